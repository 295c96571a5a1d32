"""Opens a Megatron checkpoint: headers of every rank become one Source, with what a writer needs beside it.

Weights have Megatron's names with global layers and experts; optimizer states are optimizer.state.{param, exp_avg,
exp_avg_sq}.{name}.  No tensor byte is read, but a few of every parameter to see that master weights and model agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from strategy.megatron import LayerMap, MegatronError
from transform_ckpt.errors import InputError, Problems, name_some
from transform_ckpt.formats import torch_zip
from transform_ckpt.formats.torch_values import Namespace
from transform_ckpt.megatron import directory, rules
from transform_ckpt.megatron.containers import PREFIX, STATES, State, states_of
from transform_ckpt.megatron.directory import Iteration, Place
from transform_ckpt.megatron.facts import Facts, facts_of
from transform_ckpt.megatron.maps import MapOptions, Maps, Placed
from transform_ckpt.megatron.model import Chunk, chunks_of, is_embedding, is_tied_head, split_layer, with_layer
from transform_ckpt.megatron.names import ROUTER, is_expert
from transform_ckpt.megatron.outline import Entry, Outline, global_extras
from transform_ckpt.megatron.rules import Cut, Rule
from transform_ckpt.tensors import FileHeader, Logical, Piece, Source, Tensor, Witness, part_of
from transform_ckpt.views import whole

FORMAT = "megatron"
MODEL_KEYS = ("args", "checkpoint_version", "iteration")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user says of a source; None and empty is what the checkpoint says itself."""

    iteration: int | str | None = None
    maps: MapOptions = MapOptions()
    given: Mapping[str, Any] = field(default_factory=dict)
    optimizer: bool = True
    allow_missing: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's files: its model chunks, and everything else of model_optim_rng.pt (`rest`)."""

    place: Place
    path: str
    chunks: tuple[Chunk, ...]
    rest: Mapping[str, Any]
    file: torch_zip.TorchFile


@dataclass(frozen=True, slots=True)
class Megatron:
    """A checkpoint as its headers describe it.

    `rules`: how each logical tensor is cut.  `order`: every name of the model in the order of its state dict, extra
    states included.  `versions`: of megatron-core, as far as its buffers tell.  `coalesced`: the optimizer's container,
    None without an optimizer.
    """

    iteration: Iteration
    facts: Facts
    layers: LayerMap
    ranks: Mapping[Place, Rank]
    source: Source
    rules: Mapping[str, Rule]
    witnesses: tuple[Witness, ...]
    coalesced: bool | None
    versions: frozenset[tuple[int, ...]]
    buffers: Mapping[tuple[Place, bool], Sequence[Placed]]
    outline: Outline
    others: Mapping[str, tuple[Any, Rank]]
    """Extra states that are not None, by global name, and the rank whose file they are in."""

    def first(self) -> Rank:
        """The rank that every common value is taken from."""
        return self.ranks[min(self.ranks)]


def open_megatron(path: str, options: Options = Options()) -> Megatron:
    """The checkpoint at a root or an iteration's directory; InputError names everything that contradicts itself."""
    found = directory.find(path, options.iteration)
    sample = torch_zip.read(found.sample())
    facts = facts_of(_args(sample), sample.path, **options.given)
    ranks = _ranks(found, facts, sample)
    facts = _completed(facts, ranks)
    reader = _Reader(found, facts, ranks, options)
    return reader.read()


def _args(file: torch_zip.TorchFile) -> Mapping[str, Any]:
    if not isinstance(file.tree, dict):
        raise InputError(f"{file.path}: holds a {type(file.tree).__name__}, not a checkpoint of Megatron")
    args = file.tree.get("args")
    if args is None:
        return {}
    if not isinstance(args, Namespace):
        raise InputError(f"{file.path}: its args are a {type(args).__name__}, not a Namespace")
    return args.fields


