"""A strategy as the files that a training run would leave: one a rank, and the merged one.

Names: MindFormers 1.9.0 trainer (`ckpt_strategy_rank_{rank}.ckpt`, `merged_ckpt_strategy.ckpt`).
May import only strategy.{codec,directory,document,files,layout} and transform_ckpt.errors.
"""

from __future__ import annotations

import os

from strategy.codec import encode
from strategy.directory import MERGED_STEM
from strategy.document import merged_document, stage_document
from strategy.files import write_atomically
from strategy.layout import Strategy
from transform_ckpt.errors import StorageError, UsageError, name_some

DIRECTORY = "strategy"
"""Of a checkpoint whose strategy lies beside it."""
RANK_FILE = "ckpt_strategy_rank_{rank}.ckpt"
MERGED_FILE = MERGED_STEM + ".ckpt"


def write_rank_files(strategy: Strategy, directory: str, *, merged: bool = True) -> list[str]:
    """Write every rank's file and (`merged`) the merged one; the paths, in rank order.

    Files of the same names are replaced; UsageError where others are, which readers would take for ranks of this one.
    """
    directory = os.fspath(directory)
    contents = rank_file_contents(strategy, directory, merged=merged)
    _check_no_others(directory, set(contents))
    for name, data in contents.items():
        write_atomically(os.path.join(directory, name), data)
    return [os.path.join(directory, name) for name in contents]


def rank_file_contents(strategy: Strategy, origin: str = "", *, merged: bool = True) -> dict[str, bytes]:
    """File name -> bytes: every rank's file in rank order, then (`merged`) the merged one.  `origin`: for messages."""
    found: dict[str, bytes] = {}
    parts = {number: stage_document(strategy, number, origin) for number in range(len(strategy.stages))}
    for number, part in parts.items():
        data = encode(part, "protobuf")
        found |= {RANK_FILE.format(rank=rank): data for rank in strategy.ranks(number)}
    if merged:
        found[MERGED_FILE] = encode(merged_document(parts), "protobuf")
    return found


def _check_no_others(directory: str, ours: set[str]) -> None:
    try:
        present = os.listdir(directory) if os.path.isdir(directory) else []
    except OSError as error:
        raise StorageError(f"{directory}: cannot be listed: {error.strerror}") from error
    others = [name for name in present if name.endswith((".ckpt", ".json")) and name not in ours]
    if others:
        raise UsageError(
            f"{directory}: holds other strategy files ({name_some(others)}); choose another directory, or remove them"
        )
