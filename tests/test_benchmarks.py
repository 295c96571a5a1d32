"""The benchmark's training state: real MindSpore reads and transforms it, at a small size."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import auto, auto_count, auto_layout, dist_opt, dist_opt_same, make_dist_opt, make_state, torch_loop
from benchmarks.auto_job import Job, run_job
from benchmarks.bench import world
from benchmarks.common import Case, Row, measure, table
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


# ----------------------------------------------------------------------------------------------- distributed optimizer

TINY = make_dist_opt.Model(make_dist_opt.STEP)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], Path]:
    """A checkpoint by container, TP and PP."""
    found = {(c, tp, pp): tmp_path_factory.mktemp(c) for c in make_dist_opt.CONTAINERS for tp, pp in ((2, 2), (4, 1))}
    for (container, tp, pp), out in found.items():
        make_dist_opt.make(out, TINY, container, tp=tp, pp=pp, seed=SEED)
    return found


def rank_of(root: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights by name, and the only buffer of the optimizer."""
    make_dist_opt.model_type()
    folder = root / "iter_0000010" / name
    model, optimizer = (
        torch.load(folder / file, weights_only=False) for file in ("model_optim_rng.pt", "distrib_optim.pt")
    )
    assert model["args"].model_type.value == 1
    return dict(dist_opt_same.weights(model["model"])), optimizer[0][make_dist_opt.KEY]


@pytest.mark.parametrize("container", make_dist_opt.CONTAINERS)
@pytest.mark.parametrize(("pp", "buckets"), [(0, 3), (1, 1)])
def test_weights_are_the_master_weights(
    megatron: dict[tuple[str, int, int], Path], container: str, pp: int, buckets: int
) -> None:
    root = megatron[container, 2, 2]
    weights, buffer = rank_of(root, f"mp_rank_01_00{pp}")
    ranges = json.loads((root / "param_map" / f"param_map_buffer0_dp1tp1pp{pp}vpp0.json").read_text())
    assert list(ranges) == [f"module.{name}" for name in reversed(weights)]
    assert sorted({bucket for *_, bucket in ranges.values()}) == list(range(buckets))
    for state in make_dist_opt.ADAM:
        if container == "list":
            assert len(buffer[state]) == buckets
        else:
            assert len(buffer[state]) == buffer["numel_unpadded"]
        # no bucket has padding: one behind the other they are the whole buffer
        held = torch.cat(buffer[state]) if container == "list" else buffer[state]
        assert (held.numel(), held.unique().numel() > held.numel() // 2) == (
            sum(map(torch.numel, weights.values())),
            True,
        )
        assert (held.min() >= 0) == (state == "exp_avg_sq")
        for name, (kind, shape, start, end, _) in ranges.items():
            weight = weights[name.removeprefix("module.")]
            assert (kind, shape) == (str(weight.dtype), list(weight.shape))
            same = torch.equal(held[start:end].reshape(shape).bfloat16(), weight)
            assert same == (state == "param"), name


