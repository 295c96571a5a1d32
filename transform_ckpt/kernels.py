"""Moves the bytes of a component: blocks of rows are gathered from the sources and scattered to the targets.

A block (`block_nbytes`, small enough for the L2 cache) holds some rows of the logical component.  A source or target
that spans whole rows is read or written straight from it; one that is cut along inner axes passes through a second
small buffer, run by run where runs are long (no NumPy, whose import costs more than many conversions), else by NumPy.
So a source byte is read once, a target byte is written once, in order, and digested (and cast) while in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

from transform_ckpt.casts import cast
from transform_ckpt.planner import Component, Side
from transform_ckpt.store import Reader, Writer
from transform_ckpt.views import Shape, row_major

BLOCK_NBYTES = 384 * 1024
"""Two of them fit a 1 MiB L2 cache; of 64 to 512 KiB the fastest in docs/benchmarks.md's case, by a sixth over 256."""
LONG_RUN_NBYTES = 512
"""From here on copying run by run is as fast as NumPy's strided copy."""
_MAX_KEPT = 64

Transfer = Callable[[int, memoryview], None]
"""`Reader.read_into` or `Writer.write`: (byte offset in the tensor, bytes)."""

Observer = Callable[[int, memoryview], None]
"""Called with (index of the write side, bytes) for every block that is written."""


@dataclass(frozen=True, slots=True)
class _Active:
    """A side with its outer axes already fixed."""

    index: int
    call: Transfer
    offset: int
    start: Shape
    size: Shape
    strides: Shape
    side: Side

    def row(self, row: int) -> _Active:
        """The side with axis 0 fixed at component row `row`."""
        return replace(self, offset=self.at(row), start=self.start[1:], size=self.size[1:], strides=self.strides[1:])

    def at(self, row: int) -> int:
        """Byte of the stored tensor where component row `row` begins."""
        rows = row - self.start[0]
        return self.offset + (self.side.stored_nbytes(rows) if len(self.start) == 1 else rows * self.strides[0])

    def spans(self, low: int, high: int) -> bool:
        return self.start[0] <= low and high <= self.start[0] + self.size[0]


