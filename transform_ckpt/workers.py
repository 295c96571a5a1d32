"""Runs units of work in forked processes: units go out through one pipe, errors come back through another.

Forked after planning, so that the plan is shared memory.  A worker that dies takes only its unit with it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from transform_ckpt import errors
from transform_ckpt.errors import PartialError, StorageError, TransformError

Progress = Callable[[int], None]
"""Called with the bytes done so far."""

Work = Callable[[int, Callable[[int], None]], None]
"""Does one unit; calls back with bytes as they are done."""

_INDEX = struct.Struct("<I")
_COUNT = struct.Struct("<Q")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.1


def run(units: Sequence[int], make_work: Callable[[], Work], workers: int, progress: Progress | None) -> None:
    """Do all units with `workers` processes; raises what a worker raised, PartialError when one died."""
    if workers <= 1 or len(units) <= 1:
        _run_here(units, make_work(), progress)
        return
    _Crew(units, make_work, min(workers, len(units)), progress).run()


def _run_here(units: Sequence[int], work: Work, progress: Progress | None) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done)

    for unit in units:
        work(unit, advance)


class _Crew:
    """The parent's side: feeds unit numbers, watches for errors and deaths."""

    def __init__(
        self, units: Sequence[int], make_work: Callable[[], Work], workers: int, progress: Progress | None
    ) -> None:
        self._queue = b"".join(_INDEX.pack(u) for u in units)
        self._make_work, self._workers, self._progress = make_work, workers, progress
        self._done = mmap.mmap(-1, _COUNT.size * workers)
        self._pids: dict[int, int] = {}
        self._deaths: list[str] = []
        self._failure: TransformError | None = None
        self._unit_in = -1

    def run(self) -> None:
        unit_out, self._unit_in = os.pipe()
        error_out, error_in = os.pipe()
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            parent = os.getpid()
            for slot in range(self._workers):
                pid = self._fork(slot)
                if pid is None:
                    break
                if pid == 0:
                    os.close(self._unit_in)
                    os.close(error_out)
                    _child(slot, parent, self._make_work, unit_out, error_in, self._done)
            os.close(unit_out)
            os.close(error_in)
            unit_out = error_in = -1
            os.set_blocking(self._unit_in, False)
            self._feed(error_out)
        finally:
            self._stop()
            self._close_units()
            for fd in (unit_out, error_out, error_in):
                if fd >= 0:
                    os.close(fd)
        if self._failure is not None:
            raise self._failure
        if self._deaths:
            raise PartialError(
                f"{'; '.join(self._deaths)}; what is done is recorded: run the same command again to continue"
            )

    def _fork(self, slot: int) -> int | None:
        """fork(2), or None where no more processes are allowed and there are some already.

        Signals wait meanwhile: in the child they must not meet the parent's handlers.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid: int | None = None
        try:
            pid = os.fork()
        except OSError as error:
            if not self._pids:
                raise StorageError(f"no worker process can be started: {error.strerror}: try --workers 1") from None
        finally:
            if pid:
                self._pids[pid] = slot
            if pid != 0:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return pid

    def _feed(self, error_out: int) -> None:
        """Until every worker has ended: keep the unit pipe full, collect errors, show progress."""
        at, pending = 0, b""
        while True:
            ready, writable, _ = select.select(
                [error_out], [self._unit_in] if self._unit_in >= 0 else [], [], _POLL_SECONDS
            )
            if writable:
                at = self._write(at)
                if at >= len(self._queue):
                    self._close_units()
            if ready:
                data = os.read(error_out, 65536)
                if not data:
                    break
                pending += data
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    self._failure = self._failure or _error_of(line)
            if self._progress is not None:
                self._progress(self._total())
            self._reap(block=False)
            if self._failure is not None:
                break
        self._close_units()
        if self._failure is None:
            self._reap(block=True)
        if self._progress is not None and self._failure is None:
            self._progress(self._total())

    def _close_units(self) -> None:
        fd, self._unit_in = self._unit_in, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, at: int) -> int:
        try:
            # whole records of 4 bytes: a pipe keeps writes of at most PIPE_BUF together
            return at + os.write(self._unit_in, self._queue[at : at + select.PIPE_BUF])
        except BlockingIOError:
            return at
        except BrokenPipeError:
            return len(self._queue)

    def _total(self) -> int:
        return sum(_COUNT.unpack_from(self._done, _COUNT.size * i)[0] for i in range(self._workers))

    def _reap(self, *, block: bool) -> None:
        for pid in list(self._pids):
            found, status = os.waitpid(pid, 0 if block else os.WNOHANG)
            if found == 0:
                continue
            slot = self._pids.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                self._deaths.append(f"worker {slot} (process {pid}) was killed by {signal.Signals(-code).name}")
            elif code > 0:
                self._deaths.append(f"worker {slot} (process {pid}) ended with exit code {code}")

    def _stop(self) -> None:
        """Nobody is left behind, whatever happened."""
        for pid in list(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self._pids:
            pid, _ = self._pids.popitem()
            os.waitpid(pid, 0)


def _error_of(line: bytes) -> TransformError:
    record = json.loads(line)
    kind = getattr(errors, record["kind"], TransformError)
    error: TransformError = kind(record["message"])
    return error


def _child(
    slot: int, parent: int, make_work: Callable[[], Work], unit_out: int, error_in: int, done: mmap.mmap
) -> NoReturn:
    """A worker's whole life; never returns into the parent's stack."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        _work_loop(slot, parent, make_work(), unit_out, done)
        code = 0
    except TransformError as error:
        _send(error_in, type(error).__name__, str(error))
        code = 0
    except BaseException as error:  # noqa: BLE001 - the last line of defence of a process of our own
        import traceback

        traceback.print_exc()
        _send(error_in, TransformError.__name__, f"internal error in worker {slot}: {type(error).__name__}: {error}")
        code = 0
    finally:
        os._exit(code)


def _send(error_in: int, kind: str, message: str) -> None:
    """One line, short enough that lines of several workers do not mix."""
    while len(line := json.dumps({"kind": kind, "message": message}).encode() + b"\n") > select.PIPE_BUF:
        message = message[: len(message) // 2]
    os.write(error_in, line)


def _work_loop(slot: int, parent: int, work: Work, unit_out: int, done: mmap.mmap) -> None:
    total = 0

    def advance(count: int) -> None:
        nonlocal total
        total += count
        _COUNT.pack_into(done, _COUNT.size * slot, total)
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed: leave the lock to the next run

    while True:
        data = os.read(unit_out, _INDEX.size)
        if len(data) < _INDEX.size:
            return
        work(_INDEX.unpack(data)[0], advance)
