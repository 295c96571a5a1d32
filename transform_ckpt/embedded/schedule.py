"""Learning rates by global step, as MindFormers 1.9.0 core/lr/lr_schedule.py computes them.  Pure; imports nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """`kind` is a key of `SCHEDULES`; `total_steps` None means the steps of the run."""

    kind: str = "ConstantWarmUpLR"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    warmup_lr_init: float = 0.0
    lr_end: float = 0.0
    num_cycles: float = 0.5
    total_steps: int | None = None

    def rate(self, step: int, steps: int) -> float:
        """The rate of the step after `step` finished ones, in a run of `steps`."""
        total = self.total_steps or steps
        warmup = self.warmup_steps if self.warmup_ratio is None else int(total * self.warmup_ratio)
        if step < warmup:
            return self.warmup_lr_init + (self.learning_rate - self.warmup_lr_init) * step / warmup
        return SCHEDULES[self.kind](self, step, warmup, total)


def _constant(schedule: Schedule, _step: int, _warmup: int, _total: int) -> float:
    return schedule.learning_rate


def _cosine(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    if step >= total:
        return schedule.lr_end
    progress = (step - warmup) / max(1, total - warmup)
    percent = max(0.0, 0.5 * (1 + math.cos(math.pi * schedule.num_cycles * 2 * progress)))
    return schedule.lr_end + (schedule.learning_rate - schedule.lr_end) * percent


def _linear(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    return schedule.learning_rate * max(0.0, (total - step) / max(1, total - warmup))


SCHEDULES: Mapping[str, Callable[[Schedule, int, int, int], float]] = {
    "ConstantWarmUpLR": _constant,
    "CosineWithWarmUpLR": _cosine,
    "LinearWithWarmUpLR": _linear,
}
"""lr_schedule.type -> the rate after the warm-up, from (schedule, finished steps, warm-up steps, all steps)."""
