"""A job where MindFormers and an accelerator are: MindFormers' own Trainer, with our transform in the place of its.

What run_mindformer.py of MindFormers does with a configuration (r1.3 to 1.9: build_context, Trainer, one method for
each run_mode).  Needs Ascend from build_context on; up to there it is tested on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from transform_ckpt.auto import compiler
from transform_ckpt.auto.settings import JobSettings


def possible() -> bool:
    """Is this a machine for it?"""
    return importlib.util.find_spec("mindformers") is not None and compiler.available()[0]


def hand_over(settings: JobSettings) -> None:
    """Run the job; returns when MindFormers does."""
    import mindformers

    from transform_ckpt.auto.mindformers import install

    install()
    config = _config(mindformers, settings)
    mindformers.build_context(config)
    _METHODS[settings.run_mode](mindformers.Trainer(config), config, settings)


def _config(mindformers: Any, settings: JobSettings) -> Any:
    """MindFormers' configuration of the YAML with the flags in it; its template fills in only what it reads itself."""
    with tempfile.TemporaryDirectory(prefix="transform_ckpt_") as folder:
        path = os.path.join(folder, os.path.basename(settings.config))
        with open(path, "w", encoding="utf-8") as stream:
            yaml.safe_dump(dict(settings.document), stream, sort_keys=False)
        config = mindformers.MindFormerConfig(path)
    config.output_dir = settings.output_dir
    return config


def _predict(trainer: Any, config: Any, settings: JobSettings) -> None:
    prompts = list(settings.predict_data)
    batch = config.get("predict_batch_size")
    data = prompts[0] if len(prompts) == 1 and not batch else prompts
    trainer.predict(predict_checkpoint=config.load_checkpoint, input_data=data, batch_size=batch)


_METHODS: Mapping[str, Callable[[Any, Any, JobSettings], None]] = {
    "train": lambda trainer, _config, _settings: trainer.train(),
    "finetune": lambda trainer, config, _settings: trainer.finetune(finetune_checkpoint=config.load_checkpoint),
    "eval": lambda trainer, config, _settings: trainer.evaluate(eval_checkpoint=config.load_checkpoint),
    "predict": _predict,
}
"""run_mode -> what the Trainer is asked for (MindFormers 1.9.0 trainer/trainer.py)."""
