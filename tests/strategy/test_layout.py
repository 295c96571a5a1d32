"""Layout algebra against a slicer of a few NumPy lines, against MindSpore's own helpers, and its invariants."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from strategy.layout import Layout, LayoutError, Stage, Strategy
from strategy.mindspore_file import read_strategy
from transform_ckpt.views import Box

MULTIPLES = st.tuples(*[st.integers(1, 3)] * 3)
ShapeOf = Callable[[Layout, tuple[int, ...]], tuple[int, ...]]
check = settings(deadline=None, max_examples=150)


def iota(shape: tuple[int, ...]) -> Any:
    return np.arange(int(np.prod(shape))).reshape(shape)


def cut(tensor: Any, box: Box) -> Any:
    return tensor[tuple(slice(a, b) for a, b in zip(box.start, box.stop(), strict=True))]


def slices_by_hand(layout: Layout, tensor: Any) -> list[Any]:
    """What each device holds, by cutting the tensor one mesh axis after the other; replicas are found by comparing."""
    mesh = np.arange(layout.devices).reshape(layout.dev_matrix)
    parts = []
    for rank in range(layout.devices):
        coordinate = np.argwhere(mesh == rank)[0]
        part = tensor
        for dim, axes in enumerate(layout.tensor_map):
            for axis in axes:
                part = np.split(part, mesh.shape[-1 - axis], axis=dim)[coordinate[-1 - axis]]
        parts.append(part)
    if layout.opt_step == 0 or layout.opt_size == 0:
        return parts
    sharded: list[Any] = []
    for part in parts:
        group = [other for other, held in enumerate(parts) if np.array_equal(held, part)]
        size = len(group) if layout.opt_size == -1 else layout.opt_size
        sharded.append(np.split(part, size)[group.index(len(sharded)) % size])
    return sharded


@check
@given(layout=st.from_type(Layout), multiples=MULTIPLES)
def test_boxes_are_what_cutting_by_hand_gives(layout: Layout, multiples: tuple[int, ...], shape_of: ShapeOf) -> None:
    tensor = iota(shape_of(layout, multiples))
    boxes = layout.boxes(tensor.shape)
    assert len(boxes) == layout.devices
    for box, expected in zip(boxes, slices_by_hand(layout, tensor), strict=True):
        np.testing.assert_array_equal(cut(tensor, box), expected, strict=True)


@check
@given(layout=st.from_type(Layout), multiples=MULTIPLES)
def test_every_element_is_held_equally_often(layout: Layout, multiples: tuple[int, ...], shape_of: ShapeOf) -> None:
    shape = shape_of(layout, multiples)
    boxes = Counter(layout.boxes(shape))
    held = np.zeros(shape, int)
    for box in boxes:
        cut(held, box)[...] += 1
    assert (held == 1).all()
    assert set(boxes.values()) == {layout.replicas // layout.opt_parts if shape else layout.devices}


@check
@given(layout=st.from_type(Layout), multiples=MULTIPLES)
def test_local_and_full_shape_are_inverse(layout: Layout, multiples: tuple[int, ...], shape_of: ShapeOf) -> None:
    full = shape_of(layout, multiples)
    local = layout.local_shape(full)
    assert layout.full_shape(local) == full
    assert all(box.size == local for box in layout.boxes(full))


@settings(check, suppress_health_check=[HealthCheck.filter_too_much])
@given(layout=st.from_type(Layout), multiples=MULTIPLES)
def test_step_formula_holds_where_replicas_are_evenly_spaced(
    layout: Layout, multiples: tuple[int, ...], shape_of: ShapeOf
) -> None:
    """Part (local // step) % size, as MindSpore's documents give it; elsewhere the step cannot tell the part."""
    assume(layout.opt_parts > 1)
    plain = Layout(layout.dev_matrix, layout.tensor_map)
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.devices):
        groups.setdefault(plain.index(rank), []).append(rank)
    assume(all(np.all(np.diff(group) == layout.opt_step) for group in groups.values()))
    shape = shape_of(layout, multiples)
    for rank, box in enumerate(layout.boxes(shape)):
        outer = plain.box(rank, shape)
        part = (rank // layout.opt_step) % layout.opt_parts
        assert box.start[0] == outer.start[0] + part * outer.size[0] // layout.opt_parts


class FakeTensor:
    """What mindspore.parallel._tensor asks of a Tensor."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def asnumpy(self) -> Any:
        return self.array


def slices_by_mindspore(mindspore: Any, layout: Layout, tensor_map: list[Any], tensor: Any) -> list[Any]:
    """Each device's slice by MindSpore's helpers for transform_checkpoints; ValueError where it cannot."""
    _tensor = mindspore.parallel._tensor
    dev_matrix = list(layout.dev_matrix)
    item = [dev_matrix, tensor_map, [], 0, layout.opt_step, layout.opt_size]
    dev_matrix, tensor_map, step, size = _tensor._extract_layout_item(item)
    dev, flat, shape = _tensor._construct_tensor_layout_for_opt_shard(
        dev_matrix, tensor_map, step, int(size), tensor.shape
    )
    fake = FakeTensor(tensor.reshape(shape))
    return [_tensor._load_tensor(fake, list(dev), list(flat), rank_id=r) for r in range(layout.devices)]


@check
@given(layout=st.from_type(Layout), multiples=MULTIPLES)
def test_boxes_are_what_mindspore_slices(
    layout: Layout, multiples: tuple[int, ...], shape_of: ShapeOf, mindspore: Any
) -> None:
    assume(layout.tensor_map)
    assume(layout.opt_parts > 1 or layout.opt_step * layout.opt_size == 0)
    tensor = iota(shape_of(layout, multiples))
    try:
        expected = slices_by_mindspore(mindspore, layout, [list(dim) or [-1] for dim in layout.tensor_map], tensor)
    except ValueError as error:  # an optimizer shard that takes only a part of two mesh axes: MindSpore cannot
        assume("cannot be divided" not in str(error))
        raise
    for box, part in zip(layout.boxes(tensor.shape), expected, strict=True):
        np.testing.assert_array_equal(cut(tensor, box), part.reshape(box.size))


def test_compiler_written_layouts_are_what_mindspore_slices(golden: Path, mindspore: Any) -> None:
    seen = set()
    for case in sorted((golden / "strategies").iterdir()):
        shapes = json.loads((case / "params.json").read_text())
        for stage in read_strategy(str(case / "strategy")).stages:
            seen |= {(layout, tuple(shapes[name]["shape"])) for name, layout in stage.layouts.items()}
    assert len(seen) > 50
    for layout, shape in seen:
        tensor = iota(shape)
        flat = [dim[0] if dim else -1 for dim in layout.tensor_map]
        for box, part in zip(layout.boxes(shape), slices_by_mindspore(mindspore, layout, flat, tensor), strict=True):
            np.testing.assert_array_equal(cut(tensor, box), part.reshape(box.size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 0), ()), "no devices"),
        (((2, -4), ((0,),)), "no devices"),
        (((2, 2), ((2,),)), "no such axis"),
        (((2, 2), ((-1,),)), "no such axis"),
        (((2, 2), ((0,), (0,))), "twice"),
        (((2, 2), ((1, 1),)), "twice"),
        (((2, 2), ((0,),), -1, 2), "step -1"),
        (((2, 2), ((0,),), 1, -2), "size -2"),
        (((2, 2), (), 1, 2), "scalar"),
        (((2, 2), ((0,),), 2, 4), "4 parts over 2 replicas"),
        (((6,), ((),), 1, 4), "4 parts over 6 replicas"),
    ],
)
def test_impossible_layouts_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout(*arguments)


def test_what_does_not_fit_a_layout_is_refused() -> None:
    layout = Layout((2, 4), ((0,), ()), 4, -1)
    with pytest.raises(LayoutError, match=r"dimension 0 of shape .* into 8 parts"):
        layout.local_shape((12, 3))
    with pytest.raises(LayoutError, match="2 dimensions, the tensor 1"):
        layout.local_shape((16,))
    with pytest.raises(LayoutError, match="device 8 of a stage of 8"):
        layout.box(8, (16, 3))


def test_ranks_of_stages_follow_each_other() -> None:
    first, last = Layout((4,), ((),)), Layout((2,), ((),))
    strategy = Strategy((Stage(4, {"a": first, "tied": first}), Stage(2, {"tied": last, "b": last})))
    assert strategy.world == 6
    assert (strategy.ranks(0), strategy.ranks(1)) == (range(4), range(4, 6))
    assert strategy.names == {"a": (0,), "tied": (0, 1), "b": (1,)}
    assert list(strategy.names) == ["a", "tied", "b"]
