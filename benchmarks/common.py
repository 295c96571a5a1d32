"""What every part of the benchmark needs.  Standard library only: the measuring process stays small."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import CommandFailedError, Sample, Summary, run

FORMATS = ("ckpt", "safetensors")
QUIET = {"GLOG_v": "3", "PYTHONDONTWRITEBYTECODE": ""}
"""For every process: no log of MindSpore; modules are compiled once, as they are where a package is installed."""
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


def tree_nbytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def generate(module: str, out: Path, *flags: str) -> None:
    """Generate a source unless a complete one of the same flags is there, in a process: it needs a framework."""
    recipe, wanted = out / "recipe.txt", " ".join(flags)
    if recipe.is_file() and recipe.read_text() == wanted:
        return
    shutil.rmtree(out, ignore_errors=True)
    progress(f"{module}: {wanted}")
    command = python("-m", f"benchmarks.{module}", out, *flags)
    subprocess.run(command, check=True, env={**os.environ, **QUIET})
    recipe.write_text(wanted)


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a command that writes `dst` from `src` (None: it writes nothing)."""

    group: str
    name: str
    command: tuple[str, ...]
    src: Path | None = None
    dst: Path | None = None
    expect: str = ""
    """Text that its output must hold, where the exit code alone does not say that the work was done."""
    kept: bool = True
    """Is the destination of the last run looked at?  All others go at once: they would fill the page cache."""


@dataclass(frozen=True, slots=True)
class Row:
    """A measured case."""

    case: Case
    summary: Summary


def measure(cases: Sequence[Case], runs: int, log: Path) -> list[Row]:
    """Alternate between the cases, `runs` times."""
    samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
    for number in range(runs):
        for case in cases:
            settle(case.src, case.dst)
            sample = run(case.command, log=log, env=QUIET)
            if case.expect not in log.read_text(errors="replace"):
                raise CommandFailedError(f"{case.name}: no {case.expect!r} in {log}")
            samples[case.name].append(sample)
            if case.dst is not None and not (case.kept and number == runs - 1):
                shutil.rmtree(case.dst)
            progress(f"{case.group} | {case.name} | run {number + 1}/{runs}: {sample.seconds:.2f} s")
    return [Row(case, Summary.of(samples[case.name])) for case in cases]


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown rows: the median with its range, memory, and the time against the group's `cp -r`."""
    lines = [
        "| case | wall s, median (min - max) | times cp | peak RSS, one process, MB | all processes, MB |",
        "|---|---|---|---|---|",
    ]
    copies = {row.case.group: row.summary.seconds for row in rows if row.case.name.startswith("cp ")}
    for row in rows:
        s = row.summary
        copy = copies.get(row.case.group)
        ratio = f"{s.seconds / copy:.2f}" if copy else ""
        seconds = f"{s.seconds:.2f} ({s.fastest:.2f} - {s.slowest:.2f})"
        lines.append(f"| {row.case.name} | {seconds} | {ratio} | {megabytes(s.max_rss)} | {megabytes(s.sum_rss)} |")
    return lines