def _ranks(found: Iteration, facts: Facts, sample: torch_zip.TorchFile) -> dict[Place, Rank]:
    places = found.places(facts.sizes.pp, facts.sizes.ep)
    expected = {(tp, pp) for tp in range(facts.sizes.tp) for pp in range(facts.sizes.pp)}
    missing = expected - {place[:2] for place in places}
    if missing:
        raise InputError(
            f"{found.path}: has no directory of (tp, pp) {', '.join(map(str, sorted(missing)[:5]))}: TP is "
            f"{facts.sizes.tp}, PP {facts.sizes.pp}: fetch them"
        )
    ranks: dict[Place, Rank] = {}
    for place, path in sorted(places.items()):
        name = os.path.join(path, directory.MODEL_FILE)
        file = sample if name == sample.path else torch_zip.read(name)
        chunks = tuple(chunks_of(file))
        rest = {k: v for k, v in file.tree.items() if not (isinstance(k, str) and k.startswith("model"))}
        ranks[place] = Rank(place, path, chunks, rest, file)
    return ranks


def _completed(facts: Facts, ranks: Mapping[Place, Rank]) -> Facts:
    """What only the files tell: how many chunks a stage has, how many experts a router knows."""
    problems = Problems()
    counts = {place: len(rank.chunks) for place, rank in ranks.items()}
    vpp = max(counts.values())
    odd = sorted(place for place, count in counts.items() if count != vpp)
    if odd:
        problems.add(f"{ranks[odd[0]].path}: has {counts[odd[0]]} model chunks, others have {vpp}: fetch it again")
    experts = {
        tensor.shape[0]
        for rank in ranks.values()
        for chunk in rank.chunks
        for name, tensor in chunk.tensors.items()
        if ROUTER.fullmatch(name)
    }
    if len(experts) > 1:
        problems.add(f"the routers know {sorted(experts)} experts: the files are not of one model")
    if facts.num_experts and experts and experts != {facts.num_experts}:
        problems.add(f"args says {facts.num_experts} experts, the routers {sorted(experts)}: give --num-experts")
    problems.raise_if_any(InputError)
    return replace(
        facts, sizes=replace(facts.sizes, vpp=vpp), num_experts=facts.num_experts or next(iter(experts), None)
    )


