"""`transform-ckpt convert SRC DST`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from transform_ckpt.cli.options import PATH, human, json_flag, megatron_flags, plan_flags, run_flags


@click.command("convert")
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@plan_flags
@megatron_flags
@run_flags
@click.option("--dry-run", is_flag=True, help="Print files, bytes, free space and problems; write nothing.")
@json_flag
def command(src: str, dst: str, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Transform the checkpoint SRC into DST.

    DST appears under its name only when it is complete; an interrupted run leaves DST.partial, and the same command
    continues it.
    """
    from transform_ckpt.cli.plan import show_plan

    if dry_run:
        show_plan(src, dst, flags, overwrite=flags["overwrite"], as_json=as_json)
        return
    convert(src, dst, flags, as_json=as_json)


def convert(src: str, dst: str, flags: dict[str, Any], *, as_json: bool) -> None:
    """Run, and print what was done."""
    from transform_ckpt import api
    from transform_ckpt.cli.progress import progress
    from transform_ckpt.destination import check_destination
    from transform_ckpt.routes import route

    started = time.monotonic()
    with progress("transform") as show:
        run_options = api.RunOptions(
            flags["workers"], flags["memory"], flags["overwrite"], not flags["no_resume"], flags["fsync"], show
        )
        check_destination(dst, overwrite=run_options.overwrite)
        with api.without_collection():
            found = route(src, {**flags, "progress": show})
        result = api.carry_out(found.plan, dst, run_options, found.check if flags["verify"] else None)
    seconds = time.monotonic() - started
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        fields = ("dst", "files", "write_nbytes", "read_nbytes", "resumed_units", "verified")
        shown = {name: getattr(result, name) for name in fields}
        print(json.dumps({"ok": True, **shown, "notes": result.notes, "seconds": round(seconds, 3)}))
        return
    resumed = f", {result.resumed_units} units kept from the interrupted run" if result.resumed_units else ""
    verified = "; read again and equal to the source" if result.verified else ""
    print(
        f"{result.dst}: {result.files} files, {human(result.write_nbytes)} in {seconds:.2f} s "
        f"({human(result.write_nbytes / max(seconds, 1e-9))}/s){resumed}{verified}"
    )
