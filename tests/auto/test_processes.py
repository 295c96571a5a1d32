"""Ranks that die, fail, are slow or are ended: the others end too, soon and with the reason; nothing is left over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.auto import driver
from tests.auto.driver import Ended, Ranks, Spec, all_done, job_of, request_of
from tests.hostile.driver import Case, Model, make_case, wait_for
from tests.hostile.driver import run as cli

WORLD, LAYOUT = 4, (1, 2, 2)
SOON = 6.0
"""Seconds after which nobody may be there any more, on a busy machine."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case") / "job", "ckpt", (2, 1, 2), LAYOUT)


@pytest.fixture(scope="module")
def wanted(case: Case) -> dict[int, dict[str, str]]:
    whole, stages = case.model.whole(), case.model.stages(*LAYOUT)
    return {rank: driver.digests(support.slice_rank(whole, stages, rank)) for rank in range(WORLD)}


def specs_of(case: Case, out: Path, request: Mapping[str, Any] | None = None, **more: Any) -> list[Spec]:
    return job_of(WORLD, request_of(case, out, **(request or {})), strategy=str(case.other), **more)


def assert_ended(found: Mapping[str, Ended], victim: int, reason: str) -> None:
    """Everybody else says which rank and why, in one sentence."""
    for name, end in found.items():
        if name == f"r{victim}":
            continue
        assert end.code == 7, (name, end)
        assert end.err.count("has failed") == 1, end.err
        assert f"rank {victim} has failed, so rank {name[1:]} ends too: " in end.err
        assert reason in end.err
        assert "Traceback" not in end.err


def transforming(ranks: Ranks, out: Path) -> None:
    """Until every rank writes."""
    wait_for(lambda: len(list(out.glob("auto_trans/*/transformed_checkpoint/*.partial/rank_*"))) >= WORLD)


