"""Strategy files in and out: merged, one rank's, or a directory of every rank's; protobuf and JSON.

May import only strategy.{codec,directory,document,files,layout} and transform_ckpt.errors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from strategy.codec import Form, decode, encode
from strategy.directory import read_directory
from strategy.document import make_stage, merged_document, split_merged, stage_document, stage_number
from strategy.files import read_bytes, write_atomically
from strategy.layout import Stage, Strategy
from transform_ckpt.errors import InputError


@dataclass(frozen=True, slots=True)
class StageFile:
    """One rank's strategy file.  `number` is None when the file has no strategy items, which alone tell the stage."""

    path: str
    number: int | None
    stage: Stage


def read_strategy(path: str) -> Strategy:
    """Read a merged file, the one file of a single-stage strategy, or a directory of per-rank files.

    InputError where the stages are not complete or anything in a file does not make sense.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return Strategy(split_merged(read_directory(path), path), path)
    document = decode(read_bytes(path), path)
    if document.is_merged():
        return Strategy(split_merged(document, path), path)
    number = stage_number(document, path)
    if number:
        raise InputError(
            f"{path}: is the strategy of stage {number} only, so of a pipeline of at least {number + 1} stages; give "
            "the directory of all per-rank files, or the merged file"
        )
    return Strategy((make_stage(document.layouts, path),), path)


def read_stage_file(path: str) -> StageFile:
    """Read one rank's file, of whichever stage; InputError for a merged one."""
    path = os.fspath(path)
    document = decode(read_bytes(path), path)
    if document.is_merged():
        raise InputError(f"{path}: is a merged strategy file; expected the file of one rank")
    return StageFile(path, stage_number(document, path), make_stage(document.layouts, path))


def write_strategy(strategy: Strategy, path: str, *, form: Form = "protobuf") -> None:
    """Write the merged form, atomically; equal strategies give equal bytes.  MindSpore expects JSON in *.json only."""
    path = os.fspath(path)
    if not strategy.stages:
        raise InputError(f"{path}: a strategy without stages cannot be written")
    parts = {number: stage_document(strategy, number, path) for number in range(len(strategy.stages))}
    document = merged_document(parts)
    split_merged(document, path)
    write_atomically(path, encode(document, form))


def write_stage(strategy: Strategy, stage: int, path: str, form: Form = "protobuf") -> None:
    """Write the per-rank form of one stage, atomically: names without prefix, the stage in the strategy items."""
    path = os.fspath(path)
    document = stage_document(strategy, stage, path)
    if document.is_merged():
        raise InputError(
            f"{path}: all parameter names begin with a number and '-', so it would be read as a merged file"
        )
    write_atomically(path, encode(document, form))
