"""Ranks find each other, whatever lies there and in whatever order they come; and say so when they cannot."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.auto import driver
from tests.auto.driver import Ended, all_done, job_of, request_of
from tests.hostile.driver import Case, make_case, wait_for
from transform_ckpt.auto.rendezvous import OtherRankError, Rendezvous
from transform_ckpt.errors import PartialError
from transform_ckpt.launcher import Launcher

WORLD, LAYOUT = 4, (1, 2, 2)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case") / "job", "ckpt", (2, 1, 2), LAYOUT)


def assert_right(case: Case, found: Mapping[str, Ended], prefix: str = "r", world: int = WORLD) -> None:
    all_done({name: end for name, end in found.items() if name.startswith(prefix)})
    whole, stages = case.model.whole(), case.model.stages(*LAYOUT)
    for rank in range(world):
        assert found[f"{prefix}{rank}"].tensors == driver.digests(support.slice_rank(whole, stages, rank)), rank


# ------------------------------------------------------------------------------------------------ coming together


@pytest.mark.parametrize("delays", [{0: 0.5}, {3: 0.5}, {0: 0.3, 1: 0.5, 2: 0.1}], ids=str)
def test_ranks_come_in_any_order(tmp_path: Path, case: Case, delays: dict[int, float]) -> None:
    specs = job_of(WORLD, request_of(case, tmp_path / "out"), strategy=str(case.other), own_delay=delays)
    found = driver.run(tmp_path / "job", specs)
    assert_right(case, found)
    assert len({end.report["run"] for end in found.values()}) == 1


def test_sixteen_ranks_at_once(tmp_path: Path) -> None:
    """All of 16 ranks; every file is there once."""
    many = make_case(tmp_path / "c", "safetensors", (2, 1, 2), (4, 2, 2, 2))
    out = tmp_path / "out"
    found = all_done(driver.run(tmp_path / "job", job_of(16, request_of(many, out), strategy=str(many.other))))
    whole, stages = many.model.whole(), many.model.stages(4, 2, 2, 2)
    for rank in range(16):
        assert found[f"r{rank}"].tensors == driver.digests(support.slice_rank(whole, stages, rank)), rank
    assert len(support.rank_files(out / "transformed_checkpoint" / "src")) == 16


def stale(out: Path, *, failed: int | None = None, world: int = WORLD, ranks: int = WORLD) -> None:
    """What a crashed run leaves: its notes, its run, its failures."""
    join, run_id = out / "auto_trans" / "join", "20200101_000000_abcdef"
    join.mkdir(parents=True)
    peers: dict[str, Any] = {}
    for rank in range(ranks):
        me = {"nonce": f"{rank}" * 32, "host": "other", "machine": "", "pid": 2**22 + rank, "started": "1"}
        peers[str(rank)] = {**me, "world": world} | ({"failed": "of last week"} if rank == failed else {})
        (join / f"rank_{rank}.json").write_text(json.dumps(peers[str(rank)]))
    (join / "run.json").write_text(json.dumps({"run": run_id, "peers": peers}))
    (join / "rank_1.json.4711.tmp").write_text('{"non')
    folder = out / "auto_trans" / run_id / "ranks" / "failed"
    folder.mkdir(parents=True)
    (folder / "rank_2.json").write_text(json.dumps({"rank": 2, "reason": "of last week"}))


LEFT: dict[str, dict[str, Any]] = {
    "of as many": {},
    "rank 0 failed": {"failed": 0},
    "rank 3 failed": {"failed": 3},
    "of more": {"world": 8, "ranks": 8},
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("first", [0, 3])
def test_what_a_crashed_run_left_does_no_harm(tmp_path: Path, case: Case, left: str, first: int) -> None:
    """`first` comes well before the others and meets the old notes alone."""
    stale(tmp_path / "out", **LEFT[left])
    delays = {rank: 0.3 for rank in range(WORLD) if rank != first}
    specs = job_of(WORLD, request_of(case, tmp_path / "out"), strategy=str(case.other), own_delay=delays)
    assert_right(case, driver.run(tmp_path / "job", specs))


def test_a_note_that_is_no_json(tmp_path: Path, case: Case) -> None:
    stale(tmp_path / "out")
    for name in ("run.json", "rank_0.json", "rank_1.json"):
        (tmp_path / "out" / "auto_trans" / "join" / name).write_bytes(b'{"run": ')
    (tmp_path / "out" / "auto_trans" / "join" / "rank_x.json").write_text("[]")
    specs = job_of(WORLD, request_of(case, tmp_path / "out"), strategy=str(case.other))
    assert_right(case, driver.run(tmp_path / "job", specs))


# ------------------------------------------------------------------------------------------------ other jobs


def test_two_worlds_in_one_output_dir(tmp_path: Path, case: Case) -> None:
    specs = job_of(2, request_of(case, tmp_path / "out"), strategy=str(case.other))
    specs[1]["world"] = 4
    found = driver.run(tmp_path / "job", specs, timeout=15)
    for end in found.values():
        assert end.code == 7, end
        assert "rank 0 belongs to 2 ranks, rank 1 to 4" in end.err
    assert max(end.seconds for end in found.values()) < 10


def test_two_jobs_that_start_at_once_in_one_output_dir(tmp_path: Path, case: Case) -> None:
    """Nobody gets another's tensors; who cannot go on says that the output_dir is shared."""
    more = {"strategy": str(case.other)}
    request = request_of(case, tmp_path / "out", timeout=6.0)
    specs = [*job_of(WORLD, request, prefix="a", **more), *job_of(WORLD, request, prefix="b", **more)]
    found = driver.run(tmp_path / "job", [specs[i % 2 * WORLD + i // 2] for i in range(2 * WORLD)])
    stages = case.model.stages(*LAYOUT)
    for name, end in found.items():
        if end.code == 0:
            wanted = support.slice_rank(case.model.whole(), stages, int(name[1]))
            assert end.tensors == driver.digests(wanted)
        assert "Traceback" not in end.err, end.err
    assert not all(end.code == 0 for end in found.values())
    said = [end.err for end in found.values()]
    assert any("an output_dir of its own" in text for text in said), said


@pytest.mark.parametrize("step", ["transform", "end"])
def test_a_job_that_comes_when_the_first_has_joined(tmp_path: Path, case: Case, step: str) -> None:
    """The second begins, and ends, while the first is at work: each has its own run."""
    out = tmp_path / "out"
    more = {"strategy": str(case.other)}
    slow = {rank: {step: {"until": str(tmp_path / "go")}} for rank in range(WORLD)}
    first = job_of(WORLD, request_of(case, out), prefix="a", before=slow, **more)
    second = job_of(WORLD, request_of(case, out), prefix="b", **more)
    with driver.ranks(tmp_path / "1", first) as one:
        wait_for(lambda: len(list(out.glob("auto_trans/*/ranks/joined/rank_*"))) == WORLD)
        assert_right(case, driver.run(tmp_path / "2", second), "b")
        assert not one.ended("a0")
        time.sleep(1.2)  # time to see that the second's processes are gone
        assert not one.ended("a0")
        (tmp_path / "go").touch()
        assert_right(case, one.finish(), "a")


# ------------------------------------------------------------------------------------------------ not coming


def test_a_rank_that_never_comes_is_named(tmp_path: Path, case: Case) -> None:
    specs = job_of(WORLD, request_of(case, tmp_path / "out", timeout=1.5), strategy=str(case.other))
    found = driver.run(tmp_path / "job", specs[:2] + specs[3:], timeout=15)
    for end in found.values():
        assert end.code in (3, 7), end
        assert "of ranks 2 there is no sign" in end.err
        assert end.seconds < 8


def test_rank_0_never_comes(tmp_path: Path, case: Case) -> None:
    specs = job_of(WORLD, request_of(case, tmp_path / "out", timeout=1.5), strategy=str(case.other))
    found = driver.run(tmp_path / "job", specs[1:], timeout=15)
    assert {end.code for end in found.values()} == {3}
    assert all("of ranks 0 there is no sign" in end.err for end in found.values())


def test_storage_that_is_not_shared_is_said(tmp_path: Path, case: Case) -> None:
    """Two hosts, each with an output_dir of its own under the same name."""
    specs = job_of(WORLD, request_of(case, tmp_path / "out", timeout=1.5), strategy=str(case.other))
    for spec in specs:
        host = f"node{spec['rank'] // 2}"
        spec["host"] = host
        spec["request"] = request_of(case, tmp_path / host, timeout=1.5)
    found = driver.run(tmp_path / "job", specs, timeout=15)
    for name, end in found.items():
        assert end.code in (3, 7), end
        host, absent = ("node0", "2-3") if name in ("r0", "r1") else ("node1", "0-1")
        assert f"of ranks {absent} there is no sign: only host {host} writes here" in end.err, end.err
        assert "storage that all nodes share" in end.err
        assert "transform_in_memory" in end.err


def test_several_hosts_that_share_it(tmp_path: Path, case: Case) -> None:
    hosts = {rank: f"node{rank // 2}" for rank in range(WORLD)}
    specs = job_of(WORLD, request_of(case, tmp_path / "out"), strategy=str(case.other), host=hosts)
    assert_right(case, driver.run(tmp_path / "job", specs))


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_rank_that_fails_before_it_joins(tmp_path: Path, case: Case, victim: int, late: int) -> None:
    """It says why to those who are there and to those who come a little later."""
    specs = job_of(3, request_of(case, tmp_path / "out"), strategy=str(case.other), own_delay={late: 0.8})
    specs[victim]["early"] = "the disk is on fire"
    found = driver.run(tmp_path / "job", specs, timeout=15)
    for name, end in found.items():
        if name == f"r{victim}":
            assert end.code == 1
            continue
        assert end.code == 7, end
        assert f"rank {victim} has failed" in end.err
        assert "the disk is on fire" in end.err
        assert end.err.count("has failed") == 1
        assert end.seconds < 8


# ------------------------------------------------------------------------------------------------ the place itself


def test_output_dir_is_a_file(tmp_path: Path, case: Case) -> None:
    (tmp_path / "out").write_text("mine")
    specs = job_of(2, request_of(case, tmp_path / "out", timeout=2.0), strategy=str(case.other))
    for end in driver.run(tmp_path / "job", specs, timeout=15).values():
        assert end.code == 5
        assert "output_dir must be a directory that every rank may write" in end.err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_output_dir_that_may_not_be_written(tmp_path: Path, case: Case) -> None:
    for path in (tmp_path, *tmp_path.parents, case.root, *case.root.parents):
        if path.stat().st_uid == 0 and "pytest" in str(path):
            path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    (tmp_path / "out").mkdir()
    specs = job_of(2, request_of(case, tmp_path / "out", timeout=2.0), strategy=str(case.other), uid=65534)
    for end in driver.run(tmp_path / "job", specs, timeout=15).values():
        assert end.code == 5, end
        assert "Permission denied" in end.err


def test_one_rank_needs_nobody(tmp_path: Path, case: Case) -> None:
    stale(tmp_path / "out", failed=0)
    found = driver.run(tmp_path / "job", job_of(1, request_of(case, tmp_path / "out")))
    assert all_done(found)["r0"].seconds < 10


# ------------------------------------------------------------------------------------------------ one object at a time


class Watched(Rendezvous):
    """Says what it would have ended with."""

    ends: tuple[tuple[int, str], ...] = ()

    def _end_here(self, rank: int, reason: str) -> None:
        self.ends = (*self.ends, (rank, reason))


def joined(output: Path, rank: int = 0, world: int = 2) -> Watched:
    """A rank in a run, without its thread."""
    found = Watched(str(output), Launcher(rank, world, "test"), 0.3, lambda _: None)
    found.run_id = "20200101_000000_abcdef"
    peer = {**found._me, "pid": 2**22 + 1, "started": "1"}
    found._peers = {str(r): found._me if r == rank else peer for r in range(world)}
    found.reach("joined")
    return found


def test_a_process_that_is_gone_ends_its_neighbours(tmp_path: Path) -> None:
    found = joined(tmp_path)
    found._look_around()
    found._look_around()
    ((rank, reason),) = found.ends
    assert rank == 1
    assert "is gone" in reason


@pytest.mark.parametrize("key", ["host", "machine"])
def test_processes_of_other_machines_are_not_looked_for(tmp_path: Path, key: str) -> None:
    """Not even of those with the same name: their numbers mean nothing here."""
    found = joined(tmp_path)
    found._peers = {**found._peers, "1": {**found._peers["1"], key: "another"}}
    found._look_around()
    assert not found._failures()


def test_a_rank_that_has_loaded_may_go(tmp_path: Path) -> None:
    found = joined(tmp_path)
    joined(tmp_path, 1).loaded()
    assert found._look_around()
    assert not found._failures()
    found.loaded()
    assert not found._look_around()


def test_the_first_reason_counts(tmp_path: Path) -> None:
    one, two = joined(tmp_path), joined(tmp_path, 1)
    two.fail(ValueError("no room"))
    one._check_alive(1, one._peers["1"])
    with pytest.raises(OtherRankError, match=r"rank 1 has failed, so rank 0 ends too: no room$"):
        one.check()


def test_what_others_say_of_this_rank_ends_it(tmp_path: Path) -> None:
    found = joined(tmp_path)
    found._record_failure(0, "of another world")
    with pytest.raises(OtherRankError, match=r"^of another world$"):
        found.check()


def test_a_rank_that_ends_because_of_another_adds_nothing(tmp_path: Path) -> None:
    one, two = joined(tmp_path), joined(tmp_path, 1)
    two.fail(ValueError("no room"))
    with pytest.raises(OtherRankError) as error:
        one.check()
    one.fail(error.value)
    assert [rank for rank, _ in one._failures()] == [1]


def test_an_error_without_words_is_told_by_its_name(tmp_path: Path) -> None:
    joined(tmp_path, 1).fail(KeyboardInterrupt())
    assert joined(tmp_path)._failures() == [(1, "KeyboardInterrupt")]


def test_waiting_ends_in_time_and_names_who_is_not_there(tmp_path: Path) -> None:
    found = joined(tmp_path, world=5)
    found.reach("cooked")
    began = time.monotonic()
    with pytest.raises(PartialError, match=r"waited 0\.3 s for 'cooked' of ranks 1, 3"):
        found.wait("cooked", [0, 1, 3])
    assert time.monotonic() - began < 3


def test_who_finds_everyone_there(tmp_path: Path) -> None:
    ranks = [joined(tmp_path, rank, 3) for rank in range(3)]
    assert [rank.reach("cooked") for rank in (ranks[1], ranks[0], ranks[2])] == [False, False, True]
    assert ranks[0].reached("cooked") == {0, 1, 2}
