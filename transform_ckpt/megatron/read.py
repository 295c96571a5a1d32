"""Opens a Megatron checkpoint: headers of every rank become one Source, with what a writer needs beside it.

Weights have Megatron's names with global layers and experts; optimizer states are optimizer.state.{param, exp_avg,
exp_avg_sq}.{name}.  No tensor byte is read, but a few of every parameter to see that master weights and model agree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from strategy.megatron import LayerMap
from transform_ckpt.errors import InputError, Problems, name_some
from transform_ckpt.formats import torch_zip
from transform_ckpt.formats.torch_values import Namespace
from transform_ckpt.megatron import directory
from transform_ckpt.megatron.containers import STATES, State, state_name, states_of
from transform_ckpt.megatron.directory import Iteration, Place
from transform_ckpt.megatron.facts import SIZE_NAMES, Facts, facts_of
from transform_ckpt.megatron.gather import Gatherer, pieces_of
from transform_ckpt.megatron.maps import MapOptions, Maps, Placed
from transform_ckpt.megatron.model import Chunk, chunks_of
from transform_ckpt.megatron.names import ROUTER
from transform_ckpt.megatron.outline import Outline
from transform_ckpt.megatron.rules import Cut, Rule
from transform_ckpt.megatron.witness import check_witnesses
from transform_ckpt.tensors import FileHeader, Source, Witness

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Options:
    """What the user says of a source; None and empty is what the checkpoint says itself."""

    iteration: int | str | None = None
    maps: MapOptions = field(default_factory=MapOptions)
    given: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of args, where the checkpoint's own lack a name."""
    optimizer: bool = True
    allow_missing: Sequence[str] = ()
    strict: bool = False
    """`given` must be what args says."""


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

    `rules`: how each logical tensor is cut.  `outline`: every name of the model in the order of its state dict, extra
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
    numels: Mapping[tuple[Place, bool], Sequence[tuple[int, ...]]]
    """Elements of every tensor of every buffer, padding included."""
    outline: Outline
    cuts: Mapping[Place, Sequence[Mapping[str, Cut]]]
    """By chunk and stored name."""
    others: Mapping[str, tuple[Any, Rank]]
    """Extra states that are not None, by global name, and the rank whose file they are in."""

    def first(self) -> Rank:
        """The rank that every common value is taken from."""
        return self.ranks[min(self.ranks)]


def open_megatron(path: str, options: Options | None = None) -> Megatron:
    """The checkpoint at a root or an iteration's directory; InputError names everything that contradicts itself."""
    options = options or Options()
    found = directory.find(path, options.iteration)
    sample = torch_zip.read(found.sample())
    facts = facts_of({**options.defaults, **_args(sample)}, sample.path, **options.given)
    if options.strict:
        _check_given({**options.defaults, **_args(sample)}, sample.path, options)
    ranks = _ranks(found, facts, sample)
    facts = _completed(facts, ranks)
    if options.strict and options.given.get("vpp", facts.sizes.vpp) != facts.sizes.vpp:
        raise InputError(
            f"{sample.path}: holds {facts.sizes.vpp} model chunks, and vpp {options.given['vpp']} is given: leave the "
            "flag out"
        )
    reader = _Reader(found, facts, ranks, options)
    return reader.read()


