"""Several processes, each with some target ranks of one destination, none waiting for another.

Each makes its ranks complete beside the destination, then moves them in under a lock and leaves a record of each rank;
whoever finds the records of all ranks writes the one manifest, which is the same as if one process had done everything.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from transform_ckpt import manifest, planner
from transform_ckpt.destination import check_destination, check_not_inside
from transform_ckpt.digests import part_ranges, range_digest
from transform_ckpt.errors import InputError, StorageError, UsageError
from transform_ckpt.execute import RunOptions, run
from transform_ckpt.formats.files import read_json, storage_error, write_json
from transform_ckpt.journal import DIRECTORY
from transform_ckpt.planner import Plan
from transform_ckpt.store import FileTable

MARK = "transform_succeed_rank_{}.txt"
"""What MindFormers leaves for each process that is done."""

_MARK = re.compile(r"transform_succeed_rank_\d+\.txt")
_RANK_DIR = re.compile(r"rank_\d+")


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
    for src in plan.source.paths():
        check_not_inside(src, dst)
    _check_room(plan, dst, ranks, options)
    files = tuple(plan.target.files[rank] for rank in ranks)
    mine = planner.build(plan.source, replace(plan.target, files=files))
    part = f"{dst}.rank_{ranks[0]}"
    _clear_part(plan, part)
    run(mine, part, replace(options, overwrite=True), check)
    try:
        found = _as_planned(plan, part, ranks)
        os.makedirs(dst, exist_ok=True)
        with _locked(dst):
            return _move_in(plan, part, dst, ranks, found)
    except OSError as error:
        raise storage_error(dst, error, "moving the finished ranks in") from None


def _check_room(plan: Plan, dst: str, ranks: Sequence[int], options: RunOptions) -> None:
    """UsageError when the destination holds these ranks, or ranks of another world, and may not be replaced."""
    check_destination(dst, overwrite=True)
    if options.overwrite or not os.path.isdir(dst):
        return
    ours = {_folder(plan, rank) for rank in range(len(plan.target.files))}
    mine = {_folder(plan, rank) for rank in ranks}
    for name in sorted(os.listdir(dst)):
        if name in mine:
            raise UsageError(f"{dst}: {name} is there already: add --overwrite to replace it")
        if _RANK_DIR.fullmatch(name) and name not in ours:
            raise UsageError(
                f"{dst}: {name} is there, of a result with more than these {len(ours)} ranks: choose another "
                "destination, or add --overwrite to replace it"
            )


def _clear_part(plan: Plan, part: str) -> None:
    """Remove what a run that was killed while moving in has left; UsageError when it is somebody else's."""
    if not os.path.lexists(part):
        return
    ours = {manifest.NAME, DIRECTORY, *(_folder(plan, rank) for rank in range(len(plan.target.files)))}
    try:
        if os.path.islink(part) or not os.path.isdir(part) or not ours.issuperset(os.listdir(part)):
            raise UsageError(f"{part}: is in the way and not a part of ours: move it away")
        shutil.rmtree(part)
    except OSError as error:
        raise storage_error(part, error, "making room for a part") from None


def _folder(plan: Plan, rank: int) -> str:
    return os.path.dirname(plan.target.files[rank].relpath)


def _as_planned(plan: Plan, part: str, ranks: Sequence[int]) -> Mapping[str, Any]:
    """The part's manifest, its digests cut where the plan of the whole destination cuts them."""
    found = manifest.read(part)
    if found is None:
        raise StorageError(f"{part}: its {manifest.NAME} is gone: run again")
    wanted: dict[tuple[int, str], list[int]] = {}
    for unit in range(len(plan.units)):
        for group, write, _, nbytes in part_ranges(plan, unit):
            for place in plan.groups[group].writes[write]:
                wanted.setdefault((place.file, place.name), []).append(nbytes)
    table = FileTable(os.O_RDONLY)
    try:
        for rank in ranks:
            file = plan.target.files[rank]
            tensors = found["files"][file.relpath]["tensors"]
            for name, text in tensors.items():
                sizes = wanted.get((rank, name), [])
                if sizes == [int(piece.split(":")[0]) for piece in filter(None, text.split(","))]:
                    continue
                at, pieces = 0, []
                for nbytes in sizes:
                    path = os.path.join(part, file.relpath)
                    digest = range_digest(table, path, file.skeleton.places[name], at, nbytes)
                    pieces.append(f"{nbytes}:{digest}")
                    at += nbytes
                tensors[name] = ",".join(pieces)
    finally:
        table.close()
    return found


