"""Drawn strategies and checkpoints: equal to the real mindspore.transform_checkpoints, and always to a NumPy slicer."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

import transform_ckpt
from tests import support
from tests.support import Arrays, Layout, Stages, assert_same, device_slices, load_ranks, slice_rank

EXAMPLES = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

POWERS_OF_TWO = {
    1: [(1,), (1, 1)],
    2: [(2,), (2, 1), (1, 2), (2, 1, 1)],
    4: [(4,), (2, 2), (4, 1), (1, 4), (2, 1, 2)],
    8: [(8,), (2, 4), (4, 2), (2, 2, 2), (2, 1, 4), (4, 1, 2)],
}
"""Devices of a stage -> device matrices.  Upstream wants one number of devices to divide the other."""

ANY_DEVICES = POWERS_OF_TWO | {3: [(3,), (1, 3)], 6: [(6,), (2, 3), (3, 2), (3, 1, 2)]}

DTYPES = "float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split()
"""Everything that mindspore.save_checkpoint stores of arrays."""

SIZES = [24, 48]
"""Dimensions that divide by every product of axes that is drawn."""


@dataclass(frozen=True)
class Example:
    """A whole state and how it lies before and after; stages None = complete weights."""

    whole: Arrays
    src: Stages | None
    dst: Stages | None
    fmt: str

    def __repr__(self) -> str:
        shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in self.whole.items()}
        return f"Example({self.fmt}, {shapes},\n  src={self.src},\n  dst={self.dst})"


def ring(items: Sequence[str], step: int) -> list[tuple[str, str]]:
    return [(item, items[(number + step) % len(items)]) for number, item in enumerate(items)]


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@st.composite
def layouts(draw: st.DrawFn, shape: Sequence[int], mesh: tuple[int, ...], *, upstream: bool) -> Layout:
    """Give each mesh axis to a dimension, or to none: then it repeats, and the optimizer shard may use it."""
    takers = [d for d, n in enumerate(shape) if n in SIZES]
    nested = len(shape) > 1 and draw(st.booleans())
    owned: dict[int, list[int]] = {d: [] for d in range(len(shape))}
    for axis in range(len(mesh)):
        free = [d for d in takers if nested or not owned[d]]
        owner = draw(st.sampled_from([None, *free]))
        if owner is not None:
            owned[owner].append(axis)
    entries = [tuple(draw(st.permutations(axes))) for axes in owned.values()]
    tensor_map = tuple(e if len(e) > 1 else e[0] if e else -1 for e in entries)
    layout = Layout(mesh, tensor_map)
    used = {axis for axes in entries for axis in axes}
    repeated = [axis for axis in reversed(range(len(mesh))) if axis not in used and mesh[-1 - axis] > 1]
    if not repeated or shape[0] not in SIZES or not draw(st.booleans()):
        return layout
    replicas = prod(mesh[-1 - axis] for axis in repeated)
    sizes = [-1, *(n for n in range(2, replicas + 1) if replicas % n == 0)]
    if upstream or len(repeated) > 1:
        sizes = [n for n in sizes if n == -1 or whole_axes(n, [mesh[-1 - axis] for axis in reversed(repeated)])]
    step = prod(mesh[len(mesh) - repeated[-1] :])
    found = Layout(mesh, tensor_map, step, draw(st.sampled_from(sizes)))
    return layout if upstream and upstream_mistakes(found, repeated) else found


def whole_axes(size: int, repeats: Sequence[int]) -> bool:
    """Can `size` parts be made of repeated axes, the last first, and a divisor of the next?"""
    for n in repeats:
        if size <= n:
            return n % size == 0
        if size % n:
            return False
        size //= n
    return size == 1


def upstream_mistakes(layout: Layout, repeated: Sequence[int]) -> bool:
    """mindspore 2.9.0 `_construct_tensor_layout_for_opt_shard`: with the first axis alone repeated, it takes the others
    to split the dimensions in their order, whatever the tensor map says.
    """
    if repeated != [len(layout.dev_matrix) - 1] or any(isinstance(entry, tuple) for entry in layout.tensor_map):
        return False
    axes = [entry for entry in layout.tensor_map if entry >= 0 and layout.dev_matrix[-1 - entry] > 1]
    return axes != sorted(axes, reverse=True)


def upstream_can(src: Stages | None, dst: Stages | None) -> bool:
    """mindspore 2.9.0 refuses complete to complete; and its `rank_list_for_transform` takes the global rank for that
    in the stage where the destination's stages have one device, and then misses ranks of the source.
    """
    if src is None or dst is None:
        return src is not dst
    return len(dst) == 1 or support.stage_devices(dst) > 1 or support.stage_devices(src) == 1


@st.composite
def stage_lists(
    draw: st.DrawFn, shapes: Mapping[str, Sequence[int]], meshes: Mapping[int, list[tuple[int, ...]]], *, upstream: bool
) -> list[dict[str, Layout]]:
    """Parameters dealt out to pipeline stages, each with a device matrix and a layout of its own."""
    devices = draw(st.sampled_from(sorted(meshes)))
    pp = draw(st.integers(1, min(3, len(shapes))))
    stages: list[dict[str, Layout]] = [{} for _ in range(pp)]
    for number, (name, shape) in enumerate(shapes.items()):
        stage = number if number < pp else draw(st.integers(0, pp - 1))
        mesh = draw(st.sampled_from(meshes[devices]))
        stages[stage][name] = draw(layouts(shape, mesh, upstream=upstream))
    return stages


@st.composite
def examples(
    draw: st.DrawFn,
    meshes: Mapping[int, list[tuple[int, ...]]] = ANY_DEVICES,
    *,
    upstream: bool = False,
    prefixes: Sequence[str] = ("model.layers",),
) -> Example:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 5))
    whole: dict[str, np.ndarray] = {}
    for number in range(count):
        shape = (draw(st.sampled_from(SIZES)), *draw(st.lists(st.sampled_from([1, 3, *SIZES]), max_size=2)))
        dtype = draw(st.sampled_from(DTYPES))
        prefix = draw(st.sampled_from(prefixes))
        whole[f"{prefix}.{number}.w{number}.weight"] = draw_array(rng, dtype, shape, finite=upstream)
    shapes = {name: array.shape for name, array in whole.items()}
    sides = st.none() | stage_lists(shapes, meshes, upstream=upstream)
    src, dst = draw(sides), draw(sides)
    if upstream:
        assume(upstream_can(src, dst))
    whole |= {"global_step": np.array([7], np.int32), "loss_scale": np.array(1024.0, np.float32)}
    return Example(whole, src, dst, draw(st.sampled_from(["ckpt", "safetensors"])))


def draw_array(rng: np.random.Generator, dtype: str, shape: Sequence[int], *, finite: bool) -> np.ndarray:
    """Any bits; finite where upstream goes by way of another type."""
    if finite and "float" in dtype:
        return rng.standard_normal(shape).astype(numpy_dtype(dtype))
    return support.random_bits(rng, numpy_dtype(dtype), shape)


# ---------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Bench:
    """An example on disk."""

    ms: ModuleType
    example: Example
    root: Path

    @property
    def src(self) -> Path:
        return self.root / "src"

    def strategy(self, side: str) -> Path | None:
        stages: Stages | None = getattr(self.example, side)
        path = self.root / f"{side}_strategy.ckpt"
        if stages is None:
            return None
        return path if path.exists() else support.write_merged_strategy(self.ms, stages, path)

    def expected(self) -> dict[int, dict[str, np.ndarray]]:
        stages = self.example.dst
        if stages is None:
            return {0: dict(self.example.whole)}
        return {rank: slice_rank(self.example.whole, stages, rank) for rank in range(support.world_size(stages))}

    def convert(self, name: str = "ours", **options: object) -> Path:
        out = self.root / name
        strategies = {"src_strategy": self.strategy("src"), "dst_strategy": self.strategy("dst")}
        transform_ckpt.convert(self.src, out, **strategies, **options)
        return out

    def assert_expected(self, out: Path) -> dict[int, dict[str, np.ndarray]]:
        found, expected = load_ranks(self.ms, out), self.expected()
        assert list(found) == list(expected)
        for rank, held in expected.items():
            assert_same(found[rank], held, f"rank {rank}")
        return found


@contextmanager
def on_disk(ms: ModuleType, example: Example) -> Iterator[Bench]:
    """The source checkpoint saved by mindspore, in a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(ms, example, Path(folder))
        if example.src is None:
            support.save_file(ms, example.whole, bench.src / "rank_0" / f"net_0.{example.fmt}")
        else:
            support.save_ranks(ms, example.whole, example.src, bench.src, example.fmt)
        yield bench


