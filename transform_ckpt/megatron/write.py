"""Lays a Megatron checkpoint out: model_optim_rng.pt and distrib_optim.pt of every rank, for any parallel layout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from strategy.megatron import directory_name
from transform_ckpt.errors import InputError, Problems, name_some
from transform_ckpt.formats.torch_values import BY_CODE, Global, Namespace
from transform_ckpt.megatron import buckets, directory
from transform_ckpt.megatron.arguments import args_for, bucket_args
from transform_ckpt.megatron.buckets import BucketError, BufferMap
from transform_ckpt.megatron.containers import PREFIX, STATES, state_name
from transform_ckpt.megatron.cuts import write_cut
from transform_ckpt.megatron.directory import Place
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.groups import ALL_GROUPS_SINCE, Group, arranged
from transform_ckpt.megatron.maps import bucket_sizes, is_shared
from transform_ckpt.megatron.names import is_expert
from transform_ckpt.megatron.outline import Entry, Outline
from transform_ckpt.megatron.rules import Cut, Rule, Sharding
from transform_ckpt.megatron.torch_target import Part, TorchBuilder
from transform_ckpt.tensors import Logical, SmallFile, Target, TargetFile
from transform_ckpt.views import whole

_KEYS = (
    *("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "model", "optimizer"),
    *("opt_param_scheduler", "rng_state"),
)


@dataclass(frozen=True, slots=True)
class Model:
    """What is written: logical tensors by Megatron's global names, how each is cut, and in which order they come.

    A weight that `logicals` lacks is its master weight (optimizer.state.param.X) in the type that
    `dtypes` says, else in `dtype`.  `others` are the extra
    states that are not None.  `rest` is everything of model_optim_rng.pt beside model, args and optimizer, common to
    all ranks; `own` what only one place has (its random number generators).  `groups` are the parameter groups of
    every rank, `where` names the source in messages.
    """

    logicals: Mapping[str, Logical]
    rules: Mapping[str, Rule]
    outline: Outline
    tied: bool
    where: str
    dtype: str | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    kind: type = dict
    args: Namespace = field(default_factory=Namespace)
    rest: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[Place, Mapping[str, Any]] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    rank_groups: Mapping[Place, Any] = field(default_factory=dict)
    """`optimizer` of model_optim_rng.pt of places whose parameters are the same as in the source."""
    gradients: str = "float32"


@dataclass(frozen=True, slots=True)
class Layout:
    """How it is written.  `coalesced` None: no optimizer.  `maps`: buffers that are known, by (place, experts).

    `bucket_size` in elements; 0 is one bucket for each chunk, None what args say.
    """

    facts: Facts
    iteration: int | None = 1
    step: int | None = None
    """Of the training state, where it is another than the directory's number."""
    coalesced: bool | None = None
    version: tuple[int, ...] = (0, 16, 1)
    bucket_size: int | None = None
    vocabulary: int | None = None
    maps: Mapping[tuple[Place, bool], Sequence[tuple[int, BufferMap]]] = field(default_factory=dict)
    all_places: bool = True
    """Also those (tp, ep) that no Megatron rank has, where ETP is smaller than TP."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of one rank's chunk: stored name, cut, the logical tensor and the dtype that it is written as."""

    name: str
    cut: Cut
    logical: str
    dtype: str


ChunkEntries = Sequence[tuple[Entry, Held | None]]
"""Of one chunk, in order; None for an extra state."""
Chunks = Sequence[ChunkEntries]


def lay_out_megatron(model: Model, layout: Layout) -> Target:
    """Every file of the destination; InputError with all that does not divide or has no place."""
    return _Writer(model, layout).target()


