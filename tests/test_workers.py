"""The crew of worker processes: all the work is done once, errors and deaths come back, nobody is left behind."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from transform_ckpt import errors
from transform_ckpt.errors import InputError, PartialError, StorageError, TransformError
from transform_ckpt.workers import Work, run

ERRORS = sorted(name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception))


class Tally:
    """How often each unit was done, counted in memory that the workers share."""

    def __init__(self, units: int) -> None:
        self._memory = mmap.mmap(-1, max(units, 1))
        self.units = units

    def do(self, unit: int, advance: Callable[[int], None]) -> None:
        self._memory[unit] += 1
        advance(10)

    def counts(self) -> list[int]:
        return list(self._memory[: self.units])


def open_files() -> set[str]:
    names = os.listdir("/proc/self/fd")
    return {f"{n} {os.readlink(f'/proc/self/fd/{n}')}" for n in names if os.path.lexists(f"/proc/self/fd/{n}")}


def child_processes() -> set[int]:
    """Children of this process, zombies included."""
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No zombie, no descriptor, no changed signal mask, whatever a test does."""
    files, mask, children = open_files(), signal.pthread_sigmask(signal.SIG_BLOCK, ()), child_processes()
    yield
    assert child_processes() <= children, "processes of other tests may have been there before"
    assert open_files() == files
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


@pytest.mark.parametrize("count", [0, 1, 2, 7, 200])
@pytest.mark.parametrize("crew", [1, 2, 5])
def test_every_unit_is_done_once_and_progress_reaches_the_total(count: int, crew: int) -> None:
    tally, seen = Tally(count), [0]
    run(range(count), lambda: tally.do, crew, seen.append)
    assert tally.counts() == [1] * count
    assert seen == sorted(seen)
    assert seen[-1] == 10 * count
    run(range(count), lambda: tally.do, crew, None)
    assert tally.counts() == [2] * count


def test_more_units_than_a_pipe_holds() -> None:
    """The queue is 160 KB, a pipe 64 KB: the parent must not wait for a pipe that nobody empties."""
    tally = Tally(40_000)
    run(range(40_000), lambda: tally.do, 2, None)
    assert set(tally.counts()) == {1}


def test_units_may_be_any_numbers_in_any_order() -> None:
    tally = Tally(100)
    run([99, 3, 50, 4], lambda: tally.do, 2, None)
    assert [unit for unit, n in enumerate(tally.counts()) if n] == [3, 4, 50, 99]


def test_the_work_of_a_process_is_made_there() -> None:
    parent = os.getpid()

    def make() -> Work:
        made_in = os.getpid()

        def work(unit: int, advance: Callable[[int], None]) -> None:
            if os.getpid() != made_in or made_in == parent:
                raise InputError("made in another process")

        return work

    run(range(20), make, 2, None)
    with pytest.raises(InputError):
        run(range(20), make, 1, None)


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("crew", [1, 3])
@pytest.mark.parametrize("name", [name for name in ERRORS if name != "TransformError"])
def test_an_error_comes_back_as_it_was_raised(name: str, crew: int) -> None:
    kind: type[TransformError] = getattr(errors, name)

    def work(unit: int, advance: Callable[[int], None]) -> None:
        if unit == 5:
            raise kind('/a/文件: "no"\nsecond line: \\ and \x00, do this')

    with pytest.raises(TransformError) as caught:
        run(range(20), lambda: work, crew, None)
    assert type(caught.value) is kind
    assert str(caught.value) == '/a/文件: "no"\nsecond line: \\ and \x00, do this'
    assert caught.value.exit_code == kind.exit_code


@pytest.mark.parametrize("text", ["x", "层", "\U0001f600", '"', "\n", "\udc80"])
def test_a_long_message_is_cut_not_lost(text: str) -> None:
    def work(unit: int, advance: Callable[[int], None]) -> None:
        raise StorageError("beginning " + text * 10_000)

    with pytest.raises(StorageError) as caught:
        run(range(4), lambda: work, 2, None)
    assert str(caught.value).startswith("beginning " + text * 50)


