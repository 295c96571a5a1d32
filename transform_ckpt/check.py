"""Proves coverage on integers alone: do these views hold every element of a buffer exactly once?

Only address sets matter.  Views are normalised (axes of length 1 dropped, sorted by stride, coalesced); plain intervals
end in one sweep.  Views that overlap in range form a cluster, decided exactly: boxes in the mixed radix of the
cluster's strides where these form a divisor chain, else (and to name the place of a fault) a bytearray.
May import views only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from transform_ckpt.views import View


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a cover is not exact.  `offset` is the first element concerned."""

    kind: str
    offset: int

    def __str__(self) -> str:
        return f"{self.kind} at element {self.offset:,}"


@dataclass(frozen=True, slots=True)
class _Set:
    """An address set: offset + sum(i_k * stride_k), strides descending and positive, lengths > 1."""

    offset: int
    axes: tuple[tuple[int, int], ...]
    """(length, stride), widest stride first."""

    @property
    def last(self) -> int:
        return self.offset + sum((n - 1) * s for n, s in self.axes)

    @property
    def count(self) -> int:
        total = 1
        for n, _ in self.axes:
            total *= n
        return total


def _address_set(view: View) -> _Set:
    axes: list[tuple[int, int]] = []
    for n, s in sorted(zip(view.shape, view.strides, strict=True), key=lambda a: (a[1], a[0])):
        if s < 0:
            raise ValueError(f"negative stride in {view}")
        if n == 1:
            continue
        if axes and axes[-1][0] * axes[-1][1] == s:
            axes[-1] = (axes[-1][0] * n, axes[-1][1])
        else:
            axes.append((n, s))
    return _Set(view.offset, tuple(reversed(axes)))


def exact_cover(views: Iterable[View], total: int) -> Fault | None:
    """None when the views hold elements 0 .. total-1 exactly once each; else the first fault found."""
    sets = [_address_set(v) for v in views if v.numel]
    for item in sets:
        if any(s == 0 for _, s in item.axes):
            return Fault("a repeated element", item.offset)
        if item.offset < 0 or item.last >= total:
            return Fault("an element outside the tensor", max(item.offset, 0) if item.offset < 0 else item.last)
    sets.sort(key=lambda a: a.offset)
    position = index = 0
    while index < len(sets):
        end, stop = sets[index].last, index + 1
        while stop < len(sets) and sets[stop].offset <= end:
            end = max(end, sets[stop].last)
            stop += 1
        if sets[index].offset > position:
            return Fault("a hole", position)
        fault = _cluster(sets[index:stop], position, end + 1)
        if fault:
            return fault
        position = end + 1
        index = stop
    return Fault("a hole", position) if position < total else None


def _cluster(sets: Sequence[_Set], first: int, stop: int) -> Fault | None:
    if len(sets) == 1 and sets[0].count == stop - first:
        return None
    total = sum(s.count for s in sets)
    radix = _radix(sets)
    if radix is not None and total == stop - first:
        boxes = [_digits(s, first, radix) for s in sets]
        cells = [b for b in boxes if b is not None]
        if len(cells) == len(sets) and _disjoint(cells, 0):
            return None
    return _marked(sets, first, stop)


def _radix(sets: Sequence[_Set]) -> tuple[int, ...] | None:
    """All strides of the cluster and 1, widest first, when each divides the next wider one."""
    strides = sorted({s for item in sets for _, s in item.axes} | {1}, reverse=True)
    if any(wide % narrow for wide, narrow in pairwise(strides)):
        return None
    return tuple(strides)


def _digits(item: _Set, first: int, radix: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """The set as one box of digits [(start, stop) per radix place], or None where it carries over a digit."""
    rest = item.offset - first
    length = {s: n for n, s in item.axes}
    box: list[tuple[int, int]] = []
    for place, weight in enumerate(radix):
        digit, rest = divmod(rest, weight)
        stop = digit + length.get(weight, 1)
        if place and stop > radix[place - 1] // weight:
            return None
        box.append((digit, stop))
    return tuple(box)


def _disjoint(boxes: Sequence[tuple[tuple[int, int], ...]], place: int) -> bool:
    """No two boxes share a cell: cut along one digit after the other (exact)."""
    if len(boxes) < 2:
        return True
    if place == len(boxes[0]):
        return False
    cuts = sorted({edge for box in boxes for edge in box[place]})
    starts: dict[int, list[tuple[tuple[int, int], ...]]] = {}
    for box in boxes:
        low, high = box[place]
        for cut in cuts[bisect_left(cuts, low) : bisect_left(cuts, high)]:
            starts.setdefault(cut, []).append(box)
    return all(_disjoint(found, place + 1) for found in starts.values())


def _marked(sets: Sequence[_Set], first: int, stop: int) -> Fault | None:
    """The plain way: one byte for each element."""
    marks = bytearray(stop - first)
    for item in sets:
        dense = bool(item.axes) and item.axes[-1][1] == 1
        head, run = (item.axes[:-1], item.axes[-1][0]) if dense else (item.axes, 1)
        for index in product(*(range(n) for n, _ in head)):
            at = item.offset - first + sum(i * s for i, (_, s) in zip(index, head, strict=True))
            found = marks.find(1, at, at + run)
            if found >= 0:
                return Fault("an overlap", first + found)
            marks[at : at + run] = b"\1" * run
    hole = marks.find(0)
    return Fault("a hole", first + hole) if hole >= 0 else None