class _Writer:
    def __init__(self, model: Model, layout: Layout) -> None:
        said = bucket_args(layout.bucket_size) if layout.coalesced is not None else {}
        self._model, self._layout = model, layout
        self._facts = replace(layout.facts, args={**layout.facts.args, **said})
        self._args = Namespace({**model.args.fields, **said}, model.args.kind)
        self._layers = layout.facts.layers()
        self._problems = Problems()
        self._used: set[str] = set()
        self._folder = directory.iteration_name(layout.iteration)
        # have experts an optimizer of their own?  megatron-core: with expert parallelism
        self._apart = (layout.facts.sizes.ep > 1 or layout.facts.extend_ep) and any(map(is_expert, model.rules))

    def target(self) -> Target:
        known = set(self._model.outline.layers)
        if known != set(range(self._layers.num_layers)):
            raise InputError(
                f"{self._model.where}: has {len(known)} layers, the destination's options are for "
                f"{self._layers.num_layers}: give --num-layer-list, --noop-layers, ... that sum up"
            )
        files: list[TargetFile] = []
        for place in self._places():
            chunks = [self._chunk(place, vpp) for vpp in range(len(self._layers.chunks[place[1]]))]
            if not self._problems.messages:
                files += self._rank(place, chunks)
        self._problems.raise_if_any(InputError)
        left = [name for name in self._model.logicals if name not in self._used]
        dropped, lost = self._sorted_out(left)
        if lost:
            raise InputError(f"{self._model.where}: no rank of the destination holds {name_some(lost)}")
        tracker = directory.RELEASE if self._layout.iteration is None else str(self._layout.iteration)
        return Target(directory.FORMAT, tuple(files), (SmallFile(directory.TRACKER, tracker.encode()),), tuple(dropped))

    def _sorted_out(self, left: Iterable[str]) -> tuple[list[str], list[str]]:
        """Names that the user asked to leave out, and those that got lost."""
        optimizer = self._layout.coalesced is None
        dropped = [n for n in left if optimizer and n.startswith(PREFIX)]
        return dropped, [n for n in left if n not in dropped and not n.startswith("opaque.")]

    def _places(self) -> list[Place]:
        sizes = self._facts.sizes
        found = [(t, p, e) for p in range(sizes.pp) for t in range(sizes.tp) for e in range(sizes.ep)]
        return [place for place in found if self._layout.all_places or self._is_real(place)]

    def _is_real(self, place: Place) -> bool:
        """Has any rank of a Megatron job this TP rank and this EP rank at once?"""
        replicas = range(self._facts.etp * self._facts.sizes.ep)
        return any(self._facts.expert_rank(place[0], replica) == place[2] for replica in replicas)

    def _chunk(self, place: Place, vpp: int) -> list[tuple[Entry, Held | None]]:
        """The entries of one chunk in order, each with its tensor (None: an extra state)."""
        tp, pp, ep = place
        sharding = self._facts.sharding(tp, ep)
        found: list[tuple[Entry, Held | None]] = []
        for name, entry in self._model.outline.chunk(self._layers, pp, vpp, sharding, tied=self._model.tied):
            if entry.extra:
                found.append((entry, None))
                continue
            held = self._held(name, entry.name, sharding)
            if held is not None:
                found.append((entry, held))
        return found

    def _held(self, name: str, stored: str, sharding: Sharding) -> Held | None:
        master = state_name(name)
        logical = name if name in self._model.logicals else master
        known = self._model.logicals.get(logical)
        if known is None:
            self._problems.add(f"{self._model.where}: {name!r} is missing: find its files")
            return None
        kind = known.dtype if logical == name else self._model.dtypes.get(name) or self._model.dtype or known.dtype
        try:
            cut = write_cut(name, known.shape, self._model.rules[logical], sharding, self._layout.vocabulary)
        except InputError as error:
            self._problems.add(str(error))
            return None
        self._used.add(logical)
        return Held(stored, cut, logical, kind)

    def _rank(self, place: Place, chunks: Chunks) -> list[TargetFile]:
        """Both files of a rank."""
        folder = f"{self._folder}/{directory_name(*place, pp_size=self._facts.sizes.pp, ep_size=self._facts.sizes.ep)}"
        builder = TorchBuilder()
        tree: dict[str, Any] = {
            "args": args_for(self._args, self._facts, place, self._step, self._layout.vocabulary),
            "checkpoint_version": 3.0,
            **({} if self._step is None else {"iteration": self._step}),
            **self._model.rest,
        }
        for number, chunk in enumerate(chunks):
            tree["model" if len(chunks) == 1 else f"model{number}"] = self._state_dict(builder, chunk)
        if self._layout.coalesced is not None:
            known = self._model.rank_groups.get(place)
            tree["optimizer"] = self._groups(chunks) if known is None else known
        for key, value in self._model.own.get(place, {}).items():
            tree[key] = transplanted(value, builder)
        tree = {key: tree[key] for key in sorted(tree, key=_position)}
        files = [builder.file(f"{folder}/{directory.MODEL_FILE}", tree)]
        optimizer = self._optimizer(place, chunks)
        if optimizer is not None:
            files.append(optimizer[0].file(f"{folder}/{directory.OPTIMIZER_FILE}", optimizer[1]))
        return files

    @property
    def _step(self) -> int | None:
        return self._layout.iteration if self._layout.step is None else self._layout.step

    def _state_dict(self, builder: TorchBuilder, chunk: ChunkEntries) -> Any:
        found: Any = self._model.kind()
        for entry, held in chunk:
            inner = found
            for depth, key in enumerate(entry.path[:-1], 2):
                inner = inner.setdefault(key, OrderedDict() if depth == len(entry.path) else {})
            if held is None:
                value = self._model.others.get(entry.name)
                inner[entry.path[-1]] = transplanted(value, builder)
            else:
                inner[entry.path[-1]] = builder.tensor(held.dtype, held.cut.stored, parts_of(held.logical, held.cut))
        return found

    def _parameters(self, chunk: ChunkEntries, *, experts: bool) -> list[Held]:
        """What the optimizer has of a chunk, in named_parameters order."""
        return [
            held
            for _, held in chunk
            if held is not None
            and state_name(held.cut.name) in self._model.logicals
            and (self._apart and is_expert(held.name)) == experts
        ]

    def _groups(self, chunks: Chunks) -> Any:
        found = []
        for experts in (False, True) if self._apart else (False,):
            params = [(h.cut.name, h.cut.stored) for chunk in chunks for h in self._parameters(chunk, experts=experts)]
            groups = arranged(
                self._model.groups,
                params,
                self._model.args.fields,
                experts=experts,
                all_ranks=self._layout.version >= ALL_GROUPS_SINCE,
            )
            found.append({"optimizer": {"param_groups": groups}})
        return found if self._apart else found[0]

    def _optimizer(self, place: Place, chunks: Chunks) -> tuple[TorchBuilder, Any] | None:
        """The tree of distrib_optim.pt, or None where another directory has all of it."""
        if self._layout.coalesced is None or not self._is_real(place):
            return None
        builder = TorchBuilder()
        dense = None
        if place[2] == self._facts.dense_ep(place[0]):
            dense = self._state(builder, place, chunks, experts=False)
        if not self._apart:
            return None if dense is None else (builder, dense)
        return builder, [dense, self._state(builder, place, chunks, experts=True)]

    def _state(self, builder: TorchBuilder, place: Place, chunks: Chunks, *, experts: bool) -> dict[Any, Any]:
        """One optimizer's state on one rank, in either container."""
        sizes: dict[str, list[Any]] = {"per_bucket_numel": [], "per_bucket_numel_unpadded": []}
        states: dict[Any, Any] = {}
        for number, (held, found) in enumerate(self._buffers(place, chunks, experts=experts)):
            by_name = {h.name: h for h in held}
            key = (Global("torch", BY_CODE[held[0].dtype].name), Global("torch", self._model.gradients))
            if self._layout.coalesced:
                content = {s: self._coalesced(builder, s, by_name, found) for s in STATES}
                states[number] = {key: {**content, "numel_unpadded": found.coalesced_numel}}
            else:
                states[number] = {key: {s: self._listed(builder, s, by_name, found) for s in STATES}}
                sizes["per_bucket_numel"].append({key: list(found.padded or found.unpadded)})
                sizes["per_bucket_numel_unpadded"].append({key: list(found.unpadded)})
        return {"buckets_coalesced": True, **states} if self._layout.coalesced else {**sizes, **states}

    def _coalesced(self, builder: TorchBuilder, state: str, held: Mapping[str, Held], found: BufferMap) -> Any:
        parts: list[Part] = []
        for param in found.ranges:
            parts += self._state_parts(state, held[param.name], found.coalesced_slice(param)[0])
        return builder.tensor("F32", (found.coalesced_numel,), parts)

    def _listed(self, builder: TorchBuilder, state: str, held: Mapping[str, Held], found: BufferMap) -> list[Any]:
        parts: list[list[Part]] = [[] for _ in found.unpadded]
        for param in found.ranges:
            bucket, first, _ = found.list_slice(param)
            parts[bucket] += self._state_parts(state, held[param.name], first)
        sizes = found.padded or found.unpadded
        return [builder.tensor("F32", (size,), mine) for size, mine in zip(sizes, parts, strict=True)]

    def _state_parts(self, state: str, held: Held, first: int) -> list[Part]:
        name = state_name(held.cut.name, state)
        self._used.add(name)
        return parts_of(name, held.cut, first)

    def _buffers(self, place: Place, chunks: Chunks, *, experts: bool) -> list[tuple[list[Held], BufferMap]]:
        """Parameters and map of every buffer: as given, or as Megatron's rules make them."""
        wanted: list[tuple[int, list[Held]]] = []
        for number, chunk in enumerate(chunks):
            groups: dict[str, list[Held]] = {}
            for held in self._parameters(chunk, experts=experts):
                groups.setdefault(held.dtype, []).append(held)
            wanted += [(number, group) for group in groups.values()]
        given = self._layout.maps.get((place, experts))
        if given is not None:
            return _as_given(wanted, given, self._model.where)
        return [(held, self._built(place, number, held, experts=experts)) for number, held in wanted]

    def _built(self, place: Place, chunk: int, held: Sequence[Held], *, experts: bool) -> BufferMap:
        layout, sizes = self._layout, self._facts.sizes
        names = [h.name for h in held]
        params = [
            (h.name, f"torch.{BY_CODE[h.dtype].name}", h.cut.stored, is_shared(h.name, names, self._facts))
            for h in held
        ]
        dp = self._facts.experts_dp if experts else sizes.dp * sizes.cp
        size = bucket_sizes(self._facts, layout.version, None, place[1], chunk)[0]
        try:
            return buckets.build(params, version=layout.version, dp=dp, bucket_size=size)
        except BucketError as error:
            raise InputError(f"buffers of the destination: {error}") from None


