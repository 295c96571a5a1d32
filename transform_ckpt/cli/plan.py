"""`transform-ckpt plan SRC DST` = `convert --dry-run`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from transform_ckpt.cli.options import PATH, human, json_flag, megatron_flags, plan_flags

SHOWN_FILES = 12


@click.command("plan")
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@plan_flags
@megatron_flags
@click.option("--overwrite", is_flag=True, help="DST may hold something that would be replaced.")
@json_flag
def command(src: str, dst: str, overwrite: bool, as_json: bool, **flags: Any) -> None:
    """Say what convert would do: files, bytes, free space, problems.  Writes nothing."""
    show_plan(src, dst, flags, overwrite=overwrite, as_json=as_json)


def show_plan(src: str, dst: str, flags: dict[str, Any], *, overwrite: bool, as_json: bool) -> None:
    """Print the plan and what stands in its way now; UsageError when DST is occupied."""
    from transform_ckpt import api
    from transform_ckpt.destination import check_destination, free_nbytes
    from transform_ckpt.routes import route

    check_destination(dst, overwrite=overwrite)
    with api.without_collection():
        plan = route(src, flags).plan
    free = free_nbytes(dst)
    problems = []
    if plan.write_nbytes > free:
        problems.append(f"{os.path.abspath(dst)}: needs {plan.write_nbytes:,} bytes, {free:,} are free there")
    found = {
        "source": {"format": plan.source.format, "step": plan.source.step, "files": len(plan.source.headers)},
        "target": {"format": plan.target.format, "dropped": list(plan.target.dropped)},
        "tensors": len({g.name for g in plan.groups}),
        "copies": len(plan.groups),
        "units": len(plan.units),
        "read_nbytes": plan.read_nbytes,
        "write_nbytes": plan.write_nbytes,
        "replica_nbytes_not_read": plan.replicas_nbytes,
        "free_nbytes": free,
        "files": {f.relpath: f.skeleton.nbytes for f in plan.target.files}
        | {s.relpath: len(s.data) for s in plan.target.small},
        "notes": list(plan.notes),
        "problems": problems,
    }
    if as_json:
        print(json.dumps({"ok": True, **found}))
    else:
        _print(src, dst, found)


def _print(src: str, dst: str, found: dict[str, Any]) -> None:
    for note in found["notes"]:
        print(f"note: {note}", file=sys.stderr)
    source = found["source"]
    step = "" if source["step"] is None else f", step {source['step']}"
    print(f"source       {src} ({source['format']}, {source['files']} files{step})")
    print(f"destination  {dst} ({found['target']['format']}, {len(found['files'])} files)")
    print(
        f"tensors      {found['tensors']:,} in {found['copies']:,} connected groups, {found['units']:,} units of work"
    )
    print(f"read         {human(found['read_nbytes'])} (replicas not read: {human(found['replica_nbytes_not_read'])})")
    print(f"write        {human(found['write_nbytes'])}; free there: {human(found['free_nbytes'])}")
    if found["target"]["dropped"]:
        print(f"dropped      {len(found['target']['dropped'])} tensors, as asked")
    files = list(found["files"].items())
    for name, nbytes in files[:SHOWN_FILES]:
        print(f"  {name}  {human(nbytes)}")
    if len(files) > SHOWN_FILES:
        print(f"  ... and {len(files) - SHOWN_FILES} more files (--json lists all)")
    for problem in found["problems"]:
        print(f"problem: {problem}")
    print("every element of every target is written exactly once; nothing was written now")
