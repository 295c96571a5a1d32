"""Checkpoints that exist in memory only: drawn partitions, sources and targets for the planner, and its reference.

Stored tensors are C-ordered arrays in a dictionary by (file, name); no file is written or read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from transform_ckpt import dtypes
from transform_ckpt.formats import safetensors
from transform_ckpt.planner import Component, Group, Plan, Side, Task
from transform_ckpt.tensors import Extent, Logical, Piece, Source, Target, TargetFile, Tensor, TensorSpec
from transform_ckpt.views import Box, Shape, whole

Array = np.ndarray[Any, np.dtype[Any]]
Stored = dict[tuple[str, str], bytes]

CODES = ["U8", "BF16", "F32", "I64"]
"""One dtype for each element size."""


def window(box: Box) -> tuple[slice, ...]:
    """A box as a NumPy index."""
    return tuple(slice(s, e) for s, e in zip(box.start, box.stop(), strict=True))


@dataclass(frozen=True)
class Held:
    """A whole tensor and the boxes of it that ranks hold: what a source has, or a target wants."""

    dtype: str
    shape: Shape
    boxes: tuple[tuple[int, Box], ...]
    """(rank, box)"""


# ------------------------------------------------------------------------------------------------ drawn values


@st.composite
def partitions(draw: st.DrawFn, shape: Shape, max_cuts: int = 5) -> list[Box]:
    """The tensor in disjoint boxes: nested, uneven cuts, or a grid of equal parts."""
    parts = [whole(shape)]
    for _ in range(draw(st.integers(0, max_cuts))):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axes = [axis for axis, n in enumerate(box.size) if n > 1]
        if not axes:
            parts.append(box)
            continue
        axis = draw(st.sampled_from(axes))
        n = box.size[axis]
        count = draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0]))
        at = draw(st.integers(1, n - 1))
        edges = [0, at, n] if draw(st.booleans()) else range(0, n + 1, n // count)
        for low, high in pairwise(edges):
            start = (*box.start[:axis], box.start[axis] + low, *box.start[axis + 1 :])
            parts.append(Box(start, (*box.size[:axis], high - low, *box.size[axis + 1 :])))
    return parts


@st.composite
def boxes(draw: st.DrawFn, shape: Shape, *, empty: bool = False) -> Box:
    """One box inside a tensor."""
    least = 0 if empty else 1
    size = tuple(draw(st.integers(min(least, n), n)) for n in shape)
    return Box(tuple(draw(st.integers(0, n - m)) for n, m in zip(shape, size, strict=True)), size)


@st.composite
def layouts(draw: st.DrawFn, shape: Shape, *, complete: bool) -> tuple[tuple[int, Box], ...]:
    """(rank, box) with replicas and boxes that overlap in part; `complete` ones hold every element."""
    found = draw(partitions(shape)) if complete or draw(st.booleans()) else []
    found += draw(st.lists(boxes(shape), max_size=3, min_size=0 if found else 1))
    found += [found[i] for i in draw(st.lists(st.integers(0, len(found) - 1), max_size=3))]
    return tuple(enumerate(draw(st.permutations(found))))


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


# ---------------------------------------------------------------------------------------------- plans of those


def tensor_of(rank: int, name: str, dtype: str, shape: Shape, nbytes: int | None = None) -> Tensor:
    """A stored tensor of a file that does not exist."""
    spec = TensorSpec(name, dtype, shape, nbytes or 0)
    return Tensor(name, dtype, shape, f"rank_{rank}", (Extent(100, spec.nbytes),))


def logical_of(name: str, held: Held) -> Logical:
    """A parameter with one piece for each rank."""
    pieces = [Piece(tensor_of(rank, name, held.dtype, box.size), box, rank) for rank, box in held.boxes]
    return Logical(name, held.dtype, held.shape, tuple(pieces))


def source_of(held: Mapping[str, Held], states: Mapping[str, Logical] | None = None) -> Source:
    """A source of parameters, and states as they are given."""
    return Source("memory", "/", (), {name: logical_of(name, h) for name, h in held.items()}, dict(states or {}))


def target_of(wanted: Mapping[str, Held], more: Mapping[str, TensorSpec] | None = None) -> Target:
    """A target with one file for each rank; `more` are whole tensors of rank 0."""
    ranks = sorted({rank for held in wanted.values() for rank, _ in held.boxes} | {0})
    return Target("memory", tuple(_file(rank, wanted, more or {}) for rank in ranks))


def _file(rank: int, wanted: Mapping[str, Held], more: Mapping[str, TensorSpec]) -> TargetFile:
    boxes_here = {name: box for name, held in wanted.items() for number, box in held.boxes if number == rank}
    specs = [TensorSpec(name, wanted[name].dtype, box.size) for name, box in boxes_here.items()]
    if rank == 0:
        specs += more.values()
        boxes_here |= {name: whole(spec.shape) for name, spec in more.items()}
    places = {s.name: (Extent(200, s.nbytes),) for s in specs}
    skeleton = safetensors.skeleton([s for s in specs if s.dtype != dtypes.STRING], {})
    skeleton = type(skeleton)(skeleton.nbytes, skeleton.chunks, places)
    return TargetFile(f"rank_{rank}/x.safetensors", "safetensors", skeleton, tuple(specs), boxes_here)


def content(held: Held, seed: int = 0) -> Array:
    """The whole tensor's bytes, as an array of its shape and one more axis for the bytes of an element."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*held.shape, dtypes.itemsize(held.dtype)), dtype=np.uint8)


