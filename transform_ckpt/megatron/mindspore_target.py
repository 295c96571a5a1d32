"""Lays a Megatron checkpoint out as MindSpore rank directories, its tensor-parallel shards kept as they are.

As MindSpeed-Core-MS's convert_pt2ckpt.py does, which this replaces: rank_{R}/{prefix}.{format} with the fp32 weights
and Adam states, R in the order tp-cp-ep-dp-pp.  Beside them pt_meta/ (what the way back and any reshard need) and
strategy/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError
from transform_ckpt.formats import ckpt, safetensors
from transform_ckpt.megatron.carry import Carried, has_optimizer
from transform_ckpt.megatron.containers import STATES, state_name
from transform_ckpt.megatron.directory import CONVERTED, Place
from transform_ckpt.megatron.groups import groups_of
from transform_ckpt.megatron.mindspore_names import CONSUMED, PREFIXES, Scalar, mindspore_name, scalars
from transform_ckpt.megatron.mindspore_strategy import strategy_files
from transform_ckpt.megatron.pt_meta import meta_files
from transform_ckpt.megatron.read import Megatron, Rank
from transform_ckpt.megatron.rules import Cut
from transform_ckpt.tensors import (
    Logical,
    Piece,
    Skeleton,
    Source,
    Target,
    TargetFile,
    Tensor,
    TensorSpec,
    part_name,
    part_of,
)
from transform_ckpt.views import Box, whole


@dataclass(frozen=True, slots=True)
class ConvertedOptions:
    """`content`: which of the optimizer's states; `param_only`: the model's own weights, no optimizer at all."""

    container: str = "ckpt"
    prefix: str = "network"
    content: tuple[str, ...] = STATES
    param_only: bool = False
    every_rank: bool = False
    optimizer_names: str = "exp_avg"


@dataclass(frozen=True, slots=True)
class Converted:
    """A destination, the source with what was added to it, and which directory becomes which files."""

    target: Target
    source: Source
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One tensor of a rank's file."""

    name: str
    dtype: str
    cut: Cut
    logical: str


def lay_out_converted(found: Megatron, options: ConvertedOptions) -> Converted:
    """Every file of the destination; InputError where the source lacks what is asked for."""
    if not options.param_only and not has_optimizer(found):
        raise InputError(
            f"{found.iteration.path}: has no distributed optimizer (distrib_optim.pt): add --convert-param-only"
        )
    carried = Carried()
    meta, opaques = meta_files(found, carried, options.container, param_only=options.param_only)
    states: dict[str, Logical] = dict(opaques)
    files: list[TargetFile] = []
    pairs: list[tuple[str, str]] = []
    for number, (place, rank) in enumerate(found.ranks.items()):
        wanted = list(_wanted(found, place, options))
        values = _scalars(found, rank)
        for target_rank in _target_ranks(found, place, every=options.every_rank):
            relpath = f"rank_{target_rank}/{options.prefix}.{options.container}"
            prefix = f"scalars.{target_rank}."
            states |= {f"{prefix}{name}": _inline(f"{prefix}{name}", v, rank, number) for name, v in values.items()}
            files.append(_file(relpath, wanted, {name: (v, f"{prefix}{name}") for name, v in values.items()}, options))
            if not pairs or pairs[-1][0] != rank.path:
                pairs.append((rank.path, relpath))
    used = {w for file in files for w in file.logical.values()}
    dropped = tuple(name for name in found.source.params if name not in used and not _is_shown(name, used))
    source = replace(found.source, states={**found.source.states, **states})
    small = (*meta.small, *strategy_files(found, [*_state_prefixes(options)]))
    target = Target(CONVERTED, (*files, *meta.files), small, dropped, (), () if options.param_only else found.witnesses)
    return Converted(target, source, tuple(pairs))


def _is_shown(name: str, used: set[str]) -> bool:
    """A weight whose master is written is not left out."""
    return state_name(name) in used


def _state_prefixes(options: ConvertedOptions) -> Iterator[str]:
    names = PREFIXES[options.optimizer_names]
    yield from ("",) if options.param_only else (names[state] for state in options.content)


