"""Lays the destination out: which file holds which box of which tensor.  Pure: no I/O, no numpy.

May import formats, strategy, states, ranks (layout_of), tensors, views, errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from strategy.layout import Layout, LayoutError, Strategy
from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, Problems, UsageError, name_some, rank_ranges
from transform_ckpt.formats import ckpt, safetensors
from transform_ckpt.formats.mindspore_unified import lay_out_parts
from transform_ckpt.ranks import layout_of
from transform_ckpt.states import is_state, split_optimizer
from transform_ckpt.tensors import Logical, Skeleton, Source, Target, TargetFile, TensorSpec
from transform_ckpt.views import Box, whole

DEFAULT_PREFIX = "checkpoint_"

Container = Literal["ckpt", "safetensors"]


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What the destination looks like; `carry` are patterns of names that may be in no strategy."""

    container: Container = "safetensors"
    prefix: str = DEFAULT_PREFIX
    unified: bool = False
    checkpoint2: bool = False
    crc: bool = False
    optimizer: bool = True
    carry: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.unified and self.checkpoint2:
            raise UsageError("--unified and --checkpoint-2 are two different outputs: give one of them")
        if self.crc and self.container != "ckpt":
            raise UsageError("--crc writes the trailer of .ckpt files: add --format ckpt or drop it")
        if (self.unified or self.checkpoint2) and self.container == "ckpt":
            kind = "--unified" if self.unified else "--checkpoint-2"
            raise UsageError(f"{kind} is made of safetensors files: drop --format ckpt")
        if "/" in self.prefix or "\0" in self.prefix or self.prefix in (".", ".."):
            raise UsageError(f"--prefix {self.prefix!r} must be the beginning of a file name, without '/'")


@dataclass(frozen=True, slots=True)
class Placement:
    """One tensor in one rank's file."""

    rank: int
    logical: Logical
    box: Box


def lay_out(
    source: Source, strategy: Strategy | None, options: TargetOptions, ranks: Sequence[int] | None = None
) -> Target:
    """The destination for `strategy` (None = complete weights, rank 0 alone); with `ranks`, their files only."""
    chosen = _choose(source, strategy, options, ranks)
    if options.unified:
        if strategy is not None and strategy.world > 1:
            raise UsageError("--unified writes complete weights: drop the destination strategy")
        files, small = lay_out_parts([*chosen.params.values()], [*chosen.states.values()])
        return Target("mindspore-unified", files, small, chosen.dropped, chosen.notes)
    ranks = range(strategy.world if strategy else 1) if ranks is None else ranks
    placements = [*_placements(chosen.params, strategy, ranks)]
    if options.checkpoint2:
        return _checkpoint2(source, placements, chosen, options)
    placements += [Placement(r, s, whole(s.shape)) for s in chosen.states.values() for r in ranks]
    by_rank: dict[int, list[Placement]] = {rank: [] for rank in ranks}
    for placement in placements:
        by_rank[placement.rank].append(placement)
    files = tuple(_rank_file(rank, found, options) for rank, found in by_rank.items())
    notes = (*chosen.notes, *_unreadable(chosen, files, options))
    return Target("mindspore", files, (), chosen.dropped, notes)


def _unreadable(chosen: _Chosen, files: Sequence[TargetFile], options: TargetOptions) -> list[str]:
    """What mindspore.load_checkpoint (2.9.0) cannot give back: dims [0] is a scalar to it, an empty .ckpt an error."""
    if options.container != "ckpt":
        return []
    notes: list[str] = []
    empty = [n for n, p in (*chosen.params.items(), *chosen.states.items()) if p.shape == (0,)]
    if empty:
        notes.append(
            f"MindSpore reads empty tensors of a .ckpt as scalars: {name_some(empty)}: --format safetensors keeps them"
        )
    bare = [rank for rank, file in enumerate(files) if not file.skeleton.nbytes]
    if bare:
        notes.append(
            f"no tensor of the source belongs to ranks {rank_ranges(bare)}: their .ckpt files are empty, which nobody "
            "reads: check the destination strategy, or add --format safetensors"
        )
    return notes


