"""Runs in an environment's process: imports megatron-core, then forks the ranks of each request on standard input."""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from tests.megatron_real import standins
from tests.megatron_real.case import Case


def main(version: str, answers: int) -> None:
    """One JSON request a line in, one JSON answer a line out."""
    torch.set_num_threads(1)
    standins.before_import(version)
    standins.after_import()
    jobs = importlib.import_module("tests.megatron_real.jobs")  # imports megatron
    jobs.check_version(version)
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        for line in sys.stdin:
            print(json.dumps(_answer(jobs.JOBS, json.loads(line))), file=out, flush=True)


def _answer(jobs: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    case = Case(**request["case"])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (case, jobs[request["job"]], Path(request["directory"]), Path(scratch))
        try:
            torch.multiprocessing.start_processes(_rank, args=arguments, nprocs=case.world, start_method="fork")
        except Exception:  # noqa: BLE001 - whatever a rank raised is the answer
            return {"error": traceback.format_exc()}
        return {"ranks": [json.loads(Path(scratch, f"{rank}.json").read_text()) for rank in range(case.world)]}


def _rank(rank: int, case: Case, job: Any, directory: Path, scratch: Path) -> None:
    store = f"file://{scratch}/rendezvous"
    limit = dt.timedelta(minutes=1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=case.world, timeout=limit)
    result = job(case, directory)
    Path(scratch, f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
