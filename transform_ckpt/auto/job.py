"""A job of run_mindformer.py, from its settings to its end: which rank, which strategies, which trainer.

With MindFormers and an accelerator the job is MindFormers' own, with our transform in the place of its; without, the
embedded Llama runs on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from strategy.generate import Generated
from strategy.generate_files import write_rank_files
from strategy.layout import Strategy
from transform_ckpt.auto import handover, runs
from transform_ckpt.auto.accounting import account
from transform_ckpt.auto.origin import Origin
from transform_ckpt.auto.request import Request
from transform_ckpt.auto.settings import JobSettings, Kind, check_source, check_world, read_settings
from transform_ckpt.auto.strategies import by_rule
from transform_ckpt.auto.transform import AutoTransform
from transform_ckpt.launcher import Launcher, find_launcher, in_modelarts
from transform_ckpt.views import Shape

if TYPE_CHECKING:
    import numpy as np

    Held = dict[str, np.ndarray[Any, Any] | str]

Say = Callable[[str], None]
_KINDS: Mapping[str, Kind] = {"ranks": "ranks", "file": "file"}
"""Kind of an Origin -> kind that the settings know; everything else is complete."""


def main(argv: Sequence[str], work_path: str, say: Say = print) -> None:
    """Run the job of a command line; errors of transform_ckpt.errors go to the caller."""
    settings = read_settings(argv, work_path=work_path)
    launcher = find_launcher(settings.rank_id, settings.world_size)
    if launcher.scheduler and settings.only_save_strategy and not handover.possible():
        say(f"{launcher}: converts nothing")  # and nobody will call for it
        return
    if launcher.scheduler:
        say(f"{launcher}: converts nothing, waits for the workers")
        from transform_ckpt.embedded.job import run_scheduler

        run_scheduler()
        return
    first = launcher.rank == 0
    say(f"{settings.config}: {settings.run_mode}, {launcher}")
    for note in settings.notes if first else ():
        say(f"note: {note}")
    if handover.possible():
        handover.hand_over(settings)
        return
    if settings.only_save_strategy:
        save_strategy(settings, launcher, say)
        return
    check_world(settings, launcher.world)
    Job(settings, launcher, say).run()


def request_of(settings: JobSettings, *, optimizer: bool) -> Request:
    """What the settings ask of the automatic transform."""
    return Request(
        load_checkpoint=settings.load_checkpoint or "",
        output_dir=settings.output_dir,
        src_strategy=settings.src_strategy,
        transform=settings.auto_trans_ckpt,
        resume=settings.resume_training if isinstance(settings.resume_training, str) else None,
        processes=settings.transform_process_num,
        in_memory=settings.transform_in_memory,
        optimizer=optimizer,
        container=settings.load_ckpt_format,
        keep=settings.keep,
        timeout=settings.transform_timeout,
        saves=settings.is_training or settings.only_save_strategy,
        remote_url=settings.remote_save_url if in_modelarts() else None,
    )


def check_origin(settings: JobSettings, found: Origin) -> tuple[str, ...]:
    """InputError when the settings do not fit what load_checkpoint turned out to be; else notes."""
    kind = _KINDS.get(found.kind, "complete")
    return check_source(settings, kind, found.ranks, found.formats, strategy=found.strategy)


def save_strategy(settings: JobSettings, launcher: Launcher, say: Say) -> None:
    """only_save_strategy: all ranks' files when one process runs, each its own under a launcher."""
    generated = by_rule(settings.document, settings.config)
    _say_notes(generated, launcher, say)
    job = AutoTransform(replace(request_of(settings, optimizer=False), transform=False), launcher, say)
    if launcher.world > 1:
        check_world(settings, launcher.world)
        with job.together():
            job.use_strategy(generated.strategy)
            job.publish_strategy()
    else:
        write_rank_files(generated.strategy, job.strategy_directory, merged=len(generated.strategy.stages) > 1)
        runs.mark_saving(job.output, job.rendezvous.run_id)
        runs.point(settings.output_dir, job.rendezvous.run_id, runs.STRATEGY, say)
    known = os.path.join(settings.output_dir, runs.STRATEGY)
    say(f"only_save_strategy: strategy files are in {known} ({job.strategy_directory})")


class Job:
    """One rank of a training, evaluation or prediction."""

    def __init__(self, settings: JobSettings, launcher: Launcher, say: Say) -> None:
        self.settings, self.launcher, self.say = settings, launcher, say
        self.transform = AutoTransform(request_of(settings, optimizer=bool(settings.resume_training)), launcher, say)
        self.strategy: Strategy | None = None

    def run(self) -> None:
        """To the end of the job."""
        if self.settings.use_parallel and self.launcher.world > 1:
            generated = by_rule(self.settings.document, self.settings.config)
            _say_notes(generated, self.launcher, self.say)
            self.strategy = generated.strategy
        from transform_ckpt.auto.embedded_run import run_embedded

        with self.transform.together():
            run_embedded(self)

    def load(self, expected: Mapping[str, Shape]) -> Held:
        """This rank's tensors of load_checkpoint, cut as the job needs them, each accounted for."""
        job = self.transform
        notes = check_origin(self.settings, job.resolve())
        for note in notes if self.launcher.rank == 0 else ():
            self.say(f"note: {note}")
        job.use_strategy(self.strategy)
        job.plan()
        job.transform()
        job.wait()
        held = dict(job.load())
        shapes = {name: () if isinstance(value, str) else tuple(value.shape) for name, value in held.items()}
        result = account(expected, shapes)
        for line in result.lines():
            self.say(f"rank {self.launcher.rank}: {line}")
        result.check(strict=self.settings.load_strict)
        return held

    def publish_strategy(self) -> None:
        """What a later job needs to read the checkpoints of this one."""
        self.transform.strategy = self.strategy
        self.transform.publish_strategy()


def _say_notes(generated: Generated, launcher: Launcher, say: Say) -> None:
    for note in generated.notes if launcher.rank == 0 else ():
        say(f"note: {note}")
