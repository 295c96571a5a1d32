"""Values that are read while planning: strings and the small states that every rank repeats.

They are compared between ranks and become inline values, so that the plan knows what it writes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from operator import ne

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, Problems, name_some, rank_ranges
from transform_ckpt.source import MINDSPORE
from transform_ckpt.states import STATE_NAMES, is_state, split_optimizer
from transform_ckpt.store import FileTable, TensorReader
from transform_ckpt.tensors import Logical, Source, Tensor
from transform_ckpt.views import Box

SMALL_NBYTES = 64 * 1024
SAMPLE_NBYTES, SAMPLE_MIN_NBYTES = 1024, 256
SAMPLED_TENSORS = 4
"""Of each stage: enough to see a strategy of another run, too few to be felt."""
_FLOATS = ("F16", "BF16", "F32", "F64")


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
            # complete weights have their states among the parameters; common.json of Checkpoint 2.0 wants their values
            n: _settled(table, p, problems, notes) if p.dtype == dtypes.STRING or _is_lone_state(p) else p
            for n, p in source.params.items()
        }
        if source.format == MINDSPORE:
            _check_samples(table, source, problems)
    finally:
        table.close()
    problems.raise_if_any(InputError)
    return replace(source, states=states, params=params, notes=(*source.notes, *notes))


def _is_lone_state(logical: Logical) -> bool:
    return logical.name in STATE_NAMES and len(logical.pieces) == 1


def _settled(table: FileTable, logical: Logical, problems: Problems, notes: list[str]) -> Logical:
    first = logical.pieces[0]
    small = first.tensor.nbytes <= SMALL_NBYTES
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
            problems.add(f"{where}: it is a sharded weight; give a strategy that lists it")
    if logical.dtype == dtypes.STRING:
        try:
            value.decode("utf-32-le")
        except UnicodeDecodeError as error:
            problems.add(
                f"{first.tensor.path}: {logical.name!r} is not text ({error}): the file is damaged: save it again"
            )
    if not value or not small:
        return logical
    tensor = replace(first.tensor, extents=(), inline=value)
    return replace(logical, pieces=(replace(first, tensor=tensor),))


def _ends(table: FileTable, tensor: Tensor) -> bytes:
    """Beginning, middle and end of a large tensor."""
    last = tensor.nbytes - SMALL_NBYTES // 4
    return b"".join(_part(table, tensor, at, SMALL_NBYTES // 4) for at in (0, last // 2, last))


def _part(table: FileTable, tensor: Tensor, at: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    TensorReader(table, tensor).read_into(at, memoryview(buffer))
    return bytes(buffer)


def _check_samples(table: FileTable, source: Source, problems: Problems) -> None:
    """Does the strategy fit the bytes?  Shapes cannot tell.

    Ranks that should hold one slice must not hold unrelated numbers, and a rank that should hold slices of its own must
    not hold what another rank holds.
    """
    stages: dict[tuple[int, ...], dict[tuple[int, ...], Logical]] = {}
    for logical in source.params.values():
        least = min(piece.tensor.nbytes for piece in logical.pieces)
        weight = logical.dtype in _FLOATS and not split_optimizer(logical.name)[0]
        if weight and len(logical.pieces) > 1 and least >= SAMPLE_MIN_NBYTES:
            ranks = tuple(piece.rank for piece in logical.pieces)
            stages.setdefault(ranks, {}).setdefault(logical.shape, logical)
    for ranks, by_shape in stages.items():
        chosen = sorted(by_shape.values(), key=lambda p: -p.pieces[0].tensor.nbytes)[:SAMPLED_TENSORS]
        found = [sample for logical in chosen if (sample := _Sample(table, logical)).informative]
        unlike = [text for sample in found for text in sample.unlike]
        if 2 * len(unlike) > sum(sample.replicas for sample in found):
            problems.add(
                f"{source.root}: {unlike[0]}, which the source strategy says is one slice, but their bytes are "
                f"unrelated: it is not the strategy of this checkpoint (ranks {rank_ranges(ranks)})"
            )
        split = [sample for sample in found if len(sample.boxes) > 1 and not sample.expert]
        for rank in ranks if len(split) > 1 else ():
            if all(rank in sample.twins for sample in split):
                names = name_some(sample.name for sample in split)
                problems.add(
                    f"{source.root}: ranks {split[0].twins[rank]} and {rank} hold equal bytes of {names}, which "
                    "the source strategy says are different slices: it is not the strategy of this checkpoint"
                )
                break


class _Sample:
    """A few bytes of one parameter on every rank that holds it, and what they say of its layout."""

    def __init__(self, table: FileTable, logical: Logical) -> None:
        self.name, self.replicas = logical.name, 0
        self.expert = "expert" in logical.name or len(logical.shape) > 2  # may begin as copies of one another
        self.boxes: dict[Box, tuple[int, bytes]] = {}
        self.unlike: list[str] = []
        self.twins: dict[int, int] = {}
        width = dtypes.itemsize(logical.dtype)
        nbytes = min(SAMPLE_NBYTES, *(piece.tensor.nbytes for piece in logical.pieces))
        nbytes -= nbytes % width
        seen: dict[bytes, tuple[int, Box]] = {}
        self.informative = False
        for piece in logical.pieces:
            middle = (piece.tensor.nbytes - nbytes) // 2
            data = _part(table, piece.tensor, middle - middle % width, nbytes)
            # sign and exponent of a float: replicas that drifted apart still agree in them
            tops = data[width - 1 :: width]
            self.informative = self.informative or len({data[i : i + width] for i in range(0, nbytes, width)}) >= 8
            first = self.boxes.setdefault(piece.box, (piece.rank, tops))
            if first[0] != piece.rank:
                self.replicas += 1
                if 4 * sum(map(ne, first[1], tops)) > len(tops):
                    self.unlike.append(
                        f"ranks {first[0]} and {piece.rank} both hold {piece.box.size} of {logical.name!r}"
                    )
            twin = seen.setdefault(data, (piece.rank, piece.box))
            if twin[1] != piece.box:
                self.twins[piece.rank] = twin[0]


def _show(logical: Logical, value: bytes) -> str:
    decoded = dtypes.decode(logical.dtype, value)
    return repr(decoded) if not isinstance(decoded, bytes) else f"{len(value)} bytes"
