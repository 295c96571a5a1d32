"""The Python interface: convert, plan, load.  The command line calls these; a trainer may too."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from strategy.generate_files import DIRECTORY as STRATEGY_DIRECTORY
from strategy.layout import Strategy
from transform_ckpt import dtypes, planner, values
from transform_ckpt.destination import check_destination
from transform_ckpt.errors import DifferenceError, InputError, PlanError, UsageError
from transform_ckpt.execute import RunOptions, check_crcs, run
from transform_ckpt.formats import container_of
from transform_ckpt.megatron.directory import is_converted
from transform_ckpt.planner import Plan
from transform_ckpt.source import CHECKPOINT_2, MEGATRON, Purpose, detect, open_source
from transform_ckpt.target import TargetOptions, lay_out
from transform_ckpt.tensors import SmallFile, Source
from transform_ckpt.verify import check_source

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def without_collection() -> Iterator[None]:
    """Plans are large and without cycles: looking for cycles would cost three times the planning itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


StrategyLike = Strategy | str | os.PathLike[str] | None


def read_strategy(strategy: StrategyLike) -> Strategy | None:
    """A strategy from a file or directory; None and the word "None" are complete weights."""
    if strategy is None or isinstance(strategy, Strategy):
        return strategy
    path = os.fspath(strategy)
    if path in ("", "None"):
        return None
    from strategy import mindspore_file

    return mindspore_file.read_strategy(path)


def open_checkpoint(
    src: str | os.PathLike[str],
    strategy: StrategyLike = None,
    step: int | None = None,
    allow_missing: Sequence[str] = (),
    purpose: Purpose | None = None,
) -> Source:
    """A checkpoint's headers as a Source, with strings and small states read.

    With a `purpose` (some ranks of a target strategy) only files that they need are opened.
    """
    path, own = os.path.abspath(src), read_strategy(strategy)
    if is_converted(path):
        return values.settle(_open_converted(path, own, step))
    kind = detect(path)
    if kind == MEGATRON:
        return values.settle(_open_megatron(path, own, step, allow_missing))
    return values.settle(open_source(path, own, step, allow_missing, purpose, kind))


def _open_megatron(path: str, strategy: Strategy | None, step: int | None, allow_missing: Sequence[str]) -> Source:
    from transform_ckpt.megatron.read import Options, open_megatron

    if strategy is not None:
        raise InputError(f"{path}: a Megatron checkpoint describes its own layout: drop the source strategy")
    return open_megatron(path, Options(step, allow_missing=allow_missing)).source


def _open_converted(path: str, strategy: Strategy | None, step: int | None) -> Source:
    """Shards of Megatron in MindSpore: pt_meta says how they go together, the strategy must be of as many ranks."""
    from transform_ckpt.megatron.as_mindspore import renamed
    from transform_ckpt.megatron.mindspore_source import open_converted, scalar_states

    found = open_converted(path, step=step)
    sizes = found.facts.sizes
    world = sizes.tp * sizes.pp * sizes.dp * sizes.cp
    if strategy is not None and strategy.world != world:
        raise InputError(
            f"{path}: was written for {world} ranks (pt_meta), the source strategy {strategy.origin} is for "
            f"{strategy.world}: give strategy/ beside it, or none"
        )
    return renamed(found.source, scalar_states(found))