@contextmanager
def _locked(dst: str) -> Iterator[None]:
    path = dst + ".lock"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                break
        os.close(fd)  # whoever had it has removed it
    try:
        yield
    finally:
        os.close(fd)


def _move_in(plan: Plan, part: str, dst: str, ranks: Sequence[int], found: Mapping[str, Any]) -> bool:
    """Exchange the ranks; what says anything about the old ones goes first, so that nothing is ever said wrongly."""
    fingerprint = manifest.plan_fingerprint(plan)
    _take_apart(plan, dst, fingerprint)
    for rank in ranks:
        with suppress(FileNotFoundError):
            os.unlink(_record(dst, rank))
        target = os.path.join(dst, _folder(plan, rank))
        if os.path.isdir(target):
            shutil.rmtree(target)
        os.rename(os.path.join(part, _folder(plan, rank)), target)
        relpath = plan.target.files[rank].relpath
        write_json(_record(dst, rank), {"plan": fingerprint, "file": found["files"][relpath]})
    complete = _complete(plan, dst, fingerprint, found)
    shutil.rmtree(part)
    return complete


def _take_apart(plan: Plan, dst: str, fingerprint: str) -> None:
    """The manifest becomes records of its ranks.  Records, marks and further ranks of another plan are removed."""
    path = os.path.join(dst, manifest.NAME)
    try:
        old = manifest.read(dst) or {}
    except InputError:
        old = {}
    current = old.get("plan") == fingerprint
    for rank, file in enumerate(plan.target.files if current else ()):
        write_json(_record(dst, rank), {"plan": fingerprint, "file": old["files"][file.relpath]})
    same = any(_read(_record(dst, rank), fingerprint) is not None for rank in range(len(plan.target.files)))
    if os.path.lexists(path):
        os.unlink(path)
    if same:
        return
    ours = {_folder(plan, rank) for rank in range(len(plan.target.files))}
    for name in sorted(os.listdir(dst)):
        if _MARK.fullmatch(name) or name.startswith(manifest.NAME + ".rank_"):
            os.unlink(os.path.join(dst, name))
        elif _RANK_DIR.fullmatch(name) and name not in ours:
            shutil.rmtree(os.path.join(dst, name))


def _record(dst: str, rank: int) -> str:
    return os.path.join(dst, f"{manifest.NAME}.rank_{rank}")


def _read(path: str, fingerprint: str) -> Any:
    """What a record of this plan says; None when there is none."""
    found = read_json(path)
    return found.get("file") if found.get("plan") == fingerprint else None


def _complete(plan: Plan, dst: str, fingerprint: str, found: Mapping[str, Any]) -> bool:
    """Join the records into the manifest when every rank has one; `found` is any part's manifest."""
    files: dict[str, Any] = {}
    for rank, file in enumerate(plan.target.files):
        entry = _read(_record(dst, rank), fingerprint)
        if entry is None or not os.path.isfile(os.path.join(dst, file.relpath)):
            return False
        files[file.relpath] = entry
    write_json(os.path.join(dst, manifest.NAME), {**found, "plan": fingerprint, "files": files}, indent=1)
    for rank in range(len(plan.target.files)):
        os.unlink(_record(dst, rank))
    os.unlink(dst + ".lock")
    return True
