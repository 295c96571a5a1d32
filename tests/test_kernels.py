"""Moving bytes equals a NumPy reference that holds whole tensors, whatever the partition and the size of a block."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import synthetic
from tests.synthetic import Held, content, materialise, source_of, stored, target_of, window
from transform_ckpt import kernels
from transform_ckpt.errors import StorageError
from transform_ckpt.kernels import Mover
from transform_ckpt.planner import Component, Plan, Side, build
from transform_ckpt.views import Box, View, row_major, whole

QUICK = settings(max_examples=200, derandomize=True, deadline=None, database=None)
Array = np.ndarray[Any, np.dtype[Any]]

BLOCKS = [1, 2, 3, 5, 8, 16, 40, 64, 100, 1000]


class MemoryReader:
    """A stored tensor that counts how often each byte is read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.counts = data, np.zeros(len(data), np.int64)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= len(self.data)
        self.counts[offset : offset + len(buffer)] += 1
        buffer[:] = self.data[offset : offset + len(buffer)]


class CountingWriter:
    """A target tensor and its replicas; bytes never written stay 0."""

    def __init__(self, nbytes: int, replicas: int = 1) -> None:
        self.copies = [bytearray(nbytes) for _ in range(replicas)]
        self.counts, self.offsets = np.zeros(nbytes, np.int64), [-1]

    def write(self, offset: int, data: memoryview) -> None:
        assert 0 <= offset <= offset + len(data) <= len(self.counts)
        self.counts[offset : offset + len(data)] += 1
        self.offsets.append(offset)
        for copy in self.copies:
            copy[offset : offset + len(data)] = data


class Observed:
    """What the observer saw, by write side."""

    def __init__(self) -> None:
        self.seen: dict[int, bytearray] = {}
        self.largest = 0

    def __call__(self, index: int, data: memoryview) -> None:
        self.seen.setdefault(index, bytearray()).extend(data)
        self.largest = max(self.largest, len(data))


def move_plan(plan: Plan, held: synthetic.Stored, block_nbytes: int, cuts: list[float]) -> dict[Any, bytes]:
    """Every target tensor by Mover; each group in the tasks that `cuts` (fractions of its rows) give."""
    mover = Mover(block_nbytes)
    found: dict[Any, bytes] = {}
    buffers = {(i, s.name): bytearray(s.nbytes) for i, file in enumerate(plan.target.files) for s in file.specs}
    for group in plan.groups:
        rows = group.component.shape[0]
        readers = [MemoryReader(held[t.path, t.name]) for t in group.reads]
        writers = [
            CountingWriter(side.view.numel, len(p))
            for side, p in zip(group.component.writes, group.writes, strict=True)
        ]
        observed = Observed()
        for start, stop in pairwise(sorted({0, rows, *(int(cut * rows) for cut in cuts)})):
            mover.move(group.component, (start, stop), readers, writers, observed)
        assert observed.largest <= block_nbytes
        assert all(reader.counts.max() <= 1 for reader in readers), "a source byte is read at most once"
        for index, (writer, places) in enumerate(zip(writers, group.writes, strict=True)):
            assert (writer.counts == 1).all(), "a target byte is written once"
            assert writer.offsets == sorted(writer.offsets)
            assert observed.seen[index] == writer.copies[0], "the observer sees a target's bytes in order, once"
            for place, copy in zip(places, writer.copies, strict=True):
                buffers[place.file, place.name] = copy
    found |= {key: bytes(buffer) for key, buffer in buffers.items()}
    return found


@st.composite
def reshards(draw: st.DrawFn) -> tuple[Held, Held]:
    """A tensor of one to four axes as source ranks hold it, and as target ranks want it."""
    dtype = draw(st.sampled_from(synthetic.CODES))
    shape = tuple(draw(st.integers(1, 6)) for _ in range(draw(st.integers(1, 4))))
    return (
        Held(dtype, shape, draw(synthetic.layouts(shape, complete=True))),
        Held(dtype, shape, draw(synthetic.layouts(shape, complete=False))),
    )


@QUICK
@given(reshards(), st.sampled_from(BLOCKS), st.lists(st.floats(0, 1), max_size=3))
def test_moved_equals_materialised(case: tuple[Held, Held], block_nbytes: int, cuts: list[float]) -> None:
    held, wanted = case
    array = content(held)
    plan = build(source_of({"w": held}), target_of({"w": wanted}))
    found = move_plan(plan, stored("w", held, array), block_nbytes, cuts)
    synthetic.assert_filled(plan, {"w": wanted}, {"w": array}, found)


