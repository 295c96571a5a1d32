"""One rank's parameters into memory: the plan of a single file, moved into arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transform_ckpt import dtypes, planner
from transform_ckpt.casts import numpy_type
from transform_ckpt.kernels import Mover
from transform_ckpt.planner import Plan
from transform_ckpt.store import FileTable, MemoryWriter, TensorReader
from transform_ckpt.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np


def load_file(plan: Plan) -> Iterator[tuple[str, np.ndarray[Any, Any] | str]]:
    """(name, array) of every tensor of the plan's first file, in the file's order; the plan should have no other."""
    groups: dict[str, list[planner.Group]] = {}
    for group in plan.groups:
        groups.setdefault(group.name, []).append(group)
    return _arrays(groups, plan.target.files[0].specs)


def _arrays(
    groups: dict[str, list[planner.Group]], specs: tuple[TensorSpec, ...]
) -> Iterator[tuple[str, np.ndarray[Any, Any] | str]]:
    table = FileTable(os.O_RDONLY)
    mover = Mover()
    try:
        for spec in specs:
            data = bytearray(spec.nbytes)
            for group in groups.get(spec.name, ()):
                readers = [TensorReader(table, tensor) for tensor in group.reads]
                writers = [MemoryWriter(memoryview(data)) for _ in group.writes]
                mover.move(group.component, (0, group.component.shape[0]), readers, writers)
            yield spec.name, _value(spec, data)
    finally:
        table.close()


def _value(spec: TensorSpec, data: bytearray) -> np.ndarray[Any, Any] | str:
    if spec.dtype == dtypes.STRING:
        return data.decode("utf-32-le")
    return array_of(spec.dtype, spec.shape, data)


def array_of(dtype: str, shape: tuple[int, ...], data: bytearray) -> np.ndarray[Any, Any]:
    """A NumPy array over the bytes; bfloat16 and float8 through ml_dtypes."""
    import numpy as np

    return np.frombuffer(data, dtype=numpy_type(dtype)).reshape(shape)
