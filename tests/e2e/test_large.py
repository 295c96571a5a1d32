"""Tensors that a .ckpt holds in several values (over 512 MiB in reality); memory that does not grow with the source."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

import transform_ckpt
from strategy import layout as product_layout
from strategy.mindspore_file import write_strategy
from tests import support
from tests.support import Array, Layout, assert_same, load_ranks, slice_rank
from transform_ckpt import cli, execute, planner
from transform_ckpt.errors import DifferenceError, InputError
from transform_ckpt.formats import ckpt, read_header
from transform_ckpt.tensors import TensorSpec

ROOT = Path(__file__).parents[2]
SHAPES = {"col": (36, 102), "row": (42, 50), "tall": (360, 5), "cube": (6, 12, 30), "flat": (3018,), "small": (12, 6)}
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.float32, np.float64]

Stages = list[dict[str, Layout]]


def stages_of(mp: int, opt: int = 0) -> Stages:
    """One stage of mp (times opt) devices: columns, rows, and optimizer shards."""
    shape = (opt, mp) if opt else (mp,)
    maps: dict[str, tuple[int, ...]] = {
        "col": (-1, 0), "row": (0, -1), "tall": (0, -1), "cube": (-1, 0, -1), "flat": (0,), "small": (-1,) * 2
    }  # fmt: skip
    return [
        {n: Layout(shape, m, mp if opt and n != "small" else 0, opt if n != "small" else 0) for n, m in maps.items()}
    ]


SRC, DST = stages_of(2), {"mp3": stages_of(3), "mp2 opt3": stages_of(2, 3), "complete": None}


def whole_state() -> dict[str, Array]:
    rng = np.random.default_rng(5)
    found = {n: support.random_bits(rng, d, s) for (n, s), d in zip(SHAPES.items(), DTYPES, strict=True)}
    return {**found, "loss_scale": np.array(2.0, np.float32)}


def expected_of(dst: str) -> dict[int, dict[str, Array]]:
    stages = DST[dst]
    whole = whole_state()
    return (
        {0: whole} if stages is None else {r: slice_rank(whole, stages, r) for r in range(support.world_size(stages))}
    )


@dataclass(frozen=True)
class Source:
    """mp2, written by MindSpore in pieces of about a kilobyte: rank 0's by np.array_split, rank 1's of equal size."""

    root: Path

    def options(self, dst: str) -> dict[str, Path | None]:
        return {
            "src_strategy": self.root / "src.ckpt",
            "dst_strategy": None if DST[dst] is None else self.root / f"{dst}.ckpt",
        }


@pytest.fixture(scope="session")
def source(ms: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Source:
    from mindspore.train import serialization

    root = tmp_path_factory.mktemp("pieces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialization, "SLICE_SIZE", 1)  # KiB, 512 * 1024 in life
        for rank in range(2):
            path = root / "src" / f"rank_{rank}" / "net.ckpt"
            path.parent.mkdir(parents=True)
            held = slice_rank(whole_state(), SRC, rank)
            parameters = [
                {"name": n, "data": ms.Tensor(np.ascontiguousarray(a).reshape(a.shape))} for n, a in held.items()
            ]
            ms.save_checkpoint(parameters, str(path), async_save=rank == 0)
            serialization._wait_async_thread_save_ckpt()
    support.write_merged_strategy(ms, SRC, root / "src.ckpt")
    for name, stages in DST.items():
        if stages is not None:
            support.write_merged_strategy(ms, stages, root / f"{name}.ckpt")
    return Source(root)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Pieces of 1,000 bytes and units of 700, in two processes."""
    monkeypatch.setattr(ckpt, "SLICE_NBYTES", 1000)
    monkeypatch.setattr(planner, "UNIT_NBYTES", 700)
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)
    return monkeypatch


TWO = transform_ckpt.RunOptions(workers=2)


def convert(src: Path, dst: Path, **options: object) -> transform_ckpt.Result:
    return transform_ckpt.convert(src, dst, run_options=TWO, verify=True, **options)  # type: ignore[arg-type]


def assert_ranks(ms: ModuleType, directory: Path, expected: Mapping[int, Mapping[str, Array]]) -> None:
    found = load_ranks(ms, directory)
    assert list(found) == list(expected)
    for rank, held in expected.items():
        assert_same(found[rank], held, f"rank {rank}")


def read_tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def pieces(path: Path) -> dict[str, list[int]]:
    return {n: [e.nbytes for e in t.extents] for n, t in read_header(str(path)).tensors.items()}


# -------------------------------------------------------------------------------------------------- small pieces


def test_the_source_has_unequal_pieces(source: Source) -> None:
    sizes = pieces(source.root / "src" / "rank_0" / "net.ckpt")
    assert sizes["col"] == [5 * 204] * 4 + [4 * 204] * 4
    assert sizes["flat"] == [252 * 4] * 3 + [251 * 4] * 3
    assert pieces(source.root / "src" / "rank_1" / "net.ckpt")["row"] == [1024, 1024, 52]
    assert sizes["loss_scale"] == [4]


