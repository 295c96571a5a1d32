"""Gathers what ranks hold into logical tensors under global names, whatever container the bytes are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from strategy.megatron import MegatronError
from transform_ckpt.errors import InputError, Problems, name_some
from transform_ckpt.megatron.containers import PREFIX
from transform_ckpt.megatron.cuts import read_cuts
from transform_ckpt.megatron.directory import Place
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.model import Chunk, is_embedding, is_tied_head, split_layer, with_layer
from transform_ckpt.megatron.outline import Entry, Outline, global_extras
from transform_ckpt.megatron.rules import Cut, Rule
from transform_ckpt.tensors import Logical, Piece, Tensor, part_of
from transform_ckpt.views import whole


class Gatherer:
    """Pieces of logical tensors, rank by rank; `problems` collects what does not agree."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.layers = facts, facts.layers()
        self.problems = Problems()
        self.rules: dict[str, Rule] = {}
        self.outline = Outline()
        self.others: dict[str, tuple[Any, Place]] = {}
        """Extra states that are not None, by global name, and the rank whose file they are in."""
        self._pieces: dict[str, list[Piece]] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}

    def holds(self, name: str) -> bool:
        """Has any rank a part of it?"""
        return name in self._pieces

    def cuts(self, place: Place, index: int, chunk: Chunk, where: str) -> dict[str, Cut]:
        """How each tensor of a chunk is cut, under its global name; the chunk's order is noted."""
        tp, pp, ep = place
        shapes = {name: tensor.shape for name, tensor in chunk.tensors.items()}
        found = read_cuts(shapes, self.facts.sharding(tp, ep), f"{where} (chunk {index})")
        found = {name: self._globally(where, chunk, pp, index, cut) for name, cut in found.items()}
        if not self.problems.messages:
            self._note_order(place, index, chunk, found)
        return found

    def _globally(self, where: str, chunk: Chunk, pp: int, index: int, cut: Cut) -> Cut:
        """The cut under its global name: the layer's own number, and the embedding's name for its tied copy."""
        if self.facts.tied and is_tied_head(cut.name) and self.layers.first != self.layers.last:
            return replace(cut, name=f"{'language_model.' if chunk.nested else ''}embedding.word_embeddings.weight")
        parts = split_layer(cut.name)
        if parts is None:
            return cut
        try:
            layer = self.layers.global_layer(pp, index, parts[1])
        except MegatronError as error:
            self.problems.add(f"{where}: {cut.name!r}: {error}: the layer options are not those of this run")
            return cut
        return replace(cut, name=with_layer(cut.name, layer))

    def _note_order(self, place: Place, index: int, chunk: Chunk, cuts: Mapping[str, Cut]) -> None:
        """The chunk's names in order, extra states included; a tied head is the embedding, which has its own place."""
        numbers = self.layers.chunks[place[1]][index]
        own = {name: cut.name for name, cut in cuts.items() if not is_embedding(cut.name) or is_embedding(name)}
        extras = global_extras(chunk.others, own, {n: g for n, g in enumerate(numbers) if g is not None})
        entries: list[Entry] = []
        for name, path in chunk.paths.items():
            known = extras.get(name) or own.get(name)
            if known is None:
                continue
            depth = len(path)
            entries.append(Entry(known, tuple(known.split(".", depth - 1)) if depth > 1 else (known,)))
            if chunk.others.get(name) is not None:
                self.others.setdefault(known, (chunk.others[name], place))
        self.outline.add(entries)

    def add(self, name: str, cut: Cut, tensor: Tensor, rank: int) -> None:
        """A stored tensor as parts of the logical one `name`."""
        kind = (tensor.dtype, cut.shape)
        known = self._kinds.setdefault(name, kind)
        if known != kind:
            self.problems.add(
                f"{tensor.path}: {name!r} is {kind[0]}{list(kind[1])}, and {known[0]}{list(known[1])} in another rank"
            )
            return
        self.rules.setdefault(name, cut.rule)
        self._pieces.setdefault(name, []).extend(pieces_of(cut, tensor, rank))

    def logicals(self, where: str) -> dict[str, Logical]:
        """All of them; InputError where a whole layer is nobody's, which would otherwise not be missed."""
        self.problems.raise_if_any(InputError)
        there = {parts[1] for name in self._pieces if (parts := split_layer(name.removeprefix(PREFIX))) is not None}
        missing = sorted(set(range(self.layers.num_layers)) - there)
        if missing:
            raise InputError(
                f"{where}: has no tensor of layers {name_some(map(str, missing))} of {self.layers.num_layers}: "
                "directories are missing, or the layer options are not those of this run"
            )
        return {name: Logical(name, *self._kinds[name], tuple(found)) for name, found in self._pieces.items()}


def pieces_of(cut: Cut, tensor: Tensor, rank: int) -> Iterator[Piece]:
    """The boxes of a stored tensor, each with its own bytes."""
    if not cut.boxes:
        return
    if len(cut.boxes) == 1 and cut.boxes[0].numel * len(cut.boxes) == whole(tensor.shape).numel:
        yield Piece(tensor, cut.boxes[0], rank)
        return
    width = tensor.nbytes // max(whole(tensor.shape).numel, 1)
    at = 0
    for box in cut.boxes:
        nbytes = box.numel * width
        yield Piece(replace(tensor, shape=box.size, extents=part_of(tensor.extents, at, nbytes)), box, rank)
        at += nbytes