@settings(EXAMPLES, max_examples=40)
@given(example=examples(POWERS_OF_TWO, upstream=True))
def test_equal_to_mindspore(ms: ModuleType, example: Example) -> None:
    event(example.fmt)
    with on_disk(ms, example) as bench:
        compare_with_mindspore(bench)


def compare_with_mindspore(bench: Bench) -> None:
    ours = bench.assert_expected(bench.convert())
    theirs = support.transform(bench.ms, bench.src, bench.root / "theirs", bench.strategy("src"), bench.strategy("dst"))
    assert [*support.rank_files(theirs)] == [*ours]
    for rank, held in load_ranks(bench.ms, theirs).items():
        assert_same(ours[rank], held, f"mindspore's rank {rank}")


NAMED = {
    "whole": Layout((1,), (-1, -1)),
    "columns": Layout((2,), (-1, 0)),
    "rows, repeated on the left": Layout((4, 2), (0, -1)),
    "columns, repeated on the right": Layout((2, 4), (-1, 1)),
    "both dimensions, the second on the outer axis": Layout((2, 4), (0, 1)),
    "two axes on the rows": Layout((2, 2, 2), ((0, 2), -1)),
    "two axes on the columns, two optimizer parts": Layout((2, 2, 2), (-1, (2, 1)), 1, 2),
    "optimizer shard as large as possible": Layout((2, 2, 2), (1, -1), 1, -1),
    "optimizer shard of all devices": Layout((8,), (-1, -1), 1, -1),
    "partial optimizer shard": Layout((4, 2), (0, -1), 2, 2),
    "partial optimizer shard over two repeated axes": Layout((2, 2, 2), (1, -1), 1, 2),
}


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
@pytest.mark.parametrize(("src", "dst"), [(a, b) for step in (1, 4) for a, b in ring([*NAMED], step)])
def test_each_kind_of_layout(ms: ModuleType, src: str, dst: str, fmt: str) -> None:
    rng = np.random.default_rng(3)
    whole = {name: draw_array(rng, "float32", (24, 48), finite=True) for name in ("a.weight", "adam_m.a.weight")}
    whole |= {"plain.weight": draw_array(rng, "bfloat16", (48,), finite=True), "loss_scale": np.array(2.0, np.float32)}
    stages = [
        [{"a.weight": k, "adam_m.a.weight": k, "plain.weight": Layout((k.devices,), (-1,))}]
        for k in (NAMED[src], NAMED[dst])
    ]
    with on_disk(ms, Example(whole, *stages, fmt)) as bench:
        compare_with_mindspore(bench)


