"""output/strategy and output/transformed_checkpoint are links to the newest run's (transform_ckpt.auto.runs).

MindFormers takes them for directories of its own: utils/file_utils.py of 1.9.0 deletes both at the start of a job
(`clear_auto_trans_output`, shutil.rmtree, which refuses links), and makes `strategy` (`set_strategy_save_path`,
os.makedirs, which refuses a link to nothing).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from transform_ckpt.auto.mindformers import places
from transform_ckpt.auto.runs import STRATEGY, TRANSFORMED
from transform_ckpt.errors import InputError

_FORMATS = ("ckpt", "safetensors")


def kept_output(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`clear_auto_trans_output` that deletes nothing: the last result may be this job's source, or its own again."""

    @wraps(theirs)
    def clear_auto_trans_output(
        load_checkpoint: str | None = None,  # noqa: ARG001
        src_strategy_path_or_dir: str | None = None,  # noqa: ARG001
        load_ckpt_format: str = "ckpt",
    ) -> None:
        if load_ckpt_format not in _FORMATS:
            raise InputError(f"load_ckpt_format: expected {' or '.join(_FORMATS)}, found {load_ckpt_format!r}")

    return clear_auto_trans_output


def mended_strategy_path(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`set_strategy_save_path` that works when the run that output/strategy points at was deleted by hand."""

    @wraps(theirs)
    def set_strategy_save_path(config: Any) -> Any:
        path = _known(STRATEGY)
        if os.path.islink(path) and not os.path.exists(path):
            _unlink(path)
        return theirs(config)

    return set_strategy_save_path


def unlinked_output(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`clear_auto_trans_output` of MindFormers, after our links are gone; the runs they point at stay."""

    @wraps(theirs)
    def clear_auto_trans_output(*args: Any, **kwargs: Any) -> Any:
        if places.function(places.MAIN_RANK)():
            for name in (STRATEGY, TRANSFORMED):
                if os.path.islink(_known(name)):
                    _unlink(_known(name))
        return theirs(*args, **kwargs)

    return clear_auto_trans_output


def _known(name: str) -> str:
    return os.path.join(str(places.function(places.OUTPUT)()), name)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):  # another rank was quicker
        os.unlink(path)
