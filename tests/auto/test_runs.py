"""The well-known names point at the newest run; old runs go, needed ones and this one stay, foreign things always."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from transform_ckpt.auto import runs

OLD, MIDDLE, NEW = (f"2020010{day}_000000_abcdef" for day in (1, 2, 3))


def made(output: Path, *ids: str) -> None:
    """Runs with something in them."""
    for run_id in ids:
        for name in (runs.STRATEGY, runs.TRANSFORMED):
            (output / "auto_trans" / run_id / name / "sub").mkdir(parents=True)
            (output / "auto_trans" / run_id / name / "sub" / "x").write_text(run_id)


def silent(_: str) -> None:
    """Nothing may be said."""
    raise AssertionError(_)


# ------------------------------------------------------------------------------------------------ pointing


def test_names_are_relative_so_that_the_output_may_move(tmp_path: Path) -> None:
    made(tmp_path / "out", OLD)
    runs.point(str(tmp_path / "out"), OLD, runs.STRATEGY, silent)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / runs.STRATEGY / "sub" / "x").read_text() == OLD


def test_a_later_run_takes_the_name_over_and_there_is_always_one(tmp_path: Path) -> None:
    """A reader never finds nothing, whatever happens meanwhile."""
    made(tmp_path, OLD, NEW)
    runs.point(str(tmp_path), OLD, runs.STRATEGY, silent)
    gone: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                (tmp_path / runs.STRATEGY / "sub" / "x").read_text()
            except OSError as error:
                gone.append(str(error))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(100):
        for run_id in (NEW, OLD):
            runs.point(str(tmp_path), run_id, runs.STRATEGY, silent)
    stop.set()
    reader.join()
    assert gone == []
    assert sorted(os.listdir(tmp_path)) == ["auto_trans", runs.STRATEGY]


@pytest.mark.parametrize("before", ["nothing", "link", "directory", "file", "dangling link", "link to a file"])
def test_several_ranks_point_at_once(tmp_path: Path, before: str) -> None:
    made(tmp_path, OLD, NEW)
    known = tmp_path / runs.STRATEGY
    if before == "link":
        runs.point(str(tmp_path), OLD, runs.STRATEGY, silent)
    elif before == "directory":
        known.mkdir()
        (known / "mine").write_text("mine")
    elif before == "file":
        known.write_text("mine")
    elif before == "dangling link":
        known.symlink_to("gone")
    elif before == "link to a file":
        (tmp_path / "mine").write_text("mine")
        known.symlink_to("mine")
    said: list[str] = []
    start = threading.Barrier(6)

    def work() -> None:
        start.wait()
        runs.point(str(tmp_path), NEW, runs.STRATEGY, said.append)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (known / "sub" / "x").read_text() == NEW
    aside = [path for path in tmp_path.iterdir() if ".before_" in path.name]
    assert len(aside) == len(said) == (1 if before in ("directory", "file") else 0), said
    for path in aside:
        assert (path / "mine" if path.is_dir() else path).read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in aside} <= {"auto_trans", runs.STRATEGY, "mine"}


def test_a_second_thing_in_the_way_has_a_name_of_its_own(tmp_path: Path) -> None:
    for run_id, text in ((NEW, "first"), (OLD, "second")):
        made(tmp_path, run_id)
        (tmp_path / f"{runs.STRATEGY}.before_{run_id}").write_text(f"older, {text}")
        if (tmp_path / runs.STRATEGY).is_symlink():
            (tmp_path / runs.STRATEGY).unlink()
        (tmp_path / runs.STRATEGY).write_text(text)
        runs.point(str(tmp_path), run_id, runs.STRATEGY, lambda _: None)
    texts = {path.read_text() for path in tmp_path.glob("*.before_*")}
    assert texts == {"first", "second", "older, first", "older, second"}


def test_what_cannot_be_pointed_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    runs.point(str(tmp_path / "gone"), NEW, runs.STRATEGY, said.append)
    assert "look for this run's results there" in said[0]


# ------------------------------------------------------------------------------------------------ pruning


def test_runs_are_known_by_their_names(tmp_path: Path) -> None:
    assert runs.runs(str(tmp_path)) == []
    made(tmp_path, NEW, OLD)
    for name in ("join", "notes", f"{OLD}.removed", "2020_0_abcdef", f"x{OLD}"):
        (tmp_path / "auto_trans" / name).mkdir()
    assert runs.runs(str(tmp_path)) == [OLD, NEW]


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [NEW]), (2, [MIDDLE, NEW]), (3, [OLD, MIDDLE, NEW]), (9, [OLD, MIDDLE, NEW])]
)
def test_the_newest_stay(tmp_path: Path, keep: int, left: list[str]) -> None:
    made(tmp_path, OLD, MIDDLE, NEW)
    removed = runs.prune(str(tmp_path), keep, [], silent)
    assert runs.runs(str(tmp_path)) == left
    assert sorted(removed + left) == [OLD, MIDDLE, NEW]
    assert sorted(os.listdir(tmp_path / "auto_trans")) == left


@pytest.mark.parametrize("form", ["itself", "with a slash", "below", "through a link"])
def test_what_is_needed_stays(tmp_path: Path, form: str) -> None:
    made(tmp_path, OLD, MIDDLE, NEW)
    (tmp_path / "link").symlink_to(tmp_path / "auto_trans" / OLD / runs.STRATEGY)
    run = tmp_path / "auto_trans" / OLD
    path = {
        "itself": str(run), "with a slash": f"{run}/", "below": str(run / runs.TRANSFORMED / "sub"),
        "through a link": str(tmp_path / "link"),
    }[form]  # fmt: skip
    assert runs.prune(str(tmp_path), 1, [path], silent) == [MIDDLE]
    assert runs.runs(str(tmp_path)) == [OLD, NEW]


def test_a_name_that_only_begins_alike_is_not_needed(tmp_path: Path) -> None:
    made(tmp_path, OLD, NEW)
    assert runs.prune(str(tmp_path), 1, [str(tmp_path / "auto_trans" / f"{OLD}x")], silent) == [OLD]


def test_several_ranks_prune_at_once(tmp_path: Path) -> None:
    many = [f"20200101_0000{second:02}_abcdef" for second in range(40)]
    made(tmp_path, *many)
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        runs.prune(str(tmp_path), 1, [], said.append)

    said: list[str] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == []
    assert os.listdir(tmp_path / "auto_trans") == many[-1:]


def test_the_strategy_of_saved_checkpoints_stays(tmp_path: Path) -> None:
    """A training's checkpoints outlive its transformed ones; without its strategy nobody could read them."""
    for run in (OLD, MIDDLE, NEW):
        for name in (runs.STRATEGY, runs.TRANSFORMED):
            (tmp_path / "auto_trans" / run / name).mkdir(parents=True)
            (tmp_path / "auto_trans" / run / name / "file").touch()
    runs.mark_saving(str(tmp_path), OLD)
    assert runs.prune(str(tmp_path), 1, [], silent) == [OLD, MIDDLE]
    assert (tmp_path / "auto_trans" / OLD / runs.STRATEGY / "file").exists()
    assert not (tmp_path / "auto_trans" / OLD / runs.TRANSFORMED).exists()
    assert not (tmp_path / "auto_trans" / MIDDLE).exists()
    assert runs.prune(str(tmp_path), 1, [], silent) == []


def test_what_a_well_known_name_means_stays(tmp_path: Path) -> None:
    """Jobs of one rank write no strategy: the name still means that of the last job that did."""
    for run in (OLD, MIDDLE, NEW):
        (tmp_path / "auto_trans" / run / runs.STRATEGY).mkdir(parents=True)
    runs.point(str(tmp_path), OLD, runs.STRATEGY, silent)
    assert runs.prune(str(tmp_path), 1, [], silent) == [MIDDLE]
    assert (tmp_path / runs.STRATEGY).is_dir()
