"""Which conversion a command asks for: source format and target format choose a route; each is one entry of a table."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strategy.generate_files import DIRECTORY as STRATEGY_DIRECTORY
from transform_ckpt import api
from transform_ckpt.errors import InputError, UsageError
from transform_ckpt.megatron.directory import is_converted
from transform_ckpt.planner import Plan
from transform_ckpt.source import CHECKPOINT_2, MEGATRON, MINDSPORE
from transform_ckpt.target import DEFAULT_PREFIX

Flags = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """A plan, and how its output is compared with the source before it gets its name."""

    plan: Plan
    check: Callable[[str], None]


def route(src: str, flags: Flags) -> Route:
    """The plan that flags ask for; InputError for pairs of formats that this version does not convert."""
    given = flags.get("from_format")
    source = given or _family(api.detect(src))
    target = flags.get("to_format")
    found = _ROUTES.get((source, str(target)))
    if found is None:
        known = ", ".join(f"{a} to {b}" for a, b in _ROUTES)
        raise InputError(f"{source} to {target}: this version converts {known} (transform-ckpt formats)")
    if given and given != (detected := _family(api.detect(src))):
        raise InputError(f"{src}: is a {detected} checkpoint, and --from {given} is given: drop it")
    module, function = found
    chosen: Callable[[str, Flags], Route] = getattr(importlib.import_module(module), function)
    return chosen(src, flags)


def _family(kind: str) -> str:
    return MINDSPORE if kind == CHECKPOINT_2 else kind


def mindspore_to_mindspore(src: str, flags: Flags) -> Route:
    """From any strategy to any other."""
    naming = flags.get("naming")
    if naming is not None and not (naming == "mindspeed" and is_converted(src)):
        raise InputError(NAMES_LATER.format(src=src, naming=naming))
    refuse(flags, (*MEGATRON_TARGET, *SHARDS), "a MindSpore destination of MindSpore tensors")
    keys = (
        *("src_strategy", "dst_strategy", "dst_parallel", "container", "step", "prefix", "unified", "checkpoint_2"),
        *("crc", "carry", "allow_missing"),
    )
    options = {key: flags[key] for key in keys if key in flags}
    made = api.plan(src, optimizer=not flags.get("no_optimizer"), **options)
    written = flags.get("dst_strategy")

    def check(path: str) -> None:
        strategy = os.path.join(path, STRATEGY_DIRECTORY) if flags.get("dst_parallel") else written
        api.verify_output(made, path, strategy, flags.get("progress"))

    return Route(made, check)


LAYOUT_FLAGS = (
    *("tp", "pp", "ep", "etp", "cp", "dp", "layers_per_virtual_stage", "num_layer_list", "noop_layers"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "schedule"),
)
MEGATRON_TARGET = (*LAYOUT_FLAGS, "megatron_container", "vocab_divisible_by", "impl", "experts")
SHARDS = ("megatron_shards", "optimizer_names")
COMPLETE_ONLY = ("dst_strategy", "dst_parallel", "unified", "checkpoint_2", "crc", "prefix", "carry", "src_strategy")
MINDSPORE_ONLY = (*COMPLETE_ONLY, *SHARDS, "naming", "container")
_SPELLED = {"megatron_container": "container", "container": "format"}
_UNSET = {"prefix": DEFAULT_PREFIX}
NAMES_LATER = (
    "{src}: names of MindFormers ({naming}) need the tables of model families, which this version lacks: add "
    "--naming mindspeed for Megatron's own, as convert_pt2ckpt writes them"
)


def refuse(flags: Flags, names: Sequence[str], what: str) -> None:
    """UsageError for flags that would have no effect."""
    given = [
        f"--{_SPELLED.get(n, n).replace('_', '-')}"
        for n in names
        if flags.get(n) not in (None, False, (), _UNSET.get(n))
    ]
    if given:
        raise UsageError(f"{', '.join(given)}: has no meaning for {what}: drop it")


_MEGATRON_ROUTES = "transform_ckpt.megatron_routes"
_ROUTES = {
    (MINDSPORE, MINDSPORE): (__name__, "mindspore_to_mindspore"),
    (MEGATRON, MEGATRON): (_MEGATRON_ROUTES, "megatron_to_megatron"),
    (MEGATRON, MINDSPORE): (_MEGATRON_ROUTES, "megatron_to_mindspore"),
    (MINDSPORE, MEGATRON): (_MEGATRON_ROUTES, "mindspore_to_megatron"),
}
"""(from, to) -> module and function (path, flags) -> Route; a module is imported when it is asked for."""
