"""Questions about parameter names that several modules ask."""

from __future__ import annotations

import re
from collections.abc import Collection

_EXPERT = re.compile(r".*\.experts\..+")
_EXPERT_KINDS = (
    (".experts.local_experts.", "sequential"),
    (".mlp.experts.weight1", "grouped"),
    (".mlp.experts.linear_fc1.weight", "grouped"),
)
ROUTER = re.compile(r".*\.mlp\.router\.weight")


def is_expert(name: str) -> bool:
    """Does an expert-parallel rank have its own of it?  Shared experts do not count."""
    return _EXPERT.fullmatch(name) is not None


def dialect_of(names: Collection[str]) -> dict[str, frozenset[str]]:
    """By which --impl and --experts a model with these parameters is called; empty where any would do."""
    fused = any(".linear_kv_up_proj." in n or ".linear_kv_nope." in n for n in names)
    fused = fused and not any(".linear_kv_down_proj." in n for n in names)
    impl = ["local", "mindspeed"]
    if any(n.endswith("layer_norm_weight") for n in names):
        impl = ["te"]
    elif fused or any(".post_attn_norm." in n for n in names):
        impl = ["mindspeed"]
    elif any(".linear_kv_down_proj." in n or "language_model." in n for n in names):
        impl = ["local"]
    experts = [kind for mark, kind in _EXPERT_KINDS if any(mark in n for n in names)]
    return {"impl": frozenset(impl), "experts": frozenset(experts)}


def without_wrappers(name: str) -> str:
    """A parameter's name as the model itself has it: DDP and Float16Module each put `module.` before it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
