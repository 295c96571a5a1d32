"""Which rank of a MindFormers job this is: its launcher and MindSpore must agree."""

from __future__ import annotations

from transform_ckpt.auto.mindformers import places
from transform_ckpt.errors import InputError
from transform_ckpt.launcher import Launcher, find_launcher

_GROUP = "MindSpore's communication group"


def find_job_launcher() -> Launcher:
    """The launcher, if MindSpore counts as it does; else MindSpore's group once that is there, since the job uses it.

    Before `mindspore.communication.init` MindFormers 1.9.0 tools/utils.py `get_real_rank` reads RANK_ID and RANK_SIZE,
    and falls back to rank 0 of 1.
    """
    from mindspore.communication import GlobalComm

    rank, world = (int(str(places.function(place)())) for place in (places.RANK, places.WORLD))
    group = Launcher(rank, world, _GROUP)
    initialised = bool(GlobalComm.INITED)
    try:
        found = find_launcher()
    except InputError:
        if initialised:
            return group
        raise
    if (found.rank, found.world) == (rank, world):
        return found
    if initialised:
        return group
    raise InputError(
        f"{found} started this process, but MindFormers takes it for rank {rank} of {world}: set use_parallel: True so "
        "that MindSpore joins the ranks, or start one process without the launcher"
    )
