"""Values that are read while planning: strings and the small states that every rank repeats.

They are compared between ranks and become inline values, so that the plan knows what it writes.
"""

from __future__ import annotations

import os
from dataclasses import replace

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, Problems
from transform_ckpt.samples import check_samples
from transform_ckpt.source import MINDSPORE
from transform_ckpt.states import STATE_NAMES, is_state
from transform_ckpt.store import FileTable, read_part, read_tensor
from transform_ckpt.tensors import Logical, Source, Tensor

SMALL_NBYTES = 64 * 1024


def settle(source: Source) -> Source:
    """The same source with strings and small states read: equal on every rank, or said not to be."""
    table = FileTable(os.O_RDONLY)
    problems = Problems()
    notes: list[str] = []
    try:
        states = {n: _settled(table, s, problems, notes) for n, s in source.states.items()}
        params = {
            # complete weights have their states among the parameters; common.json of Checkpoint 2.0 wants their values
            n: _settled(table, p, problems, notes) if p.dtype == dtypes.STRING or _is_lone_state(p) else p
            for n, p in source.params.items()
        }
        if source.format == MINDSPORE:
            check_samples(table, source, problems)
    finally:
        table.close()
    problems.raise_if_any(InputError)
    return replace(source, states=states, params=params, notes=(*source.notes, *notes))


def _is_lone_state(logical: Logical) -> bool:
    return logical.name in STATE_NAMES and len(logical.pieces) == 1


def _settled(table: FileTable, logical: Logical, problems: Problems, notes: list[str]) -> Logical:
    first = logical.pieces[0]
    text = logical.dtype == dtypes.STRING  # always read whole: headers and JSON files need its characters
    small = text or first.tensor.nbytes <= SMALL_NBYTES
    read = read_tensor if small else _ends
    values = {piece.rank: read(table, piece.tensor) for piece in logical.pieces}
    value = values[first.rank]
    odd = [rank for rank, other in values.items() if other != value]
    if odd:
        where = f"{logical.name!r} is in no strategy and differs between rank {first.rank} and rank {odd[0]}"
        if is_state(logical.name, logical.dtype, logical.shape):
            notes.append(
                f"{where} ({_show(logical, value)}, {_show(logical, values[odd[0]])}); rank {first.rank}'s is taken"
            )
        else:
            problems.add(
                f"{where}: it is a sharded weight; give a strategy that lists it, or "
                "put pt_meta/ back beside rank directories that convert_pt2ckpt wrote"
            )
    if text:
        try:
            value.decode("utf-32-le")
        except UnicodeDecodeError as error:
            problems.add(
                f"{first.tensor.path}: {logical.name!r} is not text ({error}): the file is damaged: save it again"
            )
    if not small or not (value or text):
        return logical
    tensor = replace(first.tensor, extents=(), inline=value)
    return replace(logical, pieces=(replace(first, tensor=tensor),))


def _ends(table: FileTable, tensor: Tensor) -> bytes:
    """Beginning, middle and end of a large tensor."""
    last = tensor.nbytes - SMALL_NBYTES // 4
    return b"".join(read_part(table, tensor, at, SMALL_NBYTES // 4) for at in (0, last // 2, last))


def _show(logical: Logical, value: bytes) -> str:
    decoded = dtypes.decode(logical.dtype, value)
    return repr(decoded) if not isinstance(decoded, bytes) else f"{len(value)} bytes"