class Mover:
    """Two buffers and the loops over them.  Not shared between processes."""

    def __init__(self, block_nbytes: int = BLOCK_NBYTES) -> None:
        self.block_nbytes = block_nbytes
        self._block = memoryview(bytearray(block_nbytes))
        self._strip = memoryview(bytearray(block_nbytes))
        self._cast = memoryview(b"")
        self._kept: dict[tuple[Shape, Shape, Shape], list[memoryview]] = {}

    def _casted(self, nbytes: int) -> memoryview:
        """Room for a block in another dtype."""
        if len(self._cast) < nbytes:
            self._cast = memoryview(bytearray(max(nbytes, self.block_nbytes)))
        return self._cast

    def move(
        self,
        component: Component,
        rows: tuple[int, int],
        readers: Sequence[Reader],
        writers: Sequence[Writer],
        observe: Observer | None = None,
    ) -> None:
        """Copy component rows `rows[0] <= r < rows[1]` from the readers to the writers (one each per side)."""
        reads = [_active(i, side, readers[i].read_into) for i, side in enumerate(component.reads)]
        writes = [_active(i, side, writers[i].write) for i, side in enumerate(component.writes)]
        self._rows(component.shape, reads, writes, rows, observe)

    def _rows(
        self,
        shape: Shape,
        reads: Sequence[_Active],
        writes: Sequence[_Active],
        rows: tuple[int, int],
        observe: Observer | None,
    ) -> None:
        low, high = rows
        row_nbytes = prod(shape[1:])
        for start, stop in _segments(low, high, [*reads, *writes]):
            sources = [side for side in reads if side.spans(start, stop)]
            targets = [side for side in writes if side.spans(start, stop)]
            if not targets:
                continue
            if row_nbytes > self.block_nbytes:
                for row in range(start, stop):
                    inner = (0, shape[1])
                    self._rows(shape[1:], [s.row(row) for s in sources], [t.row(row) for t in targets], inner, observe)
                continue
            step = max(1, self.block_nbytes // max(row_nbytes, 1))
            for at in range(start, stop, step):
                self._block_rows(shape, sources, targets, at, min(step, stop - at), observe)

    def _block_rows(
        self,
        shape: Shape,
        sources: Sequence[_Active],
        targets: Sequence[_Active],
        row: int,
        count: int,
        observe: Observer | None,
    ) -> None:
        inner = shape[1:]
        block = self._block[: count * prod(inner)]
        for side in sources:
            self._gather(block, (count, *inner), side, row)
        for side in targets:
            data = self._scattered(block, (count, *inner), side, row)
            size = (count, *side.size[1:])
            if side.side.cast is not None:
                data = cast(data, *side.side.cast, self._casted(side.side.stored_nbytes(len(data))))
                size = (*size[:-1], side.side.stored_nbytes(size[-1]))
            if observe is not None:
                observe(side.index, data)
            _transfer(side, row, data, size)

    def _gather(self, block: memoryview, shape: Shape, side: _Active, row: int) -> None:
        size = (shape[0], *side.size[1:])
        whole_rows = side.size[1:] == shape[1:]
        data = block if whole_rows else self._strip[: prod(size)]
        _transfer(side, row, data, size)
        if whole_rows:
            return
        if side.size[-1] < LONG_RUN_NBYTES:
            _window(block, shape, side)[...] = _array(data).reshape(size)
            return
        run, at = side.size[-1], 0
        for part in self._runs(shape, side):
            part[:] = data[at : at + run]
            at += run

    def _scattered(self, block: memoryview, shape: Shape, side: _Active, row: int) -> memoryview:
        """The rows of the block that belong to a target, dense."""
        if side.size[1:] == shape[1:]:
            return block
        if side.size[-1] >= LONG_RUN_NBYTES:
            return memoryview(b"".join(self._runs(shape, side)))
        size = (shape[0], *side.size[1:])
        data = self._strip[: prod(size)]
        _array(data).reshape(size)[...] = _window(block, shape, side)
        return data

    def _runs(self, shape: Shape, side: _Active) -> list[memoryview]:
        """The block's dense runs that a side covers, in the side's order; kept, since blocks repeat."""
        key = (shape, side.start[1:], side.size[1:])
        found = self._kept.get(key)
        if found is None:
            strides = row_major(shape)
            offsets = [row * strides[0] for row in range(shape[0])]
            for low, size, stride in zip(side.start[1:-1], side.size[1:-1], strides[1:-1], strict=True):
                offsets = [base + (low + i) * stride for base in offsets for i in range(size)]
            low, run = side.start[-1], side.size[-1]
            found = [self._block[base + low : base + low + run] for base in offsets]
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = found
        return found


def _active(index: int, side: Side, call: Transfer) -> _Active:
    return _Active(index, call, side.view.offset, side.box.start, side.box.size, side.view.strides, side)


def _segments(low: int, high: int, sides: Sequence[_Active]) -> list[tuple[int, int]]:
    """Row ranges in which the same sides take part."""
    edges = {low, high}
    for side in sides:
        for edge in (side.start[0], side.start[0] + side.size[0]):
            if low < edge < high:
                edges.add(edge)
    return list(pairwise(sorted(edges)))


def _array(data: memoryview) -> Any:
    import numpy as np

    return np.frombuffer(data, dtype=np.uint8)


def _window(block: memoryview, shape: Shape, side: _Active) -> Any:
    """The part of a block (as an array of `shape` bytes) that a side covers."""
    window = tuple(slice(s, s + n) for s, n in zip(side.start[1:], side.size[1:], strict=True))
    return _array(block).reshape(shape)[(slice(None), *window)]


def _dense(size: Shape, strides: Shape) -> bool:
    return all(n == 1 or s == d for n, s, d in zip(size, strides, row_major(size), strict=True))


def _transfer(side: _Active, row: int, data: memoryview, size: Shape) -> None:
    """`size` bytes of a side from component row `row` on, read into or written from dense `data`."""
    _each_run(side.call, side.at(row), size, side.strides, data)


def _each_run(call: Transfer, offset: int, size: Shape, strides: Shape, data: memoryview) -> None:
    """One call for each dense run of a strided window."""
    if _dense(size, strides):
        call(offset, data)
        return
    part = prod(size[1:])
    for index in range(size[0]):
        inner = data[index * part : (index + 1) * part]
        _each_run(call, offset + index * strides[0], size[1:], strides[1:], inner)