def stored(name: str, held: Held, array: Array) -> Stored:
    """What each rank's file holds."""
    return {(f"rank_{rank}", name): array[window(box)].tobytes() for rank, box in held.boxes}


# --------------------------------------------------------------------------------------------------- reference


def strided(buffer: Array, side: Side) -> Array:
    """The bytes of a stored tensor that a side of a component is, as an array over the same memory."""
    found: Array = as_strided(buffer[side.view.offset :], side.view.shape, side.view.strides)
    return found


def materialise(component: Component, sources: Sequence[bytes]) -> tuple[Array, Array]:
    """A whole component from its reads, and how often each byte was read."""
    array = np.zeros(component.shape, np.uint8)
    counts = np.zeros(component.shape, np.uint8)
    for side, data in zip(component.reads, sources, strict=True):
        array[window(side.box)] = strided(np.frombuffer(data, np.uint8), side)
        counts[window(side.box)] += 1
    return array, counts


class _Reference:
    """Target tensors, and how often each of their bytes was written."""

    def __init__(self, plan: Plan) -> None:
        sizes = {(i, s.name): s.nbytes for i, file in enumerate(plan.target.files) for s in file.specs}
        self.buffers = {key: np.zeros(nbytes, np.uint8) for key, nbytes in sizes.items()}
        self.marks = {key: np.zeros(nbytes, np.uint8) for key, nbytes in sizes.items()}

    def write(self, group: Group, index: int, task: Task, array: Array) -> bool:
        """One write side's rows of a task; False where it has none."""
        side = group.component.writes[index]
        first = side.box.start[0]
        low, high = max(task.start, first), min(task.stop, first + side.box.size[0])
        if low >= high:
            return False
        for place in group.writes[index]:
            key = (place.file, place.name)
            strided(self.buffers[key], side)[low - first : high - first] = array[
                (slice(low, high), *window(side.box)[1:])
            ]
            strided(self.marks[key], side)[low - first : high - first] += 1
        return True


def carry_out(plan: Plan, held: Stored) -> dict[tuple[int, str], bytes]:
    """Every target tensor's bytes by the plan's units; AssertionError where a byte is written never or twice."""
    reference = _Reference(plan)
    wholes = [materialise(g.component, [held[t.path, t.name] for t in g.reads]) for g in plan.groups]
    for group, (_, counts) in zip(plan.groups, wholes, strict=True):
        assert counts.size == 0 or counts.max() <= 1, f"a byte of {group.name} is read twice"
        for side in group.component.writes:
            assert (counts[window(side.box)] == 1).all(), f"bytes of {group.name} that nobody holds"
    for task in (task for unit in plan.units for task in unit):
        group, (array, _) = plan.groups[task.group], wholes[task.group]
        touched = [i for i in range(len(group.writes)) if reference.write(group, i, task, array)]
        assert list(plan.active(task)) == touched
    for key, mark in reference.marks.items():
        assert (mark == 1).all(), f"bytes of {key} written never or twice"
    return {key: buffer.tobytes() for key, buffer in reference.buffers.items()}


def assert_filled(
    plan: Plan, wanted: Mapping[str, Held], arrays: Mapping[str, Array], found: Mapping[Any, bytes]
) -> None:
    """Every target tensor of a plan has the bytes of its box."""
    for number, file in enumerate(plan.target.files):
        for spec in file.specs:
            if spec.name in wanted:
                assert found[number, spec.name] == arrays[spec.name][window(file.boxes[spec.name])].tobytes(), spec
