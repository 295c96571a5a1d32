"""auto_trans_ckpt: a job's checkpoint, from where it is to this rank's parameters, in explicit steps.

    resolve -> strategies -> plan -> transform -> wait -> load

By default every rank makes its own slice and waits for nobody; with `processes` fewer ranks make contiguous blocks for
the others.  Nothing here knows MindSpore or MindFormers: parameters come out as NumPy arrays, one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from strategy.layout import Strategy
from transform_ckpt import api, planner
from transform_ckpt.auto import hf_names, origin, runs
from transform_ckpt.auto.bucket import Bucket
from transform_ckpt.auto.part import join_records, make_part
from transform_ckpt.auto.remote import Remote
from transform_ckpt.auto.rendezvous import Rendezvous
from transform_ckpt.auto.request import Request
from transform_ckpt.auto.strategies import first_ranks, read_compiled, write_merged, write_own
from transform_ckpt.errors import InputError, PlanError
from transform_ckpt.execute import RunOptions
from transform_ckpt.formats import container_of
from transform_ckpt.launcher import Launcher
from transform_ckpt.planner import Plan
from transform_ckpt.sharing import maker, share
from transform_ckpt.target import TargetOptions, lay_out
from transform_ckpt.tensors import Source
from transform_ckpt.verify import check_source

if TYPE_CHECKING:
    import numpy as np

STRATEGY_WRITTEN, TRANSFORMED = "strategy_written", "transformed"
"""Milestones."""


class AutoTransform:
    """One rank's automatic transform.  `say` takes lines for the log."""

    def __init__(self, request: Request, launcher: Launcher, say: Callable[[str], None]) -> None:
        self.request, self.launcher, self.say = request, launcher, say
        self.output = os.path.abspath(request.output_dir)
        self.bucket = Bucket(Remote.open(request.remote_url), request.timeout) if request.remote_url else None
        board = self.bucket.board if self.bucket else None
        self.rendezvous = Rendezvous(self.output, launcher, request.timeout, say, board)
        self.origin: origin.Origin | None = None
        self.strategy: Strategy | None = None
        self.plans: dict[str, Plan] = {}
        self.read_nbytes = 0
        self._published = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in this block, whatever it is, ends the other ranks too, with its reason."""
        try:
            yield
        except BaseException as error:
            if self.shares or self.rendezvous.run_id:
                self.rendezvous.fail(error)
                self.rendezvous.leave()
            raise

    @property
    def shares(self) -> bool:
        """Does this run write anything, for itself or others?"""
        return self.request.transform and not self.request.in_memory

    @property
    def strategy_directory(self) -> str:
        """Where this run's strategy files are (or, before that, where a compiler should write them)."""
        self._join()
        return os.path.join(self.rendezvous.directory, runs.STRATEGY)

    @property
    def result_directory(self) -> str:
        """What holds `{name}/rank_{r}/` of this run."""
        return os.path.join(self.rendezvous.directory, runs.TRANSFORMED)

    def _join(self) -> None:
        if not self.rendezvous.run_id:
            self.rendezvous.join()
            if self.launcher.rank == 0:
                self.say(f"run {self.rendezvous.run_id} of {self.launcher.world} ranks in {self.rendezvous.root}")

    # ------------------------------------------------------------------------------------------- the steps

    def resolve(self) -> origin.Origin:
        """What is to be loaded; looked up before any well-known name may change."""
        request = self.request
        self.origin = origin.resolve(
            request.load_checkpoint, request.src_strategy, request.resume, transform=request.transform
        )
        self._tell(*self.origin.notes)
        return self.origin

    def use_strategy(self, strategy: Strategy | None) -> Strategy | None:
        """This job's strategy, known to every rank by rule; None for one rank, which has everything.

        Nobody waits.  When the run writes at all, each rank writes its own file for whoever comes later.
        """
        self._check_world(strategy)
        self.strategy = strategy
        if self.shares:
            self.publish_strategy()
        return strategy

    def publish_strategy(self) -> None:
        """Write this rank's strategy file; the well-known name points at the directory when all ranks have done so."""
        if self.strategy is None or self._published:
            return
        self._published = True
        write_own(self.strategy, self.strategy_directory, self.launcher.rank)
        self._give_strategy()
        self._strategy_is_written(self.strategy)
        if not self.shares:
            self.rendezvous.loaded()  # nothing else comes from the others: ranks may end when they like

    def collect_strategy(self, stages: int) -> Strategy:
        """This job's strategy as the compiler has written it to `strategy_directory`, each rank its own file.

        The one wait that every rank has: for the first rank of each stage.
        """
        world, directory = self.launcher.world, self.strategy_directory
        self._give_strategy()
        self.rendezvous.reach(STRATEGY_WRITTEN)
        self.rendezvous.wait(STRATEGY_WRITTEN, first_ranks(world, stages))
        if self.bucket:
            self.bucket.fetch_strategies(self.rendezvous, directory, first_ranks(world, stages))
        self.strategy = read_compiled(directory, world, stages)
        self._published = True
        self._strategy_is_written(self.strategy)
        return self.strategy

    def plan(self) -> Mapping[str, Plan]:
        """What this rank will do for each checkpoint, proven complete.  InputError and PlanError as `api.plan`."""
        found = self.origin or self.resolve()
        ranks = self._ranks() if self.shares else [self.launcher.rank]
        for name, path in found.checkpoints.items():
            if ranks:
                self.plans[name] = self._plan(path, ranks)
                self._tell(*self.plans[name].notes)
        return self.plans

    def transform(self) -> None:
        """Write this rank's share below `result_directory`; in memory: nothing."""
        if not self.shares:
            return
        self._join()
        options = RunOptions(workers=self._workers(), memory_nbytes=self.request.memory_nbytes, progress=self._progress)
        for name, plan in self.plans.items():
            if make_part(plan, self.output, self.rendezvous.run_id, name, options, self.say):
                self.read_nbytes += plan.read_nbytes
            if self.bucket:
                self.bucket.give_ranks(self.rendezvous.run_id, self.result_directory, name, self._ranks())
        if self.rendezvous.reach(TRANSFORMED):
            self._all_transformed()

    def wait(self) -> None:
        """Until this rank's file is there: by default it is; else the rank that makes it is waited for, by name."""
        if self.shares:
            self.rendezvous.wait(TRANSFORMED, [self._maker()])
            self.rendezvous.check()
        if self.shares and self.bucket and self._maker() != self.launcher.rank:
            for name in self.origin.checkpoints if self.origin else ():
                self.bucket.fetch_rank(self.rendezvous, self.result_directory, name, self.launcher.rank)

    def load(self) -> Iterator[tuple[str, np.ndarray[Any, Any] | str]]:
        """(name, array) of every tensor of this rank, one at a time; only bytes that the rank needs are read."""
        plans = self._own_files() if self.shares else self.plans
        seen: dict[str, str] = {}
        for name, plan in plans.items():
            if not self.shares:
                self.read_nbytes += plan.read_nbytes
            for tensor, value in api.load_planned(plan):
                if seen.setdefault(tensor, name) != name:
                    raise PlanError(f"{tensor!r} is in {seen[tensor]} and in {name}: leave one of them")
                yield tensor, value
        if self.shares:
            self.rendezvous.loaded()

    # ------------------------------------------------------------------------------------------- their parts

    def _check_world(self, strategy: Strategy | None) -> None:
        world = strategy.world if strategy is not None else 1
        if world != self.launcher.world:
            raise InputError(
                f"the job's strategy is for {world} ranks, but {self.launcher.world} are running ({self.launcher}): "
                "data_parallel * model_parallel * context_parallel * pipeline_stage must be their number"
            )

    def _give_strategy(self) -> None:
        if self.bucket:
            rank, world = self.launcher.rank, self.launcher.world
            self.bucket.give_strategy(self.rendezvous.run_id, self.strategy_directory, rank, world)

    def _strategy_is_written(self, strategy: Strategy) -> None:
        """Whoever finds everyone done lets the well-known name mean this run's: all have looked up their source."""
        if self.rendezvous.reach("strategy_known"):
            write_merged(strategy, self.strategy_directory)
            if self.request.saves:
                runs.mark_saving(self.output, self.rendezvous.run_id)
            runs.point(self.output, self.rendezvous.run_id, runs.STRATEGY, self.say)

    def _all_transformed(self) -> None:
        for name in self.origin.checkpoints if self.origin and not self.bucket else ():
            join_records(self.output, self.rendezvous.run_id, name, self.launcher.world)
        runs.point(self.output, self.rendezvous.run_id, runs.TRANSFORMED, self.say)
        needed = filter(None, (*self._sources(), self.rendezvous.directory))
        removed = runs.prune(self.output, self.request.keep, list(needed), self.say)
        if removed:
            self.say(f"results of older runs removed (keep {self.request.keep}): {', '.join(removed)}")

    def _sources(self) -> list[str]:
        found = self.origin
        return [] if found is None else [*found.checkpoints.values(), found.strategy or ""]

    def _ranks(self) -> list[int]:
        world = self.launcher.world
        return list(share(world, self.request.processes or world, self.launcher.rank))

    def _maker(self) -> int:
        world = self.launcher.world
        return maker(world, self.request.processes or world, self.launcher.rank)

    def _workers(self) -> int:
        """Cores of this host shared by the ranks of this host that work."""
        if self.request.workers:
            return self.request.workers
        working = min(self.request.processes or self.launcher.world, self.launcher.local_world or self.launcher.world)
        return max(1, len(os.sched_getaffinity(0)) // working)

    def _plan(self, path: str, ranks: list[int]) -> Plan:
        """The plan of one checkpoint for some target ranks; auto_trans_ckpt: False: what this rank saved, as it is."""
        found = self.origin or self.resolve()
        own = not self.request.transform and found.sharded
        path = os.path.join(path, f"rank_{self.launcher.rank}") if own else path
        with api.without_collection():
            purpose = api.Purpose(self.strategy, ranks) if self.request.transform else None
            source = api.open_checkpoint(path, None if own else found.strategy, found.step, purpose=purpose)
            if hf_names.is_hugging_face(source):
                source = hf_names.renamed(source)
            check_source(source, full=False)
            strategy, files = (self.strategy, ranks) if self.request.transform else (None, None)
            return planner.build(source, lay_out(source, strategy, self._options(source), files))

    def _options(self, source: Source) -> TargetOptions:
        held = {container_of(header.path) for header in source.headers}
        chosen = self.request.container or ("ckpt" if held == {"ckpt"} else "safetensors")
        return TargetOptions("ckpt" if chosen == "ckpt" else "safetensors", optimizer=self.request.optimizer)

    def _own_files(self) -> dict[str, Plan]:
        """This rank's files as they were written, to be read whole."""
        found: dict[str, Plan] = {}
        for name in self.origin.checkpoints if self.origin else ():
            folder = os.path.join(self.result_directory, name, f"rank_{self.launcher.rank}")
            (path,) = (os.path.join(folder, n) for n in os.listdir(folder) if container_of(n))
            if not os.path.getsize(path):  # a .ckpt without tensors: this rank's stage has none of this checkpoint's
                continue
            source = api.open_checkpoint(path)
            found[name] = planner.build(source, lay_out(source, None, TargetOptions("ckpt")))
        return found

    def _progress(self, _done: int, _total: int) -> None:
        self.rendezvous.check()

    def _note(self, text: str) -> None:
        if self.launcher.rank == 0:
            self.say(text)

    def _tell(self, *notes: str) -> None:
        for note in notes:
            self._note(note)
