"""Which pipeline stage holds which layer.

Source: MindFormers 1.9.0 parallel_core/training_graph/transformer/utils.py, class LayerSetting (`__init__`,
`_check_inputs`, `set_pipeline_stage`), which the legacy Llama uses too; seen in compiler-written strategy files.
Pure integers; may import only strategy.generate_types and transform_ckpt.errors.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from strategy.generate_types import Offset, Parallel
from transform_ckpt.errors import InputError, Problems


def layer_stages(layers: int, parallel: Parallel, where: str) -> tuple[int, ...]:
    """Stage of every layer; InputError with all that is wrong with the offset.

    Every (interleave, stage) pair takes `layers // pairs + offset` layers, in order.  With zero_bubble_v the second
    row runs backwards over the stages.
    """
    pp, interleave = parallel.pp, parallel.interleave
    if pp * interleave <= 1:
        return (0,) * layers
    counts = _counts(layers, parallel, where)
    if parallel.zero_bubble_v:
        counts = counts[:pp] + counts[pp:][::-1]
    ends = list(accumulate(counts))
    return tuple(_stage(bisect_left(ends, layer + 1), parallel) for layer in range(layers))


def _stage(pair: int, parallel: Parallel) -> int:
    row, stage = divmod(pair, parallel.pp)
    return parallel.pp - 1 - stage if parallel.zero_bubble_v and row == 1 else stage


def _counts(layers: int, parallel: Parallel, where: str) -> list[int]:
    """Layers of every (interleave, stage) pair, row by row."""
    problems = Problems()
    pairs = parallel.pp * parallel.interleave
    average, rest = divmod(layers, pairs)
    rows = _rows(parallel.offset, parallel)
    shape = f"{len(rows)} rows of {'/'.join(str(len(row)) for row in rows)}"
    if any(len(row) != parallel.pp for row in rows) or len(rows) not in (1, parallel.interleave):
        problems.add(
            f"{where}: offset has {shape} numbers, expected pipeline_stage = {parallel.pp} numbers in one row or in "
            f"pp_interleave_num = {parallel.interleave} rows"
        )
        problems.raise_if_any(InputError)
    given = parallel.offset if isinstance(parallel.offset, int) else sum(sum(row) for row in rows)
    if given != rest:
        problems.add(
            f"{where}: offset sums to {given}, expected num_layers {layers} % (pipeline_stage {parallel.pp} * "
            f"pp_interleave_num {parallel.interleave}) = {rest}; say with offset which stages take the odd layers"
        )
    full = rows if len(rows) == parallel.interleave else rows * parallel.interleave
    counts = [average + offset for row in full for offset in row]
    if min(counts[0], counts[-1]) < 0 or any(count < 1 for count in counts[1:-1]):
        problems.add(f"{where}: offset gives the stages {counts} layers; only the first and the last may have none")
    problems.raise_if_any(InputError)
    return counts


def _rows(offset: Offset, parallel: Parallel) -> list[tuple[int, ...]]:
    if isinstance(offset, int):
        return [(offset,) * parallel.pp]
    if all(isinstance(row, int) for row in offset):
        return [tuple(row for row in offset if isinstance(row, int))]
    return [row for row in offset if not isinstance(row, int)]
