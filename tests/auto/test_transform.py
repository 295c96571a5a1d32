"""The automatic transform's results: right for every rank, where they should be, and safe from the next run."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests import support
from tests.auto import driver
from tests.auto.driver import all_done, job_of, request_of
from tests.hostile.driver import Case, Model, flip, make_case, write_file, write_layout
from tests.hostile.driver import run as cli
from transform_ckpt.auto.request import Request
from transform_ckpt.errors import UsageError

DISTRIBUTED, SMALLER, COMPLETE = (2, 1, 4, 2), (1, 2, 2), (1, 1, 1)
WAYS: dict[str, dict[str, Any]] = {"every": {}, "two": {"processes": 2}, "one": {"processes": 1}}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """8 ranks with optimizer shard over 4 stages, in both formats; read by tests, never written."""
    return {fmt: make_case(tmp_path_factory.mktemp(fmt) / "job", fmt, DISTRIBUTED, SMALLER) for fmt in FORMATS}


FORMATS = ("ckpt", "safetensors")


def expected(case: Case, layout: tuple[int, ...], rank: int) -> dict[str, str]:
    """What a rank must hold, by the independent slicer."""
    return driver.digests(support.slice_rank(case.model.whole(), case.model.stages(*layout), rank))


def strategy_of(case: Case, layout: tuple[int, ...]) -> str | None:
    """A strategy file beside the case; none for one rank."""
    if layout == COMPLETE:
        return None
    path = case.root / f"to_{'_'.join(map(str, layout))}.ckpt"
    return str(path if path.exists() else write_layout(case.model.stages(*layout), path))


def run(folder: Path, case: Case, layout: tuple[int, ...], request: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One job to its end; every rank must have exactly its slices."""
    world = int(np.prod(layout[:3]))
    found = all_done(driver.run(folder, job_of(world, request, strategy=strategy_of(case, layout), **more)))
    for rank in range(world):
        assert found[f"r{rank}"].tensors == expected(case, layout, rank), f"rank {rank}"
    return dict(found)


# ------------------------------------------------------------------------------------------------------ scenarios


@pytest.mark.parametrize("way", [*WAYS, "memory"])
@pytest.mark.parametrize("layout", [SMALLER, (1, 1, 2), (2, 2, 1, 2), COMPLETE], ids=str)
def test_distributed_to_others_and_to_one(
    tmp_path: Path, cases: dict[str, Case], layout: tuple[int, ...], way: str
) -> None:
    fmt = "ckpt" if way in ("every", "memory") else "safetensors"
    how = {"in_memory": True} if way == "memory" else WAYS[way]
    run(tmp_path / "job", cases[fmt], layout, request_of(cases[fmt], tmp_path / "out", **how))
    assert (tmp_path / "out").exists() == (way != "memory")


def complete(case: Case, path: Path) -> Path:
    """The case's whole state as one file."""
    return write_file(path, case.model.whole())


