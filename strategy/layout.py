"""Which slice of a parameter each device of a pipeline stage holds: device matrix, tensor map, optimizer shard.

Pure integers; may import only transform_ckpt.views and transform_ckpt.errors.

Facts (MindSpore 2.9.0 frontend/parallel/tensor_layout/*, parallel/_tensor.py, seen in compiler-written files):
dev_matrix is row-major over the devices of ONE stage, last axis fastest; tensor_map counts axes from the RIGHT, -1 is
"not split"; several axes on one tensor dimension are listed most significant first; the optimizer shard cuts dimension
0 of the local slice once more in `size` parts among the devices that hold the same slice: part `position % size`, where
position counts those replicas in rank order (`_construct_tensor_layout_helper`: the rightmost repeated mesh axes).
Size -1 is "every replica its own"; step 0 or size 0 is none.  The step itself follows from the mesh and is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from transform_ckpt.views import Box, Shape


class LayoutError(ValueError):
    """A layout that cannot be, or does not fit a shape."""


@dataclass(frozen=True)
class Layout:
    """Layout of one parameter on one stage.

    `tensor_map[d]` is the tuple of axes (counted from the right) that split dimension d; () is not split.
    `opt_size` 0 = no optimizer shard; -1 is kept as written (see `opt_parts`).
    """

    dev_matrix: Shape
    tensor_map: tuple[Shape, ...]
    opt_step: int = 0
    opt_size: int = 0

    def __post_init__(self) -> None:
        axes = [axis for dim in self.tensor_map for axis in dim]
        if any(n <= 0 for n in self.dev_matrix):
            raise LayoutError(f"dev_matrix {list(self.dev_matrix)} has an axis of no devices")
        bad = [axis for axis in axes if not 0 <= axis < len(self.dev_matrix)]
        if bad:
            raise LayoutError(f"tensor_map names axis {bad[0]}; dev_matrix {list(self.dev_matrix)} has no such axis")
        if len(set(axes)) != len(axes):
            raise LayoutError(f"tensor_map {[list(d) for d in self.tensor_map]} uses a mesh axis twice")
        if self.opt_size < -1 or self.opt_step < 0:
            raise LayoutError(f"optimizer shard step {self.opt_step}, size {self.opt_size}")
        if self.opt_parts > 1:
            if not self.tensor_map:
                raise LayoutError("optimizer shard on a scalar")
            if self.replicas % self.opt_parts:
                raise LayoutError(f"optimizer shard in {self.opt_parts} parts over {self.replicas} replicas")

    @cached_property
    def devices(self) -> int:
        """Devices of the stage."""
        return prod(self.dev_matrix)

    @cached_property
    def splits(self) -> Shape:
        """How many parts the tensor map cuts each dimension into."""
        size = self.dev_matrix
        return tuple(prod(size[len(size) - 1 - axis] for axis in dim) for dim in self.tensor_map)

    @cached_property
    def replicas(self) -> int:
        """How many devices hold the same slice before the optimizer shard."""
        return self.devices // prod(self.splits)

    @cached_property
    def opt_parts(self) -> int:
        """How many parts the optimizer shard cuts dimension 0 of the local slice into (1 = none)."""
        if self.opt_step == 0 or self.opt_size == 0:
            return 1
        return self.replicas if self.opt_size == -1 else self.opt_size

    def cuts(self, ndim: int) -> Shape:
        """Parts per dimension of a tensor with `ndim` dimensions, optimizer shard included."""
        if not self.tensor_map:
            return (1,) * ndim
        if len(self.tensor_map) != ndim:
            raise LayoutError(f"tensor_map has {len(self.tensor_map)} dimensions, the tensor {ndim}")
        return (self.splits[0] * self.opt_parts, *self.splits[1:])

    def full_shape(self, local: Shape) -> Shape:
        """The whole tensor's shape from one device's slice."""
        return tuple(n * cut for n, cut in zip(local, self.cuts(len(local)), strict=True))

    def local_shape(self, full: Shape) -> Shape:
        """One device's slice of a whole tensor; LayoutError names the dimension that does not divide."""
        cuts = self.cuts(len(full))
        for dim, (n, cut) in enumerate(zip(full, cuts, strict=True)):
            if n % cut:
                raise LayoutError(f"dimension {dim} of shape {list(full)} does not divide into {cut} parts")
        return tuple(n // cut for n, cut in zip(full, cuts, strict=True))

    def index(self, local_rank: int) -> Shape:
        """Which part of each dimension device `local_rank` of the stage holds, in units of `local_shape`."""
        extent = self.dev_matrix[::-1]
        coordinate: list[int] = []
        for n in extent:
            local_rank, at = divmod(local_rank, n)
            coordinate.append(at)

        def row_major_index(axes: Shape) -> int:
            part = 0
            for axis in axes:
                part = part * extent[axis] + coordinate[axis]
            return part

        parts = [row_major_index(dim) for dim in self.tensor_map]
        if self.opt_parts > 1:
            used = {axis for dim in self.tensor_map for axis in dim}
            position = row_major_index(tuple(a for a in reversed(range(len(extent))) if a not in used))
            parts[0] = parts[0] * self.opt_parts + position % self.opt_parts
        return tuple(parts)

    def box(self, local_rank: int, full: Shape) -> Box:
        """The rectangle of the whole tensor that device `local_rank` of the stage holds."""
        if not 0 <= local_rank < self.devices:
            raise LayoutError(f"device {local_rank} of a stage of {self.devices}")
        local = self.local_shape(full)
        index = self.index(local_rank) if self.tensor_map else (0,) * len(full)
        return Box(tuple(i * n for i, n in zip(index, local, strict=True)), local)

    def boxes(self, full: Shape) -> tuple[Box, ...]:
        """`box` of every device of the stage, in rank order."""
        return tuple(self.box(rank, full) for rank in range(self.devices))


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its devices and the layout of each of its parameters (name without stage prefix)."""

    devices: int
    layouts: dict[str, Layout]


@dataclass(frozen=True)
class Strategy:
    """A whole distributed strategy: stage s owns the `devices` ranks that follow those of the stages before it."""

    stages: tuple[Stage, ...]
    origin: str = field(default="", compare=False)

    @cached_property
    def world(self) -> int:
        """Number of ranks."""
        return sum(stage.devices for stage in self.stages)

    @cached_property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> stages that list it, in the order of first appearance."""
        found: dict[str, list[int]] = {}
        for number, stage in enumerate(self.stages):
            for name in stage.layouts:
                found.setdefault(name, []).append(number)
        return {name: tuple(stages) for name, stages in found.items()}

    def stage_of(self, rank: int) -> int:
        """The stage that owns a global rank; LayoutError when there is no such rank."""
        for stage in range(len(self.stages)):
            if rank in self.ranks(stage):
                return stage
        raise LayoutError(f"rank {rank} of a strategy for {self.world} ranks")

    def ranks(self, stage: int) -> range:
        """Global ranks of a stage."""
        first = sum(s.devices for s in self.stages[:stage])
        return range(first, first + self.stages[stage].devices)
