"""Which rank of how many this process is: from flags, else from what its launcher exported.  Reads no file.

What launchers export, and where that is from:

- torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, TORCHELASTIC_RUN_ID (PyTorch, torch.distributed.run).
- msrun: MS_ROLE, MS_WORKER_NUM, MS_NODE_ID = rank, DEVICE_ID = place on the node; RANK_ID too, but without
  `--node_rank` on several nodes workers inherit the scheduler's RANK_ID=0 and have no MS_NODE_ID, so RANK_ID is not
  read there (MindSpore 2.9.0, mindspore/parallel/cluster/process_entity/_api.py).
- ModelArts, preset Ascend images: RANK_TABLE_FILE, RANK_ID, RANK_SIZE, ASCEND_DEVICE_ID, one process for each device
  (ModelArts user guide, "Starting a Preset Image's Boot File"); its variables that say "this is ModelArts" are those of
  check_in_modelarts (MindFormers 1.9.0, mindformers/tools/utils.py).
- rank table: RANK_TABLE_FILE, RANK_ID, RANK_SIZE, DEVICE_ID (MindFormers' run_distribute.sh up to r1.2).
- srun: SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_STEP_ID.  The script of sbatch has SLURM_PROCID=0 and the
  job's SLURM_NTASKS too, but no step: it is one process.
- Open MPI: OMPI_COMM_WORLD_*; Hydra (MPICH, Intel MPI): PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS.

MPI comes before Slurm: in an allocation mpirun starts its daemons with srun, so SLURM_PROCID is that of the daemon.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transform_ckpt.errors import InputError

Environ = Mapping[str, str]
_Local = tuple[tuple[str, ...], tuple[str, ...]]
"""Variables of the place on the node and of the node's processes: the first that is set counts."""
SCHEDULER = "MS_SCHED"
MODELARTS = ("MA_LOG_DIR", "MA_JOB_DIR", "MA_LOCAL_LOG_PATH", "BATCH_GROUP_NAME")
"""Any of them is there in a ModelArts job (check_in_modelarts)."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """Rank and world of this process, and who said so."""

    rank: int
    world: int
    name: str
    scheduler: bool = False
    """msrun starts the script once more as scheduler (MS_ROLE=MS_SCHED): that process converts nothing."""
    local_rank: int = 0
    """Place among the processes of this node; the device's number where the launcher says no more than that."""
    local_world: int | None = None

    def __str__(self) -> str:
        who = f"scheduler of {self.world} ranks" if self.scheduler else f"rank {self.rank} of {self.world}"
        return f"{who} ({self.name})"


@dataclass(frozen=True, slots=True)
class _Row:
    """Variables of one launcher; `when` says whether it started this process."""

    name: str
    rank: str | None
    world: str
    when: Callable[[Environ], bool]
    local: _Local = ((), ())
    hint: str = "set both, or neither"


def _any(*names: str) -> Callable[[Environ], bool]:
    return lambda environ: any(environ.get(name) for name in names)


def _all(*conditions: Callable[[Environ], bool]) -> Callable[[Environ], bool]:
    return lambda environ: all(condition(environ) for condition in conditions)


def _role(role: str) -> Callable[[Environ], bool]:
    return lambda environ: environ.get("MS_ROLE") == role


def _slurm_step(environ: Environ) -> bool:
    """Started by srun: in a step; or by hand with srun's variables, outside of any job."""
    return bool(environ.get("SLURM_STEP_ID")) or not environ.get("SLURM_JOB_ID")


