"""What `load_checkpoint` and `src_strategy_path_or_dir` of a job mean, as real paths.

Resolved once, at the start: both may lead through `output/strategy` or `output/transformed_checkpoint`, which this run
will point elsewhere.  Sources of the conventions: MindFormers 1.9.0 tools/ckpt_transform/transform_checkpoint.py
(`build_soft_link_of_checkpoint`) and utils/load_checkpoint_utils.py (`_get_src_strategy`, `_get_src_file_suffix`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from transform_ckpt.errors import InputError
from transform_ckpt.formats import checkpoint2, container_of, mindspore_dir
from transform_ckpt.sharing import named_sources

_RANK = re.compile(r"rank_(\d+)")


@dataclass(frozen=True, slots=True)
class Origin:
    """`checkpoints`: name -> path, one usually.  `kind`: "ranks", "complete", "file" or "checkpoint 2.0"."""

    checkpoints: Mapping[str, str]
    kind: str
    ranks: int
    formats: frozenset[str]
    strategy: str | None
    step: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def sharded(self) -> bool:
        """Does reading it need a strategy?"""
        return self.kind == "ranks" and self.ranks > 1


def resolve(
    load_checkpoint: str, src_strategy: str | None, resume: str | None = None, *, transform: bool = True
) -> Origin:
    """InputError when there is no checkpoint, or a strategy is needed and none is there.

    `resume` is the file name that `resume_training` may give to choose a step.  Without `transform` (each rank loads
    what it saved itself) no strategy is needed.
    """
    path = os.path.realpath(load_checkpoint)
    if not os.path.exists(path):
        raise InputError(f"load_checkpoint: {load_checkpoint}: not found: check the path")
    path, step = _of_one_rank(path)
    if resume is not None:
        step = _step_of(resume)
    kind, ranks, formats = _look(path)
    strategy, notes = _strategy(path, src_strategy, needed=transform and kind == "ranks" and ranks > 1)
    if kind != "ranks" and strategy is not None:
        notes.append(f"src_strategy_path_or_dir is not used: {path} holds complete weights")
        strategy = None
    named = {_name(path): path} if kind == "checkpoint 2.0" or _by_step(path, kind) else named_sources(path)
    return Origin(named, kind, ranks, formats, strategy, step, tuple(notes))


def _of_one_rank(path: str) -> tuple[str, int | None]:
    """`rank_i/`, or a file in it, means (that step of) the whole checkpoint, when there are other ranks beside it."""
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    above = os.path.dirname(folder)
    if not _RANK.fullmatch(os.path.basename(folder)) or len(mindspore_dir.rank_dirs(above)) == 1:
        return path, None
    step = mindspore_dir.parse_step(os.path.basename(path))
    return above, step[1] if step else None


def _step_of(name: str) -> int:
    """`resume_training: name-{epoch}_{step}.ckpt` chooses a step."""
    step = mindspore_dir.parse_step(name) or mindspore_dir.parse_step(f"{name}.ckpt")
    if step is None:
        raise InputError(
            f"resume_training: {name!r}: expected True, False or a file name that ends in -{{epoch}}_{{step}}.ckpt"
        )
    return step[1]


def _look(path: str) -> tuple[str, int, frozenset[str]]:
    if os.path.isfile(path):
        return "file", 1, frozenset(filter(None, [container_of(path)]))
    dirs = mindspore_dir.rank_dirs(path)
    if dirs:
        names = [name for folder in dirs.values() for name in os.listdir(folder)]
        return "ranks", len(dirs), frozenset(filter(None, map(container_of, names)))
    if checkpoint2.detect(path):
        return "checkpoint 2.0", 1, frozenset(["safetensors"])
    return "complete", 1, frozenset(filter(None, map(container_of, os.listdir(path))))


def _strategy(path: str, given: str | None, *, needed: bool) -> tuple[str | None, list[str]]:
    if given:
        found = os.path.realpath(given)
        if not os.path.exists(found):
            raise InputError(f"src_strategy_path_or_dir: {given}: not found: check the path")
        return found, []
    beside = os.path.join(os.path.dirname(path), "strategy")
    if needed and os.path.isdir(beside):
        return os.path.realpath(beside), [f"src_strategy_path_or_dir is not given: {beside} is taken"]
    if needed:
        raise InputError(
            f"load_checkpoint: {path} holds slices of several ranks and src_strategy_path_or_dir is empty: set it to "
            "the directory of the ckpt_strategy_rank_*.ckpt files of the job that saved them, or to its merged file"
        )
    return None, []


def _by_step(path: str, kind: str) -> bool:
    """Complete files whose names all end in a step are states of one checkpoint, not checkpoints of their own."""
    if kind != "complete":
        return False
    names = [name for name in os.listdir(path) if container_of(name) and not name.startswith(".")]
    return len(names) > 1 and all(mindspore_dir.parse_step(name) for name in names)


def _name(path: str) -> str:
    return os.path.basename(path.rstrip(os.sep)) or "checkpoint"
