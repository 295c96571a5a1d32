"""Opens MindSpore rank directories of Megatron shards (convert_pt2ckpt's, or trained on since) as Megatron tensors.

pt_meta/ says what each shard is: layout.json where this tool wrote it, else the parameter maps and `args` of
MindSpeed-Core-MS, with the layout from flags.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, name_some
from transform_ckpt.formats import read_header, torch_zip
from transform_ckpt.formats.torch_values import BY_NAME
from transform_ckpt.megatron.buckets import BucketError, BufferMap
from transform_ckpt.megatron.containers import STATES, state_name
from transform_ckpt.megatron.converted_meta import ConvertedMeta, files_of, places_of, ranks_of
from transform_ckpt.megatron.cuts import logical_name
from transform_ckpt.megatron.directory import CONVERTED, Place
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.gather import Gatherer
from transform_ckpt.megatron.mindspore_names import PREFIXES, STEP, is_scalar, mindspore_name
from transform_ckpt.megatron.model import EXTRA_STATE, Chunk, split_layer, with_layer
from transform_ckpt.megatron.pt_meta import BucketSizes, Recorded
from transform_ckpt.megatron.rules import Rule
from transform_ckpt.store import FileTable, read_tensor
from transform_ckpt.tensors import FileHeader, Logical, Piece, Source
from transform_ckpt.views import whole

_EXTRAS_BEHIND = (
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"),
    *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
)
"""Modules of Megatron's local layers that have an extra state (None) behind their weight."""


@dataclass(frozen=True, slots=True)
class ConvertedRank:
    """One model-parallel rank: its tensor file, and what pt_meta knows of it (None: nothing)."""

    place: Place
    header: FileHeader
    args: torch_zip.TorchFile | None
    chunks: tuple[Chunk, ...]
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ConvertedSource:
    """The checkpoint as Megatron tensors; `maps` are the buffers of the run where they are known."""

    facts: Facts
    source: Source
    rules: Mapping[str, Rule]
    gatherer: Gatherer
    ranks: Mapping[Place, ConvertedRank]
    maps: Mapping[tuple[Place, bool], Sequence[tuple[int, BufferMap]]]
    recorded: Recorded | None
    weight_dtype: str
    optimizer: bool


def scalar_states(found: ConvertedSource) -> dict[str, Logical]:
    """Step, learning rates and the like, of every rank's file."""
    states: dict[str, list[Piece]] = {}
    for number, rank in enumerate(found.ranks.values()):
        for name, tensor in rank.header.tensors.items():
            if is_scalar(name):
                states.setdefault(name, []).append(Piece(tensor, whole(tensor.shape), number))
    return {n: Logical(n, p[0].tensor.dtype, p[0].tensor.shape, tuple(p)) for n, p in states.items()}