@pytest.mark.parametrize("dst", list(DST))
@pytest.mark.parametrize(
    ("piece", "unit"), [(1000, 700), (777, 300), (64, 1 << 20), (1 << 20, 256), (3, 100), (1000, 1)]
)
def test_any_pieces_and_units(
    *, ms: ModuleType, source: Source, tmp_path: Path, tiny: pytest.MonkeyPatch, piece: int, unit: int, dst: str
) -> None:
    """Pieces that end within an element, parts that straddle pieces, columns of both."""
    tiny.setattr(ckpt, "SLICE_NBYTES", piece)
    tiny.setattr(planner, "UNIT_NBYTES", unit)
    convert(source.root / "src", tmp_path / "out", **source.options(dst))
    assert_ranks(ms, tmp_path / "out", expected_of(dst))
    assert cli.run(["verify", str(tmp_path / "out")]) == 0
    for path in support.rank_files(tmp_path / "out").values():
        for name, sizes in pieces(path).items():
            assert sizes[:-1] == [piece] * (len(sizes) - 1), name
            assert 0 < sizes[-1] <= piece
    back = {"src_strategy": source.options(dst)["dst_strategy"], "dst_strategy": source.options(dst)["src_strategy"]}
    convert(tmp_path / "out", tmp_path / "back", **back)
    assert_ranks(ms, tmp_path / "back", load_ranks(ms, source.root / "src"))


def test_to_safetensors_and_back(ms: ModuleType, source: Source, tmp_path: Path, tiny: pytest.MonkeyPatch) -> None:
    options = source.options("mp3")
    convert(source.root / "src", tmp_path / "there", container="safetensors", **options)
    assert_ranks(ms, tmp_path / "there", expected_of("mp3"))
    back = {"src_strategy": options["dst_strategy"], "dst_strategy": options["src_strategy"], "container": "ckpt"}
    convert(tmp_path / "there", tmp_path / "back", **back)
    assert_ranks(ms, tmp_path / "back", load_ranks(ms, source.root / "src"))


def test_checksum_over_all_pieces(ms: ModuleType, source: Source, tmp_path: Path, tiny: pytest.MonkeyPatch) -> None:
    convert(source.root / "src", tmp_path / "out", crc=True, **source.options("complete"))
    (path,) = support.rank_files(tmp_path / "out").values()
    found = ms.load_checkpoint(str(path), crc_check=True)
    assert found.keys() == whole_state().keys()
    convert(tmp_path / "out", tmp_path / "next", dst_strategy=source.options("mp3")["dst_strategy"])
    assert_ranks(ms, tmp_path / "next", expected_of("mp3"))