def _checkpoint2(source: Source, placements: Sequence[Placement], chosen: _Chosen, options: TargetOptions) -> Target:
    """MindFormers Checkpoint 2.0: scalars that its common.json has no field for are whole tensors of rank 0."""
    from transform_ckpt.formats import checkpoint2

    scalars: dict[str, int | float | bool | str] = {}
    unwritable: list[str] = []
    kept = dict(chosen.params)
    placed = [(p.rank, p.logical.name, p.box) for p in placements]
    apart = {  # complete weights have their states among the parameters
        n: p for n, p in chosen.params.items() if n in checkpoint2.COMMON_FIELDS or p.dtype == dtypes.STRING
    }
    for name, state in {**chosen.states, **apart}.items():
        value = state.pieces[0].tensor.inline
        decoded = None if value is None else dtypes.decode(state.dtype, value)
        if state.dtype == dtypes.STRING:
            unwritable.append(name)
            kept.pop(name, None)
        elif name in checkpoint2.COMMON_FIELDS and isinstance(decoded, int | float):
            scalars[name] = decoded
            kept.pop(name, None)
        elif name not in kept:
            kept[name] = state
            placed.append((0, name, whole(state.shape)))
    step = scalars.get("global_step", scalars.get("step_num", source.step or 0))
    found = checkpoint2.plan_target(
        {n: (p.dtype, p.shape) for n, p in kept.items()},
        [p for p in placed if p[1] in kept],
        scalars,
        "" if options.prefix == DEFAULT_PREFIX else options.prefix,
        source.step if source.step is not None else int(step),
    )
    notes = [f"Checkpoint 2.0 holds no strings, left out: {name_some(unwritable)}"] if unwritable else []
    return replace(
        found,
        dropped=(*found.dropped, *chosen.dropped, *unwritable),
        notes=(*found.notes, *chosen.notes, *notes),
    )


@dataclass(frozen=True, slots=True)
class _Chosen:
    params: Mapping[str, Logical]
    states: Mapping[str, Logical]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def _choose(source: Source, strategy: Strategy | None, options: TargetOptions, ranks: Sequence[int] | None) -> _Chosen:
    """Sort the source's tensors into laid-out parameters and carried states; refuse a weight in only one strategy."""
    params: dict[str, Logical] = {}
    states: dict[str, Logical] = {}
    everything = {**source.params, **source.states}
    dropped = () if options.optimizer else tuple(name for name in everything if split_optimizer(name)[0])
    carried: list[str] = []
    homeless: list[str] = []
    unlisted: list[str] = []

    def carries(logical: Logical) -> bool:
        return is_state(logical.name, logical.dtype, logical.shape) or any(
            fnmatchcase(logical.name, pattern) for pattern in options.carry
        )

    for name, logical in _without(source.params, dropped):
        if strategy is None or _stages(strategy, name):
            params[name] = logical
        elif carries(logical) and _is_whole(logical):
            states[name] = logical
        else:
            homeless.append(name)
    for name, logical in _without(source.states, dropped):
        listed = strategy is not None and _stages(strategy, name)
        if listed and carries(logical):
            params[name] = logical
        elif carries(logical):
            states[name] = logical
        elif listed or strategy is None or len(logical.shape) > 1 or _is_weight(name):
            unlisted.append(name)
        else:
            carried.append(name)
            states[name] = logical
    _refuse(homeless, unlisted, strategy)
    notes = [f"in no strategy, carried as it is: {name_some(carried)}"] if carried else []
    if strategy is not None:
        own = range(len(strategy.stages)) if ranks is None else {strategy.stage_of(rank) for rank in ranks}
        asked = [n for n, stages in strategy.names.items() if any(stage in own for stage in stages)]
        lacking = [n for n in asked if n not in params and not split_optimizer(n)[0]]
        if lacking:
            notes.append(f"{len(lacking)} parameters of the destination strategy have no tensor: {name_some(lacking)}")
    return _Chosen(params, states, dropped, tuple(notes))


def _without(found: Mapping[str, Logical], dropped: Sequence[str]) -> list[tuple[str, Logical]]:
    gone = set(dropped)
    return [(name, logical) for name, logical in found.items() if name not in gone]


