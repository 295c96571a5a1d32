"""What a Megatron source gives beside tensors of the model: args, scheduler, parameter groups, generators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transform_ckpt.formats.torch_values import Namespace, TensorRef
from transform_ckpt.formats.torch_zip import TorchFile
from transform_ckpt.megatron.arguments import is_plain
from transform_ckpt.megatron.containers import PREFIX, STATES, split_state
from transform_ckpt.megatron.directory import Place
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.groups import Group, distinct, groups_of
from transform_ckpt.megatron.model import stored_tensor
from transform_ckpt.megatron.read import Megatron, Rank
from transform_ckpt.megatron.write import Model, Opaque
from transform_ckpt.tensors import Logical, Piece, Source
from transform_ckpt.views import whole

COMMON = ("num_floating_point_operations_so_far", "opt_param_scheduler", "checkpoint_version")
OWN = ("rng_state", "rerun_state_machine")
_ELSEWHERE = ("args", "iteration", "optimizer", *COMMON, *OWN)


class Carried:
    """Values of ranks, with an Opaque for every tensor in them; `logicals` are those tensors, of one piece each."""

    def __init__(self) -> None:
        self.logicals: dict[str, Logical] = {}

    def value(self, value: Any, file: TorchFile) -> Any:
        """A value of a file for another file."""
        if isinstance(value, TensorRef):
            name = f"opaque.{len(self.logicals)}"
            tensor = stored_tensor(file, name, value)
            piece = Piece(tensor, whole(tensor.shape), 0)
            self.logicals[name] = Logical(name, tensor.dtype, tensor.shape, (piece,))
            return Opaque(name, tensor.dtype, tensor.shape)
        if type(value) in (list, tuple):
            return type(value)(self.value(item, file) for item in value)
        if type(value) is dict:
            return {key: self.value(item, file) for key, item in value.items()}
        return value

    def own(self, tree: Mapping[Any, Any], file: TorchFile) -> dict[str, Any]:
        """What belongs to one rank alone: its generators."""
        return {key: self.value(tree[key], file) for key in OWN if tree.get(key) is not None and is_plain(tree[key])}


def model_of(found: Megatron, target: Facts, *, optimizer: bool) -> tuple[Model, Source]:
    """The source as a writer wants it, and with the tensors of generators and extra states among its own."""
    carried = Carried()
    first = found.first()
    notes: list[str] = []
    same = same_places(found.facts, target)
    own = {p: carried.own(r.rest, r.file) for p, r in (found.ranks.items() if same and optimizer else ())}
    if optimizer and not same and any("rng_state" in rank.rest for rank in found.ranks.values()):
        notes.append("rng_state belongs to ranks of the old layout and is left out: resume with --no-load-rng")
    unknown = [str(key) for key in first.rest if key not in _ELSEWHERE]
    if unknown:
        notes.append(f"not carried over, of no known meaning: {', '.join(unknown)}")
    others = {name: carried.value(value, rank.file) for name, (value, rank) in found.others.items()}
    source = replace(
        found.source,
        states={**found.source.states, **carried.logicals},
        notes=(*found.source.notes, *notes),
    )
    chunk = first.chunks[0]
    keys = COMMON if optimizer else ("checkpoint_version",)
    model = Model(
        logicals={n: p for n, p in source.params.items() if optimizer or not n.startswith(PREFIX)},
        rules=found.rules,
        outline=found.outline,
        tied=bool(found.facts.tied),
        where=found.iteration.path,
        others=others,
        kind=dict if chunk.nested else chunk.kind,
        args=args_of(first),
        rest={key: first.rest[key] for key in keys if key in first.rest},
        own=own,
        groups=distinct(_groups(found)) if optimizer else (),
        rank_groups=_rank_groups(found, target) if optimizer else {},
    )
    return model, source


def _rank_groups(found: Megatron, target: Facts) -> dict[Place, Any]:
    """Groups of every rank as they are, where the same parameters are on the same ranks."""
    if not has_optimizer(found) or not same_parameters(found.facts, target):
        return {}
    return {place: rank.rest["optimizer"] for place, rank in found.ranks.items() if "optimizer" in rank.rest}


def same_parameters(source: Facts, target: Facts) -> bool:
    """Have the ranks of both the same parameters, however many data-parallel ranks there are?"""
    sizes = replace(target.sizes, dp=source.sizes.dp, cp=source.sizes.cp)
    return same_layout(source, replace(target, sizes=sizes))


def args_of(rank: Rank) -> Namespace:
    """`args` of a rank, empty where there are none."""
    found = rank.rest.get("args")
    return found if isinstance(found, Namespace) else Namespace({})


def same_places(source: Facts, target: Facts) -> bool:
    """Do both have the same model-parallel ranks?"""
    one, two = source.sizes, target.sizes
    return (one.tp, one.pp, one.ep) == (two.tp, two.pp, two.ep)


def has_optimizer(found: Megatron) -> bool:
    """Has any rank the distributed optimizer's state?"""
    return any(split_state(name)[0] == STATES[0] for name in found.source.params)


def _groups(found: Megatron) -> Iterator[Group]:
    """Parameter groups of every rank."""
    for rank in found.ranks.values() if has_optimizer(found) else ():
        yield from groups_of(rank.rest.get("optimizer"), rank.file.path)


def same_layout(source: Facts, target: Facts) -> bool:
    """Are the buffers of both the same, whatever the rules?"""
    one, two = (replace(f, args={}, where="", sizes=replace(f.sizes, etp=f.etp)) for f in (source, target))
    return one == two
