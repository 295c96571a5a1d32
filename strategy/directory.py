"""A directory of per-rank strategy files: which files count, which stage each is, and whether all stages are there.

Follows mindspore.merge_pipeline_strategys (2.9.0), which globs *.ckpt or *.json and takes the first file of each stage,
but refuses what that would take silently: a missing stage, two different files of one stage, an older merged file.
May import only strategy.{codec,document,files} and transform_ckpt.errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from strategy.codec import decode
from strategy.document import Document, check_no_gap, make_stage, merged_document, split_merged, stage_number
from strategy.files import read_bytes
from transform_ckpt.errors import InputError, StorageError, name_some, rank_ranges

MERGED_STEM = "merged_ckpt_strategy"
"""Name, without suffix, that MindFormers gives to the merged file it puts beside the per-rank ones."""

_SUFFIXES = (".ckpt", ".json")
_RANK = re.compile(r"rank_?([0-9]{1,9})(?![0-9])")


@dataclass(frozen=True, slots=True)
class _Content:
    """One distinct file content and the files (in rank order) that have it."""

    document: Document
    paths: tuple[str, ...]


def read_directory(directory: str, *, ignore: str = "") -> Document:
    """The merged document of a directory of per-rank files; InputError says what is missing, doubled or mixed.

    Merged files are used only where there is nothing else: `ignore` names one more of them (a destination).
    """
    merged, per_rank = _list_files(directory, ignore)
    contents = _read_contents(per_rank)
    ranks = [content for content in contents if not content.document.is_merged()]
    if ranks:
        return merged_document(_by_stage(directory, ranks))
    contents = contents or _read_contents(merged)
    if not contents:
        raise InputError(
            f"{directory}: no strategy files (*.ckpt or *.json) in it; give the directory that the training run saved "
            "its strategy in, or the merged file"
        )
    if len(contents) > 1:
        found = name_some(os.path.basename(content.paths[0]) for content in contents)
        raise InputError(f"{directory}: holds several different merged strategies ({found}); give one of these files")
    split_merged(contents[0].document, contents[0].paths[0])
    return contents[0].document


def _list_files(directory: str, ignore: str) -> tuple[list[str], list[str]]:
    """(files known by name to be merged, the others), in rank order."""
    try:
        names = [name for name in os.listdir(directory) if name.endswith(_SUFFIXES) and not name.startswith(".")]
    except OSError as error:
        raise StorageError(f"{directory}: cannot be listed: {error.strerror}") from error
    paths = [os.path.join(directory, name) for name in sorted(names, key=_natural)]
    merged = [path for path in paths if _is_merged_name(path) or _same_path(path, ignore)]
    per_rank = [path for path in paths if path not in merged and os.path.isfile(path)]
    suffixes = {os.path.splitext(path)[1] for path in per_rank}
    if len(suffixes) > 1:
        example = {suffix: next(p for p in per_rank if p.endswith(suffix)) for suffix in _SUFFIXES}
        shown = " and ".join(os.path.basename(path) for path in example.values())
        raise InputError(
            f"{directory}: holds both .ckpt and .json files ({shown}); expected one kind: move the other away"
        )
    return merged, per_rank


def _is_merged_name(path: str) -> bool:
    return os.path.splitext(os.path.basename(path))[0] == MERGED_STEM


def _same_path(path: str, other: str) -> bool:
    return bool(other) and os.path.realpath(path) == os.path.realpath(other)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """rank_2 before rank_10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name))


def _read_contents(paths: list[str]) -> list[_Content]:
    """Each distinct content parsed once: the files of a stage's ranks are equal byte by byte."""
    holders: dict[bytes, list[str]] = {}
    for path in paths:
        holders.setdefault(read_bytes(path), []).append(path)
    return [_Content(decode(data, holder[0]), tuple(holder)) for data, holder in holders.items()]


def _by_stage(directory: str, contents: list[_Content]) -> dict[int, Document]:
    stages: dict[int, _Content] = {}
    for content in contents:
        number = _number(content, alone=len(contents) == 1)
        make_stage(content.document.layouts, content.paths[0])
        first = stages.setdefault(number, content)
        if first.document.layouts != content.document.layouts:
            raise InputError(
                f"{directory}: stage {number} is there twice with different layouts: {first.paths[0]} and "
                f"{content.paths[0]}; remove the one that is left from another run"
            )
    check_no_gap(stages, directory)
    _check_ranks(directory, contents, stages)
    return {number: content.document for number, content in stages.items()}


def _number(content: _Content, *, alone: bool) -> int:
    number = stage_number(content.document, content.paths[0])
    if number is None and not alone:
        raise InputError(
            f"{content.paths[0]}: has no strategy items, which alone tell the stage, and the directory holds other "
            "strategies too; save the strategy files again, or give one merged file"
        )
    return number or 0


def _check_ranks(directory: str, contents: list[_Content], stages: Mapping[int, _Content]) -> None:
    """InputError when a file name has a rank behind the last stage that is here: a stage between is missing."""
    world = sum(make_stage(content.document.layouts, content.paths[0]).devices for content in stages.values())
    paths = [path for content in contents for path in content.paths]
    beyond = {rank: path for path in paths if (rank := _rank(path)) is not None and rank >= world}
    if beyond and len(paths) > 1:
        raise InputError(
            f"{directory}: the files are of stage {rank_ranges(stages)} with {world} devices together, that is rank "
            f"0-{world - 1}, but {os.path.basename(beyond[min(beyond)])} is of rank {min(beyond)}; a stage is missing, "
            "or files of another run are mixed in"
        )


def _rank(path: str) -> int | None:
    found = _RANK.findall(os.path.basename(path))
    return int(found[-1]) if found else None
