"""The algebra of views equals NumPy's: every operation is compared by the elements that it names, in order."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from transform_ckpt.views import Box, Shape, View, contiguous, join, row_major, whole

QUICK = settings(max_examples=150, derandomize=True, deadline=None, database=None)
Array = np.ndarray[Any, np.dtype[Any]]

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
shapes_1d = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)


def elements(view: View) -> Array:
    """The address of every element of a view, as NumPy's strided arrays have it: an array of the view's shape."""
    size = 1 + view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True) if n)
    buffer = np.arange(max(size, 1), dtype=np.int64)
    if not view.numel:
        return np.empty(view.shape, np.int64)
    found: Array = as_strided(buffer[view.offset :], view.shape, [s * 8 for s in view.strides])
    return found


def assert_elements(view: View, expected: Array) -> None:
    assert view.shape == expected.shape
    assert view.numel == expected.size
    np.testing.assert_array_equal(elements(view), expected)


@st.composite
def views(draw: st.DrawFn, min_ndim: int = 0, max_ndim: int = 4) -> View:
    """Any view without negative strides, repeats (stride 0) and empty ones included."""
    ndim = draw(st.integers(min_ndim, max_ndim))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(ndim))
    if draw(st.booleans()):
        strides = row_major(shape)
    else:
        strides = tuple(draw(st.integers(0, 12)) for _ in range(ndim))
    order = draw(st.permutations(range(ndim)))
    return View(draw(st.integers(0, 20)), tuple(shape[i] for i in order), tuple(strides[i] for i in order))


@QUICK
@given(shapes)
def test_contiguous_is_c_order(shape: Shape) -> None:
    array = np.zeros(shape, np.int8)
    if array.size:
        assert row_major(shape) == array.strides or 1 in shape
        assert_elements(contiguous(shape, 3), np.arange(array.size).reshape(shape) + 3)
    assert contiguous(shape).numel == array.size
    assert whole(shape).numel == array.size


@QUICK
@given(views(min_ndim=1), st.data())
def test_slice(view: View, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(view.shape) - 1))
    start = data.draw(st.integers(0, view.shape[axis]))
    stop = data.draw(st.integers(start, view.shape[axis]))
    assert_elements(view.slice(axis, start, stop), elements(view)[(slice(None),) * axis + (slice(start, stop),)])


@QUICK
@given(views(min_ndim=1), st.data())
def test_split_is_reshape_and_merge_undoes_it(view: View, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(view.shape) - 1))
    outer = data.draw(st.sampled_from([n for n in range(1, 7) if view.shape[axis] % n == 0]))
    parts = view.split(axis, outer)
    shape = (*view.shape[:axis], outer, view.shape[axis] // outer, *view.shape[axis + 1 :])
    assert_elements(parts, elements(view).reshape(shape))
    assert_elements(parts.merge(axis), elements(view))


@QUICK
@given(views(min_ndim=2), st.data())
def test_merge_is_reshape_or_refused(view: View, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(view.shape) - 2))
    a, b = view.shape[axis : axis + 2]
    if a > 1 and b > 1 and view.strides[axis] != b * view.strides[axis + 1]:
        with pytest.raises(ValueError, match="not contiguous"):
            view.merge(axis)
        return
    assert_elements(view.merge(axis), elements(view).reshape((*view.shape[:axis], a * b, *view.shape[axis + 2 :])))


@QUICK
@given(views(), st.data())
def test_permute(view: View, data: st.DataObject) -> None:
    order = tuple(data.draw(st.permutations(range(len(view.shape)))))
    assert_elements(view.permute(order), elements(view).transpose(order))


@QUICK
@given(views())
def test_normal_keeps_the_order_of_elements(view: View) -> None:
    normal = view.normal()
    assert normal.numel == view.numel
    np.testing.assert_array_equal(elements(normal).reshape(-1), elements(view).reshape(-1))
    assert 1 not in normal.shape
    assert normal.normal() == normal
    mergeable = zip(normal.strides, normal.shape[1:], normal.strides[1:], strict=False)
    assert not any(wide == n * s for wide, n, s in mergeable)


@QUICK
@given(shapes)
def test_normal_of_a_whole_tensor_is_one_axis(shape: Shape) -> None:
    assume(prod(shape) > 1)
    assert contiguous(shape).normal() == View(0, (prod(shape),), (1,))


@QUICK
@given(views(min_ndim=1), st.data())
def test_join_undoes_slice(view: View, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(view.shape) - 1))
    cut = data.draw(st.integers(0, view.shape[axis]))
    first, second = view.slice(axis, 0, cut), view.slice(axis, cut, view.shape[axis])
    assert join(first, second, axis) == view
    if cut and view.strides[axis]:
        with pytest.raises(ValueError, match="does not continue"):
            join(first, View(second.offset + 1, second.shape, second.strides), axis)


def test_join_refuses_what_does_not_fit() -> None:
    view = contiguous((4, 3))
    top, bottom = view.slice(0, 0, 2), view.slice(0, 2, 4)
    with pytest.raises(ValueError, match="does not continue"):
        join(bottom, top, 0)
    with pytest.raises(ValueError, match="does not continue"):
        join(top, View(6, (2, 3), (3, 2)), 0)
    with pytest.raises(ValueError, match="differ beside axis 0"):
        join(top, View(6, (2, 2), (3, 1)), 0)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5), (5, 5)])
def test_slice_refuses_what_is_outside(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"slice .* of axis 0 of length 4"):
        contiguous((4, 3)).slice(0, start, stop)


@pytest.mark.parametrize("outer", [0, -1, 3, 8])
def test_split_refuses_what_does_not_divide(outer: int) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        contiguous((4, 3)).split(0, outer)


@pytest.mark.parametrize("order", [(0,), (0, 0), (1, 2), (0, 1, 2)])
def test_permute_refuses_what_is_no_order(order: Shape) -> None:
    with pytest.raises(ValueError, match="not an order"):
        contiguous((4, 3)).permute(order)


def test_values_are_validated_at_birth() -> None:
    with pytest.raises(ValueError, match="strides"):
        View(0, (2, 3), (1,))
    with pytest.raises(ValueError, match="1 starts and 2 sizes"):
        Box((0,), (1, 2))
    with pytest.raises(ValueError, match="negative box"):
        Box((0, -1), (1, 2))
    with pytest.raises(ValueError, match="negative box"):
        Box((0, 1), (1, -2))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Box((0, 0), (1, 1)).intersect(Box((0,), (1,)))


# ------------------------------------------------------------------------------------------------------- boxes


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    """A box inside a tensor, empty ones included."""
    start = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(start, tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, start, strict=True)))


def window(box: Box) -> tuple[slice, ...]:
    return tuple(slice(s, e) for s, e in zip(box.start, box.stop(), strict=True))


@QUICK
@given(shapes_1d, st.data())
def test_intersect(shape: Shape, data: st.DataObject) -> None:
    first, second = data.draw(boxes(shape)), data.draw(boxes(shape))
    marks = np.zeros(shape, np.int8)
    marks[window(first)] += 1
    marks[window(second)] += 1
    common = first.intersect(second)
    assert common == second.intersect(first)
    if common is None:
        assert not (marks == 2).any()
        return
    assert common.numel == (marks == 2).sum() > 0
    assert (marks[window(common)] == 2).all()


def test_the_box_of_a_scalar_holds_one_element() -> None:
    scalar = whole(())
    assert scalar.numel == 1
    assert scalar.intersect(scalar) == scalar
    assert_elements(scalar.view_in(scalar), np.array(0))


@QUICK
@given(shapes_1d, st.data())
def test_view_in_a_holder(shape: Shape, data: st.DataObject) -> None:
    holder = data.draw(boxes(shape))
    inner = data.draw(boxes(holder.size))
    box = Box(tuple(a + b for a, b in zip(holder.start, inner.start, strict=True)), inner.size)
    numbers = np.arange(holder.numel).reshape(holder.size)  # the holder as it is stored
    everywhere = np.full(shape, -1)
    everywhere[window(holder)] = numbers
    if box.numel:
        assert_elements(box.view_in(holder), everywhere[window(box)])
    assert box.view_in(holder).numel == box.numel
