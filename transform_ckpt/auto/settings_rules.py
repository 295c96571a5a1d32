"""Which settings contradict each other: one row for each rule.  What only changes or ignores something is a note.

MindFormers 1.9.0 answers some of these with an exception (trainer/trainer.py `_check_config_rules`, trainer/utils.py
`check_checkpoint_config_valid` and `convert_checkpoint_config`), some by ending without a word, some by going on with
other weights than were asked for; here each is an error that names both keys.
Pure; may import only settings_types and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transform_ckpt.auto.settings_types import JobSettings
from transform_ckpt.errors import InputError, Problems

_FIELDS: Mapping[str, str] = {"src_strategy_path_or_dir": "src_strategy"}
_UNSET: Mapping[str, Any] = {
    "load_checkpoint": "",
    "src_strategy_path_or_dir": "",
    "parallel.parallel_mode": 1,
    "parallel_config.micro_batch_num": 1,
    "parallel_config.pipeline_stage": 1,
}
"""What is shown of a key that is not given."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Two keys that disagree, when they do, and what to change."""

    name: str
    keys: tuple[str, str]
    broken: Callable[[JobSettings], bool]
    advice: str


RULES: tuple[Rule, ...] = (
    Rule(
        "transform nothing",
        ("auto_trans_ckpt", "load_checkpoint"),
        lambda s: s.auto_trans_ckpt and s.load_checkpoint is None and not s.only_save_strategy,
        "there is nothing to transform: give load_checkpoint, or set auto_trans_ckpt: False",
    ),
    Rule(
        "resume from nothing",
        ("resume_training", "load_checkpoint"),
        lambda s: isinstance(s.resume_training, str) and s.load_checkpoint is None,
        "there is no directory to look in: give load_checkpoint, or set resume_training: False",
    ),
    Rule(
        "strategy of one device",
        ("only_save_strategy", "use_parallel"),
        lambda s: s.only_save_strategy and not s.use_parallel,
        "one device has no strategy, no file would be written: set use_parallel: True, or only_save_strategy: False",
    ),
    Rule(
        "strategy of whole weights",
        ("only_save_strategy", "parallel.parallel_mode"),
        lambda s: s.only_save_strategy and s.holds_whole,
        "every rank holds whole weights in that mode, no file would be written: set parallel.parallel_mode: 1",
    ),
    Rule(
        "transform to whole weights",
        ("auto_trans_ckpt", "parallel.parallel_mode"),
        lambda s: s.auto_trans_ckpt and s.holds_whole,
        "every rank loads whole weights in that mode: set parallel.parallel_mode: 1, or auto_trans_ckpt: False",
    ),
    Rule(
        "resume without training",
        ("resume_training", "run_mode"),
        lambda s: bool(s.resume_training) and not s.is_training,
        "only train and finetune resume: set resume_training: False, or another run_mode",
    ),
    Rule(
        "resume by name in the new format",
        ("resume_training", "use_legacy_format"),
        lambda s: isinstance(s.resume_training, str) and not s.use_legacy_format,
        "the new format chooses a checkpoint by load_checkpoint: set resume_training: True",
    ),
    Rule(
        "strategy in the new format",
        ("only_save_strategy", "use_legacy_format"),
        lambda s: s.only_save_strategy and not s.use_legacy_format,
        "the new format has no strategy files: set only_save_strategy: False, or use_legacy_format: True",
    ),
    Rule(
        "transform in the new format",
        ("auto_trans_ckpt", "use_legacy_format"),
        lambda s: s.auto_trans_ckpt and not s.use_legacy_format,
        "the new format is cut while it is loaded: set auto_trans_ckpt: False, or use_legacy_format: True",
    ),
    Rule(
        "strategy only, in memory",
        ("transform_in_memory", "only_save_strategy"),
        lambda s: s.transform_in_memory and s.only_save_strategy,
        "nothing is loaded when only the strategy is written: set one of them to False",
    ),
    Rule(
        "some processes, in memory",
        ("transform_in_memory", "transform_process_num"),
        lambda s: s.transform_in_memory and s.transform_process_num is not None,
        "in memory every rank makes its own slice: leave transform_process_num out, or set transform_in_memory: False",
    ),
    Rule(
        "no transform, in memory",
        ("transform_in_memory", "auto_trans_ckpt"),
        lambda s: s.transform_in_memory and not s.auto_trans_ckpt,
        "nothing is transformed: set auto_trans_ckpt: True, or transform_in_memory: False",
    ),
    Rule(
        "micro batches and stages",
        ("parallel_config.micro_batch_num", "parallel_config.pipeline_stage"),
        lambda s: s.use_parallel and s.is_training and s.setting("parallel_config.micro_batch_num", 1) < _stages(s),
        "a pipeline needs at least as many micro batches as stages: raise parallel_config.micro_batch_num",
    ),
    Rule(
        "rank of the world",
        ("rank_id", "world_size"),
        lambda s: s.rank_id is not None and s.world_size is not None and s.rank_id >= s.world_size,
        "ranks count from 0: give a rank_id below world_size",
    ),
)


