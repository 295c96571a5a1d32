"""The automatic transform beside what MindFormers does with MindSpore: whole jobs, from start to parameters in memory.

A job is 2 or 4 rank processes that start together from a checkpoint of another layout.  It ends when the slowest rank
holds all of its parameters.  Afterwards every run's tensors are compared by digest, and one more job in memory counts
the bytes that each rank reads: more than its own slices, beside headers and the documented samples, is a failure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.auto_job import Job, run_job
from benchmarks.common import FORMATS, megabytes, progress, python, settle
from benchmarks.measure import Sample, Summary

TARGETS = ("mp=2", "mp=2,pp=2")
JOIN_SIZES = (16, 64)
WAYS = {
    "memory": "ours, in memory",
    "disk": "ours, through disk",
    "mindspore_one": "MindSpore, rank 0 transforms (transform_process_num 1)",
    "mindspore_each": "MindSpore, every rank its own file (transform_process_num = ranks)",
    "mindspore_unified": "MindSpore, rank 0 merges, every rank slices",
}
UPSTREAM = {"ckpt": ("mindspore_one", "mindspore_each"), "safetensors": ("mindspore_unified",)}
"""What MindFormers 1.9.0 has for each format: tools/ckpt_transform for .ckpt, utils/load_checkpoint_utils.py else."""
OTHER_NBYTES = 256 * 1024
"""Reads of no source file, beside two strategy files: notes, /proc, modules that are imported late."""


@dataclass(frozen=True, slots=True)
class Target:
    """One layout to load into; `own` and `looking` are of auto_layout's file, `strategy_nbytes` of both strategies."""

    parallel: str
    strategy: Path
    own: Sequence[int]
    looking: Mapping[str, Mapping[str, int]]
    strategy_nbytes: int

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.own)


def find_target(state: Path, parallel: str, args: argparse.Namespace) -> Target:
    """Make its strategy (a process of its own: it needs MindSpore)."""
    name = f"auto_{parallel}"
    flags = ("--gb", str(args.gb), "--layers", str(args.layers), "--src", args.src, "--dst", parallel)
    subprocess.run(python("-m", "benchmarks.auto_layout", state, name, *flags), check=True)
    sizes = json.loads((state / f"{name}_bytes.json").read_text())
    strategies = (state / "src_strategy_merged.ckpt", state / f"{name}_strategy_merged.ckpt")
    return Target(parallel, strategies[1], **sizes, strategy_nbytes=sum(path.stat().st_size for path in strategies))


def spec_of(state: Path, fmt: str, target: Target, way: str, *, count: bool = False) -> dict[str, Any]:
    """What auto_rank is told."""
    return {
        "way": way,
        "world": target.world,
        "src": str(state / f"src_{fmt}"),
        "src_strategy": str(state / "src_strategy_merged.ckpt"),
        "dst_strategy": str(target.strategy),
        "out": str(state / "out_auto"),
        "format": fmt,
        "count": count,
    }


def job(spec: Mapping[str, Any], log: Path) -> Job:
    """One run, from a clean destination, with the source in the page cache."""
    settle(Path(spec["src"]), Path(spec["out"]))
    return run_job(spec, log)


def measure(specs: Sequence[Mapping[str, Any]], runs: int, log: Path) -> dict[str, list[Job]]:
    """Alternate between the ways, `runs` times."""
    found: dict[str, list[Job]] = {spec["way"]: [] for spec in specs}
    for number in range(runs):
        for spec in specs:
            done = job(spec, log)
            found[spec["way"]].append(done)
            what = f"auto, {spec['world']} ranks, {spec['format']} | {WAYS[spec['way']]}"
            progress(f"{what} | run {number + 1}/{runs}: {done.seconds:.2f} s")
    return found


# ---------------------------------------------------------------------------------------------- the same values


def unlike(jobs: Sequence[Job], reference: Job) -> list[str]:
    """Tensors that another run has otherwise, or not at all: rank and name."""
    found = set()
    for one in jobs:
        for rank, (mine, theirs) in enumerate(zip(one.digests, reference.digests, strict=True)):
            found |= {(rank, name) for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)}
    return [f"rank {rank}: {name}" for rank, name in sorted(found)]


def same_values(found: Mapping[str, Sequence[Job]]) -> list[str]:
    """Every run of every way against MindSpore's first; without MindSpore, against our own first."""
    against = next((way for way in found if way.startswith("mindspore")), next(iter(found)))
    reference = found[against][0]
    lines = []
    for way, all_jobs in found.items():
        jobs = [one for one in all_jobs if one is not reference]
        if not jobs:
            continue
        different = unlike(jobs, reference)
        progress("\n".join(different[:20]))
        count = sum(map(len, reference.digests))
        verdict = f"DIFFERENT in {len(different)}, first {different[0]}" if different else "equal"
        runs = f"{len(jobs)} runs of {WAYS[way]!r} against {WAYS[against]!r}"
        lines.append(f"- {runs}: {count} tensors of {len(reference.digests)} ranks, by digest: {verdict}")
    return lines


# ---------------------------------------------------------------------------------------------- bytes


