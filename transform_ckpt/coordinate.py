"""Several processes, each with some target ranks of one destination, none waiting for another.

Each makes its ranks complete beside the destination, then moves them in under a lock; whoever finds that all ranks are
there writes the one manifest, which is the same as if one process had done everything.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transform_ckpt import manifest, planner
from transform_ckpt.errors import UsageError
from transform_ckpt.execute import RunOptions, run
from transform_ckpt.formats.files import storage_error
from transform_ckpt.planner import Plan


def run_ranks(
    plan: Plan, dst: str, ranks: Sequence[int], options: RunOptions, check: Callable[[str], None] | None = None
) -> bool:
    """Write the files of `ranks` only; True when the destination is complete with them.

    `plan` is the plan of the whole destination, the same in every process.
    """
    dst = os.path.abspath(dst)
    if list(ranks) == list(range(len(plan.target.files))):
        run(plan, dst, options, check)
        return True
    files = tuple(plan.target.files[rank] for rank in ranks)
    mine = planner.build(plan.source, replace(plan.target, files=files))
    taken = [f.relpath for f in files if os.path.lexists(os.path.join(dst, os.path.dirname(f.relpath)))]
    if taken and not options.overwrite:
        raise UsageError(f"{dst}: {os.path.dirname(taken[0])} is there already: add --overwrite to replace it")
    part = f"{dst}.rank_{ranks[0]}"
    run(mine, part, replace(options, overwrite=True), check)
    try:
        os.makedirs(dst, exist_ok=True)
        with _locked(dst):
            return _move_in(plan, part, dst, ranks)
    except OSError as error:
        raise storage_error(dst, error, "moving the finished ranks in") from None


@contextmanager
def _locked(dst: str) -> Iterator[None]:
    fd = os.open(dst + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _move_in(plan: Plan, part: str, dst: str, ranks: Sequence[int]) -> bool:
    for rank in ranks:
        folder = os.path.dirname(plan.target.files[rank].relpath)
        target = os.path.join(dst, folder)
        if os.path.isdir(target):
            shutil.rmtree(target)
        os.rename(os.path.join(part, folder), target)
    found = manifest.read(part) or {}
    if os.path.lexists(os.path.join(dst, manifest.NAME)):  # of an earlier run, which this one replaces part by part
        os.unlink(os.path.join(dst, manifest.NAME))
    with open(os.path.join(dst, f"{manifest.NAME}.rank_{ranks[0]}"), "w", encoding="utf-8") as stream:
        json.dump(found, stream)
    shutil.rmtree(part)
    return _complete(plan, dst)


def _complete(plan: Plan, dst: str) -> bool:
    """Join the parts' manifests when every file is there."""
    names = sorted(n for n in os.listdir(dst) if n.startswith(manifest.NAME + ".rank_"))
    files: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for name in names:
        with open(os.path.join(dst, name), encoding="utf-8") as stream:
            whole = json.load(stream)
        files |= whole["files"]
    wanted = [f.relpath for f in plan.target.files]
    if any(path not in files for path in wanted):
        return False
    whole["plan"] = manifest.plan_fingerprint(plan)
    whole["files"] = {path: files[path] for path in wanted}
    with open(os.path.join(dst, manifest.NAME), "w", encoding="utf-8") as stream:
        stream.write(json.dumps(whole, indent=1) + "\n")
    for name in names:
        os.unlink(os.path.join(dst, name))
    os.unlink(dst + ".lock")
    return True
