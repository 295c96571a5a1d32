"""The destination's mesh as one line: `dp=2,mp=4,pp=2,opt=1`.  Pure; `KEYS` documents the keys.

May import only strategy.generate_{checks,types} and transform_ckpt.errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strategy.generate_checks import check_parallel, parse_offset, suggestion
from strategy.generate_types import OptimizerShard, Parallel
from transform_ckpt.errors import InputError, Problems

_WORDS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


@dataclass(frozen=True, slots=True)
class Key:
    """One key: how its value is read, what it means."""

    parse: Callable[[str], Any]
    meaning: str


def _flag(text: str) -> bool:
    return _WORDS[text.lower()]


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise ValueError("a positive whole number")
    return int(text)


def _size(text: str) -> int:
    return -1 if text == "-1" else _positive(text)


def _kilobytes(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _offset(text: str) -> Any:
    return parse_offset(json.loads(text))


KEYS: Mapping[str, Key] = {
    "dp": Key(_positive, "data parallel"),
    "mp": Key(_positive, "tensor (model) parallel; also tp"),
    "cp": Key(_positive, "context parallel"),
    "ep": Key(_positive, "expert parallel, inside dp*mp"),
    "pp": Key(_positive, "pipeline stages"),
    "offset": Key(_offset, "layers more than the average: a number, [1,0] a stage, [[0,1],[0,0]] a row an interleave"),
    "interleave": Key(_positive, "pp_interleave_num"),
    "zero_bubble_v": Key(_flag, "pipeline scheduler zero_bubble_v (0 or 1)"),
    "vocab_emb_dp": Key(_flag, "legacy naming: embedding and lm_head whole (default 1 for pp=1, else 0)"),
    "opt": Key(_flag, "optimizer shard (0 or 1)"),
    "opt_size": Key(_size, "at most so many parts, -1 = all replicas; needs opt=1"),
    "threshold": Key(_kilobytes, "smallest parameter in KB that is cut, default 64; needs opt=1"),
}

SYNONYMS: Mapping[str, str] = {
    "tp": "mp",
    "data_parallel": "dp",
    "model_parallel": "mp",
    "context_parallel": "cp",
    "expert_parallel": "ep",
    "pipeline_stage": "pp",
    "pp_interleave_num": "interleave",
    "optimizer_shard": "opt",
    "enable_parallel_optimizer": "opt",
    "optimizer_weight_shard_size": "opt_size",
    "parallel_optimizer_threshold": "threshold",
}


def parse_parallel(text: str) -> Parallel:
    """The mesh that a line says; InputError names every key that is wrong, doubled or contradicts another."""
    where = f"parallel configuration {text!r}"
    problems = Problems()
    values = _values(text, where, problems)
    needs_opt = [key for key in ("opt_size", "threshold") if key in values and not values.get("opt")]
    for key in needs_opt:
        problems.add(f"{where}: {key} needs opt=1, the optimizer shard is off")
    pp = values.get("pp", 1)
    if values.get("vocab_emb_dp") and pp > 1:
        problems.add(f"{where}: vocab_emb_dp=1 and pp={pp} disagree; MindFormers cuts the vocabulary when pp > 1")
    parallel = Parallel(
        dp=values.get("dp", 1),
        tp=values.get("mp", 1),
        cp=values.get("cp", 1),
        ep=values.get("ep", 1),
        pp=pp,
        interleave=values.get("interleave", 1),
        offset=values.get("offset", 0),
        zero_bubble_v=values.get("zero_bubble_v", False),
        vocab_emb_dp=values.get("vocab_emb_dp", True) and pp == 1,
        optimizer=OptimizerShard(values.get("threshold", 64), values.get("opt_size", -1))
        if values.get("opt")
        else None,
    )
    check_parallel(parallel, where, problems)
    problems.raise_if_any(InputError)
    return parallel


def _values(text: str, where: str, problems: Problems) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in _items(text):
        written, equals, value = (part.strip() for part in item.partition("="))
        key = SYNONYMS.get(written, written)
        if key not in KEYS:
            problems.add(f"{where}: unknown key {written!r}{suggestion(written, [*KEYS, *SYNONYMS])}")
        elif not equals or not value:
            problems.add(f"{where}: {written} has no value; write {written}=...")
        elif key in found:
            problems.add(f"{where}: {key} is given twice")
        else:
            try:
                found[key] = KEYS[key].parse(value)
            except (ValueError, KeyError):
                problems.add(f"{where}: {written}={value} is not valid; expected {KEYS[key].meaning}")
    return found


def _items(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    items, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth <= 0:
            items.append("")
        else:
            items[-1] += character
    return items