# ------------------------------------------------------------------------------- what upstream cannot do


@settings(EXAMPLES, max_examples=50)
@given(example=examples())
def test_equal_to_the_slicer(ms: ModuleType, example: Example) -> None:
    """Device counts that do not divide, optimizer shards that upstream gets wrong, any bits."""
    with on_disk(ms, example) as bench:
        bench.assert_expected(bench.convert())


@settings(EXAMPLES, max_examples=15)
@given(example=examples())
def test_other_format(ms: ModuleType, example: Example) -> None:
    other = {"ckpt": "safetensors", "safetensors": "ckpt"}[example.fmt]
    with on_disk(ms, example) as bench:
        out = bench.convert(container=other)
        assert {path.suffix for path in support.rank_files(out).values()} == {f".{other}"}
        bench.assert_expected(out)


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
def test_world_sizes_that_do_not_divide(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    """8 -> 6 -> 4 -> 3 -> 12 -> 1 -> 8 ranks, each made from the one before; weights, states, and stages."""
    rng = np.random.default_rng(5)
    whole = {f"layers.{n}.w": support.random_bits(rng, numpy_dtype("bfloat16"), (48, 24)) for n in range(3)}
    whole |= {f"adam_m.{name}": support.random_bits(rng, np.float32, (48, 24)) for name in list(whole)}
    whole |= {"norm": support.random_bits(rng, np.float16, (24,)), "global_step": np.array([3], np.int32)}
    names = [name for name in whole if name != "global_step"]

    def stages(pp: int, matrix: Layout, vector: Layout) -> list[dict[str, Layout]]:
        found: list[dict[str, Layout]] = [{} for _ in range(pp)]
        for number, name in enumerate(names):
            found[number % 3 % pp][name] = matrix if whole[name].ndim == 2 else vector
        return found

    chain = {
        8: stages(2, Layout((2, 2), (0, -1), 2, 2), Layout((4,), (0,))),
        6: stages(1, Layout((2, 3), (1, 0)), Layout((6,), (-1,), 1, 3)),
        4: stages(1, Layout((2, 2), (-1, (0, 1))), Layout((4,), (-1,))),
        3: stages(3, Layout((1,), (-1, -1)), Layout((1,), (-1,))),
        12: stages(3, Layout((4,), (-1, -1), 1, -1), Layout((2, 2), (1,))),
        1: stages(1, Layout((1,), (-1, -1)), Layout((1,), (-1,))),
    }
    files = {world: support.write_merged_strategy(ms, s, tmp_path / f"{world}.ckpt") for world, s in chain.items()}
    at = support.save_ranks(ms, whole, chain[8], tmp_path / "8", fmt)
    before = 8
    for world in (6, 4, 3, 12, 1, 8):
        out = tmp_path / f"{before}_to_{world}"
        transform_ckpt.convert(at, out, src_strategy=files[before], dst_strategy=files[world])
        found = load_ranks(ms, out)
        assert len(found) == world == support.world_size(chain[world])
        for rank, held in found.items():
            assert_same(held, slice_rank(whole, chain[world], rank), f"rank {rank} of {world}")
        at, before = out, world


@settings(EXAMPLES, max_examples=15)
@given(example=examples(prefixes=["block-1", "a-b-c", "10-x", "-", "trailing-"]), merged=st.booleans())
def test_dash_in_names(ms: ModuleType, example: Example, *, merged: bool) -> None:
    with on_disk(ms, example) as bench:
        strategies: dict[str, Path | None] = {}
        for side in ("src", "dst"):
            stages: Stages | None = getattr(example, side)
            plain = stages is not None and not any(name[0] == "1" for name in example.whole)
            if plain and not merged:  # one file a rank, where no name looks like that of a merged file
                strategies[f"{side}_strategy"] = support.write_strategy(ms, stages, bench.root / f"{side}_files")
            else:
                strategies[f"{side}_strategy"] = bench.strategy(side)
        transform_ckpt.convert(bench.src, bench.root / "ours", **strategies)
        bench.assert_expected(bench.root / "ours")


def write_json_strategy(stages: Stages, whole: Arrays, path: Path) -> Path:
    """As MindSpore's compiler writes JSON, merged: layouts with tensor_shape, one strategy item a node."""
    layouts, nodes = {}, {}
    for stage, held in enumerate(stages):
        for name, layout in held.items():
            splits = [prod(layout.dev_matrix[-1 - axis] for axis in layout.axes(d)) for d in range(whole[name].ndim)]
            nodes[f"{stage}-MatMul_{name}"] = {"parallel_strategy": [splits], "stage": stage}
            layouts[f"{stage}-{name}"] = {
                "dev_matrix": layout.dev_matrix,
                "field": 0,
                "opt_weight_shard_size": layout.opt_size,
                "opt_weight_shard_step": layout.opt_step,
                "tensor_map": layout.tensor_map,
                "tensor_shape": whole[name].shape,
            }
    content = {"current_stage": 1, "parallel_layout_item": layouts, "parallel_strategy_item": nodes}
    path.write_text(json.dumps(content))
    return path


@settings(EXAMPLES, max_examples=15)
@given(example=examples())
def test_json_strategies_of_several_stages(ms: ModuleType, example: Example) -> None:
    with on_disk(ms, example) as bench:
        strategies = {}
        for side in ("src", "dst"):
            stages: Stages | None = getattr(example, side)
            path = bench.root / f"{side}.json"
            strategies[f"{side}_strategy"] = write_json_strategy(stages, example.whole, path) if stages else None
        transform_ckpt.convert(bench.src, bench.root / "ours", **strategies)
        bench.assert_expected(bench.root / "ours")


TIED = {
    "same layout": [Layout((2, 2), (0, -1)), Layout((2, 2), (0, -1))],
    "other layouts": [Layout((2, 2), (0, -1)), Layout((4,), (-1, 0))],
    "optimizer shard on one": [Layout((4,), (-1, -1), 1, -1), Layout((2, 2), (-1, 1))],
    "partial and nested": [Layout((2, 2), (-1, -1), 1, 2), Layout((2, 2), ((1, 0), -1))],
    "one stage": [Layout((2, 3), (0, 1))],
}


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
@pytest.mark.parametrize("dst", [None, *TIED])
@pytest.mark.parametrize("src", [None, *TIED])
def test_tied_embedding(ms: ModuleType, src: str | None, dst: str | None, fmt: str) -> None:
    rng = np.random.default_rng(9)
    whole = {name: support.random_bits(rng, np.float32, (48, 24)) for name in ("tok.weight", "adam_v.tok.weight")}
    whole |= {f"layers.{n}.w": support.random_bits(rng, np.float16, (24,)) for n in range(2)}

    def stages(kind: str | None) -> Stages | None:
        if kind is None:
            return None
        found = []
        for number, layout in enumerate(TIED[kind]):
            own = range(number, 2, len(TIED[kind]))
            plain = {f"layers.{n}.w": Layout((layout.devices,), (-1,)) for n in own}
            found.append({"tok.weight": layout, "adam_v.tok.weight": layout} | plain)
        return found

    with on_disk(ms, Example(whole, stages(src), stages(dst), fmt)) as bench:
        bench.assert_expected(bench.convert())


# ------------------------------------------------------------------------------------- what is not stored


@dataclass
class Holdings:
    """How many of the ranks that are there hold each element."""

    example: Example

    def __post_init__(self) -> None:
        self.counts = {name: np.zeros(array.shape, np.int64) for name, array in self.example.whole.items()}
        for rank in range(support.world_size(self.example.src)):
            self.add(rank, 1)

    def slices(self, rank: int) -> dict[str, tuple[slice, ...]]:
        stage, device = divmod(rank, support.stage_devices(self.example.src))
        return {
            name: device_slices(self.example.whole[name].shape, layout)[device]
            for name, layout in self.example.src[stage].items()
        }

    def add(self, rank: int, sign: int, only: str | None = None) -> None:
        for name, index in self.slices(rank).items():
            if only in (None, name):
                self.counts[name][index] += sign

    def spare(self, rank: int, only: str | None = None) -> bool:
        """Does somebody else hold all of what the rank holds?"""
        held = self.slices(rank).items()
        return all((self.counts[name][index] > 1).all() for name, index in held if only in (None, name))


@settings(EXAMPLES, max_examples=30)
@given(example=examples().filter(lambda e: e.src is not None), data=st.data())
def test_absent_replicas(ms: ModuleType, example: Example, data: st.DataObject) -> None:
    """Directories of ranks may be gone as long as others hold everything; one more is an error that says so."""
    holdings, world = Holdings(example), support.world_size(example.src)
    order = data.draw(st.permutations(range(world)))
    with on_disk(ms, example) as bench:
        for rank in order:
            if holdings.spare(rank):
                holdings.add(rank, -1)
                shutil.rmtree(bench.src / f"rank_{rank}")
        event(f"absent: {world - len(support.rank_files(bench.src))}")
        bench.assert_expected(bench.convert())
        if len(support.rank_files(bench.src)) > 1:
            shutil.rmtree(bench.src / f"rank_{max(support.rank_files(bench.src))}")
            with pytest.raises(transform_ckpt.TransformError, match=r"missing|nobody|rank") as caught:
                bench.convert("broken")
            assert caught.value.exit_code in (3, 4)
            assert not (bench.root / "broken").exists()


@settings(EXAMPLES, max_examples=30)
@given(example=examples().filter(lambda e: e.src is not None), data=st.data())
def test_slices_at_one_holder_each(ms: ModuleType, example: Example, data: st.DataObject) -> None:
    """As remove_redundancy leaves them, at whichever holder."""
    holdings, world = Holdings(example), support.world_size(example.src)
    keep = {rank: slice_rank(example.whole, example.src, rank) for rank in range(world)}
    for rank in data.draw(st.permutations(range(world))):
        for name in holdings.slices(rank):
            if holdings.spare(rank, name):
                holdings.add(rank, -1, name)
                del keep[rank][name]
    assert {int(n) for name in listed(example.src) for n in np.unique(holdings.counts[name])} == {1}
    with on_disk(ms, example) as bench:
        for rank, path in support.rank_files(bench.src).items():
            path.unlink()
            save(ms, keep[rank], path, remove_redundancy=True if example.fmt == "safetensors" else None)
        bench.assert_expected(bench.convert())


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
def test_redundancy_removed_by_mindspore(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    """Holders chosen by MindSpore's own functions, saved with its option, as its callback does."""
    rng = np.random.default_rng(13)
    kinds = {"a": Layout((2, 4), (0, -1)), "b": Layout((2, 4), (0, -1), 4, 2), "c": Layout((8,), (-1, -1), 1, -1)}
    kinds |= {"d": Layout((2, 2, 2), (1, -1)), "e": Layout((8,), (-1, -1)), "f": Layout((2, 2, 2), (2, 0))}
    src = [{f"layers.{s}.{name}.weight": layout for name, layout in kinds.items()} for s in range(2)]
    whole = {name: support.random_bits(rng, np.float32, (48, 24)) for layouts in src for name in layouts}
    whole["global_step"] = np.array([3], np.int32)
    dst = [{name: Layout((2, 3), (0, 1)) for layouts in src for name in layouts}]
    bench = Bench(ms, Example(whole, src, dst, fmt), tmp_path)
    removed = 0
    for stage, layouts in enumerate(src):
        path = support.write_strategy(ms, [layouts], tmp_path / f"stage_{stage}") / "ckpt_strategy_rank_0.ckpt"
        redundancy = ms.train._utils.get_parameter_redundancy(str(path), initial_rank=0)
        for device, names in ms.train._utils.remove_param_redundancy(redundancy).items():
            rank = stage * 8 + device
            held = slice_rank(whole, src, rank)
            kept = {name: array for name, array in held.items() if name in names or name not in layouts}
            removed += len(held) - len(kept)
            save(ms, kept, bench.src / f"rank_{rank}" / f"net_{rank}.{fmt}", remove_redundancy=True)
    assert removed > 30
    bench.assert_expected(bench.convert())


def listed(stages: Stages) -> set[str]:
    return {name for layouts in stages for name in layouts}


def save(ms: ModuleType, arrays: Arrays, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = [
        {"name": name, "data": ms.Tensor(np.ascontiguousarray(a).reshape(a.shape))} for name, a in arrays.items()
    ]
    ms.save_checkpoint(parameters, str(path), format=path.suffix[1:], **options)
