"""Carries a plan out: prepare DST.partial, move the bytes, finish, rename.  The only writer of destinations.

DST.partial lies beside DST, so that the last step is one rename; it holds preallocated files with their headers, and
the journal.  Replacing an old DST happens after the new one is complete.
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transform_ckpt import manifest, workers
from transform_ckpt.errors import InputError, StorageError, UsageError
from transform_ckpt.formats import ckpt, safetensors
from transform_ckpt.formats.files import storage_error
from transform_ckpt.journal import Journal, record
from transform_ckpt.kernels import BLOCK_NBYTES, Mover
from transform_ckpt.planner import Place, Plan
from transform_ckpt.preallocate import preallocate
from transform_ckpt.store import FileTable, PlaceWriter, TensorReader, read_fully, write_fully
from transform_ckpt.tensors import FileHeader, TargetFile, Tensor

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
        return min(BLOCK_NBYTES, self.memory_nbytes // 4)


def check_destination(dst: str, *, overwrite: bool) -> None:
    """UsageError when DST holds something that may not be replaced."""
    if not dst:
        raise UsageError("the destination is empty: name a directory")
    if not os.path.lexists(dst):
        above = os.path.dirname(os.path.abspath(dst))
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above):
            raise UsageError(f"{dst}: cannot be made, {above} is not a directory: choose another destination")
        return
    if not os.path.isdir(dst):
        kind = "a symbolic link to nothing" if os.path.islink(dst) and not os.path.exists(dst) else "a file"
        raise UsageError(f"{dst}: is {kind}; the destination must be a directory: choose another")
    if os.path.ismount(os.path.realpath(dst)):
        raise UsageError(f"{dst}: is a mount point, which cannot be replaced by the output: name a directory below it")
    try:
        occupied = os.listdir(dst)
    except OSError as error:
        raise storage_error(dst, error, "looking into the destination") from None
    if occupied and not overwrite:
        raise UsageError(
            f"{dst}: is not empty ({len(occupied)} entries): choose another destination, or add --overwrite to replace "
            "it once the new output is complete"
        )


def free_nbytes(dst: str) -> int:
    """Free space where DST is to be, in bytes."""
    folder = os.path.dirname(os.path.abspath(dst))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


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
        for src in (self.plan.source.root, *(header.path for header in self.plan.source.headers)):
            _check_not_inside(src, self.dst)
            _check_not_inside(src, self.partial)
        check_crcs(self.plan.source.headers, self.options)
        self._enter()
        try:
            self._check_still_free()
            done = self._prepare()
            self._move([u for u in range(len(self.plan.units)) if u not in done])
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
        if os.path.isdir(left) and os.listdir(left) in ([], ["lock"]):
            if os.path.isdir(self.partial) and not self.journal.exists:
                os.rename(self.partial, unused_name(self.dst + ".replaced"))
            shutil.rmtree(left, ignore_errors=True)

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
        intact = {unit for unit, digests in done.items() if self._intact(unit, digests)}
        self.resumed_units = len(intact)
        return {unit: done[unit] for unit in intact}

    def _intact(self, unit: int, digests: Sequence[str]) -> bool:
        from transform_ckpt.verify import part_ranges, range_digest

        table = FileTable(os.O_RDONLY)
        try:
            ranges = [(g, w, at, n) for g, w, at, n in part_ranges(self.plan, unit)]
            if len(ranges) != len(digests):
                return False
            for (group, write, at, nbytes), digest in zip(ranges, digests, strict=True):
                for place in self.plan.groups[group].writes[write]:
                    if range_digest(table, self.paths[place.file], place.extents, at, nbytes) != digest:
                        return False
            return True
        finally:
            table.close()

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
        for path, file in zip(self.paths, self.plan.target.files, strict=True):
            write_crc(path, file)
        for small in self.plan.target.small:
            _write_small(os.path.join(self.partial, small.relpath), small.data)
        digests = collect_digests(self.plan, done)
        text = manifest.content(self.plan, self.fingerprint, digests)
        _write_small(os.path.join(self.partial, manifest.NAME), text)
        if self.options.fsync:
            _fsync_tree(self.partial)

    def _commit(self) -> None:
        """DST.partial becomes DST; an old DST leaves only now."""
        try:
            self.journal.retire()
            left = _give_name(self.partial, self.dst)
            shutil.rmtree(os.path.join(self.dst, os.path.basename(self.journal.directory)))
        except OSError as error:
            raise storage_error(self.dst, error, "giving the output its final name") from None
        if left is not None:
            shutil.rmtree(left, ignore_errors=True)
            if os.path.lexists(left):
                self.notes.append(f"{left}: the old output, which this user may not delete")


def _give_name(path: str, dst: str) -> str | None:
    """Rename a directory over `dst`, in one step where the kernel can; returns where a full old `dst` is now."""
    if not os.path.isdir(dst) or not os.listdir(dst):
        os.rename(path, dst)
        return None
    old = unused_name(dst + ".replaced")
    if _exchange(path, dst):
        os.rename(path, old)
        return old
    os.rename(dst, old)
    try:
        os.rename(path, dst)
    except OSError:
        os.rename(old, dst)
        raise
    return old


def unused_name(path: str) -> str:
    """`path`, or with a number where something is there already."""
    found, number = path, 1
    while os.path.lexists(found):
        number += 1
        found = f"{path}.{number}"
    return found


def _exchange(one: str, other: str) -> bool:
    """Swap two names by renameat2(2): there is no moment without a `dst`.  False where that is not possible."""
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(function(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


class _UnitWorker:
    """One process's hands: open files, buffers, its journal."""

    def __init__(self, plan: Plan, paths: Sequence[str], block_nbytes: int, log: int) -> None:
        import xxhash

        self._plan, self._paths, self._log = plan, paths, log
        self._reading, self._writing = FileTable(os.O_RDONLY), FileTable(os.O_RDWR)
        self._mover = Mover(block_nbytes)
        self._hasher = xxhash.xxh3_128

    def do(self, unit: int, advance: Callable[[int], None]) -> None:
        """All tasks of one unit, then its line in the journal."""
        digests: list[str] = []
        for task in self._plan.units[unit]:
            group = self._plan.groups[task.group]
            hashers = {index: self._hasher() for index in self._plan.active(task)}
            readers = [TensorReader(self._reading, tensor) for tensor in group.reads]
            writers = [PlaceWriter(self._writing, self._targets(places)) for places in group.writes]
            self._mover.move(
                group.component,
                (task.start, task.stop),
                readers,
                writers,
                lambda index, data, h=hashers: h[index].update(data),  # type: ignore[misc]
            )
            digests.extend(hashers[index].hexdigest() for index in sorted(hashers))
            advance((task.stop - task.start) * (group.component.nbytes // group.component.shape[0]))
        record(self._log, unit, digests)

    def close(self) -> None:
        """Close every file; only a worker in the caller's own process needs it."""
        self._reading.close()
        self._writing.close()
        os.close(self._log)

    def _targets(self, places: Sequence[Place]) -> list[tuple[str, Any]]:
        return [(self._paths[p.file], p.extents) for p in places]


def collect_digests(plan: Plan, done: dict[int, list[str]]) -> dict[int, dict[str, list[tuple[int, str]]]]:
    """Digests of the journal, by file and tensor, each tensor's parts in the order of its bytes."""
    from transform_ckpt.verify import part_ranges

    found: dict[int, dict[str, list[tuple[int, str]]]] = {}
    for unit in range(len(plan.units)):
        for (group, write, _, nbytes), digest in zip(part_ranges(plan, unit), done[unit], strict=True):
            for place in plan.groups[group].writes[write]:
                found.setdefault(place.file, {}).setdefault(place.name, []).append((nbytes, digest))
    return found


def write_crc(path: str, file: TargetFile) -> None:
    """Fill the crc trailer of a .ckpt that has room for one."""
    if file.header_format != ckpt.FORMAT or not file.skeleton.chunks:
        return
    if not file.skeleton.chunks[-1][1].startswith(ckpt.CRC_MARK):
        return
    end = file.skeleton.nbytes - ckpt.CRC_NBYTES
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        crc = crc32_of(fd, path, 0, end)
        trailer = ckpt.CRC_MARK + crc.to_bytes(ckpt.CRC_NBYTES - len(ckpt.CRC_MARK), "big")
        write_fully(fd, path, end, memoryview(trailer))
    finally:
        os.close(fd)


def crc32_of(fd: int, path: str, start: int, nbytes: int, crc: int = 0) -> int:
    """crc32 of a range of a file, through one buffer."""
    buffer = memoryview(bytearray(min(max(nbytes, 1), 1 << 20)))
    at = start
    while at < start + nbytes:
        part = buffer[: min(len(buffer), start + nbytes - at)]
        read_fully(fd, path, at, part)
        crc = zlib.crc32(part, crc)
        at += len(part)
    return crc


def check_crcs(headers: Sequence[FileHeader], options: RunOptions) -> None:
    """Every source file with a checksum of its own is read through before anything is written."""
    checked = [h for h in headers if h.crc32 is not None]
    total = sum(h.nbytes for h in checked)

    def work(index: int, advance: Callable[[int], None]) -> None:
        check_crc(checked[index])
        advance(checked[index].nbytes)

    workers.run(range(len(checked)), lambda: work, options.crew(total), None)


def check_crc(header: FileHeader) -> None:
    """InputError when a file's own checksum does not fit its bytes."""
    fd = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if header.format == safetensors.FORMAT:
            found = 0
            for name in sorted(n for n, t in header.tensors.items() if t.inline is None):
                found = _tensor_crc32(fd, header.tensors[name], zlib.crc32(name.encode(), found))
        else:
            found = crc32_of(fd, header.path, 0, header.crc_nbytes)
    finally:
        os.close(fd)
    if found != header.crc32:
        raise InputError(
            f"{header.path}: its crc_check value is {header.crc32}, its bytes give {found}: the file is damaged: "
            "fetch or save it again"
        )


def _tensor_crc32(fd: int, tensor: Tensor, crc: int) -> int:
    """As MindSpore computes it, by Python's bytes(array): for an integer n of shape () that is n zeros."""
    extent = tensor.extents[0]
    if tensor.shape or tensor.dtype[0] not in "IU":
        return crc32_of(fd, tensor.path, extent.offset_bytes, extent.nbytes, crc)
    left = int.from_bytes(os.pread(fd, extent.nbytes, extent.offset_bytes), "little")
    while 0 < left < 1 << 40:  # MindSpore could not have held more
        crc = zlib.crc32(bytes(min(left, 1 << 20)), crc)
        left -= min(left, 1 << 20)
    return crc


def _stamps(plan: Plan) -> list[list[int]]:
    """Size and mtime of the source files, to notice a source that changes between two runs."""
    stats = [os.stat(h.path) for h in plan.source.headers]
    return [[s.st_size, s.st_mtime_ns] for s in stats]


def _check_not_inside(src: str, dst: str) -> None:
    source, target = os.path.realpath(src), os.path.realpath(dst)
    if os.path.isdir(source) and (source == target or target.startswith(source + os.sep)):
        raise UsageError(f"{dst}: lies inside the source {src}: choose another destination")
    if source.startswith(target + os.sep):
        raise UsageError(f"{src}: lies inside the destination {dst}: choose another destination")


def _write_small(path: str, data: bytes) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(data)
    except OSError as error:
        raise storage_error(path, error, "writing") from None


def _fsync_tree(root: str) -> None:
    for folder, _, names in os.walk(root):
        for path in (*(os.path.join(folder, n) for n in names), folder):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise storage_error(path, error, "making it durable") from None
            finally:
                os.close(fd)
