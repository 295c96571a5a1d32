"""The benchmark's training state: real MindSpore reads and transforms it, at a small size."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks import auto, auto_count, auto_layout, make_state
from benchmarks.auto_job import Job, run_job
from benchmarks.bench import Case, Row, table, world
from benchmarks.make_state import LLAMA_70B, Model, Parallel, Param, model_of
from benchmarks.measure import CommandFailedError, Sample, Summary, run
from benchmarks.same import differences
from tests.support import device_slices, load_ranks, rank_files, transform

SRC, DST = Parallel(dp=2, pp=4, opt=1), Parallel(mp=2, pp=2)
SMALL = Model(hidden=64, ffn=176, kv=16, vocab=128, layers=4)
SEED = 3
NUMPY = {"BF16": "bfloat16", "F32": "float32"}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, ms: ModuleType) -> Path:
    assert ms is not None  # make_state imports it for its protobuf classes
    out = tmp_path_factory.mktemp("state") / "small"
    make_state.make_state(out, SMALL, SRC, DST, seed=SEED)
    return out


def whole(param: Param) -> bytes:
    itemsize = make_state.CODES[param.dtype][1]
    return make_state.values(SEED, param.name, int(np.prod(param.shape)) * itemsize, itemsize).tobytes()


def assert_state(ranks: dict[int, dict[str, np.ndarray]], parallel: Parallel) -> None:
    """Every rank holds exactly its slices of the generated values, and the scalars."""
    scalars = {name for name, *_ in make_state.SCALARS}
    assert sorted(ranks) == list(range(parallel.world))
    for stage, params in enumerate(parallel.stages(SMALL)):
        for device in range(parallel.devices):
            held = ranks[stage * parallel.devices + device]
            assert set(held) == {p.name for p in params} | scalars
            for param in params:
                dtype = held[param.name].dtype
                assert dtype.name == NUMPY[param.dtype]
                expected = np.frombuffer(whole(param), dtype).reshape(param.shape)
                index = device_slices(param.shape, parallel.layout(param))[device]
                assert held[param.name].tobytes() == expected[index].tobytes(), param.name
                assert np.isfinite(held[param.name].astype(np.float32)).all()


@pytest.mark.parametrize("fmt", make_state.FORMATS)
def test_mindspore_reads_the_source(state: Path, ms: ModuleType, fmt: str) -> None:
    assert_state(load_ranks(ms, state / f"src_{fmt}"), SRC)


@pytest.mark.parametrize("fmt", make_state.FORMATS)
def test_mindspore_transforms_it(state: Path, ms: ModuleType, fmt: str, tmp_path: Path) -> None:
    src_strategy, dst_strategy = state / "src_strategy_merged.ckpt", state / "dst_strategy_merged.ckpt"
    transform(ms, state / f"src_{fmt}", tmp_path / "out", src_strategy, dst_strategy)
    assert_state(load_ranks(ms, tmp_path / "out"), DST)


@pytest.mark.parametrize("role", ["src", "dst"])
def test_merged_strategy_is_what_mindspore_merges(state: Path, ms: ModuleType, role: str, tmp_path: Path) -> None:
    ms.merge_pipeline_strategys(str(state / f"{role}_strategy"), str(tmp_path / "merged.ckpt"))
    merged, ours = (
        ms.build_searched_strategy(str(path))
        for path in (tmp_path / "merged.ckpt", state / f"{role}_strategy_merged.ckpt")
    )
    assert merged.keys() == ours.keys()
    assert {name: str(layout) for name, layout in merged.items()} == {
        name: str(layout) for name, layout in ours.items()
    }


def test_same_seed_same_bytes(state: Path, tmp_path: Path) -> None:
    make_state.make_state(tmp_path / "again", SMALL, SRC, DST, seed=SEED)
    for path in sorted(state.rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(state)).read_bytes() == path.read_bytes()


def test_long_tensors_become_several_values(ms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_state, "CKPT_VALUE_NBYTES", 1000)
    make_state.write_stage(tmp_path, "ckpt", 0, SRC.stages(SMALL)[0], parallel=SRC, seed=SEED)
    files = rank_files(tmp_path)
    assert files[0].read_bytes().count(b"model.tok_embeddings.embedding_weight") > 3 * 8
    loaded = load_ranks(ms, tmp_path)
    param = SRC.stages(SMALL)[0][0]
    half = (loaded[0][param.name], loaded[1][param.name])
    assert b"".join(part.tobytes() for part in half) == whole(param)


@pytest.mark.parametrize("fmt", make_state.FORMATS)
def test_sparse_files_differ_in_tensor_bytes_only(state: Path, tmp_path: Path, fmt: str) -> None:
    make_state.make_state(tmp_path / "sparse", SMALL, SRC, DST, formats=[fmt], seed=None)
    full, sparse = rank_files(state / f"src_{fmt}"), rank_files(tmp_path / "sparse" / f"src_{fmt}")
    for rank, path in full.items():
        a, b = path.read_bytes(), sparse[rank].read_bytes()
        assert len(a) == len(b)
        assert all(y in {x, 0} for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("gigabytes", "layers"), [(0.1, 4), (1.6, 8), (16, 8), (16, 32)])
def test_model_is_of_the_size_asked_for(gigabytes: float, layers: int) -> None:
    nbytes = sum(int(np.prod(p.shape)) * make_state.CODES[p.dtype][1] for p in model_of(gigabytes, layers).states())
    assert nbytes == pytest.approx(gigabytes * 1e9, rel=0.1)


def test_llama_70b_has_its_size() -> None:
    assert sum(int(np.prod(p.shape)) for p in LLAMA_70B.params()) == pytest.approx(69e9, rel=0.01)


def test_bench_refuses_an_unknown_format(repo_root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench", "--format", "pt"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def measured(command: list[str], log: Path, root: Path) -> Sample:
    """Measure from a small process, for a child's peak memory starts at its parent's."""
    code = f"import pathlib; from benchmarks.measure import run; print(run({command}, log=pathlib.Path({str(log)!r})))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    return Sample(*(float(number) for number in re.findall(r"=([\d.]+)", shown)))


def test_measured_memory_is_the_commands_own(tmp_path: Path, repo_root: Path) -> None:
    hold = "import time; held = bytearray(80_000_000); time.sleep(0.3)"
    both = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; p.wait()"
    one = measured([sys.executable, "-c", hold], tmp_path / "log", repo_root)
    two = measured([sys.executable, "-c", both], tmp_path / "log", repo_root)
    assert one.seconds >= 0.3
    assert 80e6 < one.max_rss < 200e6
    assert two.max_rss < 160e6 < two.sum_rss


def test_failed_command_says_why(tmp_path: Path) -> None:
    with pytest.raises(CommandFailedError, match=r"exit code 3[\s\S]*because"):
        run([sys.executable, "-c", "print('because'); raise SystemExit(3)"], log=tmp_path / "log")
    run([sys.executable, "-c", "raise SystemExit(3)"], log=tmp_path / "log", ok=(3,))


def test_summary_and_table() -> None:
    summary = Summary.of([Sample(3, 10, 20), Sample(1, 30, 30), Sample(2, 20, 50)])
    assert summary == Summary(seconds=2, fastest=1, slowest=3, max_rss=30, sum_rss=50, runs=3)
    copy = Row(Case("g", "cp -r of the source", ()), Summary.of([Sample(4, 1_000_000, 2_000_000)]))
    lines = table([copy, Row(Case("g", "other", ()), summary)])
    assert lines[2] == "| cp -r of the source | 4.00 (4.00 - 4.00) | 1.00 | 1 | 2 |"
    assert lines[3].startswith("| other | 2.00 (1.00 - 3.00) | 0.50 |")


def test_world_size() -> None:
    assert [world(text) for text in ("dp=2,pp=4,opt=1", "mp=2,pp=2", "dp=2,mp=8,pp=4,opt=1")] == [8, 4, 64]


def test_differences_are_named() -> None:
    a = {"same": np.zeros(2), "value": np.zeros(2), "shape": np.zeros(2), "mine": np.zeros(1)}
    b = {"same": np.zeros(2), "value": np.array([0.0, -0.0]), "shape": np.zeros((1, 2)), "theirs": np.zeros(1)}
    found = differences(a, b)
    assert [line.partition(":")[0] for line in found] == ["only on one side", "only on one side", "shape", "value"]


# ------------------------------------------------------------------------------------------------ automatic transform


def bench_auto(root: Path, out: Path, *flags: str) -> tuple[int, str]:
    """Exit code and report of a quick run."""
    command = [sys.executable, "-m", "benchmarks.bench", "--quick", "--only", "auto", "--dir", str(out), *flags]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=500)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def ratios(report: str) -> list[float]:
    """The accounting's `read / own` of each rank and format."""
    return [float(found) for found in re.findall(r"^\| \d+ \| [\d,]+ \| [\d,]+ \| ([\d.]+) \|", report, re.MULTILINE)]


