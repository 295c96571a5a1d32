"""Asking MindSpore's compiler how a job's parameters are cut.  It answers on Ascend only.

On the CPU a semi-automatic parallel compilation ends with "Invalid backend: CPU" (seen with 2.7.2, 2.8.0, 2.9.0 and
2.10.0), so that there strategies come by rule (strategies.by_rule).
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strategy.generate_files import RANK_FILE
from transform_ckpt.formats.files import storage_error
from transform_ckpt.rank_table import NPUS

_PLUGINS = ("plugin/ascend", "plugin/libmindspore_ascend.so*", "libmindspore_ascend.so*")
"""Below mindspore/lib: what the Ascend wheel has and the CPU wheel has not (2.9.0: run_check/_check_version.py,
ops/operations/custom_ops.py)."""

_CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH")
"""What CANN's set_env.sh exports; run_check/_check_version.py of MindSpore 2.9.0 asks for the first and the last."""


@dataclass(frozen=True, slots=True)
class _Need:
    """Something that the compiler needs; `found` looks for it without importing MindSpore."""

    found: Callable[[Mapping[str, str]], bool]
    absent: str


def _has_plugin(_environ: Mapping[str, str]) -> bool:
    spec = importlib.util.find_spec("mindspore")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return any(glob.glob(os.path.join(folder, "lib", name)) for folder in folders for name in _PLUGINS)


_NEEDS = (
    _Need(lambda _: importlib.util.find_spec("mindspore") is not None, "mindspore is not installed"),
    _Need(_has_plugin, "this mindspore has no Ascend plugin: it is the CPU package"),
    _Need(
        lambda environ: any(os.path.isdir(environ.get(name, "")) for name in _CANN_VARIABLES),
        f"CANN is not set up: none of {', '.join(_CANN_VARIABLES)} is a directory (source its set_env.sh)",
    ),
    _Need(lambda _: bool(glob.glob(NPUS)), f"no Ascend device: there is no {NPUS}"),
)


def available(environ: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Can strategies be compiled here?  (False, the first thing that is missing); imports nothing."""
    for need in _NEEDS:
        if not need.found(environ):
            return False, need.absent
    return True, "mindspore with its Ascend plugin, CANN and devices are there"


def compile_strategies(
    model: Any,
    dataset: Any,
    config: Any,
    directory: str,
    rank: int,
    *,
    do_eval: bool = False,
    do_predict: bool = False,
) -> str:
    """Let MindFormers compile the model, with this rank's strategy file in `directory`; the file's path.

    `config` is a MindFormers configuration.  What MindSpore raises is the caller's.  The path stays set for the rest of
    the job: a later compilation writes the same file again.
    """
    from transform_ckpt.auto.mindformers import places

    path = write_to(directory, rank)
    places.function(places.COMPILE)(
        model=model,
        dataset=dataset,
        mode=config.context.mode,
        sink_mode=config.runner_config.sink_mode,
        epoch=config.runner_config.epochs,
        sink_size=config.runner_config.sink_size,
        do_eval=do_eval,
        do_predict=do_predict,
    )
    return path


def write_to(directory: str, rank: int) -> str:
    """Make the directory the one that MindSpore writes this rank's strategy to; the file's path."""
    import mindspore as ms

    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise storage_error(directory, error, "making a directory for strategies") from None
    path = os.path.join(directory, RANK_FILE.format(rank=rank))
    ms.set_auto_parallel_context(strategy_ckpt_save_file=path)
    return path
