"""Do master weights and the model agree?  A look at a few elements before anything is written.

Every element is compared while it is written (`tensors.Witness`); a buffer that was cut wrongly shows here already, in
a dry run too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from transform_ckpt import dtypes
from transform_ckpt.casts import cast, first_difference
from transform_ckpt.errors import InputError, Problems
from transform_ckpt.store import FileTable, read_part
from transform_ckpt.tensors import Logical, Tensor, Witness

SAMPLED_PER_FILE = 48
SAMPLED_ELEMENTS = 256


def check_witnesses(params: Mapping[str, Logical], witnesses: Sequence[Witness]) -> None:
    """InputError naming the parameters whose first elements differ; some of every file, evenly chosen."""
    by_file: dict[str, list[Witness]] = {}
    for witness in witnesses:
        by_file.setdefault(witness.tensor.path, []).append(witness)
    problems = Problems()
    table = FileTable(os.O_RDONLY)
    try:
        for found in by_file.values():
            step = max(1, len(found) // SAMPLED_PER_FILE)
            for witness in found[::step]:
                piece = next((p.tensor for p in params[witness.name].pieces if p.box == witness.box), None)
                if piece is not None:
                    _compare(table, piece, witness, problems)
    finally:
        table.close()
    problems.raise_if_any(InputError)


def _compare(table: FileTable, master: Tensor, witness: Witness, problems: Problems) -> None:
    if not dtypes.castable(master.dtype, witness.tensor.dtype):
        return
    kinds = (master.dtype, witness.tensor.dtype)
    wide, narrow = map(dtypes.itemsize, kinds)
    numel = min(SAMPLED_ELEMENTS, master.nbytes // wide)
    wanted = cast(memoryview(read_part(table, master, 0, numel * wide)), *kinds)
    held = bytearray(read_part(table, witness.tensor, 0, numel * narrow))
    at = first_difference(held, wanted, witness.tensor.dtype)
    if at is not None:
        problems.add(
            f"{witness.tensor.path}: {witness.tensor.name!r} is not its fp32 weight in {master.path} (element {at:,}): "
            "the parameter map, the flags or one of the files is of another run or step"
        )
