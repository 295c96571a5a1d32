"""Buffers as Megatron lays them out: against its own maps, what its own code gave, and a buffer built cell by cell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import lcm, prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transform_ckpt import param_map
from transform_ckpt.megatron import buckets
from transform_ckpt.megatron.buckets import BucketError, BufferMap, Parameter, Range, Version

BF16 = "torch.bfloat16"
CASES = (
    "mcore060/legacy_tp2_pp2_dp1",
    "mcore060/mcore_tp2_pp2_dp2",
    "mcore060/legacy_tp2_pp2_dp2_buckets",
    "mcore060/legacy_tp1_pp2_vpp2_dp2",
    "mcore060/mcore_moe_tp1_pp1_ep2_dp2",
    "mcore070/tp2_pp2_dp2_buckets",
    "mcore0161/tp2_pp2_dp2_buckets",
)


def parameter(name: str, numel: int, *, tied: bool = False) -> Parameter:
    return (name, BF16, (numel,), tied)


def at(name: str, start: int, end: int, bucket: int) -> Range:
    return Range(name, BF16, (end - start,), start, end, bucket)


# ------------------------------------------------------------------------------------------------- the golden maps


def model_order(case: Path, key: param_map.MapKey) -> list[Parameter]:
    """Dense or expert parameters of one chunk, in the order that the model registered them."""
    suffix = "" if not list(case.glob("truth/*_ep*.npz")) else f"_ep{key.ep or 0:03d}"
    with np.load(case / "truth" / f"truth_tp{key.tp:02d}_pp{key.pp:03d}{suffix}.npz") as truth:
        found = []
        for entry in truth.files:
            chunk, name, state = entry.split("|")
            if chunk == f"chunk{key.vpp}" and state == "param" and (".experts." in name) == (key.ep is not None):
                found.append((name.removeprefix("module."), BF16, truth[entry].shape, False))
    return found


@pytest.mark.parametrize("name", CASES)
def test_maps_that_megatron_wrote(golden: Path, name: str) -> None:
    case = golden / "dist_opt" / name
    run = json.loads((case / "truth" / "meta.json").read_text())
    maps = param_map.find(str(case))
    expected = {"tp": run["case"]["tp"], "pp": run["case"]["pp"], "vpp": run["case"]["vpp"]}
    assert len([key for key in maps if key.ep is None]) == prod(expected.values())
    assert len([key for key in maps if key.ep is not None]) == (2 if "moe" in name else 0)
    for key, path in maps.items():
        whole = run["case"].get("overlap", False) and key.pp == 0 and key.vpp == 0
        built = buckets.build(
            model_order(case, key),
            version=buckets.parse_version(run["megatron_core"]),
            dp=run["case"]["dp"] if key.ep is None else run["case"]["dp"] // run["case"]["ep"],
            bucket_size=run["case"]["bucket"] if whole else None,
        )
        found = param_map.read(path)
        assert found.ranges == built.ranges
        assert (found.unpadded, found.padded) == (built.unpadded, ())
        notes = Path(path).with_name(Path(path).name.replace("param_map_", "bufmeta_"))
        if "mcore060" not in name:
            real = json.loads(notes.read_text())
            assert list(built.unpadded) == real["per_bucket_numel_unpadded"]
            assert list(built.padded) == [end - start for start, end in real["bucket_indices"]]
            assert (built.coalesced_numel, sum(built.padded)) == (real["numel_unpadded"], real["numel"])


def test_golden_cases_have_several_buckets(golden: Path) -> None:
    several = [
        name
        for name in CASES
        if any(len(param_map.read(path).bases) > 1 for path in param_map.find(str(golden / "dist_opt" / name)).values())
    ]
    assert len(several) == 4


# ------------------------------------------------- what ParamAndGradBuffer of the wheels gave for the same parameters

TIED = [parameter("tied", 768, tied=True), parameter("a", 200), parameter("b", 184)]
"""Reversed: b 184, a 200, and a tied embedding that would start at 384 = 3 * 128, at 392 where starts are padded."""
EVEN = [parameter("tied", 20, tied=True), parameter("a", 64), parameter("b", 128)]
SMALL = [parameter("tied", 33, tied=True), parameter("a", 10)]


@pytest.mark.parametrize(
    ("version", "dp", "params", "ranges", "unpadded", "padded"),
    [
        ((0, 6, 0), 2, SMALL, [(0, 10, 0), (10, 43, 1)], [10, 33], [10, 34]),
        ((0, 7, 0), 3, TIED, [(0, 184, 0), (184, 384, 0), (384, 1152, 1)], [384, 768], [384, 768]),
        ((0, 8, 0), 2, TIED, [(0, 184, 0), (192, 392, 0), None], None, None),
        ((0, 9, 0), 3, SMALL, [(0, 10, 0), (384, 417, 1)], [384, 33], [384, 384]),
        ((0, 12, 2), 12, SMALL, [(0, 10, 0), (384, 417, 1)], [384, 33], [384, 384]),
        ((0, 12, 2), 2, SMALL, None, None, None),
        ((0, 13, 0), 3, SMALL, [(0, 10, 0), (384, 417, 1)], [64, 33], [384, 384]),
        ((0, 16, 1), 2, SMALL, [(0, 10, 0), (128, 161, 1)], [64, 33], [128, 128]),
        ((0, 16, 1), 2, EVEN, [(0, 128, 0), (128, 192, 0), (256, 276, 1)], [192, 20], [256, 128]),
        ((0, 17), 2, EVEN, [(0, 128, 0), (128, 192, 0), (256, 276, 1)], [192, 20], [256, 128]),
    ],
)
def test_tied_embedding_behind_others(
    version: Version, dp: int, params: list[Parameter], ranges: list, unpadded: list | None, padded: list | None
) -> None:
    if unpadded is None:
        with pytest.raises(BucketError, match="does not save"):
            buckets.build(params, version=version, dp=dp, bucket_size=None)
        return
    built = buckets.build(params, version=version, dp=dp, bucket_size=None)
    assert [(r.start, r.end, r.bucket) for r in built.ranges] == ranges
    assert (list(built.unpadded), list(built.padded)) == (unpadded, padded)


def test_where_megatron_stops() -> None:
    for version in ((0, 6), (0, 7), (0, 8)):
        with pytest.raises(BucketError, match="Megatron stops"):
            buckets.build([*SMALL[:1], parameter("a", 64), parameter("b", 1)], version=version, dp=9, bucket_size=None)
    with pytest.raises(BucketError, match=r"older than 0\.6"):
        buckets.build(SMALL, version=(0, 5, 0), dp=1, bucket_size=None)
    with pytest.raises(BucketError, match="several dtypes"):
        buckets.build([*SMALL, ("x", "torch.uint8", (1,), False)], version=(0, 9), dp=1, bucket_size=None)


def test_a_bucket_closes_when_it_is_full() -> None:
    params = [parameter(name, 50) for name in "abcd"]
    exact = buckets.build(params, version=(0, 6), dp=3, bucket_size=100)
    assert [(r.name, r.start, r.bucket) for r in exact.ranges] == [
        ("d", 0, 0),
        ("c", 50, 0),
        ("b", 102, 1),
        ("a", 152, 1),
    ]
    assert (exact.unpadded, exact.padded) == ((100, 100), (102, 102))
    assert buckets.build(params, version=(0, 6), dp=3, bucket_size=101).unpadded == (150, 50)
    high = buckets.build(params, version=(0, 12), dp=2, bucket_size=100, pad_for_high_nccl_busbw=True)
    assert high.padded == (65536, 65536)
    assert buckets.build(params, version=(0, 11), dp=2, bucket_size=100, pad_for_high_nccl_busbw=True).padded == (
        128,
        128,
    )


def test_versions_and_default_bucket_sizes() -> None:
    assert buckets.parse_version("0.6.0 (PyPI wheel)") == (0, 6, 0)
    assert buckets.parse_version("core_r0.16.1") == (0, 16, 1)
    assert buckets.parse_version("0.13.0rc2") == (0, 13, 0)
    assert buckets.parse_version("0.9") == (0, 9)
    for text in ("", "main", "7"):
        with pytest.raises(BucketError, match=r"say it as 0\.16\.1"):
            buckets.parse_version(text)
    assert buckets.padding_of((0, 10, 0)).since == (0, 9)  # 10 is behind 9, unlike "10"
    assert buckets.default_bucket_size((0, 6, 0), 100) == 40_000_000
    assert buckets.default_bucket_size((0, 7, 0), 41) == 41_000_000
    assert buckets.default_bucket_size((0, 16, 1), 39) == 40_000_000


# ------------------------------------------------------------------------------------------ built cell by cell


class Cells:
    """A buffer as a list: (parameter, element) or None for padding; cut into buckets afterwards."""

    def __init__(self, params: Sequence[Parameter], version: Version, dp: int, bucket_size: int | None) -> None:
        modern, aligned = version >= (0, 7), version >= (0, 8)
        self.end = lcm(dp, 128) if modern else dp
        self.start = 64 if aligned else 1
        self.cells: list[tuple[str, int] | None] = []
        self.cuts, self.unpadded, self.of = [0], [], {}
        for name, _, shape, tied in params[::-1]:
            self.fill(self.start)
            if tied and len(self.cells) > self.cuts[-1]:
                self.cut()
            self.of[name] = len(self.cuts) - 1
            self.cells += [(name, i) for i in range(prod(shape))]
            if tied or (bucket_size and len(self.cells) - self.cuts[-1] >= bucket_size):
                self.cut()
        if len(self.cells) > self.cuts[-1]:
            self.cut()

    def fill(self, divisor: int) -> None:
        while len(self.cells) % divisor:
            self.cells.append(None)

    def cut(self) -> None:
        self.unpadded.append(len(self.cells) - self.cuts[-1])
        self.fill(self.end)
        self.cuts.append(len(self.cells))

    def parts(self) -> Iterator[list[tuple[str, int] | None]]:
        for start, stop in zip(self.cuts, self.cuts[1:], strict=False):
            yield self.cells[start:stop]


SIZES = st.sampled_from([1, 3, 20, 63, 64, 65, 128, 150, 384])
VERSIONS = st.sampled_from([(0, 6, 0), (0, 7, 0), (0, 8, 0), (0, 9, 0), (0, 12, 1), (0, 13, 0), (0, 16, 1)])


@settings(deadline=None, max_examples=150)
@given(st.lists(SIZES, min_size=1, max_size=8), VERSIONS, st.integers(1, 9), st.none() | st.integers(1, 600), st.data())
def test_files_decode_to_what_was_put_in(
    sizes: list[int], version: Version, dp: int, bucket_size: int | None, data: st.DataObject
) -> None:
    tied = data.draw(st.none() | st.integers(0, len(sizes) - 1)) if version >= (0, 13) else None
    params = [
        ("embedding.word_embeddings.weight" if i == tied else f"p{i}", BF16, (n,), i == tied)
        for i, n in enumerate(sizes)
    ]
    truth = Cells(params, version, dp, bucket_size)
    built = buckets.build(params, version=version, dp=dp, bucket_size=bucket_size)
    assert [r.name for r in built.ranges] == [name for name, _, _, _ in params[::-1]]
    assert {r.name: r.bucket for r in built.ranges} == truth.of
    assert list(built.unpadded) == truth.unpadded
    assert list(built.padded) == [len(part) for part in truth.parts()]

    numbers = {cell: i for i, cell in enumerate(cell for cell in truth.cells if cell)}
    values = np.array([numbers.get(cell, -1) for cell in truth.cells])
    lists = np.split(values, truth.cuts[1:-1])
    coalesced = np.concatenate([part[:n] for part, n in zip(lists, truth.unpadded, strict=True)])
    from_map = BufferMap(built.ranges).fitted(coalesced.size)  # a map alone, as param_map.read gives it
    assert from_map is not None
    assert from_map.unpadded == built.unpadded
    assert from_map.coalesced_numel == coalesced.size
    for found in built.ranges:
        expected = [numbers[found.name, i] for i in range(found.numel)]
        assert values[found.start : found.end].tolist() == expected
        bucket, first, numel = found_in_list = from_map.list_slice(found)
        assert found_in_list == built.list_slice(found)
        assert lists[bucket][first : first + numel].tolist() == expected
        first, numel = from_map.coalesced_slice(found)
        assert coalesced[first : first + numel].tolist() == expected


# ------------------------------------------------------------------------------------------------ maps that cannot be

GOOD = (at("a", 0, 10, 0), at("b", 12, 20, 0), at("c", 30, 40, 1))


def test_a_map_alone() -> None:
    found = BufferMap(GOOD)
    assert (found.bases, found.unpadded, found.padded, found.offsets) == ((0, 30), (20, 10), (), (0, 20))
    assert (found.list_slice(GOOD[2]), found.coalesced_slice(GOOD[2])) == ((1, 0, 10), (20, 10))
    assert found.fitted(30) is found
    assert found.fitted(40) is None


def test_padding_before_a_tied_embedding_is_told_by_the_size() -> None:
    tied = at("x.word_embeddings.weight", 384, 417, 1)
    found = BufferMap((at("a", 0, 10, 0), tied))
    assert [m and m.unpadded for m in map(found.fitted, (43, 64 + 33, 384 + 33, 44, 128 + 33))] == [
        (10, 33),
        (64, 33),
        (384, 33),
        None,
        None,
    ]
    with_others = BufferMap((*found.ranges, at("b", 417, 420, 1)))
    assert with_others.fitted(64 + 36) is None
    assert BufferMap((at("a", 0, 10, 0), at("word_embeddings.weight", 20, 21, 1))).fitted(64 + 1) is None
    first = BufferMap((at("word_embeddings.weight", 0, 64, 0), at("a", 64, 70, 1)))
    assert (first.fitted(70), first.fitted(128), first.fitted(0)) == (first, None, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: at("a", 3, 3, 0), "0 <= start < end"),
        (lambda: Range("a", BF16, (2,), -2, 0, 0), "0 <= start < end"),
        (lambda: Range("a", BF16, (2, 3), 0, 5, 0), "6 elements, but 5"),
        (lambda: BufferMap(()), "without parameters"),
        (lambda: BufferMap((GOOD[0], at("a", 12, 20, 0))), "'a' is there twice"),
        (lambda: BufferMap((GOOD[0], at("b", 9, 20, 0))), "before 'a' ends"),
        (lambda: BufferMap(GOOD[::-1]), "in bucket 1, not 0"),
        (lambda: BufferMap((GOOD[0], at("b", 12, 20, 2))), "one by one"),
        (lambda: BufferMap((*GOOD, at("d", 50, 51, 0))), "one by one"),
        (lambda: BufferMap(GOOD, (20,)), "1 unpadded sizes for 2"),
        (lambda: BufferMap(GOOD, (20, 10), (30,)), "1 padded sizes for 2"),
        (lambda: BufferMap(GOOD, (19, 10)), "19 unpadded and 20 in use"),
        (lambda: BufferMap(GOOD, (31, 10)), "bucket 0 ends at 31, bucket 1 starts at 30"),
        (lambda: BufferMap(GOOD, (20, 10), (28, 10)), "bucket 0 ends at 28, bucket 1 starts at 30"),
        (lambda: BufferMap(GOOD, (20, 11), (30, 10)), "bucket 1 has 10 elements, 11 unpadded"),
    ],
)
def test_what_no_buffer_has(make: object, message: str) -> None:
    with pytest.raises(BucketError, match=message):
        make()  # type: ignore[operator]


def test_a_scalar_is_one_element() -> None:
    assert Range("scale", BF16, (), 0, 1, 0).numel == 1
