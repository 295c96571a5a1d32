"""Every key of the YAML that this package reads, its type and its default; what is wrong is named by its key.

Defaults are those of MindFormers 1.9.0 tools/register/template.py `GeneralConfig`, except transform_process_num and
load_ckpt_format: not given means more here (each rank its own slice; what the source holds).
Pure; may import only settings_{document,types}, request and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transform_ckpt.auto.request import DEFAULT_KEEP, DEFAULT_TIMEOUT_SECONDS
from transform_ckpt.auto.settings_document import get
from transform_ckpt.auto.settings_types import FACTORS
from transform_ckpt.errors import Problems

_RUN_MODES = ("train", "finetune", "eval", "predict", "predict_with_train_model")
_FORMATS = ("ckpt", "safetensors")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("True or False" + " without quotes" * (str(value).lower() in {"true", "false"}))
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _path(value: Any) -> str | None:
    return None if _text(value).strip() in {"", "None"} else _text(value)


def _flag_or_text(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() in {"true", "false"}:
        raise TypeError("True, False (without quotes) or a checkpoint's file name")
    return value or False


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text or a list of texts")
    return tuple(texts)


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TypeError(f"a whole number of at least {least}")
        return value

    return read


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise TypeError("a number of seconds greater than 0")
    return float(value)


def _one_of(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise TypeError("one of " + ", ".join(words))
        return str(value)

    return read


@dataclass(frozen=True, slots=True)
class Key:
    """How one key is read; `key` None means the field's own name."""

    read: Callable[[Any], Any]
    default: Any = None
    key: str | None = None


FIELDS: Mapping[str, Key] = {
    "run_mode": Key(_one_of(*_RUN_MODES)),
    "use_parallel": Key(_flag, default=False),
    "load_checkpoint": Key(_path),
    "auto_trans_ckpt": Key(_flag, default=False),
    "src_strategy": Key(_path, key="src_strategy_path_or_dir"),
    "transform_process_num": Key(_whole(1)),
    "transform_by_rank": Key(_flag),
    "npu_num_per_node": Key(_whole(1)),
    "only_save_strategy": Key(_flag, default=False),
    "load_ckpt_format": Key(_one_of(*_FORMATS)),
    "remove_redundancy": Key(_flag, default=False),
    "resume_training": Key(_flag_or_text, default=False),
    "remote_save_url": Key(_path),
    "use_legacy_format": Key(_flag, default=True),
    "output_dir": Key(_path),
    "transform_in_memory": Key(_flag, default=False),
    "load_strict": Key(_flag, default=True),
    "keep": Key(_whole(1), default=DEFAULT_KEEP),
    "transform_timeout": Key(_seconds, default=DEFAULT_TIMEOUT_SECONDS),
    "predict_data": Key(_texts, (), key="input_data"),
    "seed": Key(_whole(0), default=1),
    "rank_id": Key(_whole(0)),
    "world_size": Key(_whole(1)),
}
"""Field of JobSettings -> its key."""

_FURTHER: Mapping[str, Key] = {
    "pretrained_model_dir": Key(_path),
    "load_ckpt_async": Key(_flag, default=False),
    "checkpoint.load_path": Key(_path),
    "checkpoint.no_load_optim": Key(_flag),
}
"""Keys that other fields follow from."""

_MESH: Mapping[str, Key] = {
    f"parallel_config.{key}": Key(_whole(1), default=1) for key in (*FACTORS, "expert_parallel", "micro_batch_num")
}


def read_values(document: Mapping[str, Any], where: str, problems: Problems) -> dict[str, Any]:
    """Fields of JobSettings and further keys -> values; an explicit null is no value."""
    mesh = _MESH if document.get("use_parallel") is True else {}
    values: dict[str, Any] = {}
    for name, field in {**FIELDS, **_FURTHER, **mesh}.items():
        key = field.key or name
        value = get(document, key)
        values[name] = field.default
        if value is None:
            continue
        try:
            values[name] = field.read(value)
        except TypeError as error:
            problems.add(f"{where}: {key}: expected {error}, found {value!r}")
    if values["run_mode"] is None and document.get("run_mode") is None:
        problems.add(_no_run_mode(document, where))
    return values


def _no_run_mode(document: Mapping[str, Any], where: str) -> str:
    if "model" not in document:
        return f"{where}: is not a job's configuration: it has neither run_mode nor model"
    return f"{where}: run_mode is missing: expected one of {', '.join(_RUN_MODES)}; give it there or with --run_mode"
