"""There and back bit for bit; the same bytes again, however it was run; every kind of output read back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

import transform_ckpt
from tests import support
from tests.support import Array, Arrays, Layout, assert_same, load_file, load_ranks, rank_files, slice_rank
from tests.test_support import golden_stages
from transform_ckpt import planner

ROOT = Path(__file__).parents[2]
FORMATS = ["ckpt", "safetensors"]
STATE_PREFIXES = ("adam_m.", "adam_v.")
MANIFEST = "transform_ckpt.json"

Stages = list[dict[str, Layout]]


@pytest.fixture(scope="session")
def root(golden: Path) -> Path:
    return golden / "mindspore"


@pytest.fixture(scope="session")
def whole(ms: ModuleType, root: Path) -> dict[str, Array]:
    (found,) = load_ranks(ms, root / "src_safetensors" / "C").values()
    return found


def merged(root: Path, case: str) -> Path | None:
    """The strategy of a golden layout; C, one rank, is complete without one."""
    return None if case == "C" else root / "strategy" / f"{case}_merged.ckpt"


def between(root: Path, src: str, dst: str) -> dict[str, Path | None]:
    return {"src_strategy": merged(root, src), "dst_strategy": merged(root, dst)}


def read_tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def assert_same_tree(actual: Path, expected: Path) -> None:
    found, wanted = read_tree(actual), read_tree(expected)
    assert list(found) == list(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def assert_ranks(ms: ModuleType, directory: Path, expected: Mapping[int, Arrays]) -> None:
    found = load_ranks(ms, directory)
    assert list(found) == list(expected)
    for rank, held in expected.items():
        assert_same(found[rank], held, f"rank {rank}")


def run_cli(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transform_ckpt", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == code, found.stderr
    return found


# --------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("formats", ["ckpt", "safetensors", "both"])
def test_round_trip_through_five_layouts(ms: ModuleType, root: Path, tmp_path: Path, formats: str) -> None:
    first = "ckpt" if formats == "both" else formats
    at = root / f"src_{first}" / "A"
    for number, (src, dst) in enumerate(["AB", "BD", "DF", "FC", "CA"]):
        container = FORMATS[number % 2 - 1] if formats == "both" else None
        transform_ckpt.convert(at, tmp_path / f"{src}_to_{dst}", container=container, **between(root, src, dst))
        at = tmp_path / f"{src}_to_{dst}"
    assert_ranks(ms, at, load_ranks(ms, root / f"src_{first}" / "A"))


@pytest.mark.parametrize("fmt", FORMATS)
def test_there_and_back_is_the_same_file(root: Path, tmp_path: Path, fmt: str) -> None:
    """What we write once, we write again byte for byte after a way over other layouts."""
    at = root / f"src_{fmt}" / "C"
    for src, dst in ["CA", "AH", "HE", "EA"]:
        transform_ckpt.convert(at, tmp_path / f"{src}{dst}", **between(root, src, dst))
        at = tmp_path / f"{src}{dst}"
    first, last = read_tree(tmp_path / "CA"), read_tree(tmp_path / "EA")
    del first[MANIFEST], last[MANIFEST]  # it names the source's files
    assert first.keys() == last.keys()
    assert {name: file for name, file in first.items() if last[name] != file} == {}


# -------------------------------------------------------------------------------------- the same bytes again


LARGE = {"layers.0.w": (3840, 2816), "layers.1.w": (2304, 2816), "layers.2.w": (2304, 2816), "layers.3.w": (2304, 2816)}
"""43, 26, 26 and 13 MB: several units of work for several processes, and a tensor that is cut into two of them."""


@pytest.fixture(scope="session")
def large(ms: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 110 MB on two ranks in both formats, with strategies of another layout, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(1)
    dtypes = dict.fromkeys(LARGE, np.float32) | {"layers.3.w": ml_dtypes.bfloat16}
    whole = {name: support.random_bits(rng, dtypes[name], shape) for name, shape in LARGE.items()}
    src = [{name: Layout((2,), (-1, 0)) for name in whole}]
    dst = [{f"layers.{n}.w": Layout((3, 2), (1, 0)) for n in stage} for stage in ((0, 1), (2, 3))]
    dst[0]["layers.0.w"] = Layout((3, 2), (1, -1))
    dst[1]["layers.3.w"] = Layout((2, 3), (-1, -1), 1, -1)
    whole["loss_scale"] = np.array(2.0, np.float32)
    support.write_merged_strategy(ms, src, folder / "src.ckpt")
    support.write_merged_strategy(ms, dst, folder / "dst.ckpt")
    expected = {rank: slice_rank(whole, dst, rank) for rank in range(12)}
    for fmt in FORMATS:
        support.save_ranks(ms, whole, src, folder / fmt, fmt)
        plan = transform_ckpt.plan(folder / fmt, **large_strategies(folder))
        assert len(plan.units) >= 4
        assert any(task.start > 0 for unit in plan.units for task in unit)
        one = transform_ckpt.RunOptions(workers=1)
        transform_ckpt.convert(folder / fmt, folder / f"out_{fmt}", run_options=one, **large_strategies(folder))
        assert_ranks(ms, folder / f"out_{fmt}", expected)
    return folder


def large_strategies(large: Path) -> dict[str, Path]:
    return {"src_strategy": large / "src.ckpt", "dst_strategy": large / "dst.ckpt"}


def large_words(large: Path, fmt: str, dst: Path) -> list[object]:
    strategies = large_strategies(large)
    words = ["convert", large / fmt, dst, "--to", "mindspore", "--json"]
    return [*words, "--src-strategy", strategies["src_strategy"], "--dst-strategy", strategies["dst_strategy"]]


@pytest.mark.parametrize("fmt", FORMATS)
def test_same_tree_whatever_the_workers_and_the_memory(large: Path, tmp_path: Path, fmt: str) -> None:
    for workers, memory in [(1, "1M"), (2, "1G"), (3, "3M")]:
        out = tmp_path / f"out_{workers}"
        found = run_cli(*large_words(large, fmt, out), "--workers", workers, "--memory", memory)
        assert json.loads(found.stdout)["resumed_units"] == 0
        assert_same_tree(out, large / f"out_{fmt}")
        shutil.rmtree(out)


KILLED = """
import os, signal, sys
from transform_ckpt import execute
from transform_ckpt.cli import main
record, limit, done = execute.record, int(sys.argv.pop(1)), []
def killing(fd, unit, digests):
    if len(done) == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    record(fd, unit, digests)
    done.append(unit)