def test_the_same_tree_whatever_the_workers(source: Source, tmp_path: Path, tiny: pytest.MonkeyPatch) -> None:
    trees = []
    for workers, memory in ((1, 1 << 20), (2, 1 << 30), (5, 1 << 20)):
        options = transform_ckpt.RunOptions(workers=workers, memory_nbytes=memory)
        out = tmp_path / f"{workers}"
        transform_ckpt.convert(source.root / "src", out, run_options=options, **source.options("mp2 opt3"))
        trees.append(read_tree(out))
    assert trees[0] == trees[1] == trees[2]
    parts = [t for f in json.loads(trees[0]["transform_ckpt.json"])["files"].values() for t in f["tensors"].values()]
    assert sum("," in text for text in parts) > len(parts) / 3, "digests of several parts"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_interrupted_between_pieces_and_resumed(
    source: Source, tmp_path: Path, tiny: pytest.MonkeyPatch, share: float
) -> None:
    options = source.options("mp3")
    transform_ckpt.convert(source.root / "src", tmp_path / "whole", **options)

    def stop(done: int, total: int) -> None:
        if done > total * share:
            raise KeyboardInterrupt

    interrupted = transform_ckpt.RunOptions(workers=1, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        transform_ckpt.convert(source.root / "src", tmp_path / "out", run_options=interrupted, **options)
    partial = tmp_path / "out.partial"
    if share == 0.5:  # a unit that is in the journal, and whose second piece is lost: done again
        path = partial / "rank_0" / "checkpoint_0.ckpt"
        header = read_header(str(path))
        at = header.tensors["col"].extents[1]
        with path.open("r+b") as stream:
            stream.seek(at.offset_bytes + at.nbytes // 2)
            stream.write(bytes(64))
    found = transform_ckpt.convert(source.root / "src", tmp_path / "out", run_options=TWO, verify=True, **options)
    assert found.resumed_units > 0
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")


def test_damage_in_any_piece_is_seen(source: Source, tmp_path: Path, tiny: pytest.MonkeyPatch) -> None:
    convert(source.root / "src", tmp_path / "out", **source.options("complete"))
    path = tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt"
    data = path.read_bytes()
    for extent in read_header(str(path)).tensors["col"].extents:
        for at in (extent.offset_bytes, extent.offset_bytes + extent.nbytes - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert cli.run(["verify", str(tmp_path / "out")]) == DifferenceError.exit_code
    head = read_header(str(path)).tensors["col"].extents[1].offset_bytes - 1
    path.write_bytes(data[:head] + bytes([data[head] ^ 1]) + data[head + 1 :])
    assert cli.run(["verify", str(tmp_path / "out")]) == DifferenceError.exit_code


def value_starts(path: Path) -> list[tuple[str, int, int]]:
    """(name, start, end) of each value of a file."""
    found: list[tuple[str, int, int]] = []
    end = 0
    extents = sorted(
        (e.offset_bytes, e.nbytes, t.name) for t in read_header(str(path)).tensors.values() for e in t.extents
    )
    for offset, nbytes, name in extents:
        found.append((name, end, offset + nbytes))
        end = offset + nbytes
    return found


@pytest.mark.parametrize("fault", ["first gone", "last gone", "one twice", "apart", "swapped with another tensor"])
def test_pieces_that_are_not_one_tensor(source: Source, tmp_path: Path, tiny: pytest.MonkeyPatch, fault: str) -> None:
    src = Path(shutil.copytree(source.root / "src", tmp_path / "src"))
    (path,) = (src / "rank_1").glob("*.ckpt")
    path.chmod(0o644)
    data = path.read_bytes()
    values = [(name, data[start:end]) for name, start, end in value_starts(path)]
    mine = [i for i, (name, _) in enumerate(values) if name == "col"]
    others = [i for i, (name, _) in enumerate(values) if name == "row"]
    if fault == "first gone":
        del values[mine[0]]
    elif fault == "last gone":
        del values[mine[-1]]
    elif fault == "one twice":
        values.insert(mine[0], values[mine[0]])
    elif fault == "apart":
        values.append(values.pop(mine[-1]))
    else:
        values[mine[1]], values[others[1]] = values[others[1]], values[mine[1]]
    path.write_bytes(b"".join(value for _, value in values))
    with pytest.raises(InputError, match=r"(col|row).*(the file is damaged|in the file twice)"):
        convert(src, tmp_path / "out", **source.options("mp3"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ a process's memory

_MEASURE = """
import os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""
"""Started through a small process: a child's peak begins with that of the process that forks it."""


def measured_convert(src: Path, dst: Path, src_strategy: Path, dst_strategy: Path | str) -> int:
    """Peak resident bytes of the largest process of a conversion."""
    words = ["-m", "transform_ckpt", "convert", src, dst, "--to", "mindspore", "--workers", "2", "--json"]
    words += ["--src-strategy", src_strategy, "--dst-strategy", dst_strategy]
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", _MEASURE, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    code, rss = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0, done.stderr
    return rss


def write_strategy_of(path: Path, names: Sequence[str], devices: int, axis: int, ndim: int = 2) -> Path:
    """One stage of `devices`, every tensor cut along one axis."""
    layout = product_layout.Layout((devices,), tuple((0,) if d == axis else () for d in range(ndim)))
    stage = product_layout.Stage(devices, dict.fromkeys(names, layout))
    write_strategy(product_layout.Strategy((stage,)), str(path))
    return path


def sparse_file(path: Path, specs: Sequence[TensorSpec]) -> ckpt.Skeleton:
    """A .ckpt of zeros that takes no room."""
    laid_out = ckpt.skeleton(specs)
    path.parent.mkdir(parents=True)
    with path.open("wb") as stream:
        for offset, data in laid_out.chunks:
            stream.seek(offset)
            stream.write(data)
        stream.truncate(laid_out.nbytes)
    return laid_out


@pytest.mark.parametrize("grows", ["tensors", "number"])
def test_ten_times_the_source_in_the_same_memory(tmp_path: Path, grows: str) -> None:
    need_room(tmp_path, disk_gb=4, memory_gb=2)
    peaks = []
    for factor in (1, 10):
        root = tmp_path / f"{factor}"
        rows, count = (256 * factor, 40) if grows == "tensors" else (256, 40 * factor)
        names = [f"layers.{i}.weight" for i in range(count)]
        for rank in range(2):
            sparse_file(root / "src" / f"rank_{rank}" / "n.ckpt", [TensorSpec(n, "F32", (rows, 1152)) for n in names])
        src = write_strategy_of(root / "src.ckpt", names, 2, 1)
        dst = write_strategy_of(root / "dst.ckpt", names, 4, 0)
        peaks.append(measured_convert(root / "src", root / "out", src, dst))
        assert sum(p.stat().st_size for p in root.glob("out/rank_*/*")) > 90_000_000 * factor
        shutil.rmtree(root)
    assert peaks[1] - peaks[0] < 20_000_000, f"{peaks[0]:,} and {peaks[1]:,} bytes"


# ------------------------------------------------------------------------------------------------------- in reality

ROWS, COLUMNS = 16384, 18432
"""BF16: 604 MB whole, two values in a .ckpt; 302 MB on each of two ranks."""


def need_room(path: Path, disk_gb: float, memory_gb: float) -> None:
    free = shutil.disk_usage(path).free
    if free < disk_gb * 1e9:
        pytest.skip(f"needs {disk_gb} GB of disk, {free / 1e9:.1f} are free")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            if available < memory_gb * 1e9:
                pytest.skip(f"needs {memory_gb} GB of memory, {available / 1e9:.1f} are available")


def rows_of(start: int, stop: int) -> Array:
    """Rows of the tensor as 16-bit patterns: each column and each row is different, no value is a NaN."""
    row = np.arange(start, stop, dtype=np.uint32)[:, None] * 40503
    mixed = (row + np.arange(COLUMNS, dtype=np.uint32)[None] * 2654435) >> 7
    return (mixed & 0x3FFF).astype(np.uint16)


def write_large(path: Path, columns: slice) -> None:
    """One rank's file, some rows at a time."""
    width = columns.stop - columns.start
    laid_out = sparse_file(path, [TensorSpec("w", "BF16", (ROWS, width)), TensorSpec("loss_scale", "F32", ())])
    (extent,) = laid_out.places["w"]
    with path.open("r+b") as stream:
        stream.seek(extent.offset_bytes)
        for start in range(0, ROWS, 1024):
            stream.write(rows_of(start, start + 1024)[:, columns].tobytes())


def tensor_bytes(path: Path, chunk_nbytes: int) -> Iterator[bytes]:
    """The bytes of `w` from its values."""
    left = b""
    with path.open("rb") as stream:
        for extent in read_header(str(path)).tensors["w"].extents:
            stream.seek(extent.offset_bytes)
            at = 0
            while at < extent.nbytes:
                data = stream.read(min(chunk_nbytes - len(left), extent.nbytes - at))
                at += len(data)
                left += data
                if len(left) == chunk_nbytes:
                    yield left
                    left = b""
    assert left == b""


def same_files(one: Path, two: Path) -> bool:
    with one.open("rb") as a, two.open("rb") as b:
        return os.path.getsize(one) == os.path.getsize(two) and all(
            a.read(1 << 24) == b.read(1 << 24) for _ in range(os.path.getsize(one) // (1 << 24) + 1)
        )


@pytest.mark.slow
def test_a_tensor_of_604_megabytes(ms: ModuleType, tmp_path: Path) -> None:
    need_room(tmp_path, disk_gb=8, memory_gb=6)
    nbytes = prod((ROWS, COLUMNS)) * 2
    assert nbytes > ckpt.SLICE_NBYTES == 512 * 1024**2
    try:
        for rank in range(2):
            write_large(tmp_path / "src" / f"rank_{rank}" / "n.ckpt", slice(rank * 9216, (rank + 1) * 9216))
        strategy = write_strategy_of(tmp_path / "src.ckpt", ["w"], 2, 1)
        peaks = [measured_convert(tmp_path / "src", tmp_path / "whole", strategy, "None")]
        path = tmp_path / "whole" / "rank_0" / "checkpoint_0.ckpt"
        assert pieces(path)["w"] == [ckpt.SLICE_NBYTES, nbytes - ckpt.SLICE_NBYTES]
        for number, data in enumerate(tensor_bytes(path, 512 * COLUMNS * 2)):
            assert data == rows_of(number * 512, number * 512 + 512).tobytes(), f"rows from {number * 512}"
        loaded = ms.load_checkpoint(str(path))["w"]
        assert (loaded.shape, loaded.dtype) == ((ROWS, COLUMNS), ms.bfloat16)
        whole = loaded.asnumpy().view(np.uint16)
        for start in range(0, ROWS, 2048):
            assert (whole[start : start + 2048] == rows_of(start, start + 2048)).all()
        del loaded, whole
        gc.collect()
        assert cli.run(["verify", str(tmp_path / "whole")]) == 0
        peaks.append(measured_convert(tmp_path / "whole", tmp_path / "back", Path("None"), strategy))
        for rank in range(2):
            source = tmp_path / "src" / f"rank_{rank}" / "n.ckpt"
            assert same_files(source, tmp_path / "back" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        assert max(peaks) < 120_000_000, peaks
    finally:
        for name in ("src", "whole", "back"):  # pytest keeps the last directories
            shutil.rmtree(tmp_path / name, ignore_errors=True)
