"""Megatron tensors under MindSpore's names: what complete weights, and any reshard by strategies, are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transform_ckpt.megatron.containers import PREFIX, STATES
from transform_ckpt.megatron.mindspore_names import PREFIXES, mindspore_name
from transform_ckpt.tensors import Logical, Source

FORMAT = "mindspore"


def renamed(source: Source, states: Mapping[str, Logical], optimizer_names: str = "exp_avg") -> Source:
    """The source as MindSpore parameters: master weights in place of the model's, `states` beside them.

    A gated linear_fc1 is [all gates; all ups], as Megatron has it on one rank.
    """
    prefixes = PREFIXES[optimizer_names]
    params: dict[str, Logical] = {}
    for name, logical in source.params.items():
        kind, weight = split_state(name)
        if kind is None and f"{PREFIX}{STATES[0]}.{name}" in source.params:
            continue
        shown = (prefixes[kind] if kind else "") + mindspore_name(weight)
        params[shown] = replace(logical, name=shown)
    return replace(source, params=params, states=dict(states))


def split_state(name: str) -> tuple[str | None, str]:
    """("exp_avg", "decoder...") of an optimizer state's logical name, (None, name) of a weight's."""
    for state in STATES:
        head = f"{PREFIX}{state}."
        if name.startswith(head):
            return state, name.removeprefix(head)
    return None, name
