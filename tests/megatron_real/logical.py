"""The training state that every layout must hold: values by parameter name, trained by an Adam of NumPy.

A parameter's initial value and gradients are a function of its global name alone, so the same model has the same state
however it is cut.  Every operation rounds by itself (no fused multiply-add), so NumPy and torch agree bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from tests.megatron_real.case import ITERATION

Array = np.ndarray[Any, np.dtype[Any]]
Box = tuple[tuple[int, int], ...]

LR = 1e-2
MIN_LR = 1e-3
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Cut:
    """A stored parameter as boxes ((start, stop) a dimension) of a logical one, one behind the other in memory."""

    logical: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def take(self, whole: Array) -> Array:
        """The stored elements, flat."""
        return np.concatenate([whole[_slices(box)].reshape(-1) for box in self.boxes])

    def put(self, whole: Array, flat: Array) -> None:
        """Writes the stored elements where they belong."""
        at = 0
        for box in self.boxes:
            view = whole[_slices(box)]
            view[...] = flat[at : at + view.size].reshape(view.shape)
            at += view.size
        if at != flat.size:
            raise ValueError(f"{self.logical}: {flat.size} elements stored, the boxes have {at}")


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _normal(text: str, shape: Sequence[int]) -> Array:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(prod(shape), dtype=np.float32).reshape(shape)


def bfloat16(values: Array) -> Array:
    """Rounded to bfloat16, to the nearest even."""
    return values.astype(ml_dtypes.bfloat16)


def initial(name: str, shape: Sequence[int]) -> Array:
    """The first weights, float32 values that bfloat16 holds."""
    return bfloat16(_normal(f"{name} weight", shape) * np.float32(0.05)).astype(np.float32)


def gradient(name: str, shape: Sequence[int], step: int) -> Array:
    """The gradient of a step (from 1), float32."""
    return _normal(f"{name} gradient {step}", shape)


def weight_decay(name: str, ndim: int) -> float:
    """Megatron decays no biases and no vectors (megatron/core/optimizer/__init__.py, all versions)."""
    return 0.0 if name.endswith(".bias") or ndim == 1 else WEIGHT_DECAY


def trained(name: str, shape: Sequence[int]) -> dict[str, Array]:
    """Master weight and both Adam states after the steps, float32, as apex's FusedAdam with decoupled decay."""
    f = np.float32
    beta1, beta2 = BETAS
    decay = f(weight_decay(name, len(shape)))
    param = initial(name, shape)
    exp_avg, exp_avg_sq = np.zeros_like(param), np.zeros_like(param)
    for step in range(1, ITERATION + 1):
        grad = gradient(name, shape, step)
        exp_avg = exp_avg * f(beta1) + grad * f(1 - beta1)
        exp_avg_sq = exp_avg_sq * f(beta2) + (grad * grad) * f(1 - beta2)
        root = np.sqrt(exp_avg_sq * f(1 / (1 - beta2**step))) + f(EPS)
        update = exp_avg * f(1 / (1 - beta1**step)) / root + param * decay
        param = param - update * f(LR)
    return {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