def _is_weight(name: str) -> bool:
    """Does the name say that a strategy should list it?"""
    return bool(split_optimizer(name)[0]) or name.endswith((".weight", ".bias"))


def _refuse(homeless: Sequence[str], unlisted: Sequence[str], strategy: Strategy | None) -> None:
    problems = Problems()
    if homeless and strategy is not None:
        problems.add(
            f"{len(homeless)} tensors of the source are not in the destination strategy {strategy.origin}: "
            f"{name_some(homeless)}: it is the strategy of another model or lists only some parameters; regenerate it "
            "(strategy_ckpt_config.only_trainable_params=False lists frozen ones), or name them with --carry"
        )
    if unlisted:
        problems.add(
            f"{len(unlisted)} tensors of the source are weights that the source strategy does not list: "
            f"{name_some(unlisted)}: it is the strategy of another model or lists only some parameters; regenerate it, "
            "or name them with --carry when every rank holds them whole"
        )
    problems.raise_if_any(InputError)


def _is_whole(logical: Logical) -> bool:
    return all(piece.box == whole(logical.shape) for piece in logical.pieces)


def _stages(strategy: Strategy, name: str) -> tuple[int, ...]:
    """Stages whose files hold the parameter; an unlisted optimizer state follows its weight."""
    found = strategy.names.get(name)
    if found is None:
        prefix, weight = split_optimizer(name)
        found = strategy.names.get(weight) if prefix else None
    return found or ()


def _placements(params: Mapping[str, Logical], strategy: Strategy | None, ranks: Sequence[int]) -> list[Placement]:
    if strategy is None:
        return [Placement(0, logical, whole(logical.shape)) for logical in params.values()]
    problems = Problems()
    found: list[Placement] = []
    wanted = [[r - of.start for r in ranks if r in of] for of in map(strategy.ranks, range(len(strategy.stages)))]
    cache: dict[tuple[Layout, tuple[int, ...]], tuple[Box, ...]] = {}
    for name, logical in params.items():
        for stage in _stages(strategy, name):
            layout = layout_of(strategy.stages[stage].layouts, name)
            if layout is None:
                continue
            boxes = cache.get((layout, logical.shape))
            if boxes is None:
                try:
                    boxes = cache[layout, logical.shape] = layout.boxes(logical.shape)
                except LayoutError as error:
                    problems.add(
                        f"{name!r}: {error} of destination strategy {strategy.origin} (stage {stage}): "
                        "choose another parallel layout, or the strategy of this model"
                    )
                    continue
            first = strategy.ranks(stage).start
            found.extend(Placement(first + local, logical, boxes[local]) for local in wanted[stage])
    problems.raise_if_any(InputError)
    return found


def _rank_file(rank: int, placements: Sequence[Placement], options: TargetOptions) -> TargetFile:
    specs: list[TensorSpec] = []
    boxes: dict[str, Box] = {}
    strings: dict[str, Logical] = {}
    for placement in placements:
        logical = placement.logical
        if logical.dtype == dtypes.STRING and options.container == "safetensors":
            strings[logical.name] = logical
            continue
        size = logical.pieces[0].tensor.nbytes if logical.dtype == dtypes.STRING else 0
        specs.append(TensorSpec(logical.name, logical.dtype, placement.box.size, size))
        boxes[logical.name] = placement.box
    relpath = f"rank_{rank}/{options.prefix}{rank}.{options.container}"
    return TargetFile(relpath, options.container, _skeleton(specs, options, strings), tuple(specs), boxes)


def _skeleton(specs: Sequence[TensorSpec], options: TargetOptions, strings: Mapping[str, Logical]) -> Skeleton:
    if options.container == "ckpt":
        return ckpt.skeleton(specs, crc=options.crc)
    values = {name: _text(logical) for name, logical in strings.items()}
    return safetensors.skeleton(specs, {"format": "ms"}, values)


def _text(logical: Logical) -> str:
    data = logical.pieces[0].tensor.inline
    if data is None:
        raise InputError(f"the string {logical.name!r} was not read")
    return data.decode("utf-32-le")