@dataclass(frozen=True, slots=True)
class Note:
    """Something that is said, not refused."""

    name: str
    applies: Callable[[JobSettings], bool]
    text: str


NOTES: tuple[Note, ...] = (
    Note(
        "strategy unused",
        lambda s: s.src_strategy is not None and not s.auto_trans_ckpt,
        "src_strategy_path_or_dir is not used: auto_trans_ckpt is False",
    ),
    Note(
        "processes unused",
        lambda s: s.transform_process_num is not None and not s.auto_trans_ckpt,
        "transform_process_num is not used: auto_trans_ckpt is False",
    ),
    Note(
        "transform put off",
        lambda s: s.auto_trans_ckpt and s.only_save_strategy,
        "only_save_strategy is True: the strategy is written, nothing is transformed or loaded",
    ),
    Note(
        "one device",
        lambda s: s.auto_trans_ckpt and not s.use_parallel,
        "use_parallel is False: the result is whole weights, parallel and parallel_config are ignored",
    ),
    Note(
        "asynchronous loading unused",
        lambda s: bool(s.setting("load_ckpt_async")) and (s.auto_trans_ckpt or s.load_ckpt_format == "safetensors"),
        "load_ckpt_async is not used: it is for complete .ckpt files that are loaded as they are",
    ),
    Note(
        "prompt unused",
        lambda s: bool(s.predict_data) and s.run_mode != "predict",
        "predict_data is not used: run_mode is not predict",
    ),
    Note(
        "random weights",
        lambda s: not s.is_training and s.load_checkpoint is None and not s.only_save_strategy,
        "load_checkpoint is not given: the network keeps its random weights",
    ),
    Note(
        "nothing to upload",
        lambda s: s.transform_in_memory and s.remote_save_url is not None,
        "transform_in_memory is True: no transformed checkpoint is copied to remote_save_url",
    ),
)


def check_rules(settings: JobSettings) -> tuple[str, ...]:
    """InputError with every rule that is broken; what is to be noted."""
    problems = Problems()
    for rule in RULES:
        if rule.broken(settings):
            problems.add(disagree(settings, rule.keys, rule.advice))
    problems.raise_if_any(InputError)
    return tuple(note.text for note in NOTES if note.applies(settings))


def disagree(settings: JobSettings, keys: tuple[str, str], advice: str) -> str:
    """`YAML: a: True and b: '' disagree: advice`."""
    first, second = (f"{key}: {_shown(settings, key)!r}" for key in keys)
    return f"{settings.config}: {first} and {second} disagree: {advice}"


def _shown(settings: JobSettings, key: str) -> Any:
    field = _FIELDS.get(key, key)
    value = settings.setting(key) if "." in key else getattr(settings, field)
    return _UNSET.get(key) if value is None else value


def _stages(settings: JobSettings) -> int:
    return settings.factors["pipeline_stage"]
