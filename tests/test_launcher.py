from __future__ import annotations

import pytest

from transform_ckpt.errors import InputError
from transform_ckpt.launcher import Launcher, find_launcher

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "10.0.0.1",
}
MSRUN = {
    "MS_ROLE": "MS_WORKER",
    "MS_WORKER_NUM": "8",
    "MS_NODE_ID": "3",
    "MS_SCHED_HOST": "127.0.0.1",
    "MS_SCHED_PORT": "8118",
    "RANK_ID": "3",
    "RANK_SIZE": "8",
    "DEVICE_ID": "1",
}
RANK_TABLE = {"RANK_TABLE_FILE": "hccl_8p.json", "RANK_ID": "3", "RANK_SIZE": "8", "DEVICE_ID": "1"}
MODELARTS = {
    "MA_JOB_DIR": "/home/ma-user/modelarts",
    "RANK_TABLE_FILE": "/user/config/jobstart_hccl.json",
    "RANK_ID": "3",
    "RANK_SIZE": "8",
    "ASCEND_DEVICE_ID": "1",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environ", "name", "local_world"),
    [
        (TORCHRUN, "torchrun", 2),
        ({k: v for k, v in TORCHRUN.items() if k != "TORCHELASTIC_RUN_ID"}, "torchrun", 2),
        (MSRUN, "msrun", None),
        (RANK_TABLE, "rank table", None),
        ({**RANK_TABLE, "DEVICE_ID": "5", "LOCAL_RANK": "1", "LOCAL_RANK_SIZE": "4"}, "rank table", 4),
        (MODELARTS, "ModelArts", None),
        (SRUN, "Slurm", None),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "4"}, "Slurm", 4),
        (OPEN_MPI, "MPI", 2),
        (HYDRA, "MPI", 2),
        ({"RANK_ID": "3", "RANK_SIZE": "8", "DEVICE_ID": "1"}, "RANK_ID and RANK_SIZE", None),
    ],
)
def test_each_launcher(environ: dict[str, str], name: str, local_world: int | None) -> None:
    found = find_launcher(environ=environ)
    assert found == Launcher(3, 8, name, local_rank=1, local_world=local_world)
    assert str(found) == f"rank 3 of 8 ({name})"


def test_nothing_set_is_a_single_process() -> None:
    assert find_launcher(environ={}) == Launcher(0, 1, "single process", local_world=1)
    assert find_launcher(environ={"MASTER_ADDR": "10.0.0.1", "RANK_TABLE_FILE": "x.json", "RANK_ID": ""}).world == 1


def test_flags_come_first() -> None:
    assert find_launcher(1, 2, TORCHRUN) == Launcher(1, 2, "flags")
    assert find_launcher(0, 1, {}) == Launcher(0, 1, "flags")


# what is left of an outer job, or of a shell profile, does not win over the launcher of this very process
@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({**SRUN, **MODELARTS, **TORCHRUN, "RANK": "2"}, "torchrun"),
        ({"MASTER_ADDR": "pod-0", "RANK": "0", "WORLD_SIZE": "3", **MSRUN, "MS_NODE_ID": "2"}, "msrun"),
        ({**SRUN, **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "2"}, "MPI"),
        ({**SRUN, **HYDRA, "PMI_RANK": "2"}, "MPI"),
        ({**SRUN, **RANK_TABLE, "RANK_ID": "2"}, "rank table"),
        ({"RANK_ID": "0", "RANK_SIZE": "1", **SRUN, "SLURM_PROCID": "2"}, "Slurm"),
    ],
)
def test_the_innermost_launcher_counts(environ: dict[str, str], name: str) -> None:
    found = find_launcher(environ=environ)
    assert (found.rank, found.world, found.name) == (2, 8, name)


def test_the_scheduler_of_msrun_converts_nothing() -> None:
    environ = {**MSRUN, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
    del environ["MS_NODE_ID"]
    found = find_launcher(environ=environ)
    assert (found.scheduler, found.rank, found.world) == (True, 0, 8)
    assert str(found) == "scheduler of 8 ranks (msrun)"
    assert find_launcher(0, 8, environ).scheduler, "flags do not turn the scheduler into a rank"


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"},
        # the script of sbatch itself
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_a_slurm_allocation_without_srun_is_one_process(environ: dict[str, str]) -> None:
    assert find_launcher(environ=environ).name == "single process"


def test_srun_variables_outside_of_a_job_are_believed() -> None:
    assert find_launcher(environ={"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}).rank == 1


@pytest.mark.parametrize(
    ("environ", "there", "missing"),
    [
        ({"MASTER_ADDR": "h", "RANK": "0"}, "RANK=0", "WORLD_SIZE"),
        ({"TORCHELASTIC_RUN_ID": "h", "WORLD_SIZE": "4"}, "WORLD_SIZE=4", "RANK"),
        ({"RANK_ID": "0"}, "RANK_ID=0", "RANK_SIZE"),
        ({"RANK_TABLE_FILE": "x", "RANK_SIZE": "4"}, "RANK_SIZE=4", "RANK_ID"),
        ({"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "1"}, "MS_NODE_ID=1", "MS_WORKER_NUM"),
        ({"MS_ROLE": "MS_SCHED"}, "", "MS_WORKER_NUM"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1", "SLURM_NTASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK"),
        ({"PMI_RANK": "2"}, "PMI_RANK=2", "PMI_SIZE"),
    ],
)
def test_half_of_a_pair_is_refused(environ: dict[str, str], there: str, missing: str) -> None:
    with pytest.raises(InputError, match=rf"{there}.* is set, but not {missing}"):
        find_launcher(environ=environ)


@pytest.mark.parametrize(("rank", "world"), [(1, None), (None, 4)])
def test_half_of_the_flags_is_refused(rank: int | None, world: int | None) -> None:
    with pytest.raises(InputError, match=r"flags: .* is set, but not"):
        find_launcher(rank, world, {})


def test_msrun_without_node_rank_does_not_take_the_schedulers_rank_id() -> None:
    environ = {**MSRUN, "RANK_ID": "0"}
    del environ["MS_NODE_ID"]
    with pytest.raises(InputError, match=r"MS_NODE_ID.*--node_rank"):
        find_launcher(environ=environ)


@pytest.mark.parametrize("text", ["x", "1.0", "-1", "1_0", "٣", "0x1"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"torchrun: RANK=.* is not a number"):
        find_launcher(environ={**TORCHRUN, "RANK": text})
    with pytest.raises(InputError, match=r"rank table: DEVICE_ID=.* is not a number"):
        find_launcher(environ={**RANK_TABLE, "DEVICE_ID": text})


@pytest.mark.parametrize("rank", [8, 9])
def test_rank_must_be_below_world(rank: int) -> None:
    with pytest.raises(InputError, match=rf"MS_NODE_ID={rank}, MS_WORKER_NUM=8: expected 0 <= MS_NODE_ID < MS_WORKER"):
        find_launcher(environ={**MSRUN, "MS_NODE_ID": str(rank)})
    with pytest.raises(InputError, match=rf"flags: rank={rank}, world=8"):
        find_launcher(rank, 8, {})
    with pytest.raises(InputError, match="flags: rank=-1"):
        find_launcher(-1, 8, {})
