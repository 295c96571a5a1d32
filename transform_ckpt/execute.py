"""Carries a plan out: prepare DST.partial, move the bytes, finish, rename.  The only writer of destinations.

DST.partial lies beside DST, so that the last step is one rename; it holds preallocated files with their headers, and
the journal.  Replacing an old DST happens after the new one is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transform_ckpt import manifest, workers
from transform_ckpt.crc import check_crc, crc32, has_crcs, has_trailer, storage_crcs, write_crc
from transform_ckpt.destination import (
    check_destination,
    check_not_inside,
    free_nbytes,
    fsync_tree,
    give_name,
    unused_name,
    write_small,
)
from transform_ckpt.digests import DIGEST_DIGITS, collect_crcs, collect_digests, part_ranges, range_digest
from transform_ckpt.errors import InputError, StorageError, UsageError
from transform_ckpt.formats.files import storage_error
from transform_ckpt.journal import Journal, record
from transform_ckpt.kernels import BLOCK_NBYTES, Mover
from transform_ckpt.planner import Group, Place, Plan
from transform_ckpt.preallocate import preallocate
from transform_ckpt.store import AllWriters, FileTable, PlaceWriter, TensorReader, WitnessWriter, Writer, write_fully
from transform_ckpt.tensors import FileHeader

SMALL_NBYTES = 8 * 1024 * 1024
"""Less than this is not worth a process."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run: nothing here changes a byte of the output."""

    workers: int = 0
    memory_nbytes: int = 1 << 30
    overwrite: bool = False
    resume: bool = True
    fsync: bool = False
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: expected 1 or more (default: one for each core)")
        if self.memory_nbytes < 1 << 20:
            raise UsageError(f"--memory {self.memory_nbytes:,} bytes: at least 1M is needed")

    def crew(self, nbytes: int) -> int:
        """Processes for a job of this size."""
        if nbytes < SMALL_NBYTES:
            return 1
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def block_nbytes(self) -> int:
        """Two buffers of this size are all that a process allocates."""
        return min(BLOCK_NBYTES, self.memory_nbytes // 4 & ~0xFF)  # no element is cut


def run(plan: Plan, dst: str, options: RunOptions, check: Callable[[str], None] | None = None) -> Execution:
    """Write the destination; returns when it has its final name.

    `check` is given the path of the complete output before that, and may raise: then it keeps its partial name.
    """
    job = Execution(plan, dst, options)
    job.run(check)
    return job


class Execution:
    """One run into one destination."""

    def __init__(self, plan: Plan, dst: str, options: RunOptions) -> None:
        self.plan, self.options = plan, options
        self.dst = os.path.realpath(dst) if os.path.islink(dst.rstrip("/")) else os.path.abspath(dst)
        self.partial = self.dst + ".partial"
        self.paths = [os.path.join(self.partial, f.relpath) for f in plan.target.files]
        self.journal = Journal(self.partial)
        self.fingerprint = manifest.plan_fingerprint(plan)
        self.resumed_units = 0
        self.notes: list[str] = []
        self._stamped: list[list[int]] = []
        self._worker: _UnitWorker | None = None

    def run(self, check: Callable[[str], None] | None = None) -> None:
        """Prepare, move, finish, check, commit."""
        check_destination(self.dst, overwrite=self.options.overwrite)
        for src in self.plan.source.paths():
            check_not_inside(src, self.dst)
            check_not_inside(src, self.partial)
        check_crcs(self.plan.source.headers, self.options)
        self._enter()
        try:
            self._check_still_free()
            done = self._prepare()
            try:
                self._move([u for u in range(len(self.plan.units)) if u not in done])
            except InputError:  # the source contradicts itself: nothing is worth keeping
                shutil.rmtree(self.partial, ignore_errors=True)
                raise
            self._finish()
            if check is not None:
                check(self.partial)
            self._commit()
        finally:
            self.journal.unlock()

    def _check_still_free(self) -> None:
        """Another run may have finished since; then nothing of ours stays."""
        try:
            check_destination(self.dst, overwrite=self.options.overwrite)
        except UsageError:
            if os.listdir(self.partial) == [os.path.basename(self.journal.directory)] and not self.journal.read_plan():
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _enter(self) -> None:
        """Take DST.partial, which must be ours or not there."""
        self._tidy_interrupted_commit()
        foreign = os.path.lexists(self.partial) and not self.journal.exists
        if foreign and (not os.path.isdir(self.partial) or os.listdir(self.partial)):
            raise UsageError(f"{self.partial}: is in the way and not a partial output of ours: move it away")
        try:
            os.makedirs(self.partial, exist_ok=True)
        except FileNotFoundError as error:  # /proc and the like: not the source is at fault
            raise StorageError(f"{self.partial}: cannot be created: {error.strerror}: choose another place") from None
        except OSError as error:
            raise storage_error(self.partial, error, "creating the destination") from None
        self.journal.lock()

    def _tidy_interrupted_commit(self) -> None:
        """A run that was killed right after the names were exchanged: DST is new and whole, DST.partial the old one."""
        left = os.path.join(self.dst, os.path.basename(self.journal.directory))
        if not os.path.isdir(left) or os.listdir(left) not in ([], ["lock"]):
            return
        committing = Journal(self.dst)
        committing.lock()  # refused while that run is still at it
        try:
            if os.path.isdir(self.partial) and not self.journal.exists:
                os.rename(self.partial, unused_name(self.dst + ".replaced"))
            shutil.rmtree(left, ignore_errors=True)
        finally:
            committing.unlock()

    def _prepare(self) -> dict[int, list[str]]:
        """Files with headers and their full size; units that an earlier run finished."""
        stamps = self._stamped = _stamps(self.plan)
        found = self.journal.read_plan()
        if found is not None and self.options.resume:
            if (found.get("plan"), found.get("stamps")) == (self.fingerprint, stamps):
                return self._resumable()
            if not self.options.overwrite:
                raise UsageError(
                    f"{self.partial}: holds the partial output of another plan (or its source has changed): finish "
                    "that one, or add --no-resume to start over"
                )
        self._clear()
        try:
            self._preallocate()
        except StorageError:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        self.journal.write_plan({"plan": self.fingerprint, "stamps": stamps})
        return {}

    def _clear(self) -> None:
        for name in os.listdir(self.partial):
            path = os.path.join(self.partial, name)
            if path != self.journal.directory:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        for name in os.listdir(self.journal.directory):
            if name != "lock":
                os.unlink(os.path.join(self.journal.directory, name))

    def _preallocate(self) -> None:
        needed, free = self.plan.write_nbytes, free_nbytes(self.partial)
        if needed > free:
            raise StorageError(
                f"{self.dst}: needs {needed:,} bytes, {free:,} are free there: free some space or choose another disk"
            )
        for path, file in zip(self.paths, self.plan.target.files, strict=True):
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise storage_error(path, error, "creating the file") from None
            try:
                preallocate(fd, path, file.skeleton.nbytes)
                for offset, data in file.skeleton.chunks:
                    write_fully(fd, path, offset, memoryview(data))
            finally:
                os.close(fd)

    def _resumable(self) -> dict[int, list[str]]:
        """Units of the journal whose bytes are still what they were; the others are done again."""
        for path, file in zip(self.paths, self.plan.target.files, strict=True):
            if not os.path.isfile(path) or os.path.getsize(path) != file.skeleton.nbytes:
                raise UsageError(f"{path}: was changed since the interrupted run: add --no-resume to start over")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            for offset, data in file.skeleton.chunks:
                write_fully(fd, path, offset, memoryview(data))
            os.close(fd)
        done = {u: d for u, d in self.journal.done().items() if u < len(self.plan.units)}
        table = FileTable(os.O_RDONLY)
        try:
            intact = {unit: digests for unit, digests in done.items() if self._intact(table, unit, digests)}
        finally:
            table.close()
        if len(intact) < len(done):
            self.journal.keep(intact)  # or what was recorded before could stand beside what is done again
        self.resumed_units = len(intact)
        return intact

    def _intact(self, table: FileTable, unit: int, digests: Sequence[str]) -> bool:
        ranges = list(part_ranges(self.plan, unit))
        return len(ranges) == len(digests) and all(
            range_digest(table, self.paths[place.file], place.extents, at, nbytes) == digest[:DIGEST_DIGITS]
            for (group, write, at, nbytes), digest in zip(ranges, digests, strict=True)
            for place in self.plan.groups[group].writes[write]
        )

    def _move(self, units: Sequence[int]) -> None:
        total = self.plan.read_nbytes
        show = self.options.progress
        progress = None if show is None else lambda done: show(done, total)
        try:
            workers.run(units, self._make_work, self.options.crew(total), progress)
        finally:
            if self._worker is not None:
                self._worker.close()

    def _make_work(self) -> workers.Work:
        log = self.journal.open_log()
        self._worker = _UnitWorker(self.plan, self.paths, self.options.block_nbytes, log)
        return self._worker.do

    def _finish(self) -> None:
        """Trailers, small files, manifest; everything durable on request."""
        done = self.journal.done()
        missing = [u for u in range(len(self.plan.units)) if u not in done]
        if missing:
            raise StorageError(f"{self.journal.directory}: {len(missing)} units are not recorded: run again")
        if _stamps(self.plan) != self._stamped:
            raise StorageError(f"{self.plan.source.root}: was changed while it was read: run again with --no-resume")
        self._write_crcs()
        self._write_seals(done)
        for small in self.plan.target.small:
            write_small(os.path.join(self.partial, small.relpath), small.data)
        digests = collect_digests(self.plan, done)
        text = manifest.content(self.plan, self.fingerprint, digests)
        write_small(os.path.join(self.partial, manifest.NAME), text)
        if self.options.fsync:
            fsync_tree(self.partial)

    def _write_crcs(self) -> None:
        """Each file is read once more for its crc, several at a time."""
        files = self.plan.target.files
        trailing = [number for number, file in enumerate(files) if has_trailer(file)]
        total = sum(files[number].skeleton.nbytes for number in trailing)

        def work(number: int, advance: Callable[[int], None]) -> None:
            write_crc(self.paths[number], files[number])
            advance(files[number].skeleton.nbytes)

        workers.run(trailing, lambda: work, self.options.crew(total), None)

    def _write_seals(self, done: Mapping[int, Sequence[str]]) -> None:
        """What a file says of its own bytes, from the checksums of the parts; no byte is read again."""
        parts = None
        for number, (path, file) in enumerate(zip(self.paths, self.plan.target.files, strict=True)):
            if file.seal is None:
                continue
            if parts is None:
                parts = collect_crcs(self.plan, done)
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for offset, data in file.seal(storage_crcs(file.storages, parts.get(number, ()))):
                    write_fully(fd, path, offset, memoryview(data))
            finally:
                os.close(fd)

    def _commit(self) -> None:
        """DST.partial becomes DST; an old DST leaves only now, and one that was made meanwhile only if it may."""
        check_destination(self.dst, overwrite=self.options.overwrite)
        try:
            self.journal.retire()
            left = give_name(self.partial, self.dst)
            shutil.rmtree(os.path.join(self.dst, os.path.basename(self.journal.directory)))
        except OSError as error:
            raise storage_error(self.dst, error, "giving the output its final name") from None
        if left is not None:
            shutil.rmtree(left, ignore_errors=True)
            if os.path.lexists(left):
                self.notes.append(f"{left}: the old output, which this user may not delete")


@dataclass(slots=True)
class _Sum:
    """Checksums of what one write receives: XXH3 always, CRC-32 where a file will say its own."""

    hasher: Any
    crc: int | None

    def update(self, data: memoryview) -> None:
        self.hasher.update(data)
        if self.crc is not None:
            self.crc = crc32(data, self.crc)

    def text(self) -> str:
        digest: str = self.hasher.hexdigest()
        return digest if self.crc is None else f"{digest}{self.crc:08x}"


class _UnitWorker:
    """One process's hands: open files, buffers, its journal."""

    def __init__(self, plan: Plan, paths: Sequence[str], block_nbytes: int, log: int) -> None:
        import xxhash

        self._plan, self._paths, self._log = plan, paths, log
        self._reading, self._writing = FileTable(os.O_RDONLY), FileTable(os.O_RDWR)
        self._mover = Mover(block_nbytes)
        self._hasher = xxhash.xxh3_128
        self._held = bytearray()
        self._sealed = {number for number, file in enumerate(plan.target.files) if file.seal is not None}

    def do(self, unit: int, advance: Callable[[int], None]) -> None:
        """All tasks of one unit, then its line in the journal."""
        digests: list[str] = []
        for task in self._plan.units[unit]:
            group = self._plan.groups[task.group]
            sums = {index: self._sum(group.writes[index]) for index in self._plan.active(task)}
            readers = [TensorReader(self._reading, tensor) for tensor in group.reads]
            writers = [self._writer(group, index) for index in range(len(group.writes))]
            self._mover.move(
                group.component,
                (task.start, task.stop),
                readers,
                writers,
                lambda index, data, s=sums: s[index].update(data),  # type: ignore[misc]
            )
            digests.extend(sums[index].text() for index in sorted(sums))
            advance((task.stop - task.start) * (group.component.nbytes // group.component.shape[0]))
        record(self._log, unit, digests)

    def _sum(self, places: Sequence[Place]) -> _Sum:
        return _Sum(self._hasher(), 0 if any(p.file in self._sealed for p in places) else None)

    def _writer(self, group: Group, index: int) -> Writer:
        places = group.writes[index]
        found: list[Writer] = [PlaceWriter(self._writing, self._targets(places))] if places else []
        held = group.witnesses[index] if group.witnesses else ()
        found += [WitnessWriter(self._reading, tensor, group.name, self._held) for tensor in held]
        return found[0] if len(found) == 1 else AllWriters(found)

    def close(self) -> None:
        """Close every file; only a worker in the caller's own process needs it."""
        self._reading.close()
        self._writing.close()
        os.close(self._log)

    def _targets(self, places: Sequence[Place]) -> list[tuple[str, Any]]:
        return [(self._paths[p.file], p.extents) for p in places]


def check_crcs(headers: Sequence[FileHeader], options: RunOptions, *, every: bool = False) -> None:
    """Every source file with a checksum of its own is read through before anything is written.

    Those that have one for each tensor (torch.save writes it, and torch.load never looks) only with `every`.
    """
    checked = [h for h in headers if (has_crcs(h) if every else h.crc32 is not None)]
    total = sum(h.nbytes for h in checked)

    def work(index: int, advance: Callable[[int], None]) -> None:
        check_crc(checked[index])
        advance(checked[index].nbytes)

    workers.run(range(len(checked)), lambda: work, options.crew(total), None)


def _stamps(plan: Plan) -> list[list[int]]:
    """Size and mtime of the source files, to notice a source that changes between two runs."""
    stats = [os.stat(h.path) for h in plan.source.headers]
    return [[s.st_size, s.st_mtime_ns] for s in stats]
