"""Values that are read while planning: strings and the small states that every rank repeats.

They are compared between ranks and become inline values, so that the plan knows what it writes.
"""

from __future__ import annotations

import os
from dataclasses import replace

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, Problems
from transform_ckpt.states import is_state
from transform_ckpt.store import FileTable, TensorReader
from transform_ckpt.tensors import Logical, Source, Tensor

SMALL_NBYTES = 64 * 1024


def read_tensor(table: FileTable, tensor: Tensor) -> bytes:
    """All bytes of a (small) tensor."""
    if tensor.inline is not None:
        return tensor.inline
    buffer = bytearray(tensor.nbytes)
    if buffer:
        TensorReader(table, tensor).read_into(0, memoryview(buffer))
    return bytes(buffer)


def settle(source: Source) -> Source:
    """The same source with strings and small states read: equal on every rank, or said not to be."""
    table = FileTable(os.O_RDONLY)
    problems = Problems()
    notes: list[str] = []
    try:
        states = {n: _settled(table, s, problems, notes) for n, s in source.states.items()}
        params = {
            n: _settled(table, p, problems, notes) if p.dtype == dtypes.STRING else p for n, p in source.params.items()
        }
    finally:
        table.close()
    problems.raise_if_any(InputError)
    return replace(source, states=states, params=params, notes=(*source.notes, *notes))


def _settled(table: FileTable, logical: Logical, problems: Problems, notes: list[str]) -> Logical:
    first = logical.pieces[0]
    if first.tensor.nbytes > SMALL_NBYTES:
        return logical
    values = {piece.rank: read_tensor(table, piece.tensor) for piece in logical.pieces}
    value = values[first.rank]
    odd = [rank for rank, other in values.items() if other != value]
    if odd:
        where = f"{logical.name!r} is in no strategy and differs between rank {first.rank} and rank {odd[0]}"
        if is_state(logical.name, logical.dtype, logical.shape):
            notes.append(
                f"{where} ({_show(logical, value)}, {_show(logical, values[odd[0]])}); rank {first.rank}'s is taken"
            )
        else:
            problems.add(f"{where}: it is a sharded weight; give a strategy that lists it")
    if not value:
        return logical
    tensor = replace(first.tensor, extents=(), inline=value)
    return replace(logical, pieces=(replace(first, tensor=tensor),))


def _show(logical: Logical, value: bytes) -> str:
    decoded = dtypes.decode(logical.dtype, value)
    return repr(decoded) if not isinstance(decoded, bytes) else f"{len(value)} bytes"
