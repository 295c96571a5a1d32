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
from transform_ckpt.errors import PartialError, TransformError

Progress = Callable[[int], None]
"""Called with the bytes done so far."""

Work = Callable[[int, Callable[[int], None]], None]
"""Does one unit; calls back with bytes as they are done."""

_INDEX = struct.Struct("<I")
_COUNT = struct.Struct("<Q")
_POLL_SECONDS = 0.1
_MESSAGE_LIMIT = 3500


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

    def run(self) -> None:
        unit_out, unit_in = os.pipe()
        error_out, error_in = os.pipe()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            parent = os.getpid()
            for slot in range(self._workers):
                pid = os.fork()
                if pid == 0:
                    os.close(unit_in)
                    os.close(error_out)
                    _child(slot, parent, self._make_work, unit_out, error_in, self._done)
                self._pids[pid] = slot
            os.close(unit_out)
            os.close(error_in)
            unit_out = error_in = -1
            os.set_blocking(unit_in, False)
            self._feed(unit_in, error_out)
            unit_in = -1
        finally:
            self._stop()
            for fd in (unit_out, unit_in, error_out, error_in):
                if fd >= 0:
                    os.close(fd)
        if self._failure is not None:
            raise self._failure
        if self._deaths:
            raise PartialError(
                f"{'; '.join(self._deaths)}; what is done is recorded: run the same command again to continue"
            )

    def _feed(self, unit_in: int, error_out: int) -> None:
        """Until every worker has ended: keep the unit pipe full, collect errors, show progress."""
        at, writing, pending = 0, True, b""
        while self._pids or not pending.endswith(b"\0"):
            ready, writable, _ = select.select([error_out], [unit_in] if writing else [], [], _POLL_SECONDS)
            if writable:
                at = self._write(unit_in, at)
                if at >= len(self._queue):
                    os.close(unit_in)
                    writing = False
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
        if writing:
            os.close(unit_in)
        if self._failure is None:
            self._reap(block=True)
        if self._progress is not None and self._failure is None:
            self._progress(self._total())

    def _write(self, unit_in: int, at: int) -> int:
        try:
            # whole records of 4 bytes: a pipe keeps writes of at most PIPE_BUF together
            return at + os.write(unit_in, self._queue[at : at + select.PIPE_BUF])
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
        _work_loop(slot, parent, make_work(), unit_out, done)
        code = 0
    except TransformError as error:
        record = {"kind": type(error).__name__, "message": str(error)[:_MESSAGE_LIMIT]}
        os.write(error_in, json.dumps(record).encode()[: select.PIPE_BUF - 1] + b"\n")
        code = 0
    except BaseException:  # noqa: BLE001 - the last line of defence of a process of our own
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


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
