"""MindSpore checkpoint directories: which files make up one checkpoint of which ranks.

Three shapes: `rank_i/` directories, a directory of complete safetensors (with or without param_name_map.json), one
file.  Names of MindSpore's ModelCheckpoint end in `-{epoch}_{step}` (train/callback/_checkpoint.py, 2.9.0); steps are
compared as numbers.  May import transform_ckpt.{errors,tensors} and formats.files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from transform_ckpt.errors import InputError, PlanError, rank_ranges
from transform_ckpt.formats import container_of
from transform_ckpt.formats.files import listing, storage_error

PARAM_NAME_MAP = "param_name_map.json"
HYPER_PARAM = "hyper_param.safetensors"
_RANK_DIR = re.compile(r"rank_(\d+)")
_STEP = re.compile(r"-(\d+)_(\d+)(?:_[A-Za-z]\w*)?\.(?:ckpt|safetensors)$")

Step = tuple[int, int]
"""(epoch, step)."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one checkpoint: `ranks[i]` are rank i's paths.  `complete` = whole tensors, no ranks."""

    ranks: Mapping[int, tuple[str, ...]]
    complete: bool
    step: int | None = None
    weight_map: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def parse_step(name: str) -> Step | None:
    """(epoch, step) from a ModelCheckpoint file name, or None."""
    match = _STEP.search(name)
    return (int(match[1]), int(match[2])) if match else None


def _tensor_files(path: str) -> list[str]:
    names = [n for n in listing(path) if container_of(n) and not n.startswith(".")]
    return [n for n in names if os.path.isfile(os.path.join(path, n))]


def rank_dirs(path: str) -> dict[int, str]:
    """Rank -> its directory, for every `rank_i` below `path`."""
    found: dict[int, str] = {}
    for name in listing(path):
        match = _RANK_DIR.fullmatch(name)
        full = os.path.join(path, name)
        if not match or not os.path.isdir(full):
            continue
        rank = int(match[1])
        if rank in found:
            raise PlanError(f"{path}: {os.path.basename(found[rank])} and {name} are both rank {rank}: remove one")
        found[rank] = full
    return dict(sorted(found.items()))


def detect(path: str) -> bool:
    """Does this path look like a MindSpore checkpoint?"""
    if os.path.isfile(path):
        return container_of(path) is not None
    if not os.path.isdir(path):
        return False
    return bool(rank_dirs(path)) or bool(_tensor_files(path))


def find(path: str, step: int | None = None) -> Files:
    """The files of the checkpoint at `path`; `step` chooses among several."""
    if os.path.isfile(path):
        found = _only_step([path])
        if step is not None and step != found:
            raise InputError(f"{path}: is one file, whose name does not say step {step}: drop --step")
        return Files({0: (path,)}, True, found)
    if not os.path.isdir(path):
        raise InputError(f"{path}: not found: check the path of the checkpoint")
    dirs = rank_dirs(path)
    if dirs:
        return _find_ranks(path, dirs, step)
    return _find_complete(path, step)


def _only_step(paths: list[str]) -> int | None:
    steps = {parse_step(os.path.basename(p)) for p in paths}
    only = steps.pop() if len(steps) == 1 else None
    return only[1] if only else None


def _find_ranks(path: str, dirs: Mapping[int, str], step: int | None) -> Files:
    names = {rank: _tensor_files(folder) for rank, folder in dirs.items()}
    empty = [rank for rank, found in names.items() if not found]
    notes = [f"no checkpoint file in the directories of ranks {rank_ranges(empty)}"] if empty else []
    names = {rank: found for rank, found in names.items() if found}
    if not names:
        raise InputError(f"{path}: no .ckpt or .safetensors file in any rank directory")
    chosen, number = _choose(path, names, step)
    if step is None:
        notes += _passed_over(names, chosen)
    ranks = {rank: (os.path.join(dirs[rank], name),) for rank, name in chosen.items()}
    return Files(ranks, False, number, notes=tuple(notes))


