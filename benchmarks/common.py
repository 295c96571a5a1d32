"""What every part of the benchmark needs.  Standard library only: the measuring process stays small."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

FORMATS = ("ckpt", "safetensors")
QUIET = {"GLOG_v": "3"}
READ_NBYTES = 1 << 20


def python(*args: str | Path) -> tuple[str, ...]:
    """A command of this interpreter."""
    return (sys.executable, *map(str, args))


def progress(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def megabytes(nbytes: float) -> str:
    """Megabytes, as people compare them."""
    return f"{nbytes / 1e6:,.0f}"


def settle(src: Path | None, dst: Path | None) -> None:
    """Before a run: no destination, nothing left to write back, the source in the page cache."""
    if dst is not None:
        shutil.rmtree(dst, ignore_errors=True)
        shutil.rmtree(f"{dst}.partial", ignore_errors=True)
        dst.parent.mkdir(parents=True, exist_ok=True)
    os.sync()
    if src is not None:
        buffer = bytearray(READ_NBYTES)
        for path in sorted(src.rglob("*.*")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