@pytest.mark.parametrize("target", ["dp=2,opt=1", "mp=2"])
def test_no_rank_in_memory_reads_more_than_its_slices(
    tmp_path: Path, repo_root: Path, ms: ModuleType, target: str
) -> None:
    assert ms is not None  # the state is made with it
    page = tmp_path / "page.md"
    code, report = bench_auto(repo_root, tmp_path / "b", "--no-upstream", "--auto-dst", target, "--write", str(page))
    assert (code, page.read_text() + "\n") == (0, report)
    assert ratios(report) == [pytest.approx(1, abs=1e-3)] * 4
    assert report.count("by digest: equal") == 4
    assert re.search(r"^- 4 processes on this machine, .*: [\d.]+ s", report, re.MULTILINE)
    assert not (tmp_path / "b" / "state" / "out_auto").exists()


@pytest.mark.slow
def test_jobs_of_mindspore_hold_the_same(tmp_path: Path, repo_root: Path, ms: ModuleType) -> None:
    assert ms is not None
    code, report = bench_auto(repo_root, tmp_path / "b", "--auto-dst", "dp=2,opt=1")
    assert code == 0, report
    assert all(
        report.count(f"| {name} |") == (2 if way in ("memory", "disk") else 1) for way, name in auto.WAYS.items()
    )
    assert report.count("by digest: equal") == 5