def test_one_of_many_errors_is_reported() -> None:
    def work(unit: int, advance: Callable[[int], None]) -> None:
        raise StorageError(f"unit {unit}: " + "x" * 3000)

    for _ in range(10):
        with pytest.raises(StorageError, match=r"unit [0-9]+: x+$"):
            run(range(50), lambda: work, 5, None)


def test_an_error_stops_the_others_soon() -> None:
    def work(unit: int, advance: Callable[[int], None]) -> None:
        if unit == 0:
            raise StorageError("disk full")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(StorageError, match="disk full"):
        run(range(10), lambda: work, 4, None)
    assert time.monotonic() - start < 10


def test_an_error_while_making_the_work() -> None:
    def make() -> Work:
        raise StorageError("no journal")

    for crew in (1, 3):
        with pytest.raises(StorageError, match="no journal"):
            run(range(10), make, crew, None)


def test_a_bug_in_a_worker_is_an_error_not_silence(capfd: pytest.CaptureFixture[str]) -> None:
    def work(unit: int, advance: Callable[[int], None]) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(TransformError):
        run(range(10), lambda: work, 2, None)
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


def test_what_progress_raises_comes_through() -> None:
    """Ctrl-C arrives while the parent waits, long after the last unit number was handed out."""

    class Interrupted(BaseException):
        pass

    def work(unit: int, advance: Callable[[int], None]) -> None:
        time.sleep(60)

    calls = []

    def progress(done: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise Interrupted

    start = time.monotonic()
    with pytest.raises(Interrupted):
        run(range(10), lambda: work, 3, progress)
    assert time.monotonic() - start < 10


# ------------------------------------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM])
def test_a_killed_worker_is_a_partial_error_and_the_rest_is_done(number: signal.Signals) -> None:
    tally = Tally(100)

    def work(unit: int, advance: Callable[[int], None]) -> None:
        if unit == 7:
            os.kill(os.getpid(), number)
            time.sleep(60)
        tally.do(unit, advance)

    with pytest.raises(PartialError, match=rf"worker \d \(process \d+\) was killed by {number.name}; .*run the same"):
        run(range(100), lambda: work, 3, None)
    assert [unit for unit, n in enumerate(tally.counts()) if n != 1] == [7]


def test_all_workers_killed() -> None:
    def work(unit: int, advance: Callable[[int], None]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PartialError, match=r"worker 0 .* worker 1 "):
        run(range(30_000), lambda: work, 2, None)


def test_a_worker_that_exits_is_a_partial_error() -> None:
    def work(unit: int, advance: Callable[[int], None]) -> None:
        os._exit(3)

    with pytest.raises(PartialError, match="ended with exit code 3"):
        run(range(10), lambda: work, 2, None)


def test_workers_ignore_ctrl_c() -> None:
    """The terminal sends it to all; the parent decides."""
    tally = Tally(20)

    def work(unit: int, advance: Callable[[int], None]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        tally.do(unit, advance)

    run(range(20), lambda: work, 2, None)
    assert tally.counts() == [1] * 20


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(StorageError, match="no worker process can be started"):
        run(range(10), lambda: Tally(10).do, 2, None)


CHILDREN = textwrap.dedent(
    """
    import os, sys, time
    from transform_ckpt.workers import run

    def work(unit, advance):
        with open(sys.argv[1], "a") as stream:
            stream.write(f"{os.getpid()}\\n")
        while True:
            time.sleep(0.02)
            advance(1)

    run(range(10), lambda: work, 3, None)
    """
)


def alive(pid: int) -> bool:
    """Is this process running (a zombie is not)?"""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_soon_after_their_parent(tmp_path: Path, repo_root: Path, number: signal.Signals) -> None:
    log = tmp_path / "pids"
    log.touch()
    command = [sys.executable, "-c", CHILDREN, str(log)]
    with subprocess.Popen(command, cwd=repo_root, stderr=subprocess.DEVNULL) as process:
        try:
            assert wait_for(lambda: len(log.read_text().split()) == 3)
            pids = [int(pid) for pid in log.read_text().split()]
            assert all(map(alive, pids))
            process.send_signal(number)
            assert process.wait(10) != 0
        finally:
            process.kill()
        assert wait_for(lambda: not any(map(alive, pids)), 5), "workers outlive their parent"
