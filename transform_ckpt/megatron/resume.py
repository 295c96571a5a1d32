"""A converted checkpoint as a Megatron writer wants it: the run goes on at the step that MindSpore has reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transform_ckpt.formats.torch_values import Namespace
from transform_ckpt.megatron.carry import COMMON, Carried, same_parameters, same_places
from transform_ckpt.megatron.directory import Place
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.groups import Group, distinct, groups_of
from transform_ckpt.megatron.mindspore_names import CONSUMED
from transform_ckpt.megatron.mindspore_source import ConvertedRank, ConvertedSource
from transform_ckpt.megatron.write import Model
from transform_ckpt.tensors import Source


def resumed_model(found: ConvertedSource, target: Facts, *, optimizer: bool) -> tuple[Model, Source]:
    """Tensors, args and training state; counters are those of the step in the tensor files."""
    carried = Carried()
    first = found.ranks[min(found.ranks)]
    tree = _tree(first)
    done = _steps_since(found, tree)
    same = same_places(found.facts, target)
    own = {p: carried.own(_tree(r), r.args) for p, r in found.ranks.items() if r.args is not None} if same else {}
    args = tree.get("args")
    fields = dict(args.fields) if isinstance(args, Namespace) else {}
    batch = fields.get("global_batch_size")
    samples = done * batch if type(batch) is int else 0
    if type(fields.get(CONSUMED)) is int:
        fields[CONSUMED] += samples
    rest = {key: tree[key] for key in COMMON if tree.get(key) is not None}
    scheduler = rest.get("opt_param_scheduler")
    if isinstance(scheduler, dict) and type(scheduler.get("num_steps")) is int:
        rest["opt_param_scheduler"] = {**scheduler, "num_steps": scheduler["num_steps"] + samples}
    outline = found.recorded.outline if found.recorded is not None else found.gatherer.outline
    nested = first.chunks[0].nested
    groups = [_at_step(g, found.source.step) for g in distinct(_groups(found))] if optimizer else []
    model = Model(
        logicals=found.source.params,
        rules=found.rules,
        outline=outline,
        tied=bool(found.facts.tied),
        where=found.source.root,
        dtype=found.weight_dtype,
        dtypes=found.recorded.weights if found.recorded is not None else {},
        kind=dict if nested else first.chunks[0].kind,
        args=Namespace(fields),
        rest=rest if optimizer else {},
        own=own if optimizer else {},
        groups=groups,
        rank_groups=_rank_groups(found) if optimizer and same_parameters(found.facts, target) else {},
    )
    return model, replace(found.source, states={**found.source.states, **carried.logicals})


def _tree(rank: ConvertedRank) -> Mapping[Any, Any]:
    return rank.args.tree if rank.args is not None and isinstance(rank.args.tree, dict) else {}


def _steps_since(found: ConvertedSource, tree: Mapping[Any, Any]) -> int:
    """Steps that MindSpore has trained since the conversion."""
    before, now = tree.get("iteration"), found.source.step
    return max(0, now - before) if type(before) is int and now is not None else 0


def _at_step(group: Group, step: int | None) -> Group:
    return {**group, "step": step} if step is not None and "step" in group else group


def _groups(found: ConvertedSource) -> Iterator[Group]:
    """Parameter groups of every rank."""
    for rank in found.ranks.values():
        optimizer = _tree(rank).get("optimizer")
        if optimizer is not None and rank.args is not None:
            yield from groups_of(optimizer, rank.args.path)


def _rank_groups(found: ConvertedSource) -> dict[Place, Any]:
    """`optimizer` of every rank, at the step that MindSpore has reached."""
    return {
        place: _optimizer_at(_tree(rank)["optimizer"], found.source.step)
        for place, rank in found.ranks.items()
        if _tree(rank).get("optimizer") is not None
    }


def _optimizer_at(optimizer: Any, step: int | None) -> Any:
    if isinstance(optimizer, list):
        return [_optimizer_at(entry, step) for entry in optimizer]
    inner = optimizer["optimizer"]
    groups = [_at_step(group, step) for group in inner["param_groups"]]
    return {**optimizer, "optimizer": {**inner, "param_groups": groups}}
