"""Checks that a YAML and a command line share.  May import only strategy.generate_types and transform_ckpt.errors."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from strategy.generate_types import Offset, Parallel
from transform_ckpt.errors import Problems

_MAX_WORLD = 1 << 20
_MAX_INTERLEAVE = 1 << 10


def suggestion(written: str, known: Iterable[str]) -> str:
    """`; did you mean dp?` or what is known."""
    names = list(known)
    near = get_close_matches(written, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(names)}"


def parse_offset(value: Any) -> Offset:
    """A whole number, a list of them, or a list of such lists; ValueError else."""
    if _is_int(value):
        return int(value)
    if isinstance(value, list) and value and all(_is_int(n) for n in value):
        return tuple(value)
    if isinstance(value, list) and value and all(isinstance(row, list) and all(map(_is_int, row)) for row in value):
        return tuple(tuple(row) for row in value)
    raise ValueError("expected a number, a list of numbers, or a list of such lists")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_parallel(parallel: Parallel, where: str, problems: Problems) -> None:
    """Add what of the mesh contradicts itself, whatever the model.

    Sources: MindFormers 1.9.0 transformer/moe/ffn.py (experts), transformer_config.py (zero_bubble_v); MindSpore 2.9.0
    refuses an optimizer shard larger than the number of devices.
    """
    if parallel.world > _MAX_WORLD:
        problems.add(f"{where}: {parallel.world:,} devices are more than {_MAX_WORLD:,}")
    if parallel.interleave > _MAX_INTERLEAVE:
        problems.add(f"{where}: an interleave of {parallel.interleave:,} is more than {_MAX_INTERLEAVE:,}")
    if parallel.dp * parallel.tp % parallel.ep:
        problems.add(
            f"{where}: expert parallel {parallel.ep} does not divide data parallel {parallel.dp} * tensor parallel "
            f"{parallel.tp} = {parallel.dp * parallel.tp}"
        )
    if parallel.zero_bubble_v and (parallel.interleave != 2 or parallel.pp < 2):
        problems.add(
            f"{where}: zero_bubble_v needs an interleave of 2 and at least 2 pipeline stages, found "
            f"{parallel.interleave} and {parallel.pp}"
        )
    if parallel.optimizer is not None and parallel.optimizer.size > parallel.world:
        problems.add(
            f"{where}: optimizer shard size {parallel.optimizer.size} is more than the {parallel.world} devices"
        )
