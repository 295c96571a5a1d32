"""MindFormers' conventions of a transform that several processes share: which target ranks each makes, and the names of
checkpoints (MindFormers 1.9.0 tools/ckpt_transform/transform_checkpoint.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from transform_ckpt.errors import InputError, PlanError, UsageError
from transform_ckpt.formats import container_of, mindspore_dir


def share(world: int, processes: int, rank: int | None) -> Sequence[int]:
    """Target ranks of one process: all when no rank was given, else a contiguous block, as the original shares them."""
    if processes < 1:
        raise UsageError(f"--transform_process_num {processes}: expected 1 or more")
    processes = min(processes, world)
    if world % processes:
        raise UsageError(f"--transform_process_num {processes} does not divide the {world} target ranks")
    if rank is None:
        return range(world)
    if not 0 <= rank < world:
        raise UsageError(f"--rank_id {rank} of {world} target ranks")
    block = world // processes
    return range(rank, rank + block) if rank % block == 0 else range(0)


def maker(world: int, processes: int, rank: int) -> int:
    """The rank whose `share` holds `rank`."""
    block = world // min(processes, world)
    return rank // block * block


def named_sources(path: str) -> dict[str, str]:
    """Checkpoint name -> path: a directory of ranks by its own name, complete files each by its stem."""
    path = os.path.abspath(path)
    if os.path.isdir(path) and not mindspore_dir.rank_dirs(path):
        names = [n for n in sorted(os.listdir(path)) if container_of(n) and not n.startswith(".")]
        files = [os.path.join(path, n) for n in names if os.path.isfile(os.path.join(path, n))]
        if any(f.endswith(".safetensors") for f in files):
            return {os.path.basename(path): path}
        if not files:
            raise InputError(f"{path}: no rank_0 directory and no checkpoint file in it: check the path")
    elif os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        return {os.path.basename(path): path}
    else:
        raise InputError(f"{path}: not found: check the path of the checkpoint")
    found: dict[str, str] = {}
    for file in files:
        stem = os.path.basename(file).split(".")[0] or os.path.basename(file)
        if stem in found:
            raise PlanError(f"{found[stem]} and {file} would both become {stem}: rename one")
        found[stem] = file
    return found
