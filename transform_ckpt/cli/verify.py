"""`transform-ckpt verify PATH [--against SRC]`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import click

from transform_ckpt.cli.options import PATH, allow_missing_flag, end_with_differences, json_flag

SHOWN = 20


@click.command("verify")
@click.argument("path", type=PATH)
@click.option("--against", metavar="SRC", type=PATH, help="Compare with this checkpoint, whatever its layout.")
@click.option("--src-strategy", metavar="FILE|DIR", help="Strategy of SRC.")
@click.option("--dst-strategy", "--strategy", metavar="FILE|DIR", help="Strategy of PATH.")
@click.option("--step", type=int, help="Which step, where PATH holds several.")
@allow_missing_flag
@json_flag
def command(
    path: str,
    against: str | None,
    src_strategy: str | None,
    dst_strategy: str | None,
    step: int | None,
    allow_missing: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check PATH: its files' own checksums, its manifest's digests, its replicas (with a strategy), and SRC.

    Exit code 6 names what differs.
    """
    faults, checks = check(path, against, src_strategy, dst_strategy, step, allow_missing)
    if as_json:
        print(json.dumps({"ok": not faults, "exit_code": 6 if faults else 0, "checks": checks, "differences": faults}))
    if faults:
        shown = "\n".join(faults[:SHOWN])
        more = f"\n... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        end_with_differences(f"{path}: {len(faults)} differences:\n{shown}{more}", as_json=as_json)
    if not as_json:
        print(f"{path}: {', '.join(checks)}: no difference")


def check(
    path: str,
    against: str | None,
    src_strategy: str | None,
    dst_strategy: str | None,
    step: int | None,
    allow_missing: Sequence[str],
) -> tuple[list[str], list[str]]:
    """(differences, names of the checks made)."""
    from transform_ckpt import api, manifest
    from transform_ckpt.cli.progress import progress
    from transform_ckpt.compare import compare, replica_differences
    from transform_ckpt.crc import check_crc, has_crcs
    from transform_ckpt.errors import InputError
    from transform_ckpt.verify import check_tree, headers_of

    faults: list[str] = []
    checks: list[str] = []
    found = manifest.read(path) if os.path.isdir(path) else None
    if found is not None:
        faults += check_tree(path, found)
        checks.append("digests of the manifest")
        if faults:
            return faults, checks
    headers = headers_of(path)
    checks.append(f"headers of {len(headers)} files")
    crcs = [h for h in headers if has_crcs(h)]
    for header in crcs:
        try:
            check_crc(header)
        except InputError as error:
            faults.append(str(error))
    if crcs:
        checks.append(f"crc of {len(crcs)} files")
    if dst_strategy is not None or against is not None:
        opened = api.open_checkpoint(path, dst_strategy, step, allow_missing)
        faults += [str(d) for d in replica_differences(opened)]
        checks.append("replicas")
        if against is not None:
            with progress("compare") as show:
                source = api.open_checkpoint(against, src_strategy, allow_missing=allow_missing)
                dropped = set(found["target"]["dropped"]) if found is not None else set()
                names = [n for n in (*source.params, *source.states) if n not in dropped]
                known = {*names, *dropped}
                names += [n for n in (*opened.params, *opened.states) if n not in known]
                faults += [str(d) for d in compare(source, opened, names=names, progress=show)]
            checks.append(f"every tensor of {against}")
    return faults, checks