@pytest.mark.parametrize("block_nbytes", [7, 256, 4096, kernels.BLOCK_NBYTES])
def test_a_larger_tensor(block_nbytes: int) -> None:
    """Columns to rows, more than one block, and a last block that is not full."""
    shape = (301, 40, 6)
    across = tuple((i, Box((0, 8 * i, 0), (301, 8, 6))) for i in range(5))
    down = tuple((i, Box((i * 100, 0, 0), (min(100, 301 - i * 100), 40, 6))) for i in range(4))
    for src, dst in ((across, down), (down, across), (across, ((0, whole(shape)), (1, whole(shape))))):
        held, wanted = Held("F32", shape, src), Held("F32", shape, dst)
        array = content(held)
        plan = build(source_of({"w": held}), target_of({"w": wanted}))
        found = move_plan(plan, stored("w", held, array), block_nbytes, [0.3])
        synthetic.assert_filled(plan, {"w": wanted}, {"w": array}, found)


# --------------------------------------------------------------------------- components that no planner makes yet


@st.composite
def strided_sides(draw: st.DrawFn, boxes: list[Box]) -> tuple[tuple[Side, ...], list[int]]:
    """Sides whose stored tensors have their outer axes in any order, padding between runs, and an unaligned start."""
    sides, sizes = [], []
    for box in boxes:
        outer = draw(st.permutations(range(len(box.size) - 1)))
        padded = [box.size[axis] + draw(st.integers(0, 2)) for axis in outer]
        last = box.size[-1] + draw(st.integers(0, 3))
        strides = [0] * len(outer)
        for axis, stride in zip(outer, row_major((*padded, last)), strict=False):
            strides[axis] = stride
        offset = draw(st.integers(0, 5))
        view = View(offset, box.size, (*strides, 1))
        sides.append(Side(box, view))
        sizes.append(1 + offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)))
    return tuple(sides), sizes


@QUICK
@given(st.data(), st.sampled_from(BLOCKS))
def test_any_strides_on_both_sides(data: st.DataObject, block_nbytes: int) -> None:
    shape = tuple(data.draw(st.integers(1, 5)) for _ in range(data.draw(st.integers(1, 4))))
    reads, sizes = data.draw(strided_sides(data.draw(synthetic.partitions(shape))))
    writes, targets = data.draw(strided_sides(data.draw(synthetic.partitions(shape))))
    component = Component(shape, reads, writes)
    rng = np.random.default_rng(0)
    sources = [rng.bytes(n) for n in sizes]
    writers, observed = [CountingWriter(n) for n in targets], Observed()
    Mover(block_nbytes).move(component, (0, shape[0]), [MemoryReader(s) for s in sources], writers, observed)
    expected, counts = materialise(component, sources)
    assert (counts == 1).all()
    for index, (side, writer) in enumerate(zip(writes, writers, strict=True)):
        written = synthetic.strided(np.frombuffer(writer.copies[0], np.uint8), side)
        np.testing.assert_array_equal(written, expected[window(side.box)])
        assert (synthetic.strided(writer.counts.astype(np.uint8), side) == 1).all()
        assert writer.counts.sum() == side.box.numel, "nothing beside the view is written"
        assert observed.seen[index] == expected[window(side.box)].tobytes()


# -------------------------------------------------------------------------------------------------- small things


def test_no_more_memory_than_two_blocks() -> None:
    mover = Mover(1000)
    assert (len(mover._block), len(mover._strip), mover.block_nbytes) == (1000, 1000, 1000)
    assert Mover().block_nbytes == kernels.BLOCK_NBYTES == 384 * 1024


def test_only_the_rows_asked_for_are_touched() -> None:
    shape = (6, 4)
    side = Side(whole(shape), View(0, shape, (4, 1)))
    reader, writer = MemoryReader(bytes(range(24))), CountingWriter(24)
    Mover(5).move(Component(shape, (side,), (side,)), (2, 4), [reader], [writer])
    for counts in (reader.counts, writer.counts):
        np.testing.assert_array_equal(counts.reshape(shape), [[0] * 4] * 2 + [[1] * 4] * 2 + [[0] * 4] * 2)
    assert writer.copies[0] == bytes(8) + bytes(range(8, 16)) + bytes(8)


def test_rows_that_no_target_wants_are_not_read() -> None:
    shape = (6, 4)
    read = Side(whole(shape), View(0, shape, (4, 1)))
    write = Side(Box((2, 0), (1, 4)), View(0, (1, 4), (4, 1)))
    reader, writer = MemoryReader(bytes(range(24))), CountingWriter(4)
    Mover(64).move(Component(shape, (read,), (write,)), (0, 6), [reader], [writer])
    assert reader.counts.sum() == 4
    assert writer.copies[0] == bytes(range(8, 12))


def test_errors_of_readers_and_writers_come_through() -> None:
    class Broken:
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise StorageError("broken")

        def write(self, offset: int, data: memoryview) -> None:
            raise StorageError("broken")

    side = Side(whole((4,)), View(0, (4,), (1,)))
    component = Component((4,), (side,), (side,))
    for reader, writer in ((Broken(), CountingWriter(4)), (MemoryReader(b"abcd"), Broken())):
        with pytest.raises(StorageError, match="broken"):
            Mover(2).move(component, (0, 4), [reader], [writer])
