"""How this job's parameters are cut: from MindSpore's compiler, from MindFormers' Python, else by rule.

MindFormers 1.9.0 takes what the compiler wrote (trainer/utils.py `transform_and_load_checkpoint`), and with parallel
mode STAND_ALONE what it made itself (utils/load_checkpoint_utils.py `process_for_stand_alone_mode`).
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from strategy import mindspore_file
from strategy.generate import Generated
from strategy.generate_files import RANK_FILE
from strategy.layout import Strategy
from transform_ckpt.auto.compiler import compile_strategies
from transform_ckpt.auto.mindformers.config import COMPILED_MODES, Call
from transform_ckpt.auto.mindformers.standalone import strategy_of
from transform_ckpt.auto.rendezvous import DIRECTORY
from transform_ckpt.auto.runs import STRATEGY
from transform_ckpt.auto.settings import JobSettings
from transform_ckpt.auto.strategies import by_rule, differences
from transform_ckpt.auto.transform import AutoTransform
from transform_ckpt.errors import InputError

_PYTHON_MODES = ("STAND_ALONE", "MANUAL_PARALLEL")
"""parallel.parallel_mode whose slices MindFormers cuts in Python (tools/utils.py `PARALLEL_MODE`)."""

_IN_MEMORY = "in_memory"
_GRAPH = (0, "GRAPH_MODE")


@dataclass(frozen=True, slots=True)
class Sought:
    """Where a job's strategy comes from."""

    job: AutoTransform
    call: Call
    settings: JobSettings

    def settle(self) -> Strategy | None:
        """Give the job its strategy; None for one rank, which holds everything."""
        if self.job.launcher.world == 1:
            return self.job.use_strategy(None)
        if self.settings.setting("parallel.parallel_mode") in _PYTHON_MODES:
            return self.job.use_strategy(strategy_of(self.call.network, self.job.launcher.world))
        reason = not_compiled(self.call)
        if not reason:
            return self._compiled()
        self.job.say(f"strategies come by rule: {reason}")
        generated = self._by_rule()
        for note in generated.notes:
            self.job.say(note)
        return self.job.use_strategy(generated.strategy)

    def _by_rule(self) -> Generated:
        return by_rule(self.settings.document, self.settings.config)

    def _compiled(self) -> Strategy:
        import mindspore as ms

        call = self.call
        path = compile_strategies(
            call.model,
            call.dataset,
            call.config,
            self._prepared(),
            self.job.launcher.rank,
            do_eval=call.do_eval,
            do_predict=call.do_predict,
        )
        strategy = self._taken(path, stages=int(ms.get_auto_parallel_context("pipeline_stages")))
        self._compare(strategy)
        return strategy

    @property
    def _together(self) -> bool:
        """Do the ranks share a run?  In memory nobody waits for another."""
        return self.job.shares or self.settings.only_save_strategy

    def _prepared(self) -> str:
        """Where this job's strategy files are to be written: with the run's results, or, in memory, in no run."""
        if self._together:
            return self.job.strategy_directory
        known = os.path.join(self.job.output, STRATEGY)
        if os.path.islink(known):  # an earlier run's
            known = os.path.join(self.job.output, DIRECTORY, _IN_MEMORY, STRATEGY)
        if self.job.launcher.rank == 0:
            _drop_ranks_from(known, self.job.launcher.world)
        return known

    def _taken(self, path: str, stages: int) -> Strategy:
        """All ranks' strategy from their files; in memory this rank's own."""
        if self._together:
            return self.job.collect_strategy(stages)
        self.job.say(f"this job's strategy files are in {os.path.dirname(path)}")
        strategy = self._alone(path, stages)
        self.job.strategy = strategy
        return strategy

    def _alone(self, path: str, stages: int) -> Strategy:
        """This rank's stage as written; the other stages, which this rank never reads, by rule."""
        launcher = self.job.launcher
        own = mindspore_file.read_stage_file(path).stage
        if own.devices * stages != launcher.world:
            raise InputError(
                f"{path}: is for {own.devices} devices a stage, but {launcher.world} ranks are running in {stages} "
                "stages: data_parallel * model_parallel * context_parallel * pipeline_stage must be their number"
            )
        if stages == 1:
            return Strategy((own,), path)
        ruled = list(self._by_rule().strategy.stages)
        ruled[launcher.rank // own.devices] = own
        return Strategy(tuple(ruled), path)

    def _compare(self, strategy: Strategy) -> None:
        """Say where the compiler and the rules disagree.  The compiler is right; the rules want to be mended."""
        if self.job.launcher.rank != 0:
            return
        try:
            ruled = self._by_rule()
        except InputError as error:
            self.job.say(f"the compiler's strategies are not compared, there are no rules for this job: {error}")
            return
        for text in differences(strategy, ruled.strategy, ruled.shapes):
            _warn(f"the compiler's strategy is used, the rules disagree: {text}")


def not_compiled(call: Call) -> str:
    """Why the compiler has no strategies for this job; "" when it has."""
    import mindspore as ms

    mode = ms.get_auto_parallel_context("parallel_mode")
    if mode not in COMPILED_MODES:
        return f"the compiler lays nothing out in parallel mode {mode}"
    if call.config.context.mode not in _GRAPH:
        return "PyNative mode compiles nothing"
    target = ms.get_context("device_target")
    return "" if target == "Ascend" else f"MindSpore's compiler makes strategies on Ascend only, this is {target}"


def _drop_ranks_from(directory: str, world: int) -> None:
    """Remove strategy files of ranks that this job has not: they are an earlier, larger job's."""
    for number in itertools.count(world):
        try:
            os.unlink(os.path.join(directory, RANK_FILE.format(rank=number)))
        except FileNotFoundError:
            return


def _warn(text: str) -> None:
    from mindformers.tools.logger import logger

    logger.warning(text)