def _check_given(args: Mapping[str, Any], where: str, options: Options) -> None:
    """InputError where a flag and args say different sizes; what args lacks, a flag may say."""
    problems = Problems()
    for key, value in options.given.items():
        if key in SIZE_NAMES:
            known = next((args[name] for name in SIZE_NAMES[key] if args.get(name) is not None), None)
        else:
            known = args.get(key)
        if isinstance(value, int) and isinstance(known, int) and known != value:
            problems.add(f"{where}: args says {key} {known}, and {value} is given: leave the flag out, or mend it")
    problems.raise_if_any(InputError)


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
    beyond = [name for place, name in places.items() if place[0] >= facts.sizes.tp]
    if beyond:
        raise InputError(
            f"{found.path}: {name_some(map(os.path.basename, beyond))} are there, and args says TP {facts.sizes.tp}: "
            "remove what belongs to another run, or say --src-tp"
        )
    there = {place[:2] for place in places}
    needed = ((tp, pp) for tp in range(facts.sizes.tp) for pp in range(facts.sizes.pp))
    missing = [*islice((rank for rank in needed if rank not in there), SHOWN)]
    if missing:
        raise InputError(
            f"{found.path}: has no directory of (tp, pp) {', '.join(map(str, missing))}; TP is {facts.sizes.tp}, PP "
            f"{facts.sizes.pp}: fetch what is missing"
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
    steps = {place: rank.rest.get("iteration") for place, rank in ranks.items()}
    first = next(iter(steps.values()))
    apart = [ranks[place].path for place, step in steps.items() if step != first]
    if apart:
        problems.add(f"{apart[0]}: its iteration is not that of the other ranks ({first!r:.40}): fetch one checkpoint")
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
    """Gathers the files of every rank."""

    def __init__(self, found: Iteration, facts: Facts, ranks: Mapping[Place, Rank], options: Options) -> None:
        self._found, self._facts, self._ranks, self._options = found, facts, ranks, options
        self._gatherer = Gatherer(facts)
        self._problems = self._gatherer.problems
        self._witnesses: list[Witness] = []
        self._headers: list[FileHeader] = []
        self._notes: list[str] = []
        self._coalesced: set[bool] = set()
        self._buffers: dict[tuple[Place, bool], Sequence[Placed]] = {}
        self._numels: dict[tuple[Place, bool], Sequence[tuple[int, ...]]] = {}

    def read(self) -> Megatron:
        cuts = {place: self._model(number, rank) for number, (place, rank) in enumerate(self._ranks.items())}
        self._problems.raise_if_any(InputError)
        maps = Maps(self._options.maps, self._facts, self._found.root)
        if self._options.optimizer:
            self._optimizer(maps, cuts)
        params = self._gatherer.logicals(self._found.path)
        if maps.misfit:
            self._notes.append(f"a param_map is there that does not fit, and is not used: {maps.misfit}")
        check_witnesses(params, self._witnesses)
        source = Source(
            directory.FORMAT,
            self._found.path,
            tuple(self._headers),
            params,
            {},
            self._step(),
            tuple(dict.fromkeys(self._notes)),
        )
        return Megatron(
            self._found,
            self._facts,
            self._gatherer.layers,
            self._ranks,
            source,
            self._gatherer.rules,
            tuple(self._witnesses),
            next(iter(self._coalesced), None),
            frozenset(maps.versions),
            self._buffers,
            self._numels,
            self._gatherer.outline,
            cuts,
            {name: (value, self._ranks[place]) for name, (value, place) in self._gatherer.others.items()},
        )

    def _step(self) -> int | None:
        found = next(iter(self._ranks.values())).rest.get("iteration")
        return found if type(found) is int else self._found.number

    def _model(self, number: int, rank: Rank) -> list[dict[str, Cut]]:
        """The model of one rank: pieces of weights, and how each stored tensor is cut."""
        self._headers.append(torch_zip.header_of(rank.file))
        found: list[dict[str, Cut]] = []
        for index, chunk in enumerate(rank.chunks):
            cuts = self._gatherer.cuts(rank.place, index, chunk, rank.file.path)
            for name, cut in cuts.items():
                self._gatherer.add(cut.name, cut, chunk.tensors[name], number)
            found.append(cuts)
        return found

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
                self._state(maps, rank, numbers[place], cuts[place], state, experts=experts)
        self._check_states(held, cuts)
        if maps.rebuilt:
            versions = ", ".join(".".join(map(str, v)) for v in sorted(maps.versions))
            self._notes.append(
                f"param_map rebuilt from the model for {' and '.join(sorted(maps.rebuilt))} buffers (rules of "
                f"megatron-core {versions or 'any version'}); every parameter is compared with its weight"
            )

    def _state(
        self, maps: Maps, rank: Rank, number: int, cuts: Sequence[Mapping[str, Cut]], state: State, *, experts: bool
    ) -> None:
        where = os.path.join(rank.path, directory.OPTIMIZER_FILE)
        placed = maps.of(where, rank.place, rank.chunks, state, experts=experts)
        self._buffers[rank.place, experts] = placed
        self._numels[rank.place, experts] = [tuple(t.shape[0] for t in b.tensors[STATES[0]]) for b in state.buffers]
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
                    self._gatherer.add(state_name(cut.name, name), cut, buffer.tensor(entry.map, param, name), number)
                master = state_name(cut.name)
                self._witnesses += [Witness(master, p.box, p.tensor) for p in pieces_of(cut, weight, number)]

    def _check_states(self, held: set[tuple[Place, bool]], cuts: Mapping[Place, Sequence[Mapping[str, Cut]]]) -> None:
        """Every parameter has its states, in whichever directory they are: a lost file shows here."""
        missing: dict[str, str] = {}
        for place, rank in self._ranks.items():
            for chunk, found in zip(rank.chunks, cuts[place], strict=True):
                for name in chunk.parameters():
                    state = state_name(found[name].name)
                    if not self._gatherer.holds(state) and not _allowed(found[name].name, self._options.allow_missing):
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
                f"{self._found.path}: {len(missing)} parameters have no optimizer state: {name_some(missing)}: files "
                "or maps are missing; frozen ones are named with --allow-missing"
            )


def _allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