def _choose(path: str, names: Mapping[int, list[str]], step: int | None) -> tuple[dict[int, str], int | None]:
    """One file for each rank: the only one, or that of the highest step that every rank has."""
    steps = {rank: _by_step(found) for rank, found in names.items()}
    named = all(None not in by_step for by_step in steps.values())
    if not named:
        if step is not None or any(len(found) > 1 for found in names.values()):
            raise PlanError(_cannot_tell(path, names, step))
        return {rank: found[0] for rank, found in names.items()}, None
    common = set.intersection(*(set(by_step) for by_step in steps.values()))
    if step is not None:
        common = {s for s in common if s is not None and s[1] == step}
        if len({s[0] for s in common if s}) > 1:
            raise PlanError(_cannot_tell(path, names, step))
    if not common:
        wanted = "no step that every rank has" if step is None else f"step {step} is not in every rank directory"
        raise InputError(f"{path}: {wanted}; found: {_candidates(names)}: choose another with --step, or restore it")
    best = max(s for s in common if s is not None)
    doubled = [rank for rank, by_step in steps.items() if len(by_step[best]) > 1]
    if doubled:
        raise PlanError(_cannot_tell(path, {r: steps[r][best] for r in doubled}, step))
    return {rank: by_step[best][0] for rank, by_step in steps.items()}, best[1]


def _passed_over(names: Mapping[int, list[str]], chosen: Mapping[int, str]) -> list[str]:
    """What a user would miss: some ranks have a later step than the one that all have."""
    taken = {parse_step(name) for name in chosen.values()}
    steps = {rank: max(filter(None, map(parse_step, found)), default=None) for rank, found in names.items()}
    best = max(filter(None, taken), default=None)
    later = {rank: found for rank, found in steps.items() if best and found and found > best}
    if not later or best is None:
        return []
    epoch, step = max(later.values())
    there = f"ranks {rank_ranges(later)} have epoch {epoch} step {step}, the others do not"
    return [f"{there}: epoch {best[0]} step {best[1]} is taken, which all have"]


def _by_step(names: list[str]) -> dict[Step | None, list[str]]:
    found: dict[Step | None, list[str]] = {}
    for name in names:
        found.setdefault(parse_step(name), []).append(name)
    return found


def _candidates(names: Mapping[int, list[str]]) -> str:
    lines = [f"rank_{rank}: {', '.join(found)}" for rank, found in sorted(names.items())]
    return "; ".join(lines[:8]) + (f"; ... {len(lines) - 8} more ranks" if len(lines) > 8 else "")


def _cannot_tell(path: str, names: Mapping[int, list[str]], step: int | None) -> str:
    asked = "" if step is None else f" of step {step}"
    several = {rank: found for rank, found in names.items() if len(found) > 1} or names
    return (
        f"{path}: cannot tell which file{asked} is meant; candidates: {_candidates(several)}: "
        "leave one checkpoint file in each rank directory, or use names that end in -{epoch}_{step}"
    )


def _find_complete(path: str, step: int | None) -> Files:
    names = _tensor_files(path)
    if not names:
        raise InputError(
            f"{path}: no checkpoint: expected rank_0/, rank_1/ ... directories, or .safetensors or .ckpt files"
        )
    if os.path.isfile(os.path.join(path, PARAM_NAME_MAP)):
        if step is not None:
            raise InputError(f"{path}: {PARAM_NAME_MAP} describes one checkpoint, of no known step: drop --step {step}")
        weight_map = read_param_name_map(os.path.join(path, PARAM_NAME_MAP))
        missing = sorted(set(weight_map.values()) - set(names))
        if missing:
            raise InputError(f"{path}: {PARAM_NAME_MAP} names {missing[0]}, which is not there: fetch it again")
        return Files({0: tuple(os.path.join(path, n) for n in names)}, True, weight_map=weight_map)
    by_step = _by_step(names)
    if step is not None or (None not in by_step and len(by_step) > 1):
        chosen, number = _choose(path, {0: names}, step)
        return Files({0: (os.path.join(path, chosen[0]),)}, True, number)
    if any(container_of(n) == "ckpt" for n in names) and len(names) > 1:
        raise PlanError(_cannot_tell(path, {0: names}, step))
    paths = [os.path.join(path, n) for n in names]
    return Files({0: tuple(paths)}, True, _only_step(paths))


def read_param_name_map(path: str) -> dict[str, str]:
    """Parameter -> file name; with or without the `weight_map` level.  Names that leave the directory are refused."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise storage_error(path, error, "reading the name map") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}): fetch it again") from None
    weight_map = content.get("weight_map", content) if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{path}: expected a map of parameter names to file names")
    bad = [name for name in weight_map.values() if os.path.basename(name) != name or name in ("", ".", "..")]
    if bad:
        raise InputError(f"{path}: the file name {bad[0]!r} leaves the directory: refused")
    return weight_map
