"""What converted parameters are called in MindSpore, and the scalars of a training run that go beside them.

Names and scalars: MindSpeed-Core-MS mindspeed_ms/tools/converter/convert_pt2ckpt.py: whole components are renamed, the
rest stays; states have prefixes.  MindFormers calls the same states adam_m. and adam_v.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transform_ckpt.megatron.containers import STATES

_COMPONENTS = {
    "dense_h_to_4h": "mapping",
    "dense_4h_to_h": "projection",
    "self_attention": "attention",
    "query_key_value": "qkv_proj",
    "dense": "out_proj",
}
PREFIXES = {
    "exp_avg": dict(zip(STATES, ("", "exp_avg.", "exp_avg_sq."), strict=True)),
    "adam": dict(zip(STATES, ("", "adam_m.", "adam_v."), strict=True)),
}
"""By how optimizer states are called."""
LR_DECAY_STYLES = ("constant", "WSD", "linear", "cosine", "inverse-square-root")
WD_INCR_STYLES = ("constant", "linear", "cosine")
_STYLES = {"lr_decay_style": LR_DECAY_STYLES, "wd_incr_style": WD_INCR_STYLES}
_FLOATS = ("max_lr", "min_lr", "start_wd", "end_wd")
_NUMBERS = ("lr_warmup_steps", "num_steps", "lr_decay_steps", "wd_incr_steps")
STEP, STATE_STEP, CONSUMED = "step_num", "state_step", "consumed_train_samples"
_OWN_SCALARS = frozenset((*_FLOATS, *_NUMBERS, *_STYLES, "epoch_num", STEP, STATE_STEP, CONSUMED))


_GROUP_SCALAR = re.compile(r".*_group_\d+")


def is_scalar(name: str) -> bool:
    """Is this one of the values that `scalars` writes, and no parameter?"""
    return name in _OWN_SCALARS or _GROUP_SCALAR.fullmatch(name) is not None


def mindspore_name(name: str) -> str:
    """A Megatron name, with global numbers, in MindSpore."""
    return ".".join(_COMPONENTS.get(part, part) for part in name.split("."))


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value of its own in every rank's file: dtype code, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _float32(value: float) -> Scalar:
    return Scalar("F32", (), struct.pack("<f", value))


def _float64(value: float) -> Scalar:
    return Scalar("F64", (), struct.pack("<d", value))


def _int64(value: int) -> Scalar:
    return Scalar("I64", (), struct.pack("<q", value))


def scalars(
    step: int, groups: Sequence[Mapping[str, Any]], scheduler: Mapping[str, Any], consumed: int | None
) -> dict[str, Scalar]:
    """Step, parameter groups in the rank's own order, scheduler and consumed samples."""
    found = {STEP: _int64(step), "epoch_num": _int64(0)}
    found |= dict(_group_scalars(groups))
    found |= {key: _float64(float(scheduler[key])) for key in _FLOATS if _is_number(scheduler.get(key))}
    found |= {key: _int64(int(scheduler[key])) for key in _NUMBERS if _is_number(scheduler.get(key))}
    for key, styles in _STYLES.items():
        if scheduler.get(key) in styles:
            found[key] = _int64(styles.index(scheduler[key]))
    if consumed is not None:
        found[CONSUMED] = _int64(consumed)
    return found


def _group_scalars(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Scalar]]:
    for number, group in enumerate(groups):
        for key, value in group.items():
            if key == "step" and _is_number(value):
                yield STATE_STEP, Scalar("F32", (1,), struct.pack("<f", value))
            elif _is_number(value) or type(value) is bool:
                yield f"{'learning_rate' if key == 'lr' else key}_group_{number}", _float32(float(value))


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
