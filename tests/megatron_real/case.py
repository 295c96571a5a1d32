"""What is run: a small model, a layout of it over processes, and a version of megatron-core."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

STATES = ("param", "exp_avg", "exp_avg_sq")
ITERATION = 2


def numbers(version: str) -> tuple[int, ...]:
    """A version to compare by: "0.16.1" -> (0, 16, 1)."""
    return tuple(int(part) for part in version.split("."))


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes are of the whole model; `dp` excludes `cp` and contains `ep`; the vocabulary is a padded one.

    `tree` "mcore" is a real GPTModel of the local spec, "te" one with Transformer Engine's names, "legacy" a model with
    the names Megatron-LM used before it.  `ffn` is an expert's width too, and `dense_first` layers have no experts.
    `bucket_size` (elements) turns overlap_grad_reduce on.  `etp` None is `tp`; `kv_groups` None is `heads`.
    """

    version: str = "0.16.1"
    tree: str = "mcore"
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int = 1
    layers: int = 4
    hidden: int = 16
    heads: int = 4
    kv_groups: int | None = None
    ffn: int = 12
    vocab: int = 40
    gated: bool = True
    bias: bool = False
    qkv_bias: bool = False
    norm: str = "RMSNorm"
    qk_layernorm: bool = False
    learned_softmax: bool = False
    tied: bool = False
    experts: int | None = None
    shared_ffn: int | None = None
    dense_first: int = 0
    grouped: bool = False
    mla: bool = False
    q_lora: int | None = 8
    mtp: int = 0
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    bucket_size: int | None = None

    @property
    def world(self) -> int:
        """Processes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        """Over how many ranks each expert is cut."""
        return self.tp if self.etp is None else self.etp

    def at_least(self, version: str) -> bool:
        """Whether the megatron-core version is that one or later."""
        return numbers(self.version) >= numbers(version)

    def to_json(self) -> dict[str, Any]:
        """All fields, for another process."""
        return asdict(self)
