"""Plans of sources and targets that exist in memory only: complete, exact, the same every time."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import synthetic
from tests.synthetic import Held, assert_filled, carry_out, content, logical_of, source_of, stored, target_of
from transform_ckpt import dtypes, planner
from transform_ckpt.errors import PlanError
from transform_ckpt.planner import Plan, Task, build
from transform_ckpt.tensors import Logical, Piece, TensorSpec
from transform_ckpt.views import Box, Shape, row_major, whole

QUICK = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def rows(shape: Shape, count: int, first: int = 0) -> tuple[tuple[int, Box], ...]:
    """`count` equal row blocks on ranks `first` ..."""
    height = shape[0] // count
    return tuple((first + i, Box((i * height, *[0] * (len(shape) - 1)), (height, *shape[1:]))) for i in range(count))


def columns(shape: Shape, count: int) -> tuple[tuple[int, Box], ...]:
    width = shape[-1] // count
    return tuple((i, Box((*[0] * (len(shape) - 1), i * width), (*shape[:-1], width))) for i in range(count))


def replicated(shape: Shape, count: int) -> tuple[tuple[int, Box], ...]:
    return tuple((rank, whole(shape)) for rank in range(count))


# ------------------------------------------------------------------------------------------------- whole plans


@st.composite
def reshards(draw: st.DrawFn) -> tuple[dict[str, Held], dict[str, Held]]:
    """What source ranks hold and what target ranks want, of up to three parameters."""
    held, wanted = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        dtype, shape = draw(st.sampled_from(synthetic.CODES)), draw(synthetic.shapes)
        held[name] = Held(dtype, shape, draw(synthetic.layouts(shape, complete=True)))
        wanted[name] = Held(dtype, shape, draw(synthetic.layouts(shape, complete=False)))
    return held, wanted


@QUICK
@given(reshards(), st.sampled_from([1, 7, 64, 1 << 20]))
def test_every_target_byte_is_written_once_and_right(
    case: tuple[dict[str, Held], dict[str, Held]], unit_nbytes: int
) -> None:
    held, wanted = case
    arrays = {name: content(h, seed) for seed, (name, h) in enumerate(held.items())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "UNIT_NBYTES", unit_nbytes)
        plan = build(source_of(held), target_of(wanted))
        again = build(source_of(held), target_of(wanted))
    files = {key: data for name, h in held.items() for key, data in stored(name, h, arrays[name]).items()}
    assert_filled(plan, wanted, arrays, carry_out(plan, files))
    assert plan == again
    assert_units(plan, unit_nbytes)


def assert_units(plan: Plan, unit_nbytes: int) -> None:
    """Every row of every group is in one task; a unit is within the limit, or one row that is larger."""
    done: dict[int, list[Task]] = {}
    for unit in plan.units:
        assert unit
        size = sum((t.stop - t.start) * row_major(plan.groups[t.group].component.shape)[0] for t in unit)
        assert size <= unit_nbytes or (len(unit) == 1 and unit[0].stop - unit[0].start == 1)
        for task in unit:
            done.setdefault(task.group, []).append(task)
    assert sorted(done) == list(range(len(plan.groups)))
    for group, tasks in done.items():
        assert [t.start for t in tasks] == [0, *(t.stop for t in tasks[:-1])]
        assert tasks[-1].stop == plan.groups[group].component.shape[0]


def test_stages_that_overlap_in_part() -> None:
    """A tied embedding: stage 0 holds row blocks, stage 1 column blocks with a hole that only stage 0 fills."""
    shape = (8, 6)
    held = Held("F32", shape, (*rows(shape, 2), (2, Box((0, 0), (8, 2))), (3, Box((0, 4), (8, 2)))))
    without = Held("F32", shape, held.boxes[1:])
    array = content(held)
    wanted = {"embed": Held("F32", shape, columns(shape, 3))}
    plan = build(source_of({"embed": held}), target_of(wanted))
    assert_filled(plan, wanted, {"embed": array}, carry_out(plan, stored("embed", held, array)))
    assert plan.read_nbytes == array.nbytes  # nothing is read twice
    with pytest.raises(
        PlanError, match=r"'embed' is not whole: a hole at element 0 of the part \[0:8, 2:4\].*ranks 1-3"
    ):
        build(source_of({"embed": without}), target_of(wanted))


# ---------------------------------------------------------------------------------------------------- problems


def test_missing_pieces_are_named_with_their_ranks_all_at_once() -> None:
    shape = (8, 4)
    lost = {
        "whole": Held("F32", shape, replicated(shape, 3)),
        "block": Held("F32", shape, (*rows(shape, 4)[:2], rows(shape, 4)[3])),
        "corner": Held("F32", shape, ((0, Box((0, 0), (8, 3))), (7, Box((0, 3), (7, 1))))),
    }
    target = target_of({name: Held("F32", shape, replicated(shape, 2)) for name in lost})
    with pytest.raises(PlanError) as caught:
        build(source_of(lost), target)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "'block' is not whole: a hole at element 16 of the part [0:8, 0:4]; the files of ranks 0-1, 3"
    )
    assert lines[1].startswith(
        "'corner' is not whole: a hole at element 31 of the part [0:8, 0:4]; the files of ranks 0, 7 "
    )
    assert all("find the missing or truncated rank files" in line for line in lines)
    assert caught.value.exit_code == 4


def test_a_piece_that_nobody_wants_may_be_missing() -> None:
    shape = (8, 4)
    held = Held("F32", shape, rows(shape, 4)[:2])
    wanted = {"w": Held("F32", shape, (rows(shape, 2)[0],))}
    array = content(held)
    plan = build(source_of({"w": held}), target_of(wanted))
    assert_filled(plan, wanted, {"w": array}, carry_out(plan, stored("w", held, array)))


@QUICK
@given(st.data())
def test_a_lost_piece_is_an_error_exactly_when_a_target_needs_it(data: st.DataObject) -> None:
    shape = data.draw(synthetic.shapes)
    pieces = data.draw(synthetic.partitions(shape))
    lost = data.draw(st.sampled_from(pieces))
    targets = data.draw(synthetic.layouts(shape, complete=False))
    held = Held("F32", shape, tuple((i, box) for i, box in enumerate(pieces) if box != lost))
    wanted = {"w": Held("F32", shape, targets)}
    if any(lost.intersect(box) for _, box in targets):
        with pytest.raises(PlanError, match="'w'"):
            build(source_of({"w": held}), target_of(wanted))
    else:
        plan = build(source_of({"w": held}), target_of(wanted))
        array = content(held)
        assert_filled(plan, wanted, {"w": array}, carry_out(plan, stored("w", held, array)))


# -------------------------------------------------------------------------------------------- special contents


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (2, 0, 3)])
def test_empty_tensors_need_no_work(shape: Shape) -> None:
    held = {"e": Held("F32", shape, replicated(shape, 2))}
    plan = build(source_of(held), target_of(held))
    assert plan.groups == plan.units == ()
    assert carry_out(plan, {}) == {(0, "e"): b"", (1, "e"): b""}


def test_an_empty_box_of_a_tensor_needs_no_work() -> None:
    shape = (4, 3)
    held = Held("F32", shape, (*rows(shape, 2), (2, Box((4, 0), (0, 3)))))
    wanted = {"w": Held("F32", shape, (*columns(shape, 3), (3, Box((0, 3), (4, 0))), (4, Box((2, 0), (0, 3)))))}
    array = content(held)
    plan = build(source_of({"w": held}), target_of(wanted))
    assert_filled(plan, wanted, {"w": array}, carry_out(plan, stored("w", held, array)))


@pytest.mark.parametrize("code", sorted(set(dtypes.BY_CODE) - {dtypes.STRING}))
def test_scalars_of_every_dtype(code: str) -> None:
    held = {"s": Held(code, (), replicated((), 3))}
    array = content(held["s"])
    plan = build(source_of(held), target_of(held))
    assert carry_out(plan, stored("s", held["s"], array)) == {(i, "s"): array.tobytes() for i in range(3)}
    assert [g.component.shape for g in plan.groups] == [(dtypes.itemsize(code),)]


def test_strings_and_states_are_carried_whole() -> None:
    text = "层 one".encode("utf-32-le")
    tensor = synthetic.tensor_of(0, "note", dtypes.STRING, (), len(text))
    empty = synthetic.tensor_of(0, "void", dtypes.STRING, (), 0)
    states = {
        "note": Logical("note", dtypes.STRING, (), (Piece(tensor, whole(()), 0),)),
        "void": Logical("void", dtypes.STRING, (), (Piece(empty, whole(()), 0),)),
        "step": logical_of("step", Held("I32", (1,), replicated((1,), 2))),
    }
    more = {
        "note": TensorSpec("note", dtypes.STRING, (), len(text)),
        "void": TensorSpec("void", dtypes.STRING, (), 0),
        "step": TensorSpec("step", "I32", (1,)),
    }
    plan = build(source_of({}, states), target_of({}, more))
    held = {("rank_0", "note"): text, ("rank_0", "void"): b"", ("rank_0", "step"): b"\1\2\3\4"}
    assert carry_out(plan, held) == {(0, "note"): text, (0, "void"): b"", (0, "step"): b"\1\2\3\4"}


# -------------------------------------------------------------------------------------------------- components


def groups(plan: Plan) -> list[tuple[int, int]]:
    return [(len(g.reads), len(g.writes)) for g in plan.groups]


def test_a_group_is_what_is_connected() -> None:
    shape = (8, 4)
    four, two, across = (Held("F32", shape, boxes) for boxes in (rows(shape, 4), rows(shape, 2), columns(shape, 2)))
    assert groups(build(source_of({"w": four}), target_of({"w": four}))) == [(1, 1)] * 4
    assert groups(build(source_of({"w": four}), target_of({"w": two}))) == [(2, 1)] * 2
    assert groups(build(source_of({"w": two}), target_of({"w": four}))) == [(1, 2)] * 2
    assert groups(build(source_of({"w": four}), target_of({"w": across}))) == [(4, 2)]


def test_equal_layouts_share_their_components() -> None:
    shape = (64, 32)
    held = {f"layers.{i}.w": Held("BF16", shape, rows(shape, 4)) for i in range(50)}
    wanted = {name: Held("BF16", shape, columns(shape, 2)) for name in held}
    plan = build(source_of(held), target_of(wanted))
    assert len(plan.groups) == 50
    assert len({id(group.component) for group in plan.groups}) == 1


def test_axes_that_nobody_cuts_are_merged() -> None:
    shape = (4, 6, 5, 2)
    wanted = {"w": Held("F32", shape, replicated(shape, 1))}
    middle = tuple((i, Box((0, 3 * i, 0, 0), (4, 3, 5, 2))) for i in range(2))
    for boxes, merged in ((rows(shape, 4), (960,)), (middle, (4, 240)), (columns(shape, 2), (120, 8))):
        (group,) = build(source_of({"w": Held("F32", shape, boxes)}), target_of(wanted)).groups
        assert group.component.shape == merged
        assert group.component.nbytes == prod(shape) * 4


def test_what_a_plan_counts() -> None:
    shape = (8, 4)
    held = {"w": Held("F32", shape, (*rows(shape, 2), *rows(shape, 2, 2), *rows(shape, 2, 4)))}
    wanted = {"w": Held("F32", shape, replicated(shape, 5))}
    plan = build(source_of(held), target_of(wanted))
    assert plan.replicas_nbytes == 2 * 8 * 4 * 4
    assert plan.read_nbytes == 8 * 4 * 4
    assert plan.write_nbytes == sum(file.skeleton.nbytes for file in plan.target.files)
    assert [len(places) for group in plan.groups for places in group.writes] == [5]


def test_units_of_the_real_size() -> None:
    """A tensor over UNIT_NBYTES is several units, small ones share one; a row larger than that is a unit of its own."""
    limit = planner.UNIT_NBYTES
    held = {
        "large": Held("F32", (100, limit // 40), replicated((100, limit // 40), 1)),
        **{f"small{i}": Held("F32", (1024,), replicated((1024,), 1)) for i in range(100)},
        "wide": Held("U8", (2, 2 * limit), columns((2, 2 * limit), 2)),
    }
    wanted = {name: Held(h.dtype, h.shape, replicated(h.shape, 1)) for name, h in held.items()}
    plan = build(source_of(held), target_of(wanted))
    assert_units(plan, limit)
    names = [[plan.groups[task.group].name for task in unit] for unit in plan.units]
    assert len([unit for unit in names if "large" in unit]) == -(-100 * (limit // 40) * 4 // limit)
    assert [unit for unit in names if "wide" in unit] == [["wide"], ["wide"]]
    assert len(plan.units) < 16


def test_read_and_write_offsets_of_a_known_case() -> None:
    """A (4, 6) tensor of two-byte elements from column blocks to row blocks, by hand."""
    shape = (4, 6)
    held, wanted = Held("F16", shape, columns(shape, 2)), Held("F16", shape, rows(shape, 2))
    (group,) = build(source_of({"w": held}), target_of({"w": wanted})).groups
    assert group.component.shape == (4, 12)
    assert [(s.box, s.view.offset, s.view.strides) for s in group.component.reads] == [
        (Box((0, 0), (4, 6)), 0, (6, 1)),
        (Box((0, 6), (4, 6)), 0, (6, 1)),
    ]
    assert [(s.box, s.view.offset, s.view.strides) for s in group.component.writes] == [
        (Box((0, 0), (2, 12)), 0, (12, 1)),
        (Box((2, 0), (2, 12)), 0, (12, 1)),
    ]
    assert [tensor.path for tensor in group.reads] == ["rank_0", "rank_1"]
    assert [[place.file for place in places] for places in group.writes] == [[0], [1]]
    array = np.arange(48, dtype=np.uint8).reshape(4, 6, 2)
    plan = build(source_of({"w": held}), target_of({"w": wanted}))
    assert carry_out(plan, stored("w", held, array))[1, "w"] == bytes(range(24, 48))


def test_a_leading_axis_of_one_row_does_not_make_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "UNIT_NBYTES", 64)
    shape = (1, 64, 8)
    halves = ((0, Box((0, 0, 0), (1, 64, 4))), (1, Box((0, 0, 4), (1, 64, 4))))
    held = Held("F32", shape, halves)
    wanted = {"w": Held("F32", shape, replicated(shape, 1))}
    array = content(held)
    plan = build(source_of({"w": held}), target_of(wanted))
    assert len(plan.units) == 64 * 8 * 4 // 64
    assert_filled(plan, wanted, {"w": array}, carry_out(plan, stored("w", held, array)))
