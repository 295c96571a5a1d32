"""Source and Target become a Plan: pure data that says which bytes go where, proven complete.

The logical tensor is cut into connected components of source and target boxes; each is normalised to the fewest axes,
in bytes, and equal ones (the same parameter of every layer) share one `Component`, so that planning and the proof are
done once.  Imports neither numpy, torch nor mindspore; reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod

from transform_ckpt import dtypes
from transform_ckpt.check import exact_cover
from transform_ckpt.errors import PlanError, Problems, rank_ranges
from transform_ckpt.tensors import Extent, Logical, Piece, Source, Target, Tensor
from transform_ckpt.views import Box, Shape, View, row_major, whole

UNIT_NBYTES = 32 * 1024 * 1024
"""A unit of work: what one worker does at a time, what the journal records, what a digest covers.  Never an option:
manifests must not depend on the machine."""


@dataclass(frozen=True, slots=True)
class Side:
    """One stored tensor's part in a component: `box` of the component, and where it lies in the stored tensor.

    All in bytes: the innermost axis is bytes, `view` strides and offset are bytes of the stored tensor.  With a `cast`
    (source dtype, target dtype) the box is still in bytes of the source, the view in bytes of the target.
    """

    box: Box
    view: View
    cast: tuple[str, str] | None = None

    def stored_nbytes(self, nbytes: int) -> int:
        """Bytes of the stored tensor for some bytes of the component."""
        if self.cast is None:
            return nbytes
        return nbytes // dtypes.itemsize(self.cast[0]) * dtypes.itemsize(self.cast[1])


@dataclass(frozen=True, slots=True)
class Component:
    """A connected group of source and target boxes in its own coordinates (last axis: bytes)."""

    shape: Shape
    reads: tuple[Side, ...]
    writes: tuple[Side, ...]

    @property
    def nbytes(self) -> int:
        """Logical size in bytes."""
        return whole(self.shape).numel


@dataclass(frozen=True, slots=True)
class Place:
    """A target tensor: file number in the plan, name there, and its extents."""

    file: int
    name: str
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """One component of one parameter: `reads[i]` fills side i, each of `writes[j]` receives side j.

    `witnesses[j]` are stored tensors of the source that must equal what side j receives.
    """

    name: str
    component: Component
    reads: tuple[Tensor, ...]
    writes: tuple[tuple[Place, ...], ...]
    witnesses: tuple[tuple[Tensor, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """Rows `start <= r < stop` (axis 0 of the component) of one group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Everything that will be done, before anything is."""

    source: Source
    target: Target
    groups: tuple[Group, ...]
    units: tuple[tuple[Task, ...], ...]
    replicas_nbytes: int
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def read_nbytes(self) -> int:
        """Bytes read from the source: every source byte once, those that are compared beside them."""
        read = sum(side.view.numel for g in self.groups for side in g.component.reads)
        return read + sum(t.nbytes for g in self.groups for tensors in g.witnesses for t in tensors)

    @cached_property
    def write_nbytes(self) -> int:
        """Size of the destination's files."""
        return sum(f.skeleton.nbytes for f in self.target.files) + sum(len(s.data) for s in self.target.small)

    def active(self, task: Task) -> Iterator[int]:
        """Indices of the group's writes that a task touches, in order."""
        for index, side in enumerate(self.groups[task.group].component.writes):
            low = side.box.start[0]
            if low < task.stop and low + side.box.size[0] > task.start:
                yield index


def build(source: Source, target: Target) -> Plan:
    """The plan; PlanError when an element of a target would be written never or twice, or a cast is none."""
    logical = {**source.states, **source.params}
    wanted = _wanted(target)
    patterns: dict[tuple[Shape, str, int, tuple[Box, ...], tuple[_Wish, ...]], tuple[_Part, ...]] = {}
    problems = Problems()
    incomplete: dict[str, list[tuple[str, str]]] = {}
    groups: list[Group] = []
    replicas = 0
    for name, receivers in wanted.items():
        parameter = logical[name]
        holders: dict[Box, Piece] = {}
        for piece in parameter.pieces:
            if piece.box in holders:
                replicas += piece.tensor.nbytes
            holders.setdefault(piece.box, piece)
        sources, wishes = tuple(holders), tuple(receivers)
        impossible = {dtype for _, dtype in wishes if not dtypes.castable(parameter.dtype, dtype)}
        if impossible:
            problems.add(f"{name!r} is {parameter.dtype} and cannot become {', '.join(sorted(impossible))}")
            continue
        key = (parameter.shape, parameter.dtype, _element_nbytes(parameter), sources, wishes)
        if key not in patterns:
            patterns[key] = _pattern(*key)
        fault = next((part.fault for part in patterns[key] if part.fault), None)
        if fault:
            ranks = rank_ranges({piece.rank for piece in parameter.pieces})
            incomplete.setdefault(ranks, []).append((name, fault))
            continue
        for part in patterns[key]:
            found = [receivers[wishes[i]] for i in part.writes]
            groups.append(
                Group(
                    name,
                    part.component,
                    tuple(holders[sources[i]].tensor for i in part.reads),
                    tuple(tuple(r.places) for r in found),
                    tuple(tuple(r.witnesses) for r in found) if any(r.witnesses for r in found) else (),
                )
            )
    for ranks, faults in incomplete.items():
        problems.add(_describe_incomplete(ranks, faults))
    if problems.messages:
        problems.messages[:0] = source.notes  # they name the directories that are absent or empty
    problems.raise_if_any(PlanError)
    groups.sort(key=lambda g: min((p.file for w in g.writes for p in w), default=0))
    return Plan(source, target, tuple(groups), tuple(_units(groups)), replicas, (*source.notes, *target.notes))


