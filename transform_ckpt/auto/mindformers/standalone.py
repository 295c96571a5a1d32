"""The strategy of a network whose slices MindFormers cuts in Python, without MindSpore's compiler.

Every rank knows it from its own network (parallel_core/inference/utils.py `generate_state_dict`, 1.9.0): "shard" says
in how many parts each dimension is cut.  MindFormers would write it with `save_strategy_file`, the ranks that are left
over as the first axis of the device matrix; the same layout is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from strategy.layout import Layout, Stage, Strategy
from transform_ckpt.auto.mindformers import places
from transform_ckpt.errors import InputError, Problems

_WHERE = "MindFormers' generate_state_dict"


def strategy_of(network: Any, world: int) -> Strategy:
    """InputError when a parameter's parts do not divide the ranks."""
    made: Any = places.function(places.STATE_DICT)(network)
    if made["stage_rank_size"] != world:
        raise InputError(f"{_WHERE}: is for {made['stage_rank_size']} ranks, but {world} are running")
    problems = Problems()
    layouts: dict[str, Layout] = {}
    for name, entry in {**made["model"], **made["optimizer"]}.items():
        parts = prod(entry.get("shard", ()))
        if "shard" not in entry or "shape" not in entry:
            continue
        if world % parts:
            problems.add(f"{name}: is cut into {parts} parts, which do not divide the {world} ranks")
            continue
        layouts[name] = _layout(entry, world // parts)
    problems.raise_if_any(InputError)
    return Strategy((Stage(world, layouts),), _WHERE)


def _layout(entry: Mapping[str, Any], replicas: int) -> Layout:
    shard = tuple(int(parts) for parts in entry["shard"])
    axes = tuple((axis,) for axis in reversed(range(len(shard))))
    step, size = (int(entry.get(f"opt_weight_shard_{word}", 0)) for word in ("step", "size"))
    return Layout((replicas, *shard), axes, step, size)