def group_of(pid: int) -> list[int]:
    """Processes of a process group that are not yet reaped."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
            if fields and int(fields[2]) == pid and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


# ------------------------------------------------------------------------------------------------ dying


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_while_it_transforms(tmp_path: Path, case: Case, victim: int, number: int) -> None:
    out = tmp_path / "out"
    specs = specs_of(case, out, {"workers": 2}, slow=0.05, unit=256)
    with driver.ranks(tmp_path / "job", specs) as started:
        transforming(started, out)
        time.sleep(0.3)
        began = time.monotonic()
        started.kill(f"r{victim}", number)
        found = started.finish(15)
        assert time.monotonic() - began < SOON
        assert found[f"r{victim}"].code == -number
        assert_ended(found, victim, "is gone")
        wait_for(lambda: not group_of(started.process.pid), 5)
    assert not (out / "transformed_checkpoint").exists()


def test_a_rank_that_is_interrupted(tmp_path: Path, case: Case) -> None:
    out = tmp_path / "out"
    with driver.ranks(tmp_path / "job", specs_of(case, out, slow=0.05)) as started:
        transforming(started, out)
        began = time.monotonic()
        started.kill("r1", signal.SIGINT)
        found = started.finish(15)
        assert time.monotonic() - began < SOON
    assert found["r1"].code not in (0, 7)
    assert_ended(found, 1, "KeyboardInterrupt")


@pytest.mark.parametrize("step", ["strategy", "end"])
def test_a_rank_that_kills_itself_while_the_others_wait_or_work(tmp_path: Path, case: Case, step: str) -> None:
    """Before it has loaded; one process makes everything, so that all others wait for it, or it for nobody."""
    before = {1: {step: {"kill": signal.SIGKILL}}, **{r: {"load": {"sleep": 8}} for r in (0, 2, 3)}}
    specs = specs_of(case, tmp_path / "out", {"processes": 2} if step == "strategy" else {}, before=before)
    found = driver.run(tmp_path / "job", specs, timeout=20)
    if step == "end":  # it has loaded already: nobody needs it
        assert [found[f"r{r}"].code for r in range(WORLD)] == [0, -9, 0, 0]
    else:
        assert_ended(found, 1, "is gone")
        assert max(end.seconds for end in found.values()) < SOON + 2


# ------------------------------------------------------------------------------------------------ failing


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("step", ["resolve", "plan", "wait"])
def test_a_rank_that_raises(tmp_path: Path, case: Case, victim: int, step: str) -> None:
    """The others are in the middle of something slow, or wait for it."""
    before = {victim: {step: {"sleep": 0.3, "raise": "the cat sat on it"}}}
    specs = specs_of(case, tmp_path / "out", {"processes": 1}, before=before)
    for spec in specs:
        if spec["rank"] != victim:
            spec["before"] = {"load": {"sleep": 6}}
    found = driver.run(tmp_path / "job", specs, timeout=20)
    assert found[f"r{victim}"].code == 1
    assert_ended(found, victim, "the cat sat on it")
    assert max(end.seconds for end in found.values()) < SOON


def test_a_rank_whose_disk_is_full(tmp_path: Path) -> None:
    """As RLIMIT_FSIZE has it, with files of a size that is only its own."""
    case = make_case(tmp_path / "c", "safetensors", (2, 1, 2), LAYOUT, Model(hidden=64, wide=64))
    specs = specs_of(case, tmp_path / "out", fsize={1: 20_000}, before={r: {"load": {"sleep": 4}} for r in (0, 2, 3)})
    found = driver.run(tmp_path / "job", specs, timeout=15)
    assert found["r1"].code == 5, found["r1"]
    assert "File too large" in found["r1"].err
    assert_ended(found, 1, "File too large")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_rank_that_may_not_write(tmp_path: Path, case: Case) -> None:
    """It is of another user, and what the others have made is theirs."""
    for path in (tmp_path, *tmp_path.parents, case.root, *case.root.parents):
        if "pytest" in str(path):
            path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    join = tmp_path / "out" / "auto_trans" / "join"
    join.mkdir(parents=True)
    join.chmod(0o777)
    before = {r: {"load": {"sleep": 5}} for r in (0, 1, 2)}
    found = driver.run(tmp_path / "job", specs_of(case, tmp_path / "out", uid={3: 65534}, before=before), timeout=20)
    assert found["r3"].code == 5, found["r3"]
    assert "Permission denied" in found["r3"].err
    for rank in range(3):
        assert found[f"r{rank}"].code == 7, found[f"r{rank}"]
        assert "rank 3" in found[f"r{rank}"].err


def test_a_rank_whose_source_is_not_there(tmp_path: Path, case: Case) -> None:
    specs = specs_of(case, tmp_path / "out", before={r: {"load": {"sleep": 4}} for r in (0, 1, 3)})
    specs[2]["request"]["load_checkpoint"] = str(tmp_path / "elsewhere")
    found = driver.run(tmp_path / "job", specs, timeout=15)
    assert found["r2"].code == 3
    assert_ended(found, 2, f"{tmp_path}/elsewhere: not found")


def test_in_memory_nobody_minds_the_others(tmp_path: Path, case: Case, wanted: dict[int, dict[str, str]]) -> None:
    before = {1: {"plan": {"raise": "alone"}}}
    found = driver.run(tmp_path / "job", specs_of(case, tmp_path / "out", {"in_memory": True}, before=before))
    assert found.pop("r1").code == 1
    for name, end in all_done(found).items():
        assert end.tensors == wanted[int(name[1])]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ being slow


@pytest.mark.parametrize(("processes", "slow"), [(None, 2), (2, 2), (1, 0)])
def test_a_slow_rank_is_waited_for(
    tmp_path: Path, case: Case, wanted: dict[int, dict[str, str]], processes: int | None, slow: int
) -> None:
    before = {slow: {"transform": {"sleep": 1.5}}}
    found = all_done(
        driver.run(tmp_path / "job", specs_of(case, tmp_path / "out", {"processes": processes}, before=before))
    )
    for rank in range(WORLD):
        assert found[f"r{rank}"].tensors == wanted[rank]
    alone = {None: {0, 1, 3}, 2: {0, 1}, 1: set[int]()}[processes]
    assert all(found[f"r{rank}"].seconds < found[f"r{slow}"].seconds for rank in alone)
    assert cli(["verify", str(tmp_path / "out" / "transformed_checkpoint" / "src")]).code == 0


def test_a_maker_that_is_too_slow_is_named(tmp_path: Path, case: Case) -> None:
    before = {0: {"transform": {"sleep": 30}}}
    specs = specs_of(case, tmp_path / "out", {"processes": 1, "timeout": 1.5}, before=before)
    found = driver.run(tmp_path / "job", specs, timeout=20)
    assert {end.code for end in found.values()} == {7}
    text = "".join(end.err for end in found.values())
    assert "waited 1.5 s for 'transformed' of ranks 0" in text
    assert max(end.seconds for end in found.values()) < 10


def test_nobody_is_watched_any_more_when_all_have_loaded(tmp_path: Path, case: Case) -> None:
    """Ranks train for different times, and end as they like."""
    linger = {rank: 0.6 * rank for rank in range(3)}
    found = driver.run(
        tmp_path / "job", specs_of(case, tmp_path / "out", linger=linger, before={3: {"end": {"kill": 9}}})
    )
    assert [found[f"r{rank}"].code for rank in range(WORLD)] == [0, 0, 0, -9]


# ------------------------------------------------------------------------------------------------ again and again


def test_many_jobs_with_ranks_that_come_and_go_as_they_like(
    tmp_path: Path, case: Case, wanted: dict[int, dict[str, str]]
) -> None:
    """Several at once, each in its output_dir; then all again in the same, on top of what is there."""
    rng = random.Random(5)  # noqa: S311 - delays
    jobs = [f"{letter}" for letter in "abcdef"]
    runs: dict[str, set[str]] = {job: set() for job in jobs}
    for number in range(4):
        specs: list[Spec] = []
        for job in jobs:
            delays = {rank: rng.random() * 0.15 for rank in range(WORLD)}
            naps = {rank: {rng.choice(driver.STEPS): {"sleep": rng.random() * 0.2}} for rank in range(WORLD)}
            request = {"processes": rng.choice([None, 1, 2, 4]), "keep": 1, "timeout": 30.0}
            out = tmp_path / job
            specs += specs_of(case, out, request, prefix=job, own_delay=delays, before=naps)
        found = all_done(driver.run(tmp_path / f"round{number}", specs, timeout=60))
        for name, end in found.items():
            assert end.tensors == wanted[int(name[1])], name
            assert end.err == ""
            assert "cannot" not in end.out
            assert "watching" not in end.out
        for job in jobs:
            run_id = found[f"{job}0"].report["run"]
            assert run_id not in runs[job]
            runs[job].add(run_id)
            for known in ("strategy", "transformed_checkpoint"):
                assert os.readlink(tmp_path / job / known) == f"auto_trans/{run_id}/{known}"
            litter = [p for p in (tmp_path / job).rglob("*") if ".tmp" in p.name or "part" in p.name]
            assert litter == []
            folder = tmp_path / job / "transformed_checkpoint" / "src"
            assert cli(["verify", str(folder)]).code == 0