def overdrawn(counted: Mapping[str, Any], own: int, looking: Mapping[str, int], other: int) -> list[str]:
    """What a rank has read beyond its due; empty when nothing."""
    phases = counted["phases"]
    tensors, headers = phases.get("load", 0), phases.get("plan", 0)
    rest = counted["rchar"] - sum(phases.values())
    limits = (
        ("of tensors", tensors, own),
        ("while planning", headers, sum(looking.values())),
        ("of no source file", rest, other),
    )
    found = [f"{nbytes:,} bytes {what}, at most {limit:,}" for what, nbytes, limit in limits if nbytes > limit]
    return found + [f"{path} is mapped: its bytes are not counted" for path in counted["mapped"]]


def accounting(counted: Sequence[Mapping[str, Any] | None], target: Target, fmt: str) -> list[str]:
    """A table of what each rank has read, in its own words where it is too much."""
    looking, other = target.looking[fmt], target.strategy_nbytes + OTHER_NBYTES
    limit = " + ".join(f"{nbytes:,} {what}" for what, nbytes in looking.items())
    lines = [
        f"| rank | own slices, bytes | tensor bytes read | read / own | while planning (at most {limit}) |",
        "|---|---|---|---|---|",
    ]
    faults = []
    for rank, (report, own) in enumerate(zip(counted, target.own, strict=True)):
        if report is None:
            raise ValueError(f"rank {rank} has not counted")
        read, planning = (report["phases"].get(phase, 0) for phase in ("load", "plan"))
        lines.append(f"| {rank} | {own:,} | {read:,} | {read / own:.4f} | {planning:,} |")
        faults += [f"- rank {rank} READS TOO MUCH: {text}" for text in overdrawn(report, own, looking, other)]
    return [*lines, "", *faults] if faults else lines


# ---------------------------------------------------------------------------------------------- report


def table(found: Mapping[str, Sequence[Job]]) -> list[str]:
    """Markdown rows."""
    columns = (
        *("case", "wall s, median (min - max)", "without imports, s"),
        *("peak RSS of a rank, MB", "with imports only, MB", "all ranks, MB"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for way, jobs in found.items():
        s, own = (
            Summary.of([Sample(seconds, j.max_rss, j.sum_rss) for j, seconds in timed])
            for timed in ([(j, j.seconds) for j in jobs], [(j, j.own_seconds) for j in jobs])
        )
        imported = max(j.imported_rss for j in jobs)
        lines.append(
            f"| {WAYS[way]} | {s.seconds:.2f} ({s.fastest:.2f} - {s.slowest:.2f}) | {own.seconds:.2f} "
            f"({own.fastest:.2f} - {own.slowest:.2f}) | {megabytes(s.max_rss)} | {megabytes(imported)} "
            f"| {megabytes(s.sum_rss)} |"
        )
    return lines


def introduction(args: argparse.Namespace) -> list[str]:
    """What the tables say."""
    return [
        "## Automatic transform",
        "",
        f"A job of several ranks starts from a checkpoint of {args.src}. Wall time is from the start of its",
        f"processes until the slowest rank has all of its parameters in memory; {args.runs} alternating runs, page",
        "cache warm. Memory is each rank's own peak (VmHWM), the highest of all runs. MindSpore's ranks import",
        "MindSpore, ours NumPy; a trainer imports MindSpore in either case, therefore the columns without imports and",
        "with imports only. MindSpore does what MindFormers 1.9.0 asks of it, with merged strategy files given; ranks",
        "that wait look every 0.05 s, where MindFormers looks every 5 s (.ckpt). For safetensors",
        "`load_distributed_checkpoint` gets an empty network and returns the parameters. In memory, a rank of ours",
        "must read tensors only where its own slices are: counted in a run of its own, and a failure where it is more.",
    ]


def join_lines(sizes: Sequence[int], runs: int) -> list[str]:
    """Seconds until N processes have found each other and know all strategies."""
    lines = ["", "### Ranks find each other", ""]
    for size in sizes:
        command = python("-m", "benchmarks.auto_join", str(size))
        seconds = [float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(runs)]
        s = Summary.of([Sample(number, 0, 0) for number in seconds])
        text = f"{s.seconds:.2f} s ({s.fastest:.2f} - {s.slowest:.2f})"
        progress(f"auto, {size} ranks join: {text}")
        lines.append(
            f"- {size} processes on this machine, until the last knows that all strategies are written: {text}"
        )
    return lines


def bench(state: Path, args: argparse.Namespace, log: Path) -> tuple[list[str], bool]:
    """The page's section, and whether all values are equal and no rank reads too much."""
    lines = introduction(args)
    for parallel in args.auto_dst:
        target = find_target(state, parallel, args)
        for fmt in args.format or FORMATS:
            ways = ("memory", "disk", *(() if args.no_upstream else UPSTREAM[fmt]))
            found = measure([spec_of(state, fmt, target, way) for way in ways], args.runs, log)
            counting = job(spec_of(state, fmt, target, "memory", count=True), log)
            compared = {**found, "memory": [*found["memory"], counting]}
            checks = [*same_values(compared), "", *accounting(counting.counted, target, fmt)]
            lines += ["", f"### {args.src} -> {parallel} ({target.world} ranks), {fmt}", "", *table(found), "", *checks]
    shutil.rmtree(state / "out_auto", ignore_errors=True)
    lines += join_lines(args.auto_join, args.runs)
    return lines, not any("DIFFERENT" in line or "READS TOO MUCH" in line for line in lines)
