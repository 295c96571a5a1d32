"""Does a strategy fit the bytes?  Shapes cannot tell: a few bytes of a few weights of each stage can.

Only for distributed sources.  May import store, states, tensors, errors.
"""

from __future__ import annotations

from operator import ne

from transform_ckpt import dtypes
from transform_ckpt.errors import Problems, name_some, rank_ranges
from transform_ckpt.states import split_optimizer
from transform_ckpt.store import FileTable, read_part
from transform_ckpt.tensors import Logical, Source
from transform_ckpt.views import Box

SAMPLE_NBYTES, SAMPLE_MIN_NBYTES = 1024, 256
SAMPLED_TENSORS = 4
"""Of each stage: enough to see a strategy of another run, too few to be felt."""
_FLOATS = ("F16", "BF16", "F32", "F64")


def check_samples(table: FileTable, source: Source, problems: Problems) -> None:
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
            data = read_part(table, piece.tensor, middle - middle % width, nbytes)
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
