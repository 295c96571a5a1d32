"""Megatron's checkpoint directories: the tracker, iterations, one directory a model-parallel rank.

Facts: Megatron-LM megatron/training/checkpointing.py (get_checkpoint_name, read_metadata); a name with one number
behind tp is a pipeline stage or an expert rank: only `args` can tell.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from strategy.megatron import parse_directory
from transform_ckpt.errors import InputError, name_some
from transform_ckpt.formats.files import listing, open_binary

FORMAT, CONVERTED = "megatron", "mindspore-megatron"
"""Of Source and Target: Megatron's own files, and its shards in MindSpore's."""
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
MODEL_FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
_MAX_TRACKER_NBYTES = 64
_ITERATION = re.compile(r"iter_(\d{1,12})")
_RANK = re.compile(r"mp_rank_\d+(_\d+){0,2}")

Place = tuple[int, int, int]
"""(tp, pp, ep)"""


@dataclass(frozen=True, slots=True)
class Iteration:
    """One checkpoint: its directory, its number (None for `release`), the rank directories in it."""

    path: str
    number: int | None
    names: tuple[str, ...]

    @property
    def root(self) -> str:
        """Where the tracker lies, and param_map/ beside it."""
        return os.path.dirname(self.path)

    def sample(self) -> str:
        """One rank's model file, to ask for `args`."""
        return os.path.join(self.path, self.names[0], MODEL_FILE)

    def places(self, pp_size: int, ep_size: int) -> dict[Place, str]:
        """Directory of every rank; InputError for names that these sizes do not explain."""
        found: dict[Place, str] = {}
        odd: list[str] = []
        for name in self.names:
            place = parse_directory(name, pp_size=pp_size, ep_size=ep_size)
            if place is None:
                odd.append(name)
            else:
                found[place] = os.path.join(self.path, name)
        if odd:
            raise InputError(
                f"{self.path}: {name_some(odd)} are no directories of PP {pp_size}, EP {ep_size}, which args says: "
                "remove what belongs to another run, or say --src-pp and --src-ep"
            )
        return found


META_DIRECTORY, LAYOUT_FILE = "pt_meta", "layout.json"
"""Beside rank directories that convert_pt2ckpt wrote."""


def is_converted(path: str) -> bool:
    """Has the directory a pt_meta that tells what its shards are?"""
    return os.path.isfile(os.path.join(path, META_DIRECTORY, LAYOUT_FILE))


def iteration_name(number: int | None) -> str:
    """`iter_0000100`, or `release`."""
    return RELEASE if number is None else f"iter_{number:07d}"


def is_megatron(path: str) -> bool:
    """Is this a root with a tracker, an iteration, or something that holds iterations?"""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    if TRACKER in names or any(map(_RANK.fullmatch, names)):
        return True
    inner = [n for n in names if _ITERATION.fullmatch(n) or n == RELEASE]
    return any(_RANK.fullmatch(name) for n in inner for name in _safe_listing(os.path.join(path, n)))


def has_iteration(path: str, iteration: int | str) -> bool:
    """Is there a directory of this iteration below a root?"""
    names = _safe_listing(path)
    return RELEASE in names if iteration == RELEASE else any(_number(name) == int(iteration) for name in names)


def _safe_listing(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def find(path: str, iteration: int | str | None = None) -> Iteration:
    """The checkpoint at a root (the tracker's iteration, or the one asked for) or at an iteration's own directory."""
    path = os.path.abspath(path)
    names = listing(path)
    if any(map(_RANK.fullmatch, names)):
        name = os.path.basename(path)
        match = _ITERATION.fullmatch(name)
        return _of(path, names, int(match[1]) if match else None)
    if iteration is None:
        iteration = _tracked(path, names)
    number = None if iteration == RELEASE else int(iteration)
    wanted = next((n for n in names if _number(n) == number and (n == RELEASE) == (number is None)), None)
    if wanted is None:
        there = [n for n in names if n == RELEASE or _ITERATION.fullmatch(n)]
        raise InputError(
            f"{path}: has no {iteration_name(number)}; there are {name_some(there) or 'no iterations'}: "
            "give --iteration, or mend the tracker"
        )
    inner = os.path.join(path, wanted)
    return _of(inner, listing(inner), number)


def _number(name: str) -> int | None:
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def _of(path: str, names: list[str], number: int | None) -> Iteration:
    ranks = tuple(n for n in names if _RANK.fullmatch(n))
    if not ranks:
        raise InputError(f"{path}: has no mp_rank_* directory: it is no checkpoint of Megatron's torch format")
    lacking = [n for n in ranks if not os.path.isfile(os.path.join(path, n, MODEL_FILE))]
    if lacking:
        raise InputError(f"{path}: {name_some(lacking)} have no {MODEL_FILE}: fetch them again")
    return Iteration(path, number, ranks)


def _tracked(path: str, names: list[str]) -> int | str:
    """What the tracker says: nothing but digits or `release` is believed."""
    if TRACKER not in names:
        found = [n for n in names if n == RELEASE or _ITERATION.fullmatch(n)]
        if len(found) == 1:
            return RELEASE if found[0] == RELEASE else int(found[0].removeprefix("iter_"))
        raise InputError(f"{path}: has no {TRACKER} and {len(found)} iterations: give --iteration, or one of them")
    file = os.path.join(path, TRACKER)
    with open_binary(file, "reading the tracker") as (fd, nbytes):
        text = os.pread(fd, _MAX_TRACKER_NBYTES, 0).decode("ascii", "replace").strip()
    if nbytes > _MAX_TRACKER_NBYTES or not (text == RELEASE or re.fullmatch(r"[0-9]{1,12}", text)):
        raise InputError(f"{file}: says {text!r:.80}, which is neither an iteration nor {RELEASE!r}: mend it")
    return RELEASE if text == RELEASE else int(text)