FORMS = {
    "a file": lambda root: (root / "whole.ckpt", root / "whole.ckpt"),
    "a file, safetensors": lambda root: (root / "whole.safetensors", root / "whole.safetensors"),
    "rank_0": lambda root: (root / "some" / "rank_0" / "net.ckpt", root / "some"),
    "a file in rank_0": lambda root: (root / "some" / "rank_0" / "net.ckpt", root / "some" / "rank_0" / "net.ckpt"),
    "a directory": lambda root: (root / "some" / "net.safetensors", root / "some"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory", [False, True])
def test_complete_to_distributed(tmp_path: Path, cases: dict[str, Case], form: str, *, memory: bool) -> None:
    case = cases["ckpt"]
    written, load = FORMS[form](tmp_path)
    complete(case, written)
    request = request_of(case, tmp_path / "out", load_checkpoint=str(load), src_strategy=None, in_memory=memory)
    run(tmp_path / "job", case, SMALLER, request)
    if not memory:
        assert all(path.suffix == written.suffix for path in result(tmp_path / "out", load).values())


def result(output: Path, load: Path, name: str | None = None) -> dict[int, Path]:
    """The files of a run, through the well-known name."""
    name = name or (load.name.split(".")[0] if load.is_file() else load.name)
    return support.rank_files(output / "transformed_checkpoint" / name)


@pytest.mark.parametrize("memory", [False, True])
def test_several_complete_files_each_under_its_own_name(
    tmp_path: Path, cases: dict[str, Case], *, memory: bool
) -> None:
    """The last stage has nothing of `first`, the first nothing of `last`."""
    case = cases["ckpt"]
    whole = case.model.whole()
    first = {n for n, stages in _stages_of(case, SMALLER).items() if stages == [0]}
    write_file(tmp_path / "parts" / "first.v1.ckpt", {n: a for n, a in whole.items() if n in first})
    write_file(tmp_path / "parts" / "last.ckpt", {n: a for n, a in whole.items() if n not in first})
    load = tmp_path / "parts"
    request = request_of(case, tmp_path / "out", load_checkpoint=str(load), src_strategy=None, in_memory=memory)
    run(tmp_path / "job", case, SMALLER, request)
    if not memory:
        assert {p.name for p in (tmp_path / "out" / "transformed_checkpoint").iterdir()} == {"first", "last"}


def _stages_of(case: Case, layout: tuple[int, ...]) -> dict[str, list[int]]:
    stages = case.model.stages(*layout)
    return {name: [i for i, stage in enumerate(stages) if name in stage] for stage in stages for name in stage}


def test_one_tensor_in_two_complete_files_is_refused(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["ckpt"]
    for name in ("one", "two"):
        complete(case, tmp_path / "parts" / f"{name}.ckpt")
    request = request_of(case, tmp_path / "out", load_checkpoint=str(tmp_path / "parts"), src_strategy=None)
    found = driver.run(tmp_path / "job", job_of(1, request))["r0"]
    assert found.code == 4
    assert "leave one of them" in found.err


def test_a_step_is_chosen_and_optimizer_states_are_left_out(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["safetensors"]
    shutil.copytree(case.src, tmp_path / "src")
    for file in list((tmp_path / "src").glob("rank_*/*")):
        shutil.copy(file, file.with_name("net-1_3.safetensors"))
        file.write_bytes(b"of a later step: not to be read")
    request = request_of(
        case, tmp_path / "out", load_checkpoint=str(tmp_path / "src"), resume="net-1_3", optimizer=False
    )
    found = all_done(driver.run(tmp_path / "job", job_of(4, request, strategy=strategy_of(case, SMALLER))))
    for rank in range(4):
        wanted = {n: d for n, d in expected(case, SMALLER, rank).items() if not n.startswith("adam")}
        assert found[f"r{rank}"].tensors == wanted


def test_without_transform_each_rank_has_what_it_saved(tmp_path: Path, cases: dict[str, Case]) -> None:
    request = request_of(cases["ckpt"], tmp_path / "out", transform=False)
    run(tmp_path / "job", cases["ckpt"], DISTRIBUTED, request)
    assert not (tmp_path / "out").exists()


def test_strategies_that_the_compiler_has_written(tmp_path: Path, cases: dict[str, Case]) -> None:
    """Each rank writes its own late, and needs the first of each stage."""
    from strategy.generate_files import write_rank_files
    from transform_ckpt.api import read_strategy

    case = cases["ckpt"]
    made = read_strategy(strategy_of(case, SMALLER))
    assert made is not None
    write_rank_files(made, str(tmp_path / "compiled"))
    more = {"compiled": str(tmp_path / "compiled"), "stages": 2, "before": {2: {"strategy": {"sleep": 0.5}}}}
    found = run(tmp_path / "job", case, SMALLER, request_of(case, tmp_path / "out"), **more)
    assert found["r0"].seconds > 0.5  # it needs rank 2's
    names = sorted(p.name for p in (tmp_path / "out" / "strategy").iterdir())
    assert names == [*(f"ckpt_strategy_rank_{r}.ckpt" for r in range(4)), "merged_ckpt_strategy.ckpt"]


def test_another_world_than_the_strategys_is_refused(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["ckpt"]
    request = request_of(case, tmp_path / "out", timeout=5.0)
    found = driver.run(tmp_path / "job", job_of(2, request, strategy=strategy_of(case, SMALLER)))
    assert {end.code for end in found.values()} <= {3, 7}
    assert any("4 ranks, but 2 are running" in end.err for end in found.values())


@pytest.mark.parametrize(
    "fields",
    [{"processes": 0}, {"processes": -1}, {"keep": 0}, {"timeout": 0.0}, {"in_memory": True, "processes": 2}],
    ids=str,
)
def test_requests_that_mean_nothing(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Request("a", "b", **fields)


# ------------------------------------------------------------------------------------------------------ bytes read


def test_in_memory_a_rank_reads_its_own_bytes_and_writes_nothing(tmp_path: Path) -> None:
    """Real reads of the process: 1/8 of each matrix, cut along either axis, and no more than the headers beside."""
    case = make_case(tmp_path / "c", "safetensors", COMPLETE, (1, 8, 1), Model(2, 512, 1024, optimizer=False))
    file = complete(case, tmp_path / "whole.safetensors")
    (tmp_path / "out").mkdir()
    request = request_of(
        case, tmp_path / "out", load_checkpoint=str(file), src_strategy=None, in_memory=True, timeout=5.0
    )
    found = run(tmp_path / "job", case, (1, 8, 1), request)
    assert os.listdir(tmp_path / "out") == []
    stages, whole = case.model.stages(1, 8, 1), case.model.whole()
    total = sum(array.nbytes for array in whole.values())
    for rank in range(8):
        own = sum(array.nbytes for array in support.slice_rank(whole, stages, rank).values())
        assert own < total / 7
        read = found[f"r{rank}"].report["rchar"]
        assert own <= read < own + 100_000, f"rank {rank} needs {own:,} of {total:,} bytes and read {read:,}"
        assert found[f"r{rank}"].report["read_nbytes"] == own


def test_in_memory_from_ranks_reads_no_foreign_slices(tmp_path: Path) -> None:
    """From 4 to 8: a rank reads half of what one rank's file holds, wherever it lies."""
    model = Model(2, 512, 1024, optimizer=False)
    case = make_case(tmp_path / "c", "ckpt", (1, 4, 1), (1, 8, 1), model)
    found = run(tmp_path / "job", case, (1, 8, 1), request_of(case, tmp_path / "out", in_memory=True))
    stages, whole = model.stages(1, 8, 1), model.whole()
    own = sum(array.nbytes for array in support.slice_rank(whole, stages, 5).values())
    assert own <= found["r5"].report["rchar"] < own + 300_000  # four headers and samples
    assert not (tmp_path / "out").exists()


def test_no_rank_of_a_written_result_reads_more_than_its_share(tmp_path: Path) -> None:
    case = make_case(tmp_path / "c", "safetensors", COMPLETE, (1, 8, 1), Model(2, 512, 1024, optimizer=False))
    file = complete(case, tmp_path / "whole.safetensors")
    request = request_of(case, tmp_path / "out", load_checkpoint=str(file), src_strategy=None)
    found = run(tmp_path / "job", case, (1, 8, 1), request)
    own = sum(a.nbytes for a in support.slice_rank(case.model.whole(), case.model.stages(1, 8, 1), 3).values())
    assert found["r3"].report["rchar"] < 2 * own + 300_000  # the source's bytes, and its own file again


# ------------------------------------------------------------------------------------------------------ where it lies


def test_what_lies_where(tmp_path: Path, cases: dict[str, Case]) -> None:
    case, out = cases["safetensors"], tmp_path / "out"
    found = run(tmp_path / "job", case, SMALLER, request_of(case, out))
    run_id = found["r0"].report["run"]
    assert {name: os.readlink(out / name) for name in ("strategy", "transformed_checkpoint")} == {
        name: f"auto_trans/{run_id}/{name}" for name in ("strategy", "transformed_checkpoint")
    }
    assert sorted(os.listdir(out)) == ["auto_trans", "strategy", "transformed_checkpoint"]
    assert sorted(os.listdir(out / "transformed_checkpoint")) == ["src"]
    folder = out / "transformed_checkpoint" / "src"
    assert sorted(os.listdir(folder)) == ["rank_0", "rank_1", "rank_2", "rank_3", "transform_ckpt.json"]
    assert [path.name for path in result(out, case.src).values()] == [f"checkpoint_{r}.safetensors" for r in range(4)]
    strategies = [f"ckpt_strategy_rank_{rank}.ckpt" for rank in range(4)]
    assert sorted(os.listdir(out / "strategy")) == [*strategies, "merged_ckpt_strategy.ckpt"]
    assert (out / "strategy" / strategies[0]).read_bytes() != (out / "strategy" / strategies[3]).read_bytes()
    assert not [p for p in out.rglob("*") if ".tmp" in p.name or "part" in p.name], "litter"
    assert cli(["verify", str(folder)]).code == 0
    flip(result(out, case.src)[2], -1)
    assert cli(["verify", str(folder)]).code == 6


def test_a_strategy_without_pipeline_is_not_merged(tmp_path: Path, cases: dict[str, Case]) -> None:
    run(
        tmp_path / "job", cases["ckpt"], (1, 2, 1), request_of(cases["ckpt"], tmp_path / "out", container="safetensors")
    )
    names = ["ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt"]
    assert sorted(os.listdir(tmp_path / "out" / "strategy")) == names
    assert {path.suffix for path in result(tmp_path / "out", cases["ckpt"].src).values()} == {".safetensors"}


@pytest.mark.parametrize("fmt", FORMATS)
def test_mindspore_loads_the_result(tmp_path: Path, cases: dict[str, Case], ms: ModuleType, fmt: str) -> None:
    case = cases[fmt]
    run(tmp_path / "job", case, SMALLER, request_of(case, tmp_path / "out"))
    whole, stages = case.model.whole(), case.model.stages(*SMALLER)
    for rank, path in result(tmp_path / "out", case.src).items():
        wanted = {
            n: a.reshape(1) if a.shape == () and fmt == "ckpt" else a
            for n, a in support.slice_rank(whole, stages, rank).items()
        }
        found = {n: a.reshape(wanted[n].shape) if a.size == 1 else a for n, a in support.load_file(ms, path).items()}
        support.assert_same(found, wanted, f"rank {rank}")


# ------------------------------------------------------------------------------------------------------ several runs


@dataclass(frozen=True)
class Twice:
    """Directories of runs in one output_dir."""

    out: Path

    def ids(self) -> list[str]:
        return sorted(n for n in os.listdir(self.out / "auto_trans") if n[0].isdigit())


def test_a_result_stays_until_it_is_pruned(tmp_path: Path, cases: dict[str, Case]) -> None:
    case, out = cases["ckpt"], tmp_path / "out"
    request = request_of(case, out, keep=2)
    ids = [run(tmp_path / "1", case, SMALLER, request)["r0"].report["run"]]
    before = {p.relative_to(out): p.read_bytes() for p in (out / "auto_trans" / ids[0]).rglob("*") if p.is_file()}
    for number, layout in enumerate([(1, 1, 2), (1, 4, 1)], start=2):
        _next_second(out, ids[-1])
        ids.append(run(tmp_path / str(number), case, layout, request)["r0"].report["run"])
        if number == 2:
            assert {path: (out / path).read_bytes() for path in before} == before
    assert Twice(out).ids() == ids[1:]
    assert os.readlink(out / "strategy") == f"auto_trans/{ids[2]}/strategy"


def _next_second(out: Path, run_id: str) -> None:
    """Make a run older than the next without waiting: its name says when it was."""
    del out, run_id
    import time

    time.sleep(1.05 - time.time() % 1)


def test_the_run_itself_is_never_pruned(tmp_path: Path, cases: dict[str, Case]) -> None:
    """A run that seems to be of the future: another clock."""
    out = tmp_path / "out"
    future = out / "auto_trans" / "29991231_235959_ffffff"
    future.mkdir(parents=True)
    found = run(tmp_path / "job", cases["ckpt"], (1, 1, 2), request_of(cases["ckpt"], out, keep=1))
    assert (out / "auto_trans" / found["r0"].report["run"]).is_dir()
    assert cli(["verify", str(out / "transformed_checkpoint" / "src")]).code == 0


@pytest.mark.parametrize("late", [0, 1, 3])
def test_the_previous_run_may_be_the_source(tmp_path: Path, cases: dict[str, Case], late: int) -> None:
    """Through both well-known names, in the same output_dir, keep=1, a rank being slow to look it up."""
    case, out = cases["ckpt"], tmp_path / "out"
    run(tmp_path / "1", case, SMALLER, request_of(case, out))
    request = request_of(
        case,
        out,
        load_checkpoint=str(out / "transformed_checkpoint" / "src"),
        src_strategy=str(out / "strategy"),
        keep=1,
    )
    before = {late: {"resolve": {"sleep": 0.6}, "plan": {"sleep": 0.3}}}
    run(tmp_path / "2", case, (2, 2, 1, 2), request, before=before)
    assert len(Twice(out).ids()) == 2, "the source is still needed"


def test_the_previous_run_as_source_when_the_rank_is_late_to_join(tmp_path: Path, cases: dict[str, Case]) -> None:
    case, out = cases["safetensors"], tmp_path / "out"
    run(tmp_path / "1", case, SMALLER, request_of(case, out))
    paths = {"load_checkpoint": str(out / "transformed_checkpoint" / "src"), "src_strategy": str(out / "strategy")}
    run(tmp_path / "2", case, (1, 1, 2), request_of(case, out, **paths), own_delay={1: 0.5})


@pytest.mark.parametrize("kind", ["directory", "file", "empty"])
def test_what_another_program_left_is_moved_aside(tmp_path: Path, cases: dict[str, Case], kind: str) -> None:
    case, out = cases["ckpt"], tmp_path / "out"
    for name in ("strategy", "transformed_checkpoint"):
        out.mkdir(exist_ok=True)
        if kind == "file":
            (out / name).write_text("mine")
        else:
            (out / name).mkdir()
        if kind == "directory":
            (out / name / "mine.txt").write_text("mine")
    found = run(tmp_path / "job", case, (1, 1, 2), request_of(case, out))
    aside = sorted(p for p in out.iterdir() if ".before_" in p.name)
    assert len(aside) == (0 if kind == "empty" else 2)
    for path in aside:
        assert (path / "mine.txt" if path.is_dir() else path).read_text() == "mine"
        assert any(str(path) in end.out for end in found.values())
    assert (out / "strategy").is_symlink()


# ------------------------------------------------------------------------------------------------------ taking over


def inodes(out: Path, run_id: str) -> dict[str, int]:
    """Of each rank's file of a run."""
    folder = out / "auto_trans" / run_id / "transformed_checkpoint" / "src"
    return {path.parent.name: path.stat().st_ino for path in folder.glob("rank_*/*")}


def test_the_same_again_is_taken_over(tmp_path: Path, cases: dict[str, Case]) -> None:
    case, out = cases["ckpt"], tmp_path / "out"
    one = run(tmp_path / "1", case, SMALLER, request_of(case, out))["r0"]
    two = run(tmp_path / "2", case, SMALLER, request_of(case, out))["r0"]
    assert inodes(out, one.report["run"]) == inodes(out, two.report["run"])
    assert f"taken over from run {one.report['run']}" in two.out
    assert (one.report["read_nbytes"] > 0, two.report["read_nbytes"]) == (True, 0)
    assert cli(["verify", str(out / "transformed_checkpoint" / "src")]).code == 0


@pytest.mark.parametrize("victim", [0, 2])
def test_a_flipped_bit_is_not_taken_over(tmp_path: Path, cases: dict[str, Case], victim: int) -> None:
    case, out = cases["ckpt"], tmp_path / "out"
    one = run(tmp_path / "1", case, SMALLER, request_of(case, out))["r0"].report["run"]
    flip(result(out, case.src)[victim], -3)
    again = run(tmp_path / "2", case, SMALLER, request_of(case, out))
    old, new = inodes(out, one), inodes(out, again["r0"].report["run"])
    assert {name for name in old if old[name] != new[name]} == {f"rank_{victim}"}
    assert "made anew" in again[f"r{victim}"].out
    assert cli(["verify", str(out / "transformed_checkpoint" / "src")]).code == 0


@pytest.mark.parametrize("damage", ["missing", "cut", "record", "record of nothing"])
def test_a_damaged_result_is_not_taken_over(tmp_path: Path, cases: dict[str, Case], damage: str) -> None:
    case, out = cases["ckpt"], tmp_path / "out"
    one = run(tmp_path / "1", case, (1, 1, 2), request_of(case, out))["r0"].report["run"]
    file = result(out, case.src)[1]
    record = out / "auto_trans" / one / "records" / "src" / "rank_1.json"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 5)
    elif damage == "record":
        record.write_bytes(record.read_bytes()[:100])
    else:
        import json

        record.write_text(json.dumps({**json.loads(record.read_text()), "manifest": {}}))
    again = run(tmp_path / "2", case, (1, 1, 2), request_of(case, out))["r0"].report["run"]
    assert inodes(out, one).get("rank_1") != inodes(out, again)["rank_1"]


def test_a_source_that_has_changed_is_not_taken_over(tmp_path: Path, cases: dict[str, Case]) -> None:
    """Equal headers and sizes; another value."""
    case, out = cases["ckpt"], tmp_path / "out"
    shutil.copytree(case.src, tmp_path / "src")
    request = request_of(case, out, load_checkpoint=str(tmp_path / "src"))
    one = run(tmp_path / "1", case, (1, 1, 2), request)
    changed = {**case.model.whole(), "global_step": np.array([12], np.int64)}
    stages = case.model.stages(*DISTRIBUTED)
    for rank in range(8):
        path = tmp_path / "src" / case.file(rank).relative_to(case.src)
        write_file(path, support.slice_rank(changed, stages, rank))
    found = all_done(driver.run(tmp_path / "2", job_of(2, request, strategy=strategy_of(case, (1, 1, 2)))))
    digests = {end.tensors["global_step"] for end in found.values()}
    assert digests == {driver.digests(changed)["global_step"]} != {one["r0"].tensors["global_step"]}
