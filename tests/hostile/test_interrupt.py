"""Runs that end in the middle, at any moment, by any hand: the next one continues, and gives the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import driver
from tests.hostile.driver import (
    Case,
    Model,
    Run,
    assert_done,
    assert_refused,
    children,
    end,
    make_case,
    run,
    slow_command,
    start,
    tree,
    units_done,
    untouched,
    wait_for,
)
from transform_ckpt import destination, execute, planner

RANDOM = random.Random()  # noqa: S311 - moments, not secrets
UNIT = 512
"""Tiny units, so that a small checkpoint has hundreds."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, dict[str, tuple[int, bytes]]]:
    """A checkpoint, and the tree that an uninterrupted run of the same units gives."""
    case = make_case(tmp_path_factory.mktemp("good"), model=Model(hidden=32, wide=48))
    assert_done(end(start(slow_command(case.args("--crc"), delay=0))))
    return case, tree(case.dst)


@pytest.fixture
def case(good: tuple[Case, object], tmp_path: Path) -> Case:
    """The source under another root, without output."""
    found = driver.copy(good[0], tmp_path / "case")
    shutil.rmtree(found.dst)
    return found


@pytest.fixture
def whole(good: tuple[object, dict[str, tuple[int, bytes]]]) -> dict[str, tuple[int, bytes]]:
    """What must come out."""
    return good[1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same units in this process."""
    monkeypatch.setattr(planner, "UNIT_NBYTES", UNIT)
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)


def partial(case: Case) -> Path:
    """Where the output is before it is complete."""
    return case.root / "out.partial"


def interrupt(case: Case, after: int, hit: Callable[[int], None], *more: object, delay: float = 0.003) -> Run:
    """Start a slow run and hit it when that many units are done."""
    process = start(slow_command(case.args("--crc", *more), delay=delay))
    wait_for(lambda: process.poll() is not None or (partial(case).exists() and units_done(partial(case)) >= after))
    assert process.poll() is None, process.stderr and process.stderr.read().decode()
    hit(process.pid)
    return end(process)


def resume(case: Case, *more: object) -> Run:
    """The same command again, as soon as the workers of a killed parent have let go."""
    found = Run(2, "", "another run")
    for _ in range(100):
        found = end(start(slow_command(case.args("--crc", *more), delay=0)))
        if "another run" not in found.err:
            break
    return found


def alone(case: Case, *expected: str) -> None:
    """Nothing is left beside the output."""
    assert driver.litter(case.root, "src", "out", case.strategy.name, case.other.name, *expected) == []


def a_worker(pid: int) -> None:
    """Kill one worker of a parent."""
    wait_for(lambda: children(pid))
    os.kill(RANDOM.choice(children(pid)), signal.SIGKILL)


HITS: dict[str, tuple[Callable[[int], None], int]] = {
    "SIGINT": (lambda pid: os.kill(pid, signal.SIGINT), 130),
    "SIGTERM": (lambda pid: os.kill(pid, signal.SIGTERM), 143),
    "SIGKILL": (lambda pid: os.kill(pid, signal.SIGKILL), -signal.SIGKILL),
    "SIGINT to all": (lambda pid: os.killpg(pid, signal.SIGINT), 130),
    "SIGTERM to all": (lambda pid: os.killpg(pid, signal.SIGTERM), 143),
    "SIGKILL to all": (lambda pid: os.killpg(pid, signal.SIGKILL), -signal.SIGKILL),
    "SIGKILL to a worker": (a_worker, 7),
}


@pytest.mark.parametrize(("hit", "code"), HITS.values(), ids=list(HITS))
def test_interrupted_and_resumed(
    case: Case, whole: dict[str, tuple[int, bytes]], hit: Callable[[int], None], code: int
) -> None:
    moments = (RANDOM.randrange(1, 40), RANDOM.randrange(40, 80))
    for after in moments[:1] if code == 7 else moments:  # the other workers go on to the end
        found = interrupt(case, after, hit)
        assert "Traceback" not in found.err
        assert found.code == code, found.err
        if code > 0:
            assert "run the same command again to continue" in found.err
        assert not case.dst.exists()
        assert partial(case).exists()
    done = units_done(partial(case))
    found = resume(case)
    assert_done(found)
    assert f"{done} units kept from the interrupted run" in found.out
    assert tree(case.dst) == whole
    alone(case)


def test_killed_at_random_moments(case: Case, whole: dict[str, tuple[int, bytes]]) -> None:
    """Start-up, reserving, moving, finishing, renaming: whatever is there afterwards is the old state or the new."""
    old = driver.old_output(case.dst)
    finished = 0
    for trial in range(14):
        process = start(slow_command(case.args("--crc", "--overwrite"), delay=0))
        wait_until(case, process, 40 * trial if trial % 3 else -1)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.killpg(process.pid, RANDOM.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        end(process)
        if (case.dst / "transform_ckpt.json").exists():
            finished += 1
            assert {k: v for k, v in tree(case.dst).items() if not k.startswith(".journal")} == whole
            shutil.rmtree(case.dst)
            old = driver.old_output(case.dst)
        assert tree(case.dst) == old
    assert_done(resume(case, "--overwrite"))
    assert tree(case.dst) == whole
    assert [
        n for n in driver.litter(case.root, "src", "out", case.strategy.name, case.other.name) if "replaced" not in n
    ] == []


def wait_until(case: Case, process: subprocess.Popen[bytes], units: int) -> None:
    """That many units are done, or the run has come to its end; -1: the partial output is there."""

    def reached() -> bool:
        if process.poll() is not None:
            return True
        return partial(case).exists() and (units < 0 or units_done(partial(case)) >= units)

    wait_for(reached)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("step", ["_prepare", "_preallocate", "_move", "_finish", "_commit"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_between_any_two_steps(
    case: Case,
    whole: dict[str, tuple[int, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    when: str,
    error: type[BaseException],
) -> None:
    old = driver.old_output(case.dst)
    real = getattr(execute.Execution, step)

    def stop(*args: object) -> object:
        if when == "before":
            raise error
        real(*args)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(execute.Execution, step, stop)
        if error is RuntimeError:
            with pytest.raises(RuntimeError):
                run(case.args("--crc", "--overwrite"))
        else:
            assert run(case.args("--crc", "--overwrite")).code == 130
    if (step, when) == ("_commit", "after"):
        assert tree(case.dst) == whole
        return
    assert tree(case.dst) == old
    assert_done(run(case.args("--crc", "--overwrite")))
    assert tree(case.dst) == whole
    alone(case)


# ---------------------------------------------------------------------------------------------- resumed after changes


def stopped(case: Case, monkeypatch: pytest.MonkeyPatch, *more: object) -> None:
    """A run that has done every unit and then ends."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(execute.Execution, "_finish", stop)
        assert run(case.args("--crc", *more)).code == 130


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("offset", [300, 5000, -300])
def test_data_of_the_partial_output_was_damaged(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    stopped(case, monkeypatch)
    path = partial(case) / "rank_1" / "checkpoint_1.ckpt"
    for at in (0, offset):  # a header's bytes are written anew, data is done again
        driver.flip(path, at)
    found = run(case.args("--crc"))
    assert_done(found)
    assert "units kept" in found.out
    assert tree(case.dst) == whole


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", ["gone", "shorter", "longer", "directory"])
def test_a_file_of_the_partial_output_was_changed(case: Case, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    stopped(case, monkeypatch)
    path = partial(case) / "rank_1" / "checkpoint_1.ckpt"
    if damage == "gone":
        path.unlink()
    elif damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        os.truncate(path, path.stat().st_size + (1 if damage == "longer" else -1))
    assert_refused(run(case.args("--crc")), 2, path, "was changed since", "--no-resume")
    assert_done(run(case.args("--crc", "--no-resume", "--verify")))
    alone(case)


JOURNAL: dict[str, Callable[[Path], object]] = {
    "torn": lambda p: p.write_bytes(p.read_bytes()[:-7]),
    "garbage": lambda p: p.write_bytes(
        b"5\nnull\n[1]\n[[],[]]\n[-1, []]\n[true, []]\n\xff\n" + b"[" * 50_000 + b"\n" + p.read_bytes()
    ),
    "others' digests": lambda p: p.write_bytes(p.read_bytes().replace(b"[1, ", b"[2, ")),
    "units that are none": lambda p: p.write_bytes(p.read_bytes() + b'[99999999, ["00"]]\n'),
    "gone": lambda p: p.unlink(),
    "a wrong digest, in a log read last": lambda p: (
        p.write_bytes(re.sub(rb'^\[3, \["[0-9a-f]{8}', b'[3, ["00000000', p.read_bytes(), flags=re.MULTILINE)),
        p.rename(p.with_name("units-z.log")),
    ),
}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", JOURNAL.values(), ids=list(JOURNAL))
def test_the_journal_was_damaged(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    stopped(case, monkeypatch)
    for log in partial(case).glob(".journal/units-*"):
        damage(log)
    assert_done(run(case.args("--crc")))
    assert tree(case.dst) == whole


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 50_000, b'{"plan": 5}'])
def test_the_recorded_plan_was_damaged(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    stopped(case, monkeypatch)
    (partial(case) / ".journal" / "plan.json").write_bytes(content)
    found = run(case.args("--crc"))
    if found.code:
        assert_refused(found, 2, partial(case), "another plan", "--no-resume")
        found = run(case.args("--crc", "--no-resume"))
    assert_done(found)
    assert tree(case.dst) == whole


@pytest.mark.usefixtures("tiny")
def test_a_torn_line_does_not_swallow_the_next(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process numbers come again, in containers always: the same log is continued."""
    stopped(case, monkeypatch, "--workers", 1)
    (log,) = partial(case).glob(".journal/units-*")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:10])
    assert_done(run(case.args("--crc", "--workers", 1)))
    assert tree(case.dst) == whole


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("more", [["--prefix", "x_"], ["--no-optimizer"], ["--format", "safetensors"], []])
def test_another_plan_or_a_changed_source(case: Case, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    stopped(case, monkeypatch)
    args = [a for a in case.args("--crc", *more) if a != "--crc" or "safetensors" not in more]
    if not more:
        path = case.file(2)
        header = path.stat().st_size
        driver.flip(path, -30)
        os.utime(path, (1, 1))
        assert path.stat().st_size == header
    with untouched(partial(case)):
        assert_refused(run(args), 2, partial(case), "another plan", "--no-resume")
    assert_done(run([*args, "--no-resume"]))
    alone(case)


def test_the_source_changes_while_it_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training job saves over it: no success with half of each."""
    driver.old_output(case.dst)
    real = execute.Execution._move

    def change(job: execute.Execution, *args: object) -> None:
        real(job, *args)
        driver.flip(case.file(5), -30)
        os.utime(case.file(5), (1, 1))

    monkeypatch.setattr(execute.Execution, "_move", change)
    with untouched(case.dst):
        assert_refused(run(case.args("--overwrite")), 5, case.src, "changed while it was read")


def test_the_source_shrinks_while_it_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = execute.Execution._move

    def change(job: execute.Execution, *args: object) -> None:
        os.truncate(case.file(5), 100)
        real(job, *args)

    monkeypatch.setattr(execute.Execution, "_move", change)
    assert_refused(run(case.args()), 5, case.file(5), "changed while")
    assert not case.dst.exists()


# ---------------------------------------------------------------------------------------------- several at once


def test_three_runs_into_one_destination(case: Case, whole: dict[str, tuple[int, bytes]]) -> None:
    for delay in (0.001, 0.0):
        found = [end(p) for p in [start(slow_command(case.args("--crc"), delay=delay)) for _ in range(3)]]
        assert sorted(f.code for f in found) == [0, 2, 2], found
        for one in found:
            if one.code:
                assert_refused(one, 2, case.dst)
                assert "another run is writing" in one.err or "is not empty" in one.err
        assert tree(case.dst) == whole
        alone(case)
        shutil.rmtree(case.dst)


@pytest.mark.usefixtures("tiny")
def test_a_run_that_comes_when_the_other_has_just_finished(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at the destination and its lock."""
    real = execute.Execution._enter

    def late(job: execute.Execution) -> None:
        monkeypatch.setattr(execute.Execution, "_enter", real)
        assert_done(run(case.args("--crc")))
        real(job)

    monkeypatch.setattr(execute.Execution, "_enter", late)
    assert_refused(run(case.args("--crc")), 2, case.dst, "is not empty")
    assert tree(case.dst) == whole
    alone(case)


@pytest.mark.usefixtures("tiny")
def test_a_destination_that_others_make_meanwhile_is_not_replaced(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = execute.Execution._finish

    def late(job: execute.Execution) -> None:
        driver.old_output(case.dst)
        real(job)

    with monkeypatch.context() as patch:
        patch.setattr(execute.Execution, "_finish", late)
        assert_refused(run(case.args("--crc")), 2, case.dst, "is not empty")
    with untouched(case.dst):
        assert_refused(run(case.args("--crc")), 2, case.dst, "is not empty")
    shutil.rmtree(case.dst)
    assert_done(run(case.args("--crc")))
    assert tree(case.dst) == whole
    alone(case)


@pytest.mark.usefixtures("tiny")
def test_a_run_that_comes_between_two_steps_of_an_exchange(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are swapped, the old output still has the partial one's: that is not an interrupted run."""
    driver.old_output(case.dst)
    real = destination._exchange
    seen: list[Run] = []

    def second(one: str, other: str) -> bool:
        monkeypatch.setattr(destination, "_exchange", real)
        done = real(one, other)
        seen.append(run(case.args("--crc", "--overwrite")))
        return done

    monkeypatch.setattr(destination, "_exchange", second)
    assert_done(run(case.args("--crc", "--overwrite")))
    assert_refused(seen[0], 2, "another run is writing")
    assert tree(case.dst) == whole
    alone(case)


@pytest.mark.usefixtures("tiny")
def test_a_run_that_comes_while_the_other_takes_its_name(
    case: Case, whole: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is held until the output has its name, or the second would begin to clear the first one's files."""
    real = execute.give_name
    seen: list[Run] = []

    def second(path: str, dst: str) -> str | None:
        monkeypatch.setattr(execute, "give_name", real)
        seen.append(run(case.args("--crc")))
        return real(path, dst)

    monkeypatch.setattr(execute, "give_name", second)
    assert_done(run(case.args("--crc")))
    assert_refused(seen[0], 2, partial(case), "another run is writing")
    assert tree(case.dst) == whole
    alone(case)


@pytest.mark.usefixtures("tiny")
def test_a_worker_that_fails_says_so_in_any_script(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long message of wide characters passes the pipe between processes."""
    folder = case.root / ("重要" * 40) / ("检查点" * 25)
    folder.parent.mkdir()
    case.src.rename(folder)
    real = execute.Execution._move

    def change(job: execute.Execution, *args: object) -> None:
        for rank in range(8):
            os.truncate(folder / f"rank_{rank}" / "net-1_7.ckpt", 50)
        real(job, *args)

    monkeypatch.setattr(execute.Execution, "_move", change)
    assert_refused(run(case.args("--workers", 2, src=folder)), 5, folder, "changed while")


@pytest.mark.usefixtures("tiny")
def test_a_fault_of_this_program_in_a_worker_is_exit_code_1(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("transform_ckpt.store.write_fully", fail)
    found = run(case.args("--workers", 2, "--json"))
    assert found.code == 1
    assert "internal error in worker" in found.err
    assert json.loads(found.out)["exit_code"] == 1
    assert not case.dst.exists()
