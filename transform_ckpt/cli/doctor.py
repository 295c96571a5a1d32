"""`transform-ckpt doctor`: can this machine do the work?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from typing import Any

import click

from transform_ckpt.auto import compiler
from transform_ckpt.cli.options import PATH, human, json_flag
from transform_ckpt.version import VERSION

NEEDED = ("numpy", "click", "xxhash", "ml_dtypes", "pyyaml", "rich")
OPTIONAL = ("mindspore", "mindformers", "torch", "megatron-core", "transformers", "safetensors")
BAD_SAFETENSORS = "0.8.0"


@click.command("doctor")
@click.argument("folder", type=PATH, default=".")
@json_flag
def command(folder: str, as_json: bool) -> None:
    """Check packages, memory and the file system of FOLDER (where a destination would be)."""
    found = examine(folder)
    if as_json:
        print(json.dumps({"ok": not found["problems"], **found}))
    else:
        for key, value in found.items():
            if key != "problems":
                print(f"{key:<16}{value}")
        for problem in found["problems"]:
            print(f"problem: {problem}")
        print("no problem found" if not found["problems"] else f"{len(found['problems'])} problems")
    if found["problems"]:
        click.get_current_context().exit(3)


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def examine(folder: str) -> dict[str, Any]:
    """What was found; `problems` names what would go wrong."""
    needed, optional = _versions(NEEDED), _versions(OPTIONAL)
    problems = [f"package {name} is missing: pip install {name}" for name, v in needed.items() if v is None]
    notes = []
    if optional["safetensors"] == BAD_SAFETENSORS:
        notes.append(
            "safetensors 0.8.0 writes wrong bytes for non-contiguous NumPy arrays, mindspore's own transform among its "
            "victims; this tool does not use it, but install 0.7.0 for the rest of your job"
        )
    stat = os.statvfs(folder) if os.path.isdir(folder) else None
    if stat is None:
        problems.append(f"{folder}: not a directory")
    reserve = _reserve(folder) if stat else "unknown"
    if reserve == "not writable":
        problems.append(f"{folder}: not writable")
    compiles, reason = compiler.available()
    return {
        "transform_ckpt": VERSION,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory": human(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "free": human(stat.f_bavail * stat.f_frsize) if stat else "unknown",
        "fallocate": reserve,
        "strategies": f"MindSpore's compiler ({reason})" if compiles else f"by rule ({reason})",
        "packages": {k: v for k, v in {**needed, **optional}.items() if v is not None},
        "notes": notes,
        "problems": problems,
    }


def _reserve(folder: str) -> str:
    """Does the file system reserve space, or will only the size be set?"""
    from transform_ckpt.preallocate import preallocate

    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            preallocate(stream.fileno(), folder, 1 << 20)
            blocks = os.fstat(stream.fileno()).st_blocks
    except OSError:
        return "not writable"
    return "reserves space" if blocks * 512 >= 1 << 20 else "sets the size only: a full disk shows while writing"