@pytest.mark.parametrize(("name", "axis"), [("linear_qkv", 0), ("linear_proj", 1), ("linear_fc2", 1)])
def test_values_do_not_depend_on_the_layout(megatron: dict[tuple[str, int, int], Path], name: str, axis: int) -> None:
    part = "mlp" if "fc" in name else "self_attention"
    two = [rank_of(megatron["coalesced", 2, 2], f"mp_rank_0{tp}_001")[0] for tp in range(2)]
    four = [rank_of(megatron["coalesced", 4, 1], f"mp_rank_0{tp}")[0] for tp in range(4)]
    joined = torch.cat([rank[f"decoder.layers.1.{part}.{name}.weight"] for rank in two], axis)
    assert torch.equal(joined, torch.cat([rank[f"decoder.layers.3.{part}.{name}.weight"] for rank in four], axis))
    # [gate; up] of every rank
    gate = torch.cat([rank["decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)[0] for rank in two])
    wide = [rank["decoder.layers.3.mlp.linear_fc1.weight"].chunk(2)[0] for rank in four]
    assert torch.equal(gate, torch.cat(wide))


def test_megatron_is_of_the_size_asked_for(megatron: dict[tuple[str, int, int], Path]) -> None:
    model = make_dist_opt.model_of(4.3)
    assert (model.hidden, model.vocab, model.ffn) == (2048, 32000, 5632)
    nbytes = sum(14 * int(np.prod(p.shape)) for p in model.params(make_dist_opt.CORE, 1, 0))
    assert nbytes == pytest.approx(4.3e9, rel=0.1)
    files = sum(path.stat().st_size for path in megatron["list", 2, 2].rglob("*.pt"))
    assert files == pytest.approx(
        14 * sum(int(np.prod(p.shape)) for p in TINY.params(make_dist_opt.CORE, 1, 0)), rel=0.01
    )


@pytest.mark.parametrize("container", make_dist_opt.CONTAINERS)
def test_conversions_and_what_they_are_compared_with(
    megatron: dict[tuple[str, int, int], Path], ms: ModuleType, container: str, tmp_path: Path, repo_root: Path
) -> None:
    src, expected = megatron[container, 2, 2], megatron[container, 4, 1]
    maps = ("--param-map-path", src / "param_map") if container == "list" else ()
    there, again = tmp_path / "ms", tmp_path / "back"
    for command in (
        dist_opt.reshard(src, tmp_path / "m", maps),
        dist_opt.to_mindspore(src, there, "ckpt", maps),
        dist_opt.to_megatron(there, again),
    ):
        subprocess.run(command, cwd=repo_root, check=True, capture_output=True, timeout=100)
    assert dist_opt_same.main(f"{tmp_path}/m", str(expected)) == 0
    assert dist_opt_same.main(f"{tmp_path}/m", str(src)) == 1
    assert dist_opt_same.main(str(again), str(src)) == 0
    if container == "list":
        assert ms is not None
        for one in torch_loop.jobs(src, tmp_path / "loop"):
            torch_loop.convert(one)
        assert dist_opt_same.main(f"{tmp_path}/ms", f"{tmp_path}/loop") == 0


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_other_bytes_are_named(
    megatron: dict[tuple[str, int, int], Path], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = megatron["list", 2, 2]
    shutil.copytree(src, tmp_path / "copy")
    changed = tmp_path / "copy/iter_0000010/mp_rank_01_000" / file
    with changed.open("r+b") as held:
        held.seek(changed.stat().st_size // 2)
        byte = held.read(1)
        held.seek(-1, os.SEEK_CUR)
        held.write(bytes([byte[0] ^ 1]))
    assert dist_opt_same.main(str(src), str(tmp_path / "copy")) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("mp_rank_01_000: " + ("optimizer " if "distrib" in file else "language_model."))
    assert last == "66 tensors of 4 ranks compared: DIFFERENT"


def test_destinations_that_nobody_looks_at_go(tmp_path: Path) -> None:
    cases = [
        Case(
            "g",
            name,
            (sys.executable, "-c", f"import os; os.mkdir({str(tmp_path / name)!r})"),
            None,
            tmp_path / name,
            kept=kept,
        )
        for name, kept in (("kept", True), ("gone", False))
    ]
    assert [row.summary.runs for row in measure(cases, 2, tmp_path / "log")] == [2, 2]
    assert [(tmp_path / name).exists() for name in ("kept", "gone")] == [True, False]


@pytest.mark.slow
def test_megatron_benchmark(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench", "--quick", "--only", "dist_opt", "--no-upstream"]
    done = subprocess.run(
        [*command, "--dir", str(tmp_path / "b")],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compared: equal") == 4
    assert len(re.findall(r"^\| cp -r of the source \| .* \| 1\.00 \|", done.stdout, re.MULTILINE)) == 4
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["last.log"]
