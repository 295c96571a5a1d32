"""`exact_cover` against one counter for each element, on partitions of every kind the engine can meet, then spoilt."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transform_ckpt.check import Fault, exact_cover
from transform_ckpt.views import Shape, View, contiguous

HOLE, OVERLAP, OUTSIDE, REPEAT = "a hole", "an overlap", "an element outside the tensor", "a repeated element"


# --------------------------------------------------------------------------------------------------- reference


def addresses(view: View) -> list[int]:
    """Every element of a view, one by one."""
    found = [view.offset]
    for n, stride in zip(view.shape, view.strides, strict=True):
        found = [at + i * stride for at in found for i in range(n)]
    return found


def counted(views: list[View], total: int) -> tuple[bytearray, set[str]]:
    """How often each element is held, and the kinds of fault that there are."""
    counts, kinds = bytearray(total), set()
    for view in views:
        if view.numel and any(n > 1 and s == 0 for n, s in zip(view.shape, view.strides, strict=True)):
            kinds.add(REPEAT)
        for at in addresses(view):
            if 0 <= at < total:
                counts[at] = min(counts[at] + 1, 255)
            else:
                kinds.add(OUTSIDE)
    kinds |= {HOLE for n in counts if n == 0}
    kinds |= {OVERLAP for n in counts if n > 1}
    return counts, kinds


def assert_agrees(views: list[View], total: int) -> Fault | None:
    """The verdict is that of the counters: a fault where there is one, of a kind and at a place that is true."""
    counts, kinds = counted(views, total)
    fault = exact_cover(views, total)
    if fault is None:
        assert not kinds, views
        return None
    assert fault.kind in kinds, (fault, views)
    assert fault.kind in kinds & {REPEAT, OUTSIDE} or not kinds & {REPEAT, OUTSIDE}, "these are found first"
    if fault.kind == HOLE:
        assert counts[fault.offset] == 0, (fault, views)
        assert 0 not in counts[: fault.offset] or OVERLAP in kinds
    elif fault.kind == OVERLAP:
        assert counts[fault.offset] > 1, (fault, views)
    elif fault.kind == OUTSIDE:
        assert fault.offset == 0 or fault.offset >= total
    return fault


# -------------------------------------------------------------------------------------------------- partitions


class Partition:
    """Cuts the elements of a tensor into views at random, in all the ways that checkpoints are cut."""

    def __init__(self, rng: random.Random, shape: Shape) -> None:
        self.rng = rng
        self.total = prod(shape)
        self.views = [self._shuffled(view) for view in self._cut(contiguous(shape), rng.randint(0, 5))]
        rng.shuffle(self.views)

    def _cut(self, view: View, depth: int) -> list[View]:
        """The same elements in several views."""
        axes = [axis for axis, n in enumerate(view.shape) if n > 1]
        if not depth or not axes:
            return [view]
        axis = self.rng.choice(axes)
        length = view.shape[axis]
        parts = [n for n in range(2, length + 1) if length % n == 0]
        match self.rng.randrange(4):
            case 0:  # an uneven cut
                cut = self.rng.randint(1, length - 1)
                found = [view.slice(axis, 0, cut), view.slice(axis, cut, length)]
            case 1:  # equal blocks
                blocks, each = (count := self.rng.choice(parts)), length // count
                found = [view.slice(axis, i * each, (i + 1) * each) for i in range(blocks)]
            case 2:  # interleaved: every n-th element
                step = self.rng.choice(parts)
                outer = view.split(axis, length // step)
                found = [outer.slice(axis + 1, i, i + 1) for i in range(step)]
            case _:  # interleaved in blocks, as gate and up rows of each tensor parallel rank
                outer = view.split(axis, self.rng.choice(parts))
                inner = outer.shape[axis + 1]
                cut = self.rng.randint(0, inner)
                found = [outer.slice(axis + 1, 0, cut), outer.slice(axis + 1, cut, inner)]
        return [piece for part in found for piece in self._cut(part, depth - 1)]

    def _shuffled(self, view: View) -> View:
        """Axes in any order, with axes of length 1 of any stride between them."""
        order = list(range(len(view.shape)))
        self.rng.shuffle(order)
        view = view.permute(tuple(order))
        for _ in range(self.rng.randint(0, 2)):
            at = self.rng.randint(0, len(view.shape))
            stride = self.rng.choice([0, 1, 7])
            view = View(
                view.offset, (*view.shape[:at], 1, *view.shape[at:]), (*view.strides[:at], stride, *view.strides[at:])
            )
        return view


def shape_of(rng: random.Random) -> Shape:
    while True:
        shape = tuple(rng.choice([1, 2, 3, 4, 5, 6, 8, 12]) for _ in range(rng.randint(1, 4)))
        if prod(shape) <= 400:
            return shape


def grown(view: View, axis: int, by: int) -> View:
    shape = (*view.shape[:axis], view.shape[axis] + by, *view.shape[axis + 1 :])
    return replace(view, shape=shape)


# -------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("seed", range(4))
def test_partitions_are_exact_and_spoilt_ones_are_not(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    seen = dict.fromkeys((HOLE, OVERLAP, OUTSIDE, REPEAT, None), 0)
    for _ in range(1000):
        made = Partition(rng, shape_of(rng))
        assert assert_agrees(made.views, made.total) is None
        held = [v for v in made.views if v.numel]
        victim = rng.choice(held)
        others = list(made.views)
        others.remove(victim)
        axis = rng.randrange(len(victim.shape)) if victim.shape else None
        match rng.randrange(6):
            case 0:
                found, kind = others, HOLE
            case 1:
                found, kind = [*made.views, victim], OVERLAP
            case 2:
                found, kind = [*others, replace(victim, offset=victim.offset + made.total)], OUTSIDE
            case 3:
                found, kind = [*others, replace(victim, offset=victim.offset - made.total)], OUTSIDE
            case 4:
                stuck = View(victim.offset, (*victim.shape, 2), (*victim.strides, 0))
                found, kind = [*others, stuck], REPEAT
            case _ if axis is not None and victim.shape[axis] > 1:  # several kinds may be true, or none
                found, kind = [*others, grown(victim, axis, rng.choice([-1, 1]))], ""
            case _:
                found, kind = [*others, replace(victim, offset=victim.offset + rng.choice([-1, 1]))], ""
        rng.shuffle(found)
        fault = assert_agrees(found, made.total)
        if kind:
            assert fault is not None
            assert fault.kind == kind
        seen[fault.kind if fault else None] += 1
    assert min(seen[kind] for kind in (HOLE, OVERLAP, OUTSIDE, REPEAT)) > 100, seen


any_view = st.integers(0, 3).flatmap(
    lambda ndim: st.builds(
        View,
        st.integers(-2, 12),
        st.tuples(*[st.integers(0, 4)] * ndim),
        st.tuples(*[st.sampled_from([0, 1, 1, 2, 3, 4, 6, 12])] * ndim),
    )
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.lists(any_view, max_size=4), st.integers(0, 30))
def test_any_views_are_judged_as_counters_judge_them(views: list[View], total: int) -> None:
    assert_agrees(views, total)


def test_small_sets_of_small_views_exhaustively() -> None:
    small = [
        View(offset, (n, m), (stride, 1)) for offset in range(5) for n in (1, 2) for m in (1, 2, 3) for stride in (2, 3)
    ]
    exact = sum(assert_agrees([a, b], 6) is None for i, a in enumerate(small) for b in small[i:])
    assert exact > 5


def test_nothing_covers_nothing() -> None:
    assert exact_cover([], 0) is None
    assert exact_cover([View(9, (0,), (1,))], 0) is None
    assert exact_cover([View(0, (), ())], 1) is None
    assert exact_cover([], 1) == Fault(HOLE, 0)
    assert str(Fault(HOLE, 12_345)) == "a hole at element 12,345"


@pytest.mark.parametrize(
    ("views", "total", "fault"),
    [
        ([contiguous((3,)), contiguous((3,), 4)], 7, Fault(HOLE, 3)),
        ([contiguous((4,)), contiguous((4,), 3)], 7, Fault(OVERLAP, 3)),
        ([contiguous((6,), 1)], 7, Fault(HOLE, 0)),
        ([contiguous((6,))], 7, Fault(HOLE, 6)),
        ([contiguous((8,))], 7, Fault(OUTSIDE, 7)),
        ([contiguous((7,), -1)], 7, Fault(OUTSIDE, 0)),
        ([View(0, (7, 2), (1, 0))], 7, Fault(REPEAT, 0)),
        # columns 0 and 2 of a (2, 4) tensor, and 1 twice: as many elements as places, in the same range
        ([View(0, (2, 2), (4, 2)), View(1, (2,), (4,)), View(1, (2,), (4,))], 8, Fault(OVERLAP, 1)),
    ],
)
def test_the_place_of_a_fault(views: list[View], total: int, fault: Fault) -> None:
    assert exact_cover(views, total) == fault


def test_negative_strides_are_refused() -> None:
    with pytest.raises(ValueError, match="negative stride"):
        exact_cover([View(3, (4,), (-1,))], 4)


# -------------------------------------------------------------------------------------------------------- speed


def grid(rows: int, columns: int, height: int, width: int) -> list[View]:
    """A tensor in a grid of equal tiles."""
    full = contiguous((rows * height, columns * width))
    return [
        full.slice(0, r * height, (r + 1) * height).slice(1, c * width, (c + 1) * width)
        for r in range(rows)
        for c in range(columns)
    ]


@pytest.mark.parametrize(
    ("rows", "columns"), [(200, 100), (20_000, 1), (1, 20_000)], ids=["tiles", "row blocks", "column blocks"]
)
def test_twenty_thousand_views_take_seconds_at_most(rows: int, columns: int) -> None:
    height, width = 16, 32
    views = grid(rows, columns, height, width)
    random.Random(0).shuffle(views)  # noqa: S311
    start = time.process_time()
    assert exact_cover(views, rows * columns * height * width) is None
    assert time.process_time() - start < 5


def test_a_fault_in_a_large_tensor_is_found_quickly() -> None:
    views = grid(20, 20, 200, 200)
    lost = views.pop(210)
    start = time.process_time()
    assert exact_cover(views, 16_000_000) == Fault(HOLE, lost.offset)
    assert time.process_time() - start < 5