def open_converted(
    path: str,
    meta: str | None = None,
    *,
    template: str | None = None,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> ConvertedSource:
    """The rank directories at `path`, by `meta` (default: pt_meta in it); InputError names what does not fit.

    `template` is a model_optim_rng.pt, or a directory of mp_rank_*, for `args` and the like where `meta` has none.
    """
    if meta is not None and not os.path.isdir(meta):
        raise InputError(f"{meta}: not found: --param-map-path is pt_meta/ of the conversion, or param_map/ of the run")
    meta = meta or os.path.join(path, "pt_meta")
    if not os.path.isdir(meta):
        raise InputError(
            f"{path}: has no pt_meta directory, which says how its shards go together: give --param-map-path"
        )
    found = ConvertedMeta(os.path.abspath(meta), template, dict(given or {}))
    return _Reader(os.path.abspath(path), found).read(step)


class _Reader:
    """Gathers the files of every rank."""

    def __init__(self, path: str, meta: ConvertedMeta) -> None:
        self._path, self._meta = path, meta
        self._facts, self._recorded = meta.facts, meta.recorded
        self._gatherer = Gatherer(meta.facts)
        self._optimizer = False
        self._used: set[str] = set()

    def read(self, step: int | None) -> ConvertedSource:
        files = files_of(self._path, self._facts, step)
        headers: list[FileHeader] = []
        ranks: dict[Place, ConvertedRank] = {}
        strange: set[str] = set()
        for number, place in enumerate(places_of(self._facts)):
            path = files.get(place)
            if path is None:
                shown = f"tp {place[0]}, pp {place[1]}" + (f", ep {place[2]}" if self._facts.sizes.ep > 1 else "")
                expected = ranks_of(self._facts, place)[0]
                raise InputError(f"{self._path}: has no checkpoint of {shown} (rank_{expected}): fetch it")
            header = read_header(path)
            headers.append(header)
            args = self._meta.args_of(place)
            chunks = tuple(self._chunks(place, header, args))
            self._rank(number, place, header, chunks)
            strange |= header.tensors.keys() - self._used
            ranks[place] = ConvertedRank(place, header, args, chunks, _values(header))
        steps = {place: rank.values.get(STEP) for place, rank in ranks.items()}
        apart = [ranks[place].header.path for place, step in steps.items() if step != next(iter(steps.values()))]
        if apart:
            raise InputError(f"{apart[0]}: its {STEP} is not that of the other ranks: give files of one step")
        unknown = {n for n in strange if not is_scalar(n)}
        if unknown:
            raise InputError(
                f"{self._path}: {len(unknown)} tensors are in no parameter map: {name_some(unknown)}: pt_meta is that "
                "of another run"
            )
        params = self._gatherer.logicals(self._path)
        value = next(iter(ranks.values())).values.get(STEP)
        source = Source(CONVERTED, self._path, tuple(headers), params, {}, None if value is None else int(value))
        return ConvertedSource(
            self._facts,
            source,
            self._gatherer.rules,
            self._gatherer,
            ranks,
            self._buffers(),
            self._recorded,
            self._weight_dtype(),
            self._optimizer,
        )

    def _chunks(self, place: Place, header: FileHeader, args: torch_zip.TorchFile | None) -> Iterator[Chunk]:
        """The chunks of a rank with MindSpore's tensors under Megatron's stored names."""
        for index in range(len(self._gatherer.layers.chunks[place[1]])):
            names, nested = self._names(place, index, args)
            chunk = Chunk(nested, OrderedDict)
            for name, path in names:
                chunk.paths[name] = path
                if name.endswith(EXTRA_STATE):
                    chunk.others[name] = None
                    continue
                tensor = header.tensors.get(mindspore_name(self._global(place, index, name)))
                if tensor is None:
                    raise InputError(
                        f"{header.path}: has no {mindspore_name(self._global(place, index, name))!r}, which pt_meta "
                        "lists: fetch it again, or give the pt_meta of this run"
                    )
                chunk.tensors[name] = tensor
            yield chunk

    def _global(self, place: Place, index: int, name: str) -> str:
        """A stored name with the global layer and expert numbers."""
        parts = split_layer(name)
        if parts is not None:
            name = with_layer(name, self._gatherer.layers.global_layer(place[1], index, parts[1]))
        return logical_name(name, self._facts.sharding(place[0], place[2]))

    def _names(
        self, place: Place, index: int, args: torch_zip.TorchFile | None
    ) -> tuple[list[tuple[str, tuple[str, ...]]], bool]:
        """(stored name, path) of a chunk in the order of named_parameters, and whether the state dict nests."""
        tp, pp, ep = place
        if self._recorded is not None:
            sharding = self._facts.sharding(tp, ep)
            layers = self._gatherer.layers
            entries = self._recorded.outline.chunk(layers, pp, index, sharding, tied=bool(self._facts.tied))
            return [(entry.name, entry.path) for _, entry in entries], self._recorded.nested
        found: list[str] = []
        for key, buffer in sorted(self._meta.maps.items(), key=lambda item: item[0].ep is not None):
            if (key.tp, key.pp, key.vpp) == (tp, pp, index) and key.ep in (None, ep):
                found += [param.name for param in reversed(buffer.ranges)]
        listed = args.tree.get("param_name_list") if args is not None and isinstance(args.tree, dict) else None
        if not found and isinstance(listed, list) and index < len(listed):
            found = [str(name).partition(".")[2] for name in reversed(listed[index])]
        if not found:
            raise InputError(
                f"{self._meta.path}: has no parameter map of tp {tp}, pp {pp}, chunk {index}, and no param_name_list: "
                "give the whole pt_meta, or the run's param_map directory"
            )
        nested = any(name.startswith("language_model.") for name in found)
        return [pair for name in found for pair in _with_extra(name, nested=nested)], nested

    def _rank(self, number: int, place: Place, header: FileHeader, chunks: Sequence[Chunk]) -> None:
        """Pieces of weights and states of one rank."""
        self._used = set()
        names = next((n for n in PREFIXES.values() if any(t.startswith(n[STATES[1]]) for t in header.tensors)), None)
        self._optimizer = self._optimizer or names is not None
        for index, chunk in enumerate(chunks):
            cuts = self._gatherer.cuts(place, index, chunk, header.path)
            parameters = chunk.parameters()
            for stored, cut in cuts.items():
                known = mindspore_name(self._global(place, index, stored))
                self._used.add(known)
                if stored not in parameters:
                    self._gatherer.add(cut.name, cut, chunk.tensors[stored], number)
                    continue
                self._gatherer.add(state_name(cut.name), cut, chunk.tensors[stored], number)
                for state in STATES[1:]:
                    if names is None:
                        break
                    tensor = header.tensors.get(names[state] + known)
                    if tensor is None:
                        self._gatherer.problems.add(f"{header.path}: {known!r} has no {names[state]}: fetch it again")
                        continue
                    self._used.add(tensor.name)
                    self._gatherer.add(state_name(cut.name, state), cut, tensor, number)

    def _buffers(self) -> dict[tuple[Place, bool], list[tuple[int, BufferMap]]]:
        """The run's own buffers by place, with the sizes that were recorded."""
        found: dict[tuple[Place, bool], list[tuple[int, BufferMap]]] = {}
        for key in sorted(self._meta.maps, key=lambda k: (k.vpp, k.buffer)):
            ep = self._facts.dense_ep(key.tp) if key.ep is None else key.ep
            found.setdefault(((key.tp, key.pp, ep), key.ep is not None), []).append((key.vpp, self._meta.maps[key]))
        if self._recorded is None:
            return found
        sized: dict[tuple[Place, bool], list[tuple[int, BufferMap]]] = {}
        for slot, maps in found.items():
            sizes = self._recorded.buffers.get(slot, ())
            if len(sizes) == len(maps):
                pairs = zip(maps, sizes, strict=True)
                sized[slot] = [(chunk, _sized(buffer, known, self._meta.path)) for (chunk, buffer), known in pairs]
        return sized

    def _weight_dtype(self) -> str:
        """Of the model's own weights, which MindSpore has only as fp32."""
        if self._recorded is not None and self._recorded.weights:
            kinds = [kind for name, kind in self._recorded.weights.items() if name.endswith(".weight")]
            return max(set(kinds), key=kinds.count) if kinds else "BF16"
        names = {param.dtype.removeprefix("torch.") for buffer in self._meta.maps.values() for param in buffer.ranges}
        kind = BY_NAME.get(names.pop()) if len(names) == 1 else None
        return kind.code if kind is not None else "BF16"


def _with_extra(name: str, *, nested: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The name with its path, and an extra state behind the weights of modules that have one."""
    yield name, _path(name, nested=nested)
    module = name.removesuffix(".weight")
    if module != name and module.rpartition(".")[2] in _EXTRAS_BEHIND:
        yield f"{module}.{EXTRA_STATE}", _path(f"{module}.{EXTRA_STATE}", nested=nested)


def _path(name: str, *, nested: bool) -> tuple[str, ...]:
    """Where megatron.legacy's state dict has a name; mcore's is flat."""
    if not nested:
        return (name,)
    if name == "word_embeddings.weight":
        return ("word_embeddings_for_head", "weight")
    parts = name.split(".")
    depth = 3 if parts[1] in ("encoder", "transformer", "output_layer") else len(parts)
    return tuple(name.split(".", depth - 1))


def _sized(found: BufferMap, sizes: BucketSizes, where: str) -> BufferMap:
    unpadded, padded = sizes
    try:
        return BufferMap(found.ranges, unpadded, padded if len(padded) == len(unpadded) else ())
    except BucketError:  # the file had its padding cut off
        pass
    try:
        return BufferMap(found.ranges, unpadded)
    except BucketError as error:
        raise InputError(f"{where}: the sizes of its buckets are not those of its maps ({error}): mend it") from None


def _values(header: FileHeader) -> dict[str, float]:
    """Scalars of a rank's file."""
    table = FileTable(os.O_RDONLY)
    try:
        return {
            name: float(value)
            for name, tensor in header.tensors.items()
            if is_scalar(name)
            and isinstance(value := dtypes.decode(tensor.dtype, read_tensor(table, tensor)), int | float)
        }
    finally:
        table.close()