@without_collection()
def plan(
    src: str | os.PathLike[str],
    *,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    dst_parallel: str | None = None,
    container: str | None = None,
    step: int | None = None,
    prefix: str = "checkpoint_",
    unified: bool = False,
    checkpoint_2: bool = False,
    crc: bool = False,
    optimizer: bool = True,
    carry: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> Plan:
    """What `convert` would do: every file, every byte range, proven complete.  Writes nothing.

    `dst_parallel` ("dp=2,mp=4,pp=2,opt=1") generates the destination's strategy by rule, in place of `dst_strategy`;
    its files are written to DST/strategy.  `container` is "ckpt" or "safetensors"; default the source's.  `carry` are
    patterns of names that may be in no strategy, `allow_missing` of names that the source strategy lists and no file
    holds.  Raises InputError (bad source or strategy) and PlanError (ambiguous or incomplete).
    """
    source = open_checkpoint(src, src_strategy, step, allow_missing)
    check_source(source, full=False)
    strategy, small = _destination_strategy(source, dst_strategy, dst_parallel)
    chosen = container or _container_of(source, only_safetensors=unified or checkpoint_2)
    if chosen not in ("ckpt", "safetensors"):
        raise UsageError(f"--format {chosen!r}: expected ckpt or safetensors")
    options = TargetOptions(
        "ckpt" if chosen == "ckpt" else "safetensors", prefix, unified, checkpoint_2, crc, optimizer, tuple(carry)
    )
    target = lay_out(source, strategy, options)
    return planner.build(source, replace(target, small=(*target.small, *small)))


def _destination_strategy(
    source: Source, strategy: StrategyLike, parallel: str | None
) -> tuple[Strategy | None, tuple[SmallFile, ...]]:
    """What was given, or generated by rule: then its files go into the destination."""
    if parallel is None:
        return read_strategy(strategy), ()
    if read_strategy(strategy) is not None:
        raise UsageError("--dst-strategy and --dst-parallel both say what the destination is: give one of them")
    from strategy.generate import for_parameters
    from strategy.generate_files import rank_file_contents

    laid_out = {n: p for n, p in source.params.items() if p.dtype != dtypes.STRING}
    found = for_parameters(
        {n: p.shape for n, p in laid_out.items()}, {n: p.dtype for n, p in laid_out.items()}, parallel
    )
    contents = rank_file_contents(found, "--dst-parallel")
    return found, tuple(SmallFile(f"{STRATEGY_DIRECTORY}/{name}", data) for name, data in contents.items())


def _container_of(source: Source, *, only_safetensors: bool) -> str:
    formats = {container_of(h.path) for h in source.headers}
    return "ckpt" if formats == {"ckpt"} and not only_safetensors else "safetensors"


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did."""

    dst: str
    files: int
    write_nbytes: int
    read_nbytes: int
    resumed_units: int
    verified: bool
    notes: tuple[str, ...]


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    run_options: RunOptions | None = None,
    verify: bool = False,
    **plan_options: Any,
) -> Result:
    """Transform the checkpoint at `src` into `dst`; keywords as for `plan`.

    Output appears under its final name only when complete; StorageError, PartialError and KeyboardInterrupt leave
    `dst`.partial, which the same call continues.
    """
    options = run_options or RunOptions()
    check_destination(os.fspath(dst), overwrite=options.overwrite)
    made = plan(src, **plan_options)

    def check(path: str) -> None:
        written = os.path.join(path, STRATEGY_DIRECTORY) if plan_options.get("dst_parallel") else None
        verify_output(made, path, written or plan_options.get("dst_strategy"), options.progress)

    return carry_out(made, dst, options, check if verify else None)


def carry_out(
    made: Plan, dst: str | os.PathLike[str], options: RunOptions, check: Callable[[str], None] | None = None
) -> Result:
    """Write what a plan says; with `check` the source's own digests are looked at before, the output behind."""
    if check is not None:
        check_source(made.source, full=True)
        check_crcs(made.source.headers, options, every=True)
    job = run(made, os.fspath(dst), options, check)
    return Result(
        job.dst,
        len(made.target.files),
        made.write_nbytes,
        made.read_nbytes,
        job.resumed_units,
        check is not None,
        (*made.notes, *job.notes),
    )


def verify_output(
    made: Plan, dst: str, dst_strategy: StrategyLike, progress: Callable[[int, int], None] | None = None
) -> None:
    """Open what was written as anyone would and compare it with the source; DifferenceError names what differs."""
    from transform_ckpt.compare import check_output

    described = made.target.format == CHECKPOINT_2
    try:
        # a name that the source lacks, too, may be missing; what only the output lacks, the comparison names
        reopened = open_checkpoint(dst, None if described else dst_strategy, allow_missing=("*",))
    except (InputError, PlanError) as error:
        raise DifferenceError(f"{dst}: 1 differences from the source: it cannot be read again: {error}") from None
    check_output(made, dst, reopened, progress)


def load(
    src: str | os.PathLike[str],
    *,
    rank: int = 0,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    step: int | None = None,
    optimizer: bool = True,
    carry: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> Iterator[tuple[str, np.ndarray[Any, Any] | str]]:
    """One rank's parameters under `dst_strategy`, straight from the source: (name, array or string), nothing written.

    Arrays are C-ordered NumPy arrays that own their memory; bfloat16 and float8 have ml_dtypes types.  Only the bytes
    that the rank needs are read, one parameter at a time.  `carry` and `allow_missing` as for `plan`; raises InputError
    and PlanError at the call, StorageError while reading.
    """
    target = read_strategy(dst_strategy)
    world = target.world if target else 1
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of a destination strategy for {world} ranks")
    source = open_checkpoint(src, src_strategy, step, allow_missing, Purpose(target, [rank]))
    options = TargetOptions("ckpt", optimizer=optimizer, carry=tuple(carry))
    return load_planned(planner.build(source, lay_out(source, target, options, [rank])))


def load_planned(made: Plan) -> Iterator[tuple[str, np.ndarray[Any, Any] | str]]:
    """(name, array or string) of every tensor of a plan for one file, in the file's order; nothing is written."""
    from transform_ckpt.memory import load_file

    return load_file(made)


__all__ = [
    "Plan",
    "Purpose",
    "Result",
    "RunOptions",
    "convert",
    "detect",
    "load",
    "load_planned",
    "open_checkpoint",
    "plan",
    "read_strategy",
    "without_collection",
]
