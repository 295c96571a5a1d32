"""The order of a whole model's names, from which every chunk of every layout takes its own.

Megatron's order matters twice: a state dict is read by name, but buffers of the distributed optimizer are laid out in
the reverse of named_parameters, and parameter groups are created in its order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from strategy.megatron import LayerMap
from transform_ckpt.megatron.cuts import stored_name
from transform_ckpt.megatron.model import TIED_HEAD, TIED_HEAD_ENTRY, is_embedding, split_layer, with_layer
from transform_ckpt.megatron.rules import Sharding

_FAMILIES = (
    re.compile(r"(.*\.local_experts\.)\d+\..*"),
    re.compile(r"(.*\.experts\.linear_fc\d\.(?:weight|bias))\d+"),
)
EXTRA_SUFFIX = "._extra_state"
_HEAD_EXTRA = f"output_layer{EXTRA_SUFFIX}"
"""It is there without a weight when that is the embedding on the same rank."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a model: global layer and expert numbers, and the keys that lead to it in a state dict."""

    name: str
    path: tuple[str, ...]

    @property
    def extra(self) -> bool:
        """Is it an extra state, not a tensor of the model?"""
        return self.name.endswith("_extra_state")

    def at(self, layer: int | None, name: str) -> Entry:
        """The same in a chunk, where the layer has the number `layer` and the whole name is `name`."""
        if layer is None and name == self.name:
            return self
        joined = ".".join(self.path)
        stored = name if joined == self.name else joined.replace(self.name, name)
        if layer is not None:
            stored = with_layer(stored, layer)
            name = with_layer(name, layer)
        depth = len(self.path)
        return Entry(name, tuple(stored.split(".", depth - 1)) if depth > 1 else (stored,))


@dataclass(slots=True)
class Outline:
    """All names: before the layers, of each layer, and behind them."""

    before: list[Entry] = field(default_factory=list)
    layers: dict[int, list[Entry]] = field(default_factory=dict)
    behind: list[Entry] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def add(self, entries: Iterable[Entry]) -> None:
        """Merge one chunk's entries, in its order."""
        last: dict[int, str] = {}
        for entry in entries:
            parts = split_layer(entry.name)
            if parts is not None:
                known = self.layers.setdefault(parts[1], [])
            else:
                known = self.before if is_embedding(entry.name) else self.behind
            if entry.name not in self._seen:
                self._seen.add(entry.name)
                known.insert(_position([e.name for e in known], entry.name, last.get(id(known))), entry)
            last[id(known)] = entry.name

    def names(self) -> Iterator[Entry]:
        """Every entry, in order."""
        yield from self.before
        for layer in sorted(self.layers):
            yield from self.layers[layer]
        yield from self.behind

    def chunk(
        self, layers: LayerMap, pp: int, vpp: int, sharding: Sharding, *, tied: bool
    ) -> Iterator[tuple[str, Entry]]:
        """(global name, entry as stored) of one rank's chunk; `tied`: output weights are the embedding's."""
        here = (pp, vpp)
        ends_meet = layers.first == layers.last
        if here == layers.first:
            yield from ((e.name, e) for e in self.before)
        elif here == layers.last and any(e.name.startswith("mtp.") for e in self.behind):
            yield from ((e.name, e) for e in self.before if "word_embeddings" in e.name)
        for local, layer in enumerate(layers.chunks[pp][vpp]):
            for entry in self.layers.get(layer, ()) if layer is not None else ():
                stored = _stored(entry.name, sharding)
                if stored is not None:
                    yield entry.name, entry.at(local, stored)
        if here == layers.last:
            head = list(self._tied_head()) if tied and not ends_meet else []
            for entry in self.behind:
                if entry.name == _HEAD_EXTRA:
                    yield from head
                    head = []
                stored = _stored(entry.name, sharding)
                if stored is not None:
                    yield entry.name, entry.at(None, stored)
            yield from head

    def _tied_head(self) -> Iterator[tuple[str, Entry]]:
        for entry in self.before:
            if entry.name == "language_model.embedding.word_embeddings.weight":
                yield entry.name, Entry(TIED_HEAD, tuple(TIED_HEAD_ENTRY.split(".")))
            elif entry.name == "embedding.word_embeddings.weight":
                yield entry.name, Entry("output_layer.weight", ("output_layer.weight",))


def _stored(name: str, sharding: Sharding) -> str | None:
    """A name in a rank's file; an extra state goes where its module's weight goes."""
    if name.endswith(EXTRA_SUFFIX):
        found = stored_name(name.removesuffix(EXTRA_SUFFIX) + ".weight", sharding)
        return None if found is None else found.removesuffix(".weight") + EXTRA_SUFFIX
    return stored_name(name, sharding)


def _position(names: list[str], name: str, previous: str | None) -> int:
    """Where a new name belongs: behind its family, which another expert rank has begun, else behind `previous`."""
    family = _family(name)
    if family is not None:
        known = [i for i, other in enumerate(names) if _family(other) == family]
        if known:
            return known[-1] + 1
    return names.index(previous) + 1 if previous in names else len(names)


@lru_cache(maxsize=1 << 16)
def _family(name: str) -> str | None:
    return next((m[1] for pattern in _FAMILIES if (m := pattern.fullmatch(name))), None)


def global_extras(stored: Iterable[str], renamed: Mapping[str, str], layer_of: Mapping[int, int]) -> dict[str, str]:
    """Global names of extra states, from those of the tensors beside them (`renamed`: stored -> global)."""
    found: dict[str, str] = {}
    for name in stored:
        beside = renamed.get(name.removesuffix(EXTRA_SUFFIX) + ".weight")
        if beside is not None:
            found[name] = beside.removesuffix(".weight") + EXTRA_SUFFIX
            continue
        parts = split_layer(name)
        found[name] = with_layer(name, layer_of.get(parts[1], parts[1])) if parts else name
    return found
