"""What an auto_trans_ckpt job is told to do, as one checked value.  May import only settings_document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from transform_ckpt.auto.settings_document import get

FACTORS = ("data_parallel", "model_parallel", "context_parallel", "pipeline_stage")
"""Keys of parallel_config whose product is the number of ranks; expert_parallel lies inside the first two."""

TRAINING = ("train", "finetune")

_WHOLE_MODES = (0, "data_parallel", "DATA_PARALLEL")
"""parallel.parallel_mode in which every rank holds whole weights and no strategy is written.

Not STAND_ALONE: MindFormers 1.9.0 tools/utils.py `PARALLEL_MODE` makes that of MANUAL_PARALLEL, whose ranks do hold
slices, and its predict YAMLs of DeepSeek-V3 say STAND_ALONE and auto_trans_ckpt together.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """One job.  `read_settings` and `settings_from_document` make it; every rule that needs no file holds for it."""

    config: str
    """Path of the YAML, as given."""
    run_mode: str
    """train, finetune, eval or predict (predict_with_train_model is predict here, and as written in `document`)."""
    use_parallel: bool
    load_checkpoint: str | None
    auto_trans_ckpt: bool
    src_strategy: str | None
    """src_strategy_path_or_dir."""
    transform_process_num: int | None
    """None: every rank makes its own slice."""
    transform_by_rank: bool
    npu_num_per_node: int | None
    only_save_strategy: bool
    load_ckpt_format: str | None
    """ckpt or safetensors; None: what load_checkpoint holds."""
    remove_redundancy: bool
    resume_training: bool | str
    remote_save_url: str | None
    """obs://... or s3://...."""
    use_legacy_format: bool
    """False: MindFormers' Checkpoint 2.0."""
    output_dir: str
    transform_in_memory: bool
    load_strict: bool
    keep: int
    transform_timeout: float
    """Seconds."""
    predict_data: tuple[str, ...]
    seed: int
    rank_id: int | None
    world_size: int | None
    """What the command line says of this process; None: see the environment."""
    document: Mapping[str, Any]
    """The whole YAML after the flags: plain dicts and lists that nothing else refers to."""
    extra: Mapping[str, Any]
    """Flags that have no key in the YAML: modal_type, register_path."""
    notes: tuple[str, ...]

    @property
    def is_training(self) -> bool:
        """Whether weights change."""
        return self.run_mode in TRAINING

    @property
    def holds_whole(self) -> bool:
        """Whether each of several ranks holds whole weights: parallel_mode data_parallel."""
        return self.use_parallel and self.setting("parallel.parallel_mode", 1) in _WHOLE_MODES

    @property
    def factors(self) -> dict[str, int]:
        """The mesh: FACTORS -> size; all 1 when use_parallel is False, which makes MindFormers ignore it."""
        return {key: self.setting(f"parallel_config.{key}", 1) if self.use_parallel else 1 for key in FACTORS}

    @property
    def world(self) -> int:
        """Number of ranks that the mesh is for."""
        return prod(self.factors.values())

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key of `document`; an explicit null is no value."""
        value = get(self.document, key)
        return default if value is None else value
