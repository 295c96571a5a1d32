"""A job on a machine without accelerators: the embedded Llama with the job's checkpoint.  Needs mindspore (CPU)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transform_ckpt.embedded.config import read_embedded
from transform_ckpt.errors import InputError
from transform_ckpt.views import Shape

if TYPE_CHECKING:
    from transform_ckpt.auto.job import Held, Job


def run_embedded(job: Job) -> None:
    """Train, evaluate or predict; InputError for what only the real trainer can do."""
    settings, rank, world = job.settings, job.launcher.rank, job.launcher.world
    config = read_embedded(settings.document, settings.config)
    try:
        from transform_ckpt.embedded import job as embedded
    except ImportError as error:
        raise InputError(
            f"{settings.config}: run_mode {settings.run_mode} needs mindspore ({error}): pip install mindspore, or "
            "use only_save_strategy: True, which needs nothing"
        ) from None

    def load(expected: Mapping[str, Shape]) -> Held:
        held = job.load(expected)
        if not settings.load_strict:
            held = {**embedded.unloaded(config, rank, set(expected) - set(held)), **held}
        if settings.is_training:
            job.publish_strategy()
        return held

    loader = load if settings.load_checkpoint else None
    if settings.is_training:
        if loader is None:
            job.publish_strategy()
        resume = bool(settings.resume_training)
        embedded.train(config, rank, world, settings.output_dir, loader, resume=resume, report=job.say)
        return
    if settings.run_mode == "eval":
        loss = embedded.evaluate(config, rank, world, loader)
        if rank == 0:
            job.say(f"mean loss {loss:.6f}")
        return
    report = job.say if rank == 0 else _unsaid
    embedded.predict(config, rank, world, settings.predict_data, loader, report=report)


def _unsaid(_line: str) -> None:
    """Every rank has the same prediction; one says it."""
