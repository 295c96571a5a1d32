"""The journal: whole lines count, torn ones do not; one run at a time; what it holds survives the process."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transform_ckpt.errors import StorageError, TransformError, UsageError
from transform_ckpt.journal import Journal, record

DIGESTS = ["0" * 32, "f" * 32]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A journal that is locked by this process."""
    found = Journal(str(tmp_path / "dst.partial"))
    found.lock()
    yield found
    found.unlock()


def write_units(journal: Journal, units: dict[int, list[str]]) -> Path:
    """Record units in this process's log; returns it."""
    fd = journal.open_log()
    for unit, digests in units.items():
        record(fd, unit, digests)
    os.close(fd)
    return Path(journal.directory) / f"units-{os.getpid()}.log"


# -------------------------------------------------------------------------------------------------------- units


def test_units_of_all_processes_are_read(journal: Journal) -> None:
    assert journal.done() == {}
    write_units(journal, {3: DIGESTS, 0: []})
    other = Path(journal.directory) / "units-1.log"
    other.write_text(json.dumps([7, DIGESTS]) + "\n")
    (Path(journal.directory) / "notes.txt").write_text("[9, []]\n")
    assert journal.done() == {0: [], 3: DIGESTS, 7: DIGESTS}


def test_a_unit_done_again_counts_once_with_the_last_digests(journal: Journal) -> None:
    write_units(journal, {3: ["old"]})
    write_units(journal, {3: ["new"]})
    assert journal.done() == {3: ["new"]}


def test_a_log_cut_at_any_byte_gives_its_whole_lines_only(journal: Journal) -> None:
    log = write_units(journal, {1: DIGESTS, 22: [], 3: DIGESTS})
    data = log.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    whole = [{}, {1: DIGESTS}, {1: DIGESTS, 22: []}, {1: DIGESTS, 22: [], 3: DIGESTS}]
    for size in range(len(data) + 1):
        log.write_bytes(data[:size])
        lines = [line for line in data[:size].split(b"\n")[:-1] if line]
        assert journal.done() == whole[len(lines)]
    assert len(ends) >= 3


def test_what_follows_a_torn_line_counts(journal: Journal) -> None:
    """A process number comes again: the second run appends to the log that the first left torn."""
    log = write_units(journal, {1: DIGESTS, 2: DIGESTS})
    log.write_bytes(log.read_bytes()[:-9])
    write_units(journal, {4: DIGESTS, 5: DIGESTS})
    assert journal.done() == {1: DIGESTS, 4: DIGESTS, 5: DIGESTS}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"7",
        b"null",
        b"true",
        b'"ab"',
        b"[1]",
        b"[1, [], 2]",
        b'["1", []]',
        b"[true, []]",
        b"[-1, []]",
        b"[1.0, []]",
        b"[1, 2]",
        b'[1, {"a": 1}]',
        b'{"1": [], "2": []}',
        b"\x00" * 512,
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
    ],
    ids=range(18),
)
def test_lines_of_anything_else_are_passed_over(journal: Journal, line: bytes) -> None:
    log = write_units(journal, {5: DIGESTS})
    log.write_bytes(line + b"\n" + log.read_bytes() + line + b"\n")
    assert journal.done() == {5: DIGESTS}


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.binary(max_size=60))
def test_a_log_of_random_bytes_is_survived(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    found = Journal(str(tmp_path_factory.getbasetemp() / "random.partial"))
    os.makedirs(found.directory, exist_ok=True)
    (Path(found.directory) / "units-1.log").write_bytes(data)
    assert all(type(unit) is int and unit >= 0 for unit in found.done())


def test_a_full_disk_is_said(journal: Journal) -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(StorageError, match="No space left"):
        record(full.fileno(), 1, DIGESTS)


# --------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_read_as_it_was_written(journal: Journal) -> None:
    assert journal.read_plan() is None
    for plan in ({"plan": "a", "stamps": [[1, 2]]}, {"plan": "层"}):
        journal.write_plan(plan)
        assert journal.read_plan() == plan
    assert sorted(os.listdir(journal.directory)) == ["lock", "plan.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}x", "[" * 100_000])
def test_a_damaged_plan_is_no_plan(journal: Journal, text: str) -> None:
    (Path(journal.directory) / "plan.json").write_text(text)
    assert journal.read_plan() is None


def test_a_plan_cut_at_any_byte_is_no_plan(journal: Journal) -> None:
    journal.write_plan({"plan": "a" * 32, "stamps": [[1, 2]]})
    path = Path(journal.directory) / "plan.json"
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert journal.read_plan() is None


# --------------------------------------------------------------------------------------------------------- lock


def test_exists_tells_our_partial_output_from_a_directory(tmp_path: Path) -> None:
    found = Journal(str(tmp_path / "dst.partial"))
    assert not found.exists
    (tmp_path / "dst.partial").mkdir()
    assert not found.exists
    found.lock()
    assert found.exists
    found.unlock()
    assert found.exists


def test_a_second_lock_is_refused_until_the_first_is_gone(journal: Journal, tmp_path: Path) -> None:
    second = Journal(str(tmp_path / "dst.partial"))
    with pytest.raises(UsageError, match="another run is writing into this destination: wait for it"):
        second.lock()
    second.unlock()  # it holds nothing: no effect
    with pytest.raises(UsageError, match=r"dst\.partial: another run"):
        second.lock()
    journal.unlock()
    second.lock()
    with pytest.raises(UsageError):
        journal.lock()
    second.unlock()
    second.unlock()
    journal.lock()


def test_no_descriptor_is_left_by_a_refused_lock(journal: Journal, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(UsageError):
            Journal(str(tmp_path / "dst.partial")).lock()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_file_that_another_run_removed_is_no_lock(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replaced: bool,  # noqa: FBT001
) -> None:
    """Between our open and our flock the other run commits and removes its journal: we hold a file without a name."""
    found = Journal(str(tmp_path / "dst.partial"))
    flock, lock = fcntl.flock, Path(found.directory) / "lock"

    def remove_first(fd: int, operation: int) -> None:
        lock.unlink()
        if replaced:
            lock.touch()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with pytest.raises(UsageError, match="another run"):
        found.lock()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TransformError, match="creating the destination"):
        Journal(str(tmp_path / "file" / "dst.partial")).lock()


HOLDER = textwrap.dedent(
    """
    import os, sys, time
    from transform_ckpt.journal import Journal, record

    journal = Journal(sys.argv[1])
    journal.lock()
    fd = journal.open_log()
    record(fd, 4, ["a"])
    os.write(fd, b'[5, ["torn')
    print("locked", flush=True)
    time.sleep(60)
    """
)


@contextmanager
def another_run(partial: Path, root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock and was writing a line."""
    command = [sys.executable, "-c", HOLDER, str(partial)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_takes_over_from_a_killed_one(tmp_path: Path, repo_root: Path) -> None:
    partial = tmp_path / "dst.partial"
    ours = Journal(str(partial))
    with another_run(partial, repo_root) as process:
        with pytest.raises(UsageError, match="another run") as caught:
            ours.lock()
        assert caught.value.exit_code == 2
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        ours.lock()  # the lock went with the process
    assert ours.done() == {4: ["a"]}
    ours.unlock()


def test_a_retired_journal_is_a_lock_only(journal: Journal) -> None:
    write_units(journal, {1: DIGESTS})
    journal.write_plan({"plan": "a"})
    journal.retire()
    assert os.listdir(journal.directory) == ["lock"]
    assert journal.read_plan() is None
    assert journal.done() == {}
    with pytest.raises(UsageError, match="another run"):
        Journal(os.path.dirname(journal.directory)).lock()