def _as_given(
    wanted: Sequence[tuple[int, list[Held]]], given: Sequence[tuple[int, BufferMap]], where: str
) -> list[tuple[list[Held], BufferMap]]:
    """The maps of the run, which must have exactly the parameters that are there."""
    if len(wanted) != len(given):
        raise InputError(f"{where}: has parameters for {len(wanted)} buffers, the maps are of {len(given)}")
    found = []
    for (_, held), (_, buffer) in zip(wanted, given, strict=True):
        here = {h.name: h.cut.stored for h in held}
        there = {param.name: param.shape for param in buffer.ranges}
        odd = {n for n in here.keys() | there.keys() if here.get(n) != there.get(n)}
        if odd:
            raise InputError(f"{where}: the maps are of another model or layout: they differ in {name_some(odd)}")
        found.append((held, buffer))
    return found


def _position(key: str) -> int:
    """Megatron-LM's order of the keys of model_optim_rng.pt."""
    kind = "model" if key.startswith("model") else key
    return _KEYS.index(kind) if kind in _KEYS else len(_KEYS)


def parts_of(logical: str, cut: Cut, first: int = 0) -> list[Part]:
    """The boxes of a stored tensor, one behind the other, from element `first` on."""
    found: list[Part] = []
    for box in cut.boxes:
        found.append(Part(logical, box, first))
        first += box.numel
    return found


@dataclass(frozen=True, slots=True)
class Opaque:
    """A tensor of the source's tree that is carried over as it is; `logical` is its name among the logical tensors."""

    logical: str
    dtype: str
    shape: tuple[int, ...]


def transplanted(value: Any, builder: TorchBuilder) -> Any:
    """A tree for another file: every Opaque becomes a tensor of that file."""
    if isinstance(value, Opaque):
        return builder.tensor(value.dtype, value.shape, [Part(value.logical, whole(value.shape))])
    if type(value) in (list, tuple):
        return type(value)(transplanted(item, builder) for item in value)
    if type(value) is dict:
        return {key: transplanted(item, builder) for key, item in value.items()}
    return value
