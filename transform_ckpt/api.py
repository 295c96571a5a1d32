"""The Python interface: convert, plan, load.  The command line calls these; a trainer may too."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategy.layout import Strategy
from transform_ckpt import planner, values
from transform_ckpt.destination import check_destination
from transform_ckpt.errors import DifferenceError, InputError, PlanError, UsageError
from transform_ckpt.execute import RunOptions, run
from transform_ckpt.formats import container_of
from transform_ckpt.planner import Plan
from transform_ckpt.source import CHECKPOINT_2, detect, open_source
from transform_ckpt.target import TargetOptions, lay_out
from transform_ckpt.tensors import Source

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def _no_collection() -> Iterator[None]:
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
) -> Source:
    """A checkpoint's headers as a Source, with strings and small states read."""
    return values.settle(open_source(os.fspath(src), read_strategy(strategy), step, allow_missing))


@_no_collection()
def plan(
    src: str | os.PathLike[str],
    *,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
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

    `container` is "ckpt" or "safetensors"; default the source's.  `carry` are patterns of names that may be in no
    strategy, `allow_missing` of names that the source strategy lists and no file holds.  Raises InputError (bad source
    or strategy) and PlanError (ambiguous or incomplete).
    """
    source = open_checkpoint(src, src_strategy, step, allow_missing)
    chosen = container or _container_of(source, only_safetensors=unified or checkpoint_2)
    if chosen not in ("ckpt", "safetensors"):
        raise UsageError(f"--format {chosen!r}: expected ckpt or safetensors")
    options = TargetOptions(
        "ckpt" if chosen == "ckpt" else "safetensors", prefix, unified, checkpoint_2, crc, optimizer, tuple(carry)
    )
    return planner.build(source, lay_out(source, read_strategy(dst_strategy), options))


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
        verify_output(made, path, plan_options.get("dst_strategy"), options.progress)

    job = run(made, os.fspath(dst), options, check if verify else None)
    return Result(
        job.dst,
        len(made.target.files),
        made.write_nbytes,
        made.read_nbytes,
        job.resumed_units,
        verify,
        (*made.notes, *job.notes),
    )


def verify_output(
    made: Plan, dst: str, dst_strategy: StrategyLike, progress: Callable[[int, int], None] | None = None
) -> None:
    """Open what was written as anyone would and compare it with the source; DifferenceError names what differs."""
    from transform_ckpt.compare import check_output

    described = made.target.format == CHECKPOINT_2
    try:
        reopened = open_checkpoint(dst, None if described else dst_strategy)
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
) -> Iterator[tuple[str, np.ndarray[Any, Any] | str]]:
    """One rank's parameters under `dst_strategy`, straight from the source: (name, array or string), nothing written.

    Arrays are C-ordered NumPy arrays that own their memory; bfloat16 and float8 have ml_dtypes types.  Only the bytes
    that the rank needs are read, one parameter at a time.
    """
    from transform_ckpt.memory import load_rank

    target = read_strategy(dst_strategy)
    world = target.world if target else 1
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of a destination strategy for {world} ranks")
    source = open_checkpoint(src, src_strategy, step)
    laid_out = lay_out(source, target, TargetOptions("ckpt", optimizer=optimizer, carry=tuple(carry)))
    return load_rank(source, laid_out, rank)


__all__ = ["Plan", "Result", "RunOptions", "convert", "detect", "load", "open_checkpoint", "plan", "read_strategy"]
