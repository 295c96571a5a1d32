"""The step itself: a function with the parameters of MindFormers' `transform_and_load_checkpoint`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from transform_ckpt.auto.compiler import write_to
from transform_ckpt.auto.job import check_origin, request_of, save_strategy
from transform_ckpt.auto.mindformers import places
from transform_ckpt.auto.mindformers.config import COMPILED_MODES, Call
from transform_ckpt.auto.mindformers.launch import find_job_launcher
from transform_ckpt.auto.mindformers.loading import load
from transform_ckpt.auto.mindformers.strategies import Sought
from transform_ckpt.auto.mindformers.weights import needs_conversion
from transform_ckpt.auto.origin import Origin
from transform_ckpt.auto.settings import JobSettings, check_world
from transform_ckpt.auto.transform import AutoTransform
from transform_ckpt.launcher import Launcher


def replacement_step(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Our step, with MindFormers' own behind it for what needs no transform."""

    @wraps(theirs)
    def transform_and_load_checkpoint(
        config: Any,
        model: Any,
        network: Any,
        dataset: Any,
        optimizer: Any = None,
        do_eval: bool = False,  # noqa: FBT001, FBT002 - MindFormers' own
        do_predict: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        call = Call(config, model, network, dataset, optimizer, do_eval, do_predict)
        places.function(places.CHECK_CONFIG)(config)
        if config.only_save_strategy:
            _save_strategy(call)
            sys.exit(0)
        if config.auto_trans_ckpt:
            conversion = needs_conversion(call)
            if not conversion:
                _transform_and_load(call, call.settings)
                return
            _say(f"MindFormers' own transform is used: {conversion}")
            _separate_strategies(call)
        elif call.rank_directories and not config.use_parallel:
            _load_on_one_rank(call)
            return
        theirs(config, model, network, dataset, optimizer=optimizer, do_eval=do_eval, do_predict=do_predict)

    return transform_and_load_checkpoint


def _say(text: str) -> None:
    from mindformers.tools.logger import logger

    logger.info(text)


def _transform_and_load(call: Call, settings: JobSettings) -> None:
    launcher = find_job_launcher()
    check_world(settings, launcher.world)
    job = _job(call, settings, launcher)
    with job.together():
        found = job.resolve()
        _check_source(settings, found, launcher)
        if call.do_eval or call.do_predict:
            call.network.set_train(False)  # as load_checkpoint_with_safetensors does: the compiler has less to do
        Sought(job, call, settings).settle()
        job.plan()
        job.transform()
        job.wait()
        load(job, call, settings)
    if job.shares:
        call.set_path(job.result_directory)


def _load_on_one_rank(call: Call) -> None:
    """Rank directories on one device: MindFormers 1.9.0 refuses them, or takes rank 0's slices for the whole.

    Nothing was said of a transform, so nothing is written.
    """
    settings = replace(call.settings, auto_trans_ckpt=True, transform_in_memory=True, transform_process_num=None)
    _transform_and_load(call, settings)


def _job(call: Call, settings: JobSettings, launcher: Launcher) -> AutoTransform:
    resume = bool(settings.resume_training) and call.optimizer is not None
    request = request_of(settings, optimizer=resume)
    # MindFormers fills in load_ckpt_format: ckpt, so only the other one is the user's word
    container = request.container if request.container != "ckpt" else None
    return AutoTransform(replace(request, container=container), launcher, _say)


def _check_source(settings: JobSettings, found: Origin, launcher: Launcher) -> None:
    known = settings.load_ckpt_format in found.formats
    asked = settings if known else replace(settings, load_ckpt_format=None)
    for note in check_origin(asked, found) if launcher.rank == 0 else ():
        _say(note)


def _save_strategy(call: Call) -> None:
    """only_save_strategy: the strategy files of this job, and nothing else."""
    settings = call.settings
    launcher = find_job_launcher()
    if launcher.world == 1:
        save_strategy(settings, launcher, _say)
        return
    check_world(settings, launcher.world)
    job = _job(call, settings, launcher)
    with job.together():
        Sought(job, call, settings).settle()
        job.publish_strategy()
        job.rendezvous.loaded()
    _say(f"only_save_strategy: strategy files are in {job.strategy_directory}")


def _separate_strategies(call: Call) -> None:
    """MindFormers' transform merges all strategy files of a directory: let it be this run's own."""
    import mindspore as ms

    launcher = find_job_launcher()
    if launcher.world > 1 and ms.get_auto_parallel_context("parallel_mode") in COMPILED_MODES:
        job = _job(call, call.settings, launcher)
        with job.together():
            write_to(job.strategy_directory, launcher.rank)
            job.rendezvous.loaded()