_TORCH: _Local = (("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
_ASCEND: _Local = (("LOCAL_RANK", "ASCEND_DEVICE_ID", "DEVICE_ID"), ("LOCAL_RANK_SIZE",))
_OPEN_MPI: _Local = (("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",))
_HYDRA: _Local = (("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",))
_SLURM: _Local = (("SLURM_LOCALID",), ("SLURM_NTASKS_PER_NODE",))
_OMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
_HAS_TORCH, _HAS_ID = _any("RANK", "WORLD_SIZE"), _any("RANK_ID", "RANK_SIZE")
_MODELARTS = _any(*MODELARTS)
_NODE_RANK = (
    "on several nodes give msrun --node_rank (without it ranks are known only once the job is connected), "
    "or give rank and world as flags"
)
_TABLE = (
    _Row("torchrun", "RANK", "WORLD_SIZE", _all(_any("TORCHELASTIC_RUN_ID"), _HAS_TORCH), _TORCH),
    _Row("msrun", None, "MS_WORKER_NUM", _role(SCHEDULER), hint="the scheduler needs it, too"),
    _Row("msrun", "MS_NODE_ID", "MS_WORKER_NUM", _role("MS_WORKER"), _ASCEND, _NODE_RANK),
    _Row("torchrun", "RANK", "WORLD_SIZE", _all(_any("MASTER_ADDR"), _HAS_TORCH), _TORCH),
    _Row("ModelArts", "RANK_ID", "RANK_SIZE", _all(_MODELARTS, _HAS_ID), _ASCEND),
    _Row("rank table", "RANK_ID", "RANK_SIZE", _all(_any("RANK_TABLE_FILE"), _HAS_ID), _ASCEND),
    _Row("MPI", *_OMPI, _any(*_OMPI), _OPEN_MPI),
    _Row("MPI", "PMI_RANK", "PMI_SIZE", _any("PMI_RANK", "PMI_SIZE"), _HYDRA),
    _Row("Slurm", "SLURM_PROCID", "SLURM_NTASKS", _all(_any("SLURM_PROCID"), _slurm_step), _SLURM),
    _Row("RANK_ID and RANK_SIZE", "RANK_ID", "RANK_SIZE", _HAS_ID, _ASCEND),
)


def in_modelarts(environ: Environ = os.environ) -> bool:
    """Is this a ModelArts job?  As check_in_modelarts: a variable that is set to nothing counts, too."""
    return any(name in environ for name in MODELARTS)


def find_launcher(rank: int | None = None, world: int | None = None, environ: Environ = os.environ) -> Launcher:
    """Rank and world: the flags if given, else the first launcher that left its variables, else a single process."""
    scheduler = environ.get("MS_ROLE") == SCHEDULER
    if rank is not None or world is not None:
        rank, world = _pair({"rank": rank, "world": world}, "flags", "set both, or neither")
        return Launcher(rank, world, "flags", scheduler=scheduler)
    for row in _TABLE:
        if row.when(environ):
            return _launcher(row, environ, scheduler=scheduler)
    return Launcher(0, 1, "single process", local_world=1)


def _launcher(row: _Row, environ: Environ, *, scheduler: bool) -> Launcher:
    given = {name: _number(name, environ, row.name) for name in (row.rank, row.world) if name}
    rank, world = _pair(given if row.rank else {"rank": 0, **given}, row.name, row.hint)
    local_rank, local_world = (_first(names, environ, row.name) for names in row.local)
    return Launcher(rank, world, row.name, scheduler=scheduler, local_rank=local_rank or 0, local_world=local_world)


def _pair(given: Mapping[str, int | None], launcher: str, hint: str) -> tuple[int, int]:
    """Rank and world, both there and 0 <= rank < world; names are those that the user knows."""
    missing = [name for name, value in given.items() if value is None]
    values = [value for value in given.values() if value is not None]
    found = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    if missing:
        raise InputError(f"{launcher}: {found or 'nothing'} is set, but not {' and '.join(missing)}: {hint}")
    rank, world = values
    if not 0 <= rank < world:
        raise InputError(f"{launcher}: {found}: expected 0 <= {' < '.join(given)}: give every process its own rank")
    return rank, world


def _first(names: tuple[str, ...], environ: Environ, launcher: str) -> int | None:
    """The first of several variables that is set."""
    return next((_number(name, environ, launcher) for name in names if environ.get(name)), None)


def _number(name: str, environ: Environ, launcher: str) -> int | None:
    """A variable's number; None when it is not set, or empty."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{launcher}: {name}={text!r} is not a number: expected 0, 1, 2 ...")
    return int(text)
