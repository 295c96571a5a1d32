"""One process's ranks of a result: made beside it, proven, moved in, recorded; or taken over from an earlier run.

`records/{name}/rank_{r}.json` of a run says what rank r's file is (digests of its tensors), of which plan, and of which
source files (size, mtime).  A record with the same plan and source in another run means that the work is done already:
the file is read, its digests compared, and linked.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transform_ckpt import manifest
from transform_ckpt.auto.rendezvous import DIRECTORY
from transform_ckpt.auto.runs import TRANSFORMED, runs
from transform_ckpt.errors import TransformError
from transform_ckpt.execute import RunOptions, run
from transform_ckpt.formats.files import read_json, storage_error, write_json, xxh3
from transform_ckpt.planner import Plan
from transform_ckpt.verify import check_files

RECORDS = "records"


def make_part(plan: Plan, output: str, run_id: str, name: str, options: RunOptions, say: Callable[[str], None]) -> bool:
    """Write the plan's files into the run's `transformed_checkpoint/{name}/`; False when all were taken over.

    `plan` is of this process's ranks only.
    """
    here = os.path.join(output, DIRECTORY, run_id)
    key: dict[str, Any] = {"plan": manifest.plan_fingerprint(plan), "source": _stamps(plan)}
    target = os.path.join(here, TRANSFORMED, name)
    try:
        os.makedirs(target, exist_ok=True)
        os.makedirs(os.path.join(here, RECORDS, name), exist_ok=True)
        if _take_over(plan, output, run_id, name, key, say):
            return False
        part = f"{target}.part_{_folder(plan, 0)}"
        shutil.rmtree(part, ignore_errors=True)
        run(plan, part, replace(options, overwrite=True))
        written = manifest.read(part)
        if written is None:
            raise FileNotFoundError(2, "its manifest is gone", part)
        for number, file in enumerate(plan.target.files):
            folder = _folder(plan, number)
            os.rename(os.path.join(part, folder), os.path.join(target, folder))
            content = {**key, "manifest": {**written, "files": {file.relpath: written["files"][file.relpath]}}}
            write_json(os.path.join(here, RECORDS, name, f"{folder}.json"), content, indent=1)
        shutil.rmtree(part)
    except OSError as error:
        raise storage_error(target, error, "moving the finished ranks in") from None
    return True


def join_records(output: str, run_id: str, name: str, world: int) -> str:
    """The manifest of a result whose ranks are all there, from their records; its path."""
    here = os.path.join(output, DIRECTORY, run_id)
    files: dict[str, Any] = {}
    plans: list[str] = []
    whole: dict[str, Any] = {}
    for rank in range(world):
        with open(os.path.join(here, RECORDS, name, f"rank_{rank}.json"), encoding="utf-8") as stream:
            record = json.load(stream)
        whole = record["manifest"]
        files.update(whole["files"])
        plans.append(record["plan"])
    path = os.path.join(here, TRANSFORMED, name, manifest.NAME)
    write_json(path, {**whole, "plan": xxh3(*(plan.encode() for plan in plans)), "files": files}, indent=1)
    return path


def _take_over(
    plan: Plan, output: str, run_id: str, name: str, key: Mapping[str, Any], say: Callable[[str], None]
) -> bool:
    """Link what an earlier run has made of the same plan and source, when its digests are right."""
    for other in reversed(runs(output)):
        there = os.path.join(output, DIRECTORY, other)
        found = [_record(os.path.join(there, RECORDS, name, f"{_folder(plan, n)}.json"), key) for n in _files(plan)]
        if other == run_id or not all(found):
            continue
        faults = _faults(os.path.join(there, TRANSFORMED, name), found)
        if faults:
            say(f"the result of run {other} is not what was written, made anew: {faults[0]}")
            continue
        for number, record in zip(_files(plan), found, strict=True):
            _link(os.path.join(there, TRANSFORMED, name), os.path.join(output, DIRECTORY, run_id, TRANSFORMED, name),
                  plan.target.files[number].relpath)  # fmt: skip
            path = os.path.join(output, DIRECTORY, run_id, RECORDS, name, f"{_folder(plan, number)}.json")
            write_json(path, record, indent=1)
        if _folder(plan, 0) == "rank_0":  # one line, not one for each process
            say(f"ranks are taken over from run {other}: same source, same strategies, digests compared")
        return True
    return False


def _faults(there: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not as the records say; what cannot be read, or makes no sense, is not taken over either."""
    try:
        return check_files(there, {k: entry for record in records for k, entry in record["manifest"]["files"].items()})
    except (TransformError, OSError) as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["its records are damaged"]


def _link(there: str, here: str, relpath: str) -> None:
    os.makedirs(os.path.dirname(os.path.join(here, relpath)), exist_ok=True)
    try:
        os.link(os.path.join(there, relpath), os.path.join(here, relpath))
    except OSError:  # file systems without hard links
        shutil.copyfile(os.path.join(there, relpath), os.path.join(here, relpath))


def _record(path: str, key: Mapping[str, Any]) -> dict[str, Any]:
    """A record of this plan and source; {} when there is none."""
    found = read_json(path)
    return found if all(found.get(name) == value for name, value in key.items()) else {}


def _stamps(plan: Plan) -> list[list[int]]:
    stats = [os.stat(header.path) for header in plan.source.headers]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _files(plan: Plan) -> Sequence[int]:
    return range(len(plan.target.files))


def _folder(plan: Plan, number: int) -> str:
    return os.path.dirname(plan.target.files[number].relpath)
