"""Questions about parameter names that several modules ask."""

from __future__ import annotations

import re

_EXPERT = re.compile(r".*\.experts\..+")
ROUTER = re.compile(r".*\.mlp\.router\.weight")


def is_expert(name: str) -> bool:
    """Does an expert-parallel rank have its own of it?  Shared experts do not count."""
    return _EXPERT.fullmatch(name) is not None


def without_wrappers(name: str) -> str:
    """A parameter's name as the model itself has it: DDP and Float16Module each put `module.` before it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