def _element_nbytes(parameter: Logical) -> int:
    """A string is one element as long as it is."""
    if parameter.dtype == dtypes.STRING:
        return parameter.pieces[0].tensor.nbytes
    return dtypes.itemsize(parameter.dtype)


_Wish = tuple[Box, str]
"""A box of a logical tensor in some dtype."""


@dataclass(slots=True)
class _Receivers:
    """Who wants one box: places that receive it (replicas receive the same bytes), and who is compared with it."""

    places: list[Place] = field(default_factory=list)
    witnesses: list[Tensor] = field(default_factory=list)


def _wanted(target: Target) -> dict[str, dict[_Wish, _Receivers]]:
    """Logical name -> what is wanted of it."""
    found: dict[str, dict[_Wish, _Receivers]] = {}
    for number, file in enumerate(target.files):
        for spec in file.specs:
            name = file.logical.get(spec.name, spec.name)
            place = Place(number, spec.name, file.skeleton.places[spec.name])
            wish = (file.boxes[spec.name], spec.dtype)
            found.setdefault(name, {}).setdefault(wish, _Receivers()).places.append(place)
    for witness in target.witnesses:
        wishes = found.get(witness.name)
        if wishes is not None:
            wishes.setdefault((witness.box, witness.tensor.dtype), _Receivers()).witnesses.append(witness.tensor)
    return found


