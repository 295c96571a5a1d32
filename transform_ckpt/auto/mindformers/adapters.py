"""Parameters that fine-tuning adds to a network: low-rank adapters, and S-LoRA's, which come from their own files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from strategy.layout import Strategy
from transform_ckpt.auto.mindformers import places
from transform_ckpt.auto.mindformers.config import Call

_MARKS = ("mindpet_delta", "tk_delta", ".lora_a", ".lora_b")
"""Parts of names; pet/tuners of MindFormers 1.9.0."""


def is_adapter(name: str) -> bool:
    """Does a parameter belong to an adapter?  A base model's checkpoint has none of these."""
    return any(mark in name for mark in _MARKS)


def adapter_parameters(call: Call, strategy: Strategy | None, rank: int) -> dict[str, Any]:
    """What this rank holds of S-LoRA's adapters; {} without S-LoRA.

    MindFormers 1.9.0 (trainer/utils.py `load_slora_ckpt`) makes whole parameters of the adapters' files, then has them
    transformed as a checkpoint of its own.  Here they are whole in memory, so this rank's slices are cut there.
    """
    pet = call.option("pet_config")
    if not pet or pet.pet_type != "slora":
        return {}
    alone = SimpleNamespace(model=call.config.model, auto_trans_ckpt=False, use_parallel=False)
    whole: Any = places.function(places.LOAD_SLORA)({}, alone, call.network)
    return {name: _cut(name, value, strategy, rank) for name, value in whole.items()}


def _cut(name: str, value: Any, strategy: Strategy | None, rank: int) -> Any:
    if strategy is None:
        return value
    import mindspore as ms

    stage = strategy.stage_of(rank)
    layout = strategy.stages[stage].layouts.get(name)
    if layout is None:
        return value
    box = layout.boxes(tuple(value.shape))[rank - strategy.ranks(stage).start]
    window = tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
    return ms.Parameter(value[window], name=name)
