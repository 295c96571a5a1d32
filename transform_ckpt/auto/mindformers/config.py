"""What a job of MindFormers says of its checkpoint: its configuration, and the arguments of the step, as one value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transform_ckpt.auto.settings import JobSettings, settings_from_document
from transform_ckpt.auto.settings_types import TRAINING

WHERE = "the job's configuration"
"""Names the configuration in messages: MindFormers does not keep the YAML's path."""

COMPILED_MODES = ("semi_auto_parallel", "auto_parallel", "hybrid_parallel")
"""Parallel modes of MindSpore's context in which the compiler lays parameters out (checkpoint/utils.py, 1.9.0)."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `transform_and_load_checkpoint`."""

    config: Any
    model: Any
    network: Any
    dataset: Any
    optimizer: Any = None
    do_eval: bool = False
    do_predict: bool = False

    @property
    def path(self) -> str | None:
        """Where the checkpoint is: checkpoint.load_path since 1.9, load_checkpoint before.

        1.9 copies load_checkpoint into the section (trainer/utils.py `convert_checkpoint_config`).
        """
        section = self.config.get("checkpoint")
        path = self.config.get("load_checkpoint") if section is None else section.get("load_path")
        return path or None

    def set_path(self, path: str) -> None:
        """What later steps of the job find as its checkpoint."""
        section = self.config.get("checkpoint")
        if section is None:
            self.config.load_checkpoint = path
        else:
            section.load_path = path

    @property
    def settings(self) -> JobSettings:
        """The configuration, checked.  The arguments say what the job does: run_mode may be another or missing."""
        document = dict(self.config)
        said = document.get("run_mode")
        training = said if said in TRAINING else "train"
        document["run_mode"] = "eval" if self.do_eval else "predict" if self.do_predict else training
        return settings_from_document(document, WHERE)

    @property
    def rank_directories(self) -> bool:
        """Does the checkpoint have rank_0/ ..., or is it a file in one?"""
        path = self.path
        if path is None:
            return False
        if os.path.isfile(path):
            return os.path.basename(os.path.dirname(os.path.realpath(path))).startswith("rank_")
        return os.path.isdir(os.path.join(path, "rank_0"))

    def option(self, key: str) -> Any:
        """A key of model.model_config; None when it is not there."""
        model = self.config.get("model")
        section = model.get("model_config") if isinstance(model, Mapping) else None
        return section.get(key) if isinstance(section, Mapping) else None
