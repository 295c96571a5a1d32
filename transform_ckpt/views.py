"""The algebra of strided views: which stored element is which logical one.  Integers only; imports nothing.

A `View` says that element (i, j, ...) lies at `offset + i*strides[0] + j*strides[1] + ...` of some flat buffer of
elements.  A `Box` is a rectangle of a logical tensor.  Everything a reshard does is a box of a logical tensor seen as
a view of a stored one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


def row_major(shape: Shape) -> Shape:
    """Strides in elements of a C-ordered tensor."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The rectangle `start[d] <= i[d] < start[d] + size[d]` of a logical tensor, in elements."""

    start: Shape
    size: Shape

    def __post_init__(self) -> None:
        if len(self.start) != len(self.size):
            raise ValueError(f"box with {len(self.start)} starts and {len(self.size)} sizes")
        if any(v < 0 for v in (*self.start, *self.size)):
            raise ValueError(f"negative box {self.start} {self.size}")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.size)

    def stop(self) -> Shape:
        """Exclusive end per axis."""
        return tuple(s + n for s, n in zip(self.start, self.size, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common rectangle, or None where they share no element."""
        start = tuple(map(max, self.start, other.start))
        size = tuple(min(a, b) - s for a, b, s in zip(self.stop(), other.stop(), start, strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None

    def view_in(self, holder: Box) -> View:
        """This box as a view of a C-ordered tensor that stores exactly `holder`."""
        strides = row_major(holder.size)
        offset = sum((a - b) * s for a, b, s in zip(self.start, holder.start, strides, strict=True))
        return View(offset, self.size, strides)


def whole(shape: Shape) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), shape)


@dataclass(frozen=True, slots=True)
class View:
    """A strided window of a stored tensor; offset and strides in elements of that tensor."""

    offset: int
    shape: Shape
    strides: Shape

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.strides):
            raise ValueError(f"view of shape {self.shape} with strides {self.strides}")

    @property
    def numel(self) -> int:
        """Number of elements of the window (stride 0 repeats count each time)."""
        return prod(self.shape)

    def slice(self, axis: int, start: int, stop: int) -> View:
        """Elements `start <= i < stop` of one axis."""
        if not 0 <= start <= stop <= self.shape[axis]:
            raise ValueError(f"slice [{start}:{stop}] of axis {axis} of length {self.shape[axis]}")
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return View(self.offset + start * self.strides[axis], shape, self.strides)

    def split(self, axis: int, outer: int) -> View:
        """Axis of length n becomes the two axes (outer, n // outer)."""
        length, stride = self.shape[axis], self.strides[axis]
        if outer <= 0 or length % outer:
            raise ValueError(f"axis {axis} of length {length} does not divide by {outer}")
        inner = length // outer
        shape = (*self.shape[:axis], outer, inner, *self.shape[axis + 1 :])
        strides = (*self.strides[:axis], stride * inner, stride, *self.strides[axis + 1 :])
        return View(self.offset, shape, strides)

    def merge(self, axis: int) -> View:
        """Axes `axis` and `axis + 1` become one; they must lie one behind the other."""
        a, b = self.shape[axis], self.shape[axis + 1]
        if a > 1 and b > 1 and self.strides[axis] != b * self.strides[axis + 1]:
            raise ValueError(f"axes {axis} and {axis + 1} of {self} are not contiguous")
        stride = self.strides[axis + 1] if b > 1 else self.strides[axis]
        shape = (*self.shape[:axis], a * b, *self.shape[axis + 2 :])
        strides = (*self.strides[:axis], stride, *self.strides[axis + 2 :])
        return View(self.offset, shape, strides)

    def permute(self, order: Shape) -> View:
        """Axes in a new order, as numpy.transpose."""
        if sorted(order) != list(range(len(self.shape))):
            raise ValueError(f"{order} is not an order of {len(self.shape)} axes")
        return View(self.offset, tuple(self.shape[i] for i in order), tuple(self.strides[i] for i in order))

    def normal(self) -> View:
        """The same elements with axes of length 1 dropped and contiguous neighbours merged (element order kept)."""
        shape: list[int] = []
        strides: list[int] = []
        for n, s in zip(self.shape, self.strides, strict=True):
            if n == 1:
                continue
            if shape and strides[-1] == n * s:
                shape[-1] *= n
                strides[-1] = s
            else:
                shape.append(n)
                strides.append(s)
        return View(self.offset, tuple(shape), tuple(strides))


def contiguous(shape: Shape, offset: int = 0) -> View:
    """A C-ordered view."""
    return View(offset, shape, row_major(shape))


def join(first: View, second: View, axis: int) -> View:
    """One view of two that continue each other along `axis` (the inverse of `slice`)."""
    stride = first.strides[axis]
    if first.strides != second.strides or second.offset != first.offset + first.shape[axis] * stride:
        raise ValueError(f"{second} does not continue {first} along axis {axis}")
    if first.shape[:axis] + first.shape[axis + 1 :] != second.shape[:axis] + second.shape[axis + 1 :]:
        raise ValueError(f"{first} and {second} differ beside axis {axis}")
    shape = (*first.shape[:axis], first.shape[axis] + second.shape[axis], *first.shape[axis + 1 :])
    return View(first.offset, shape, first.strides)
