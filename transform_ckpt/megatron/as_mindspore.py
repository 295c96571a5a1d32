"""Megatron tensors under MindSpore's names: what complete weights, and any reshard by strategies, are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transform_ckpt.megatron.containers import split_state, state_name
from transform_ckpt.megatron.mindspore_names import PREFIXES, mindspore_name
from transform_ckpt.tensors import Logical, Source


def renamed(source: Source, states: Mapping[str, Logical], optimizer_names: str = "exp_avg") -> Source:
    """The source as MindSpore parameters: master weights in place of the model's, `states` beside them.

    A gated linear_fc1 is [all gates; all ups], as Megatron has it on one rank.
    """
    prefixes = PREFIXES[optimizer_names]
    params: dict[str, Logical] = {}
    for name, logical in source.params.items():
        kind, weight = split_state(name)
        if kind is None and state_name(name) in source.params:
            continue
        shown = (prefixes[kind] if kind else "") + mindspore_name(weight)
        params[shown] = replace(logical, name=shown)
    return replace(source, params=params, states=dict(states))