def test_own_slices_are_what_the_files_hold(state: Path) -> None:
    sizes = [sum(tensors) for tensors in auto_layout.rank_sizes(SMALL, SRC)]
    headers = auto_layout.header_nbytes(state / "src_safetensors")
    files = rank_files(state / "src_safetensors")
    assert sizes == [files[rank].stat().st_size - headers[files[rank].name] for rank in range(SRC.world)]
    assert auto_layout.looking_nbytes(SMALL, SRC, state)["safetensors"]["headers"] == sum(headers.values())


COUNTED = {"phases": {"plan": 90, "load": 100}, "rchar": 195, "mapped": []}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"phases": {"plan": 90, "load": 101}, "rchar": 196}, "101 bytes of tensors, at most 100"),
        ({"phases": {"plan": 93, "load": 100}, "rchar": 198}, "93 bytes while planning, at most 92"),
        ({"rchar": 196}, "6 bytes of no source file, at most 5"),
        ({"mapped": ["/x"]}, "/x is mapped"),
    ],
)
def test_reading_too_much_is_said(change: dict[str, object], said: str | None) -> None:
    found = auto.overdrawn({**COUNTED, **change}, 100, {"headers": 80, "samples": 12}, 5)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_reading_too_much_fails_the_benchmark() -> None:
    looking = {"ckpt": {"headers": 90}}
    target = auto.Target("mp=1", Path("s"), [100], looking, 0)
    more = {**COUNTED, "phases": {"plan": 90, "load": 120}}
    assert not any("READS TOO MUCH" in line for line in auto.accounting([COUNTED], target, "ckpt"))
    assert "1.2000" in auto.accounting([more], target, "ckpt")[2]
    assert "rank 0 READS TOO MUCH" in auto.accounting([more], target, "ckpt")[-1]


def test_other_values_and_other_names_are_named() -> None:
    first, second = (
        Job(1, 1, 1, 1, 1, (digests, {}), (None, None))
        for digests in ({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
    )
    assert auto.unlike([first, second], first) == ["rank 0: b", "rank 0: c"]
    lines = auto.same_values({"memory": [second], "mindspore_one": [first, first], "disk": [replace(first)]})
    assert "DIFFERENT in 2, first rank 0: b" in lines[0]
    assert [line.endswith("equal") for line in lines] == [False, True]  # MindSpore's first run is not its own witness


def test_reads_are_counted_where_they_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", os.pread)
    monkeypatch.setattr(os, "preadv", os.preadv)
    inside, outside = tmp_path / "src" / "f", tmp_path / "src2"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(b"x" * 50_000)
    counter = auto_count.Counter(str(inside.parent))
    with inside.open("rb", buffering=0) as mine, outside.open("rb", buffering=0) as other:
        counter.phase = "plan"
        os.pread(mine.fileno(), 1000, 49_500)  # 500 are left
        os.pread(other.fileno(), 700, 0)
        counter.phase = "load"
        os.preadv(mine.fileno(), [bytearray(20), bytearray(30)], 0)
        mine.read(40_000)
        with mmap.mmap(mine.fileno(), 0, prot=mmap.PROT_READ):
            found = counter.report()
    assert found["phases"] == {"plan": 500, "load": 50}
    assert 41_250 <= found["rchar"] < 60_000  # the other file, and what passed by, too
    assert found["mapped"] == [str(inside)]
    assert counter.report()["mapped"] == []


def test_a_job_ends_with_its_first_failure(tmp_path: Path, state: Path) -> None:
    target = auto.Target("", state / "dst_strategy_merged.ckpt", [0] * 3, {}, 0)  # 3 ranks, for a strategy of 4
    spec = auto.spec_of(state, "ckpt", target, "memory")
    with pytest.raises(CommandFailedError, match=r"exit code 1 of rank \d[\s\S]*strategy is for 4 ranks, but 3 are"):
        run_job(spec, tmp_path / "log")


def test_ranks_join(repo_root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.auto_join", "3"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=True, timeout=60)
    assert 0 < float(done.stdout) < 30