class _Reader:
    """Gathers pieces of logical tensors rank by rank."""

    def __init__(self, found: Iteration, facts: Facts, ranks: Mapping[Place, Rank], options: Options) -> None:
        self._found, self._facts, self._ranks, self._options = found, facts, ranks, options
        self._layers = facts.layers()
        self._pieces: dict[str, list[Piece]] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._rules: dict[str, Rule] = {}
        self._witnesses: list[Witness] = []
        self._problems = Problems()
        self._headers: list[FileHeader] = []
        self._notes: list[str] = []
        self._coalesced: set[bool] = set()
        self._buffers: dict[tuple[Place, bool], Sequence[Placed]] = {}
        self._outline = Outline()
        self._others: dict[str, tuple[Any, Rank]] = {}

    def read(self) -> Megatron:
        cuts = {place: self._model(number, rank) for number, (place, rank) in enumerate(self._ranks.items())}
        self._problems.raise_if_any(InputError)
        maps = Maps(self._options.maps, self._facts)
        if self._options.optimizer:
            self._optimizer(maps, cuts)
        self._problems.raise_if_any(InputError)
        params = {name: Logical(name, *self._kinds[name], tuple(pieces)) for name, pieces in self._pieces.items()}
        self._check_layers(params)
        source = Source(
            FORMAT, self._found.path, tuple(self._headers), params, {}, self._step(), tuple(dict.fromkeys(self._notes))
        )
        return Megatron(
            self._found,
            self._facts,
            self._layers,
            self._ranks,
            source,
            self._rules,
            tuple(self._witnesses),
            next(iter(self._coalesced), None),
            frozenset(maps.versions),
            self._buffers,
            self._outline,
            self._others,
        )

    def _step(self) -> int | None:
        found = next(iter(self._ranks.values())).rest.get("iteration")
        return found if type(found) is int else self._found.number

    def _model(self, number: int, rank: Rank) -> list[dict[str, Cut]]:
        """The model of one rank: pieces of weights, and how each stored tensor is cut."""
        self._headers.append(torch_zip.header_of(rank.file))
        found: list[dict[str, Cut]] = []
        tp, _, ep = rank.place
        for index, chunk in enumerate(rank.chunks):
            shapes = {name: tensor.shape for name, tensor in chunk.tensors.items()}
            cuts = rules.read_cuts(shapes, self._facts.sharding(tp, ep), f"{rank.file.path} (chunk {index})")
            cuts = {name: self._globally(rank, index, cut) for name, cut in cuts.items()}
            for name, cut in cuts.items():
                self._add(cut.name, cut, chunk.tensors[name], number)
            if tp == 0:
                self._note_order(rank, index, cuts)
            found.append(cuts)
        return found

    def _note_order(self, rank: Rank, index: int, cuts: Mapping[str, Cut]) -> None:
        """The chunk's names in order, extra states included; a tied head is the embedding, which has its own place."""
        chunk = rank.chunks[index]
        numbers = self._layers.chunks[rank.place[1]][index]
        extras = global_extras(
            chunk.others,
            {name: cut.name for name, cut in cuts.items()},
            {n: g for n, g in enumerate(numbers) if g is not None},
        )
        entries: list[Entry] = []
        for name, path in chunk.paths.items():
            known = extras[name] if name in extras else cuts[name].name
            depth = len(path)
            if name not in extras and is_embedding(known) and not is_embedding(name):
                continue
            entries.append(Entry(known, tuple(known.split(".", depth - 1)) if depth > 1 else (known,)))
            if chunk.others.get(name) is not None:
                self._others.setdefault(known, (chunk.others[name], rank))
        self._outline.add(entries)

    def _globally(self, rank: Rank, chunk: int, cut: Cut) -> Cut:
        """The cut under its global name: the layer's own number, and the embedding's name for its tied copy."""
        if self._facts.tied and is_tied_head(cut.name):
            names = rank.chunks[chunk].tensors
            nested = rank.chunks[chunk].nested
            if not any(name.endswith("embedding.word_embeddings.weight") for name in names) or "mtp" in str(names):
                return replace(cut, name=f"{'language_model.' if nested else ''}embedding.word_embeddings.weight")
        parts = split_layer(cut.name)
        if parts is None:
            return cut
        try:
            layer = self._layers.global_layer(rank.place[1], chunk, parts[1])
        except MegatronError as error:
            self._problems.add(f"{rank.file.path}: {cut.name!r}: {error}: the layer options are not those of this run")
            return cut
        return replace(cut, name=with_layer(cut.name, layer))

    def _add(self, name: str, cut: Cut, tensor: Tensor, rank: int) -> None:
        kind = (tensor.dtype, cut.shape)
        known = self._kinds.setdefault(name, kind)
        if known != kind:
            self._problems.add(
                f"{tensor.path}: {name!r} is {kind[0]}{list(kind[1])}, and {known[0]}{list(known[1])} in another rank"
            )
            return
        self._rules.setdefault(name, cut.rule)
        self._pieces.setdefault(name, []).extend(pieces_of(cut, tensor, rank))

    def _check_layers(self, params: Mapping[str, Logical]) -> None:
        """Every layer has tensors; a whole layer that nobody holds would otherwise not be missed."""
        there = {parts[1] for name in params if (parts := split_layer(name)) is not None}
        missing = sorted(set(range(self._layers.num_layers)) - there)
        if missing:
            raise InputError(
                f"{self._found.path}: has no tensor of layers {name_some(map(str, missing))} of "
                f"{self._layers.num_layers}: directories are missing, or the layer options are not those of this run"
            )

    def _optimizer(self, maps: Maps, cuts: Mapping[Place, Sequence[Mapping[str, Cut]]]) -> None:
        files = {
            place: torch_zip.read(path)
            for place, rank in self._ranks.items()
            if os.path.isfile(path := os.path.join(rank.path, directory.OPTIMIZER_FILE))
        }
        if not files:
            return
        numbers = {place: number for number, place in enumerate(self._ranks)}
        held: set[tuple[Place, bool]] = set()
        for place, file in files.items():
            self._headers.append(torch_zip.header_of(file))
            for experts, state in zip((False, True), states_of(file), strict=False):
                if state is None:
                    continue
                held.add((place, experts))
                rank = self._ranks[place]
                if state.short_of_fp32:
                    self._notes.append(
                        "the optimizer was saved with --reuse-fp32-param: its fp32 weights are as near as bfloat16 is"
                    )
                self._coalesced.update(buffer.coalesced for buffer in state.buffers)
                self._state(maps, rank, numbers[place], cuts[place], state, experts)
        self._check_states(held, cuts)
        if maps.rebuilt:
            versions = ", ".join(".".join(map(str, v)) for v in sorted(maps.versions))
            self._notes.append(
                f"param_map rebuilt from the model for {' and '.join(sorted(maps.rebuilt))} buffers (rules of "
                f"megatron-core {versions or 'any version'}); every parameter is compared with its weight"
            )

    def _state(
        self, maps: Maps, rank: Rank, number: int, cuts: Sequence[Mapping[str, Cut]], state: State, experts: bool
    ) -> None:
        where = os.path.join(rank.path, directory.OPTIMIZER_FILE)
        placed = maps.of(where, rank.place, rank.chunks, state, experts)
        self._buffers[rank.place, experts] = placed
        for entry, buffer in zip(placed, state.buffers, strict=True):
            if entry.chunk >= len(rank.chunks):
                self._problems.add(f"{where}: its map is of model chunk {entry.chunk}, the rank has {len(rank.chunks)}")
                continue
            chunk = rank.chunks[entry.chunk]
            for param in entry.map.ranges:
                weight = chunk.tensors.get(param.name)
                if weight is None or weight.shape != param.shape:
                    shown = "is not in the model" if weight is None else f"has shape {list(weight.shape)} in the model"
                    self._problems.add(
                        f"{where}: {param.name!r} {list(param.shape)} {shown}: the param_map is of another run"
                    )
                    continue
                cut = cuts[entry.chunk][param.name]
                for name in STATES:
                    self._add(f"{PREFIX}{name}.{cut.name}", cut, buffer.tensor(entry.map, param, name), number)
                master = f"{PREFIX}{STATES[0]}.{cut.name}"
                self._witnesses += [Witness(master, p.box, p.tensor) for p in pieces_of(cut, weight, number)]

    def _check_states(self, held: set[tuple[Place, bool]], cuts: Mapping[Place, Sequence[Mapping[str, Cut]]]) -> None:
        """Every parameter has its states, in whichever directory they are: a lost file shows here."""
        missing: dict[str, str] = {}
        for place, rank in self._ranks.items():
            for chunk, found in zip(rank.chunks, cuts[place], strict=True):
                for name in chunk.parameters():
                    state = f"{PREFIX}{STATES[0]}.{found[name].name}"
                    if state not in self._pieces and not _allowed(found[name].name, self._options.allow_missing):
                        missing.setdefault(found[name].name, rank.path)
        for tp in range(self._facts.sizes.tp):
            for pp in range(self._facts.sizes.pp):
                if not any((place[:2] == (tp, pp)) and not experts for place, experts in held):
                    self._problems.add(
                        f"{self._found.path}: no rank of tp {tp}, pp {pp} has the dense optimizer state "
                        f"({directory.OPTIMIZER_FILE}): fetch it, or add --no-optimizer"
                    )
        if missing:
            self._problems.add(
                f"{self._found.path}: {len(missing)} parameters have no optimizer state: {name_some(missing)}: files or "
                "maps are missing; frozen ones are named with --allow-missing"
            )


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


def _allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


__all__ = ["FORMAT", "Megatron", "Options", "Rank", "is_expert", "open_megatron", "pieces_of"]