def _target_ranks(found: Megatron, place: Place, *, every: bool) -> list[int]:
    """Global ranks that get a rank directory's tensors: the first data-parallel one, or all."""
    sizes = found.facts.sizes
    mine = found.facts.global_ranks(place)
    if not mine:  # args knows no dp, or fewer ranks than there are directories
        raise InputError(
            f"{found.iteration.path}: EP {sizes.ep} needs more data-parallel ranks than dp {sizes.dp} x cp {sizes.cp}: "
            "give --dp-size"
        )
    return mine if every else mine[:1]


def _wanted(found: Megatron, place: Place, options: ConvertedOptions) -> Iterator[_Wanted]:
    """Tensors of one rank's file, state by state, in the model's order."""
    names = PREFIXES[options.optimizer_names]
    known = found.source.params
    for state in ("param",) if options.param_only else options.content:
        for chunk in found.cuts[place]:
            for stored, cut in chunk.items():
                own = state_name(cut.name, state)
                name = names[state] + mindspore_name(shown_name(stored, cut))
                if not options.param_only and own in known:
                    yield _Wanted(name, known[own].dtype, cut, own)
                elif state == STATES[0]:
                    kind = known[cut.name].dtype
                    yield _Wanted(name, "F32" if dtypes.castable(kind, "F32") else kind, cut, cut.name)


def shown_name(stored: str, cut: Cut) -> str:
    """The global name, and a tied head's own where the logical tensor is the embedding."""
    return stored if cut.name.endswith("embedding.word_embeddings.weight") and "embedding." not in stored else cut.name


def scalar_states(found: Megatron) -> dict[str, Logical]:
    """Step, learning rates and the like, as the first rank has them."""
    rank = found.first()
    return {name: _inline(name, value, rank, 0) for name, value in _scalars(found, rank).items()}


def _scalars(found: Megatron, rank: Rank) -> dict[str, Scalar]:
    optimizer = rank.rest.get("optimizer")
    groups = groups_of(optimizer, rank.file.path) if optimizer is not None else []
    scheduler = rank.rest.get("opt_param_scheduler")
    consumed = found.facts.args.get(CONSUMED)
    return scalars(
        found.source.step or 0,
        groups,
        scheduler if isinstance(scheduler, Mapping) else {},
        consumed if type(consumed) is int else None,
    )


def _inline(name: str, value: Scalar, rank: Rank, number: int) -> Logical:
    tensor = Tensor(name, value.dtype, value.shape, rank.file.path, (), value.data)
    return Logical(name, value.dtype, value.shape, (Piece(tensor, whole(value.shape), number),))


def _file(
    relpath: str,
    wanted: Sequence[_Wanted],
    values: Mapping[str, tuple[Scalar, str]],
    options: ConvertedOptions,
) -> TargetFile:
    """One rank's file: its header has whole tensors, its parts are the boxes that they are made of."""
    specs = [TensorSpec(w.name, w.dtype, w.cut.stored) for w in wanted]
    specs += [TensorSpec(name, value.dtype, value.shape) for name, (value, _) in values.items()]
    made = ckpt.skeleton(specs) if options.container == "ckpt" else safetensors.skeleton(specs, {"format": "ms"})
    parts: list[TensorSpec] = []
    boxes: dict[str, Box] = {}
    logical: dict[str, str] = {}
    places: dict[str, Any] = {}
    for spec, want in zip(specs, wanted, strict=False):
        at, width = 0, dtypes.itemsize(want.dtype)
        for box in want.cut.boxes:
            nbytes = box.numel * width
            whole_tensor = nbytes == spec.nbytes
            name = want.name if whole_tensor else part_name(want.name, at, at + nbytes)
            parts.append(TensorSpec(name, want.dtype, box.size))
            boxes[name], logical[name] = box, want.logical
            places[name] = made.places[want.name] if whole_tensor else part_of(made.places[want.name], at, nbytes)
            at += nbytes
    for name, (value, own) in values.items():
        parts.append(TensorSpec(name, value.dtype, value.shape))
        boxes[name], logical[name], places[name] = whole(value.shape), own, made.places[name]
    return TargetFile(
        relpath, options.container, Skeleton(made.nbytes, made.chunks, places), tuple(parts), boxes, logical
    )
