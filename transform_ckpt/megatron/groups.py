"""Parameter groups of a rank: Megatron makes them in named_parameters order, and some versions load them by position.

Facts: megatron-core optimizer/__init__.py `_get_param_groups`.  A group is one of weight decay or none (biases and
one-dimensional parameters have none), of a learning rate of its own or not (embedding and output layer with
--decoupled-lr), of experts or not.  Up to 0.13 a rank has the groups of its own parameters and loads them by position;
from 0.14 on it has those of all ranks and finds them by these marks.  The order of the rank's own parameters first fits
both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.views import Shape

ALL_GROUPS_SINCE = (0, 14)
Group = Mapping[str, Any]
_MARKS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def marks_of(group: Group) -> tuple[Any, ...]:
    """What tells groups apart; NeMo puts `pre_` before two of them."""
    return tuple(group.get(mark, group.get(f"pre_{mark}")) for mark in _MARKS)


def groups_of(optimizer: Any, where: str) -> list[Group]:
    """Every parameter group of `optimizer` of a model_optim_rng.pt, of one optimizer or a list of them."""
    found: list[Group] = []
    for entry in optimizer if isinstance(optimizer, list) else [optimizer]:
        inner = entry.get("optimizer") if isinstance(entry, dict) else None
        groups = inner.get("param_groups") if isinstance(inner, dict) else None
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise InputError(f"{where}: 'optimizer' has no param_groups: it was saved by another optimizer")
        odd = [mark for group in groups for mark in marks_of(group) if not isinstance(mark, int | float | None)]
        if odd:
            raise InputError(f"{where}: a parameter group is marked by {odd[0]!r:.80}, which is no number")
        found += groups
    return found


def distinct(groups: Iterable[Group]) -> list[Group]:
    """Each kind of group once, in order; a rank that has no parameters of a kind counts no steps of it, others do."""
    found: dict[tuple[Any, ...], Group] = {}
    for group in groups:
        marks = marks_of(group)
        if marks not in found or found[marks].get("step") is None:
            found[marks] = group
    return list(found.values())


def is_decoupled(name: str, args: Mapping[str, Any]) -> bool:
    """Has the parameter a learning rate of its own?"""
    return args.get("decoupled_lr") is not None and ("embedding." in name or "output_layer." in name)


def has_decay(name: str, shape: Shape) -> bool:
    """Megatron's rule: neither biases nor one-dimensional parameters decay."""
    return not name.endswith(".bias") and len(shape) != 1


def arranged(
    known: Sequence[Group],
    parameters: Iterable[tuple[str, Shape]],
    args: Mapping[str, Any],
    *,
    experts: bool,
    all_ranks: bool,
) -> list[Group]:
    """The groups of a rank's optimizer for its parameters, in their order; then the other ranks' when `all_ranks`.

    `known` are the groups of every rank of the source.  InputError where a parameter's group is nobody's.
    """
    wanted = list(dict.fromkeys((has_decay(n, s), is_decoupled(n, args)) for n, s in parameters))
    found: list[Group] = []
    for decay, decoupled in wanted:
        fits = [g for g in known if _fits(g, decay=decay, decoupled=decoupled)]
        own = [g for g in fits if bool(g.get("is_expert_parallel")) == experts] or fits
        if not own:
            raise InputError(
                f"no parameter group of the source is for parameters {'with' if decay else 'without'} weight decay"
                f"{' and with a learning rate of their own' if decoupled else ''}"
            )
        found.append({**own[0], "is_expert_parallel": experts} if "is_expert_parallel" in own[0] else own[0])
    if all_ranks:
        seen = {marks_of(group) for group in found}
        for group in known:
            if bool(group.get("is_expert_parallel")) == experts and marks_of(group) not in seen:
                seen.add(marks_of(group))
                found.append(group)
    return found


def _fits(group: Group, *, decay: bool, decoupled: bool) -> bool:
    multiplier = group.get("wd_mult", group.get("pre_wd_mult", 1.0))
    return (multiplier != 0) == decay and bool(group.get("is_decoupled_lr")) == decoupled
