"""MindSpore strategy files of tensor-parallel shards in Megatron's order.

A device matrix is [data parallel, TP] for dense tensors and [rest, EP, ETP] for experts, ranks being in the order
tp-cp-ep-dp-pp.  Shards that are no rectangle of the whole tensor ([gate_r; up_r], grouped experts in one matrix) cannot
be said and are left out: a reader that has only the strategy must not put them together wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

from strategy.generate_files import DIRECTORY, rank_file_contents
from strategy.layout import Layout, Stage, Strategy
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.mindspore_names import mindspore_name
from transform_ckpt.megatron.read import Megatron
from transform_ckpt.megatron.rules import Cut
from transform_ckpt.tensors import SmallFile


def strategy_files(found: Megatron, prefixes: Sequence[str]) -> tuple[SmallFile, ...]:
    """strategy/ckpt_strategy_rank_*.ckpt and the merged one; `prefixes` of the names that each weight has."""
    strategy = strategy_of(found, prefixes)
    contents = rank_file_contents(strategy, found.iteration.path)
    return tuple(SmallFile(f"{DIRECTORY}/{name}", data) for name, data in contents.items())


def strategy_of(found: Megatron, prefixes: Sequence[str]) -> Strategy:
    """Which slice each global rank holds, as far as a strategy can say it."""
    from transform_ckpt.megatron.mindspore_target import shown_name

    sizes = found.facts.sizes
    stages: list[dict[str, Layout]] = [{} for _ in range(sizes.pp)]
    for place, chunks in found.cuts.items():
        for chunk in chunks:
            for stored, cut in chunk.items():
                layout = layout_of(cut, found.facts)
                if layout is not None:
                    name = mindspore_name(shown_name(stored, cut))
                    stages[place[1]].update({f"{prefix}{name}": layout for prefix in prefixes})
    devices = sizes.dp * sizes.cp * sizes.tp
    return Strategy(tuple(Stage(devices, layouts) for layouts in stages), found.iteration.path)


def layout_of(cut: Cut, facts: Facts) -> Layout | None:
    """The layout of a stored tensor, None where its shards are no rectangles."""
    sizes, rule = facts.sizes, cut.rule
    devices = sizes.dp * sizes.cp * sizes.tp
    matrix, axis_of = _matrix(facts, devices, expert=rule.expert)
    ways = {"tp": sizes.tp, "etp": matrix[-1]}["etp" if rule.expert else "tp"]
    if rule.stacked and (ways > 1 or matrix[-2] > 1):
        return None
    if rule.axis is None or ways == 1:
        return Layout(matrix, tuple(() for _ in cut.stored))
    if rule.blocks > 1 or len(cut.stored) != len(cut.shape):
        return None
    return Layout(matrix, tuple((axis_of,) if axis == rule.axis else () for axis in range(len(cut.stored))))


def _matrix(facts: Facts, devices: int, *, expert: bool) -> tuple[tuple[int, ...], int]:
    """Device matrix, and the axis (from the right) that cuts tensors."""
    if not expert:
        return (devices // facts.sizes.tp, facts.sizes.tp), 0
    if facts.extend_ep:
        return (max(1, devices // (facts.sizes.ep * facts.sizes.tp)), facts.sizes.ep * facts.sizes.tp, 1), 0
    return (max(1, devices // (facts.sizes.ep * facts.etp)), facts.sizes.ep, facts.etp), 0