def _describe_incomplete(ranks: str, found: Sequence[tuple[str, str]]) -> str:
    name, fault = found[0]
    several = "is not whole" if len(found) == 1 else f"and {len(found) - 1} more tensors are not whole"
    return (
        f"{name!r} {several}: {fault}; the files of ranks {ranks} hold only a part, nobody holds the rest: "
        "find the missing or truncated rank files, or the strategy that the checkpoint was saved with"
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """A component with the indices of the source and target boxes that its sides stand for."""

    component: Component
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    fault: str | None = None


def _pattern(
    shape: Shape, dtype: str, width: int, sources: Sequence[Box], wishes: Sequence[_Wish]
) -> tuple[_Part, ...]:
    """Cut a logical tensor into connected components and prove each one complete, as wanted and as it will be moved.

    `shape` in elements of `width` bytes, `sources` as distinct boxes of it.
    """
    if whole(shape).numel == 0:
        return ()
    targets = [box for box, _ in wishes]
    casts = [None if wish == dtype else (dtype, wish) for _, wish in wishes]
    pieces = _first_holder(sources)
    parts: list[_Part] = []
    for reads, writes in _components(pieces, targets):
        used = [targets[i] for i in writes]
        boxes = [_wanted_part(pieces[i][1], used) for i in reads]
        component = _normalise(
            [(box, sources[pieces[i][0]], None) for box, i in zip(boxes, reads, strict=True)],
            [(targets[i], targets[i], casts[i]) for i in writes],
            width,
        )
        fault = _prove(boxes, used) or _prove_component(component)
        parts.append(_Part(component, tuple(pieces[i][0] for i in reads), tuple(writes), fault))
    return tuple(parts)


def _wanted_part(box: Box, targets: Sequence[Box]) -> Box:
    """The smallest box with all that any target wants of this one: what nobody wants is not read."""
    common = [part for target in targets if (part := box.intersect(target))]
    start = tuple(map(min, zip(*(part.start for part in common), strict=True)))
    stop = tuple(map(max, zip(*(part.stop() for part in common), strict=True)))
    return Box(start, tuple(high - low for low, high in zip(start, stop, strict=True)))


def _first_holder(sources: Sequence[Box]) -> list[tuple[int, Box]]:
    """(source, sub-box) so that every element comes from the first source box that holds it."""
    taken: list[tuple[int, Box]] = []
    for index, box in enumerate(sources):
        rest = [box] if box.numel else []
        for _, other in taken:
            rest = [piece for part in rest for piece in _difference(part, other)]
            if not rest:
                break
        taken.extend((index, part) for part in rest)
    return taken


def _difference(box: Box, other: Box) -> list[Box]:
    """`box` without `other`, as disjoint boxes."""
    common = box.intersect(other)
    if common is None:
        return [box]
    rest: list[Box] = []
    start, stop = list(box.start), list(box.stop())
    for axis, (low, high) in enumerate(zip(common.start, common.stop(), strict=True)):
        for a, b in ((start[axis], low), (high, stop[axis])):
            if a < b:
                corner = (*start[:axis], a, *start[axis + 1 :])
                size = [e - s for s, e in zip(start, stop, strict=True)]
                size[axis] = b - a
                rest.append(Box(tuple(corner), tuple(size)))
        start[axis], stop[axis] = low, high
    return rest


def _components(pieces: Sequence[tuple[int, Box]], targets: Sequence[Box]) -> list[tuple[list[int], list[int]]]:
    """Connected groups of (indices of pieces, indices of targets); pieces that no target wants are left out."""
    parent = list(range(len(pieces) + len(targets)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for i, (_, piece) in enumerate(pieces):
        for j, box in enumerate(targets):
            if piece.intersect(box) is not None:
                parent[root(i)] = root(len(pieces) + j)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for j in range(len(targets)):
        found.setdefault(root(len(pieces) + j), ([], []))[1].append(j)
    for i in range(len(pieces)):
        if root(i) in found:
            found[root(i)][0].append(i)
    return list(found.values())


def _prove(reads: Sequence[Box], writes: Sequence[Box]) -> str | None:
    """Every element of every target box comes from exactly one read; else what is wrong."""
    for box in writes:
        parts = [common for read in reads if (common := read.intersect(box))]
        fault = exact_cover([part.view_in(box) for part in parts], box.numel)
        if fault:
            return f"{fault} of the part {_describe(box)}"
    return None


def _prove_component(component: Component) -> str | None:
    """The same of what is executed: the component's own boxes and the bytes that each target's view addresses."""
    for side in component.writes:
        fault = exact_cover([side.view], side.view.numel)
        if fault:
            return f"{fault} of a target's bytes"
    return _prove([side.box for side in component.reads], [side.box for side in component.writes])


def _describe(box: Box) -> str:
    return "[" + ", ".join(f"{s}:{e}" for s, e in zip(box.start, box.stop(), strict=True)) + "]"


_Held = tuple[Box, Box, tuple[str, str] | None]
"""Box, holder, cast."""


def _normalise(reads: Sequence[_Held], writes: Sequence[_Held], width: int) -> Component:
    """A Component of boxes in their holders: origin moved, axes that nobody cuts merged, elements as bytes."""
    both = [(box, holder) for box, holder, _ in (*reads, *writes)]
    ndim = len(both[0][0].start)
    low = [min(b.start[d] for b, _ in both) for d in range(ndim)]
    high = [max(b.start[d] + b.size[d] for b, _ in both) for d in range(ndim)]
    # axis d joins axis d - 1 when nothing cuts it, neither a box nor the tensor that holds it
    uncut = [
        all(b.start[d] == low[d] == h.start[d] and b.size[d] == h.size[d] == high[d] - low[d] for b, h in both)
        for d in range(ndim)
    ]
    axes: list[list[int]] = [[0]] if ndim else []
    for d in range(1, ndim):
        if uncut[d]:
            axes[-1].append(d)
        else:
            axes.append([d])

    def extent(members: Sequence[int]) -> int:
        return prod(high[d] - low[d] for d in members)

    # units are rows of axis 0: an axis of one row would make a unit of any size
    axes = [members for members in axes if extent(members) > 1 or members is axes[-1]]
    shape = [extent(members) for members in axes] or [1]
    shape[-1] *= width

    def side(box: Box, holder: Box, cast: tuple[str, str] | None) -> Side:
        view = box.view_in(holder)
        stored = dtypes.itemsize(cast[1]) if cast else width
        start: list[int] = []
        size: list[int] = []
        strides: list[int] = []
        for members in axes:
            rest = extent(members[1:])
            start.append((box.start[members[0]] - low[members[0]]) * rest)
            size.append(box.size[members[0]] * rest)
            strides.append(view.strides[members[-1]] * stored)
        if not axes:
            return Side(Box((0,), (width,)), View(0, (stored,), (1,)), cast)
        inner = (*size[:-1], size[-1] * stored)
        start[-1] *= width
        size[-1] *= width
        strides[-1] = 1
        return Side(Box(tuple(start), tuple(size)), View(view.offset * stored, inner, tuple(strides)), cast)

    return Component(tuple(shape), tuple(side(*r) for r in reads), tuple(side(*w) for w in writes))


def _units(groups: Sequence[Group]) -> Iterator[tuple[Task, ...]]:
    """Groups cut into rows of at most UNIT_NBYTES, small ones gathered."""
    batch: list[Task] = []
    filled = 0
    for number, group in enumerate(groups):
        shape = group.component.shape
        row_nbytes = row_major(shape)[0]
        step = max(1, UNIT_NBYTES // row_nbytes)
        for start, stop in pairwise([*range(0, shape[0], step), shape[0]]):
            nbytes = (stop - start) * row_nbytes
            if batch and filled + nbytes > UNIT_NBYTES:
                yield tuple(batch)
                batch, filled = [], 0
            batch.append(Task(number, start, stop))
            filled += nbytes
    if batch:
        yield tuple(batch)