execute.record = killing
main()
"""


def run_killed(units: int, words: list[object]) -> int:
    """The command line, each process of which is killed when it has recorded so many units."""
    command = [sys.executable, "-c", KILLED, str(units), *map(str, words)]
    return subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fmt", FORMATS)
def test_killed_and_resumed_is_the_same_tree(large: Path, tmp_path: Path, fmt: str, workers: int) -> None:
    out = tmp_path / "out"
    words = [*large_words(large, fmt, out), "--workers", workers]
    assert run_killed(1, words) == (-signal.SIGKILL if workers == 1 else 7)
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    found = json.loads(run_cli(*words).stdout)
    assert found["resumed_units"] == workers  # one of each
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert_same_tree(out, large / f"out_{fmt}")


def interrupt(done: int, total: int) -> None:
    if done > total // 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_interrupted_and_resumed_is_the_same_tree(
    *, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str, damaged: bool
) -> None:
    """Small units, so that half of them are done; bytes that change in between are written again."""
    monkeypatch.setattr(planner, "UNIT_NBYTES", 2000)
    src, options = root / f"src_{fmt}" / "A", between(root, "A", "B")
    transform_ckpt.convert(src, tmp_path / "once", **options)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        transform_ckpt.convert(src, out, run_options=transform_ckpt.RunOptions(progress=interrupt), **options)
    assert not out.exists()
    intact = transform_ckpt.plan(src, **options)
    if damaged:
        for path in rank_files(tmp_path / "out.partial").values():
            data = bytearray(path.read_bytes())
            for at in range(len(data) // 2, len(data), 7):
                data[at] ^= 0xFF
            path.write_bytes(data)
    result = transform_ckpt.convert(src, out, **options)
    low = 0 if damaged else len(intact.units) // 4
    assert low < result.resumed_units < len(intact.units)
    assert_same_tree(out, tmp_path / "once")


@pytest.mark.parametrize("fmt", FORMATS)
def test_manifest_says_nothing_of_the_machine(root: Path, tmp_path: Path, fmt: str) -> None:
    """Another place, another time, another name of the strategy: the same tree."""
    copied = tmp_path / "elsewhere" / "copy"
    shutil.copytree(root / f"src_{fmt}" / "A", copied)
    for path in copied.rglob("*"):
        os.utime(path, (1, 1))
    strategies = {}
    for side, path in between(root, "A", "B").items():
        strategies[side] = Path(shutil.copy(path, tmp_path / f"{side}.x"))
    transform_ckpt.convert(root / f"src_{fmt}" / "A", tmp_path / "here", **between(root, "A", "B"))
    transform_ckpt.convert(copied, tmp_path / "elsewhere" / "out", **strategies)
    assert_same_tree(tmp_path / "elsewhere" / "out", tmp_path / "here")
    text = (tmp_path / "here" / MANIFEST).read_text()
    for word in (str(root), str(tmp_path), socket.gethostname(), str(ROOT)):
        assert re.search(rf"\b{re.escape(word.strip('/'))}\b", text) is None
    assert all(not path.startswith("/") for path in json.loads(text)["files"])
    assert not re.search(r"\b(19|20)\d\d-\d\d|\d\d:\d\d:\d\d|\b1[5-9]\d{8}\b", text)


def test_nothing_stays_open(root: Path, tmp_path: Path) -> None:
    """A trainer may convert and load many times in one process."""
    options = between(root, "A", "B")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        transform_ckpt.convert(root / "src_ckpt" / "A", tmp_path / str(number), **options)
        list(transform_ckpt.load(root / "src_ckpt" / "A", rank=number, **options))
    run_options = transform_ckpt.RunOptions(progress=lambda done, total: interrupt(total, done))  # at once
    with pytest.raises(KeyboardInterrupt):
        transform_ckpt.convert(root / "src_ckpt" / "A", tmp_path / "never", run_options=run_options, **options)
    assert len(os.listdir("/proc/self/fd")) <= before


# ------------------------------------------------------------------------------------------ into memory


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("src", "dst"), [("A", "B"), ("D", "F"), ("B", "C"), ("C", "G")])
def test_load_gives_what_convert_writes(
    *, ms: ModuleType, root: Path, tmp_path: Path, src: str, dst: str, fmt: str
) -> None:
    source, options = source_of(root, src, fmt), between(root, src, dst)
    transform_ckpt.convert(source, tmp_path / "out", **options)
    for rank, held in load_ranks(ms, tmp_path / "out").items():
        loaded = dict(transform_ckpt.load(source, rank=rank, **options))
        assert_same(loaded, held, f"rank {rank}")
        assert all(array.flags.c_contiguous and array.flags.writeable for array in loaded.values())


def source_of(root: Path, case: str, fmt: str) -> Path:
    return root / f"src_{fmt}" / case


# ------------------------------------------------------------------------------------ other kinds of output


@contextmanager
def same_cores() -> Iterator[None]:
    """mindspore binds the process to cores when it loads unified weights."""
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.fixture(scope="session")
def unified(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unified") / "out"
    transform_ckpt.convert(root / "src_safetensors" / "D", out, src_strategy=merged(root, "D"), unified=True)
    return out


def test_unified_parts_load_with_mindspore(ms: ModuleType, unified: Path, whole: Arrays) -> None:
    parts = sorted(unified.glob("*.safetensors"))
    found = [load_file(ms, path) for path in parts]
    assert sum(map(len, found)) == len(whole)
    assert_same({name: array for part in found for name, array in part.items()}, whole)
    table = json.loads((unified / "param_name_map.json").read_text())["weight_map"]
    held = {name: path.name for path, part in zip(parts, found, strict=True) for name in part}
    assert table == {name: file for name, file in held.items() if file != "hyper_param.safetensors"}
    assert {name for name, file in held.items() if file == "hyper_param.safetensors"} == set(whole) - listed(table)


def listed(table: Mapping[str, str]) -> set[str]:
    return set(table)


@pytest.mark.parametrize("case", ["B", "E"])
def test_unified_is_resharded_by_mindspore(
    ms: ModuleType, root: Path, unified: Path, tmp_path: Path, case: str
) -> None:
    stages = golden_stages(ms, merged(root, case))
    complete = load_ranks(ms, root / "src_safetensors" / "C")[0]
    for rank in range(support.world_size(stages)):
        with same_cores():
            ms.load_distributed_checkpoint(
                network=None,
                predict_strategy=str(merged(root, case)),
                format="safetensors",
                unified_safetensors_dir=str(unified),
                dst_safetensors_dir=str(tmp_path),
                rank_id=rank,
            )
        found = load_file(ms, tmp_path / f"rank_{rank}" / "net.safetensors")
        assert_same(found, slice_rank(complete, stages, rank), f"rank {rank}")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", ["A", "C", "F"])
def test_unified_converts_back(
    *, ms: ModuleType, root: Path, unified: Path, whole: Arrays, tmp_path: Path, case: str, fmt: str
) -> None:
    transform_ckpt.convert(unified, tmp_path / "out", dst_strategy=merged(root, case), container=fmt)
    stages = golden_stages(ms, root / "strategy" / f"{case}_merged.ckpt")
    assert_ranks(ms, tmp_path / "out", {r: slice_rank(whole, stages, r) for r in range(support.world_size(stages))})


COMMON = {"epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size"}
"""States that Checkpoint 2.0 keeps as numbers of its common.json, without a type."""


@pytest.mark.parametrize("case", ["B", "C", "D", "G"])
def test_checkpoint_2_out_and_back_in(ms: ModuleType, root: Path, tmp_path: Path, case: str) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    transform_ckpt.convert(root / "src_safetensors" / "A", there, checkpoint_2=True, **between(root, "A", case))
    transform_ckpt.convert(there, back, dst_strategy=merged(root, "A"))
    wanted, found = load_ranks(ms, root / "src_safetensors" / "A"), load_ranks(ms, back)
    assert list(found) == list(wanted)
    for rank, held in wanted.items():
        for name in COMMON & set(held):
            assert float(found[rank].pop(name).reshape(())) == float(held.pop(name).reshape(())), name
        assert_same(found[rank], held, f"rank {rank}")


@pytest.mark.parametrize("src", ["A", "C"])
def test_checkpoint_2_says_the_states(root: Path, whole: Arrays, tmp_path: Path, src: str) -> None:
    """common.json has the numbers, whether the source is distributed or complete; the iteration is the step."""
    source = tmp_path / "src"
    for rank, path in rank_files(root / "src_ckpt" / src).items():
        (source / f"rank_{rank}").mkdir(parents=True)
        shutil.copy(path, source / f"rank_{rank}" / "no_step_in_the_name.ckpt")
    transform_ckpt.convert(source, tmp_path / "out", checkpoint_2=True, **between(root, src, "B"))
    (path,) = (tmp_path / "out").rglob("common.json")
    common = json.loads(path.read_text())
    assert {name: common[name] for name in COMMON} == {name: whole[name].item() for name in COMMON}
    assert int(path.parent.name.rpartition("_")[2]) == whole["global_step"].item() == 7


def test_crc_files_load_with_their_check(ms: ModuleType, root: Path, tmp_path: Path) -> None:
    transform_ckpt.convert(root / "src_ckpt" / "A", tmp_path / "out", crc=True, **between(root, "A", "B"))
    wanted = load_ranks(ms, root / "golden_ckpt" / "A_to_B")
    for rank, path in rank_files(tmp_path / "out").items():
        loaded = ms.load_checkpoint(str(path), crc_check=True)
        assert {name: value.asnumpy().tobytes() for name, value in loaded.items()} == {
            name: array.tobytes() for name, array in wanted[rank].items()
        }
    path = rank_files(tmp_path / "out")[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="crc"):
        ms.load_checkpoint(str(path), crc_check=True)
    with pytest.raises(transform_ckpt.TransformError, match="crc") as caught:
        transform_ckpt.convert(tmp_path / "out", tmp_path / "back", src_strategy=merged(root, "B"))
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("fmt", FORMATS)
def test_crc_of_mindspore_is_read_and_kept_out(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    rng = np.random.default_rng(2)
    whole = {"w": support.random_bits(rng, np.float32, (4, 6)), "n": support.random_bits(rng, np.int8, (6,))}
    parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in whole.items()]
    path = tmp_path / "src" / "rank_0" / f"a.{fmt}"
    path.parent.mkdir(parents=True)
    ms.save_checkpoint(parameters, str(path), crc_check=True, format=fmt)
    transform_ckpt.convert(tmp_path / "src", tmp_path / "out", container="ckpt")
    assert_same(load_ranks(ms, tmp_path / "out")[0], whole)
    assert b"crc_num" not in rank_files(tmp_path / "out")[0].read_bytes()


# ---------------------------------------------------------------------------------------- states


TEXTS = {"note": 'naïve 漢字 🙂 \\ " \n', "empty_not": " ", "ascii": "cosine"}


def test_strings_survive_the_other_format(ms: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    whole = {"layers.0.w": support.random_bits(rng, np.float16, (8, 6))}
    stages: Stages = [{"layers.0.w": Layout((2,), (0, -1))}]
    append = {"epoch_num": 3, "learning_rate": 0.25, "flag": True, **TEXTS}
    for rank in range(2):
        path = tmp_path / "src" / f"rank_{rank}" / f"a_{rank}.ckpt"
        support.save_file(ms, slice_rank(whole, stages, rank), path, append=append)
    strategy = support.write_merged_strategy(ms, stages, tmp_path / "strategy.ckpt")
    wanted = load_ranks(ms, tmp_path / "src")
    assert {name: str(wanted[0][name]) for name in TEXTS} == TEXTS
    both = {"src_strategy": strategy, "dst_strategy": strategy}
    transform_ckpt.convert(tmp_path / "src", tmp_path / "there", container="safetensors", **both)
    assert {p.suffix for p in rank_files(tmp_path / "there").values()} == {".safetensors"}
    transform_ckpt.convert(tmp_path / "there", tmp_path / "back", container="ckpt", **both)
    assert_ranks(ms, tmp_path / "back", wanted)
    loaded = dict(transform_ckpt.load(tmp_path / "there", rank=1, **both))
    assert {name: loaded[name] for name in TEXTS} == TEXTS


def weights_only(stages: Stages) -> Stages:
    return [{n: x for n, x in layouts.items() if not n.startswith(STATE_PREFIXES)} for layouts in stages]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("src", "dst"), [("A", "B"), ("D", "E"), ("C", "G")])
def test_optimizer_states_follow_their_weights(
    *, ms: ModuleType, root: Path, whole: Arrays, tmp_path: Path, src: str, dst: str, fmt: str
) -> None:
    stages = weights_only(golden_stages(ms, root / "strategy" / f"{dst}_merged.ckpt"))
    strategy = support.write_merged_strategy(ms, stages, tmp_path / "weights.ckpt")
    transform_ckpt.convert(
        source_of(root, src, fmt), tmp_path / "out", src_strategy=merged(root, src), dst_strategy=strategy
    )
    # a state lies as its weight does
    full = [
        layouts | {p + n: layout for p in STATE_PREFIXES for n, layout in layouts.items() if p + n in whole}
        for layouts in stages
    ]
    assert sum(map(len, full)) > 2 * sum(map(len, stages))
    assert_ranks(ms, tmp_path / "out", {r: slice_rank(whole, full, r) for r in range(support.world_size(full))})


@pytest.mark.parametrize("fmt", FORMATS)
def test_states_follow_in_the_source_too(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    """Neither strategy lists states; the weights' optimizer shards are theirs."""
    rng = np.random.default_rng(6)
    names = [prefix + f"layers.{n}.w" for n in range(2) for prefix in ("", "adam_m.", "adam_v.", "accu_grads.")]
    whole = {name: support.random_bits(rng, np.float32, (24, 8)) for name in names}
    src: Stages = [{f"layers.{n}.w": Layout((2, 2), (-1, 0), 2, 2)} for n in range(2)]
    dst: Stages = [{f"layers.{n}.w": Layout((3,), (0, -1)) for n in range(2)}]
    full = {side: [with_states(s, whole) for s in stages] for side, stages in (("src", src), ("dst", dst))}
    support.save_ranks(ms, whole, full["src"], tmp_path / "src", fmt)
    options = {
        "src_strategy": support.write_merged_strategy(ms, src, tmp_path / "src.ckpt"),
        "dst_strategy": support.write_merged_strategy(ms, dst, tmp_path / "dst.ckpt"),
    }
    transform_ckpt.convert(tmp_path / "src", tmp_path / "out", **options)
    assert_ranks(ms, tmp_path / "out", {rank: slice_rank(whole, full["dst"], rank) for rank in range(3)})


def with_states(layouts: dict[str, Layout], whole: Arrays) -> dict[str, Layout]:
    return {name: layouts[weight] for name in whole for weight in layouts if name.endswith(weight)}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dst", ["B", "C"])
def test_no_optimizer_drops_the_states_and_nothing_else(
    *, ms: ModuleType, root: Path, tmp_path: Path, dst: str, fmt: str
) -> None:
    strategies = between(root, "A", dst)
    words = ["convert", root / f"src_{fmt}" / "A", tmp_path / "out", "--to", "mindspore", "--no-optimizer"]
    run_cli(*words, *(("--dst-strategy", merged(root, dst)) if dst != "C" else ()), "--src-strategy", merged(root, "A"))
    assert strategies["src_strategy"] is not None
    wanted = {
        rank: {name: array for name, array in held.items() if not name.startswith(STATE_PREFIXES)}
        for rank, held in load_ranks(ms, root / f"golden_{fmt}" / f"A_to_{dst}").items()
    }
    assert_ranks(ms, tmp_path / "out", wanted)
    dropped = json.loads((tmp_path / "out" / MANIFEST).read_text())["target"]["dropped"]
    assert dropped
    assert all(name.startswith(STATE_PREFIXES) for name in dropped)
