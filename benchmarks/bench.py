"""Speed and memory beside `cp -r` and the real mindspore.transform_checkpoints, as whole processes.

    python -m benchmarks.bench --runs 5 --gb 1.6 --write docs/benchmarks.md
    python -m benchmarks.bench --quick          # seconds, to see that it works; the numbers mean nothing

Runs alternate between the cases.  Before each run, outside the timed part, the case's destination is removed, the
file systems are synced and the source is read into the page cache.  After the timed runs our output is compared with
MindSpore's tensor by tensor.  Exit code 1 when they differ, or when a rank of an automatic transform in memory
reads more than its slices (auto.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from math import prod
from pathlib import Path

from benchmarks import auto, dist_opt
from benchmarks.common import FORMATS, QUIET, Case, Row, generate, measure, progress, python, table, tree_nbytes
from benchmarks.measure import CommandFailedError

PARTS = ("start", "plan", "reshard", "auto", "dist_opt")


def world(parallel: str) -> int:
    """Ranks of `dp=2,mp=8,pp=4,opt=1`."""
    sizes = dict(part.split("=") for part in parallel.split(","))
    return prod(int(sizes.get(axis, 1)) for axis in ("dp", "mp", "pp"))


def convert(state: Path, src: Path, dst: Path, *more: str) -> tuple[str, ...]:
    """The product's command line for one state directory."""
    return python(
        *("-m", "transform_ckpt", "convert", src, dst, "--to", "mindspore"),
        *("--src-strategy", state / "src_strategy_merged.ckpt"),
        *("--dst-strategy", state / "dst_strategy_merged.ckpt"),
        *more,
    )


# ---------------------------------------------------------------------------------------------- cases


def reshard_cases(state: Path, fmt: str, args: argparse.Namespace) -> list[Case]:
    """All ways to reshard (or just copy) one format; each has its own destination."""
    src, group = state / f"src_{fmt}", f"{world(args.src)} -> {world(args.dst)} ranks, {fmt}"
    out = state / "out"
    strategies = (state / "src_strategy_merged.ckpt", state / "dst_strategy_merged.ckpt")

    def upstream(process_num: int) -> Case:
        dst = out / f"{fmt}_mindspore{process_num}"
        command = python("-m", "benchmarks.upstream", src, dst, *strategies, fmt, str(process_num))
        return Case(group, f"mindspore.transform_checkpoints, process_num={process_num}", command, src, dst)

    def ours(workers: int | None) -> Case:
        dst = out / f"{fmt}_ours{workers or ''}"
        flags = () if workers is None else ("--workers", str(workers))
        name = "transform-ckpt convert" + "".join(f" {flag}" for flag in flags)
        return Case(group, name, convert(state, src, dst, *flags), src, dst)

    copy = Case(group, "cp -r of the source", ("cp", "-r", str(src), str(out / f"{fmt}_cp")), src, out / f"{fmt}_cp")
    workers = args.workers or [None, 1]
    processes = [] if args.no_upstream else [1] if fmt == "ckpt" else [1, 2]
    return [copy, *map(ours, workers), *map(upstream, processes)]


def start_cases() -> list[Case]:
    """What every call pays."""
    return [
        Case("start", "python -c pass", python("-c", "pass")),
        Case("start", "import transform_ckpt", python("-c", "import transform_ckpt")),
        Case("start", "transform-ckpt --help", python("-m", "transform_ckpt", "--help")),
    ]


def plan_cases(plan: Path, fmt: str, args: argparse.Namespace) -> list[Case]:
    """A dry run over headers: no tensor byte exists."""
    name = f"plan {args.plan_model}: {world(args.plan_src)} -> {world(args.plan_dst)} ranks, {fmt}"
    command = convert(plan, plan / f"src_{fmt}", plan / "out" / fmt, "--dry-run", "--format", fmt)
    return [Case("plan", name, command, expect=f"{world(args.plan_dst)} files")]


# ---------------------------------------------------------------------------------------------- running


def compare(rows: Sequence[Row]) -> list[str]:
    """Compare each of our outputs with MindSpore's of the same group; a line each, with `DIFFERENT` in failures."""
    lines = []
    for theirs in (row.case for row in rows if "process_num=1" in row.case.name):
        for ours in (row.case for row in rows if row.case.group == theirs.group and "convert" in row.case.name):
            done = subprocess.run(
                python("-m", "benchmarks.same", str(ours.dst), str(theirs.dst)),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=False,
                env={**os.environ, **QUIET},
            )
            progress(done.stdout if done.returncode else "")
            verdict = done.stdout.strip().splitlines()[-1] if done.stdout else "DIFFERENT: the comparison failed"
            lines.append(f"{ours.group}: `{ours.name}` against MindSpore's output: {verdict}")
    return lines


# ---------------------------------------------------------------------------------------------- report


def versions() -> str:
    """The software that the numbers depend on."""
    names = ("numpy", "mindspore", "safetensors")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])


def proc_value(path: str, key: str) -> str:
    """The first `key : value` of a file in /proc."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def filesystem(path: Path) -> str:
    """Type of the file system that holds `path`."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def machine(directory: Path) -> str:
    """One line on what the numbers were measured on; no names and no paths."""
    memory_gb = int(proc_value("/proc/meminfo", "MemTotal").split()[0]) / 1e6
    cores = len(os.sched_getaffinity(0))
    cpu = proc_value("/proc/cpuinfo", "model name")
    return (
        f"{cpu}, {cores} cores, {memory_gb:.0f} GB, {filesystem(directory)}, Linux {platform.release()}; {versions()}"
    )


def report(
    rows: Sequence[Row],
    checks: Sequence[str],
    args: argparse.Namespace,
    sizes: Mapping[str, int],
    more: Sequence[str] = (),
) -> str:
    """The whole Markdown page; `more` are further sections."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; every number of this page is from one session of",
        "",
        f"    python -m benchmarks.bench {' '.join(shown_arguments(args))}",
        "",
        f"Machine: {machine(args.dir)}.",
        "",
        f"Whole processes from start to exit, {args.runs} alternating runs of each case (one where only memory is",
        "asked for), page cache warm, the destination removed before each run outside the timed part. Memory is the",
        "highest of all runs: of the largest single process (as `/usr/bin/time` shows it, mapped page cache",
        "included), and of all processes together, sampled.",
    ]
    for group in dict.fromkeys(row.case.group for row in rows):
        size = f" ({sizes[group] / 1e9:.2f} GB)" if group in sizes else ""
        lines += ["", f"## {group}{size}", "", *table([row for row in rows if row.case.group == group])]
    if checks:
        lines += ["", "## The same values", "", *(f"- {line}" for line in checks)]
    lines += ["", *more] if more else []
    return "\n".join(lines) + "\n"


def shown_arguments(args: argparse.Namespace) -> list[str]:
    """The flags that matter for the numbers, without places on this machine."""
    shown = [
        f"--runs {args.runs}",
        f"--gb {args.gb:g}",
        f"--layers {args.layers}",
        f"--src {args.src}",
        f"--dst {args.dst}",
    ]
    shown += [f"--only {part}" for part in args.only or []]
    shown += [f"--auto-dst {parallel}" for parallel in args.auto_dst]
    shown += [f"--large-gb {args.large_gb:g}"] if args.large_gb else []
    shown += [f"--dist-opt-gb {args.dist_opt_gb:g}"]
    return shown + [f"--workers {count}" for count in args.workers or []]


# ---------------------------------------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, default=Path("bench-output"), help="work directory (5 times --gb for each format)"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gb", type=float, default=1.6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--src", default="dp=2,pp=4,opt=1", help="parallel layout of the source")
    parser.add_argument("--dst", default="mp=2,pp=2", help="parallel layout of the destination")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", action="append", choices=FORMATS, help="repeat for more than one; default both")
    parser.add_argument(
        "--workers", action="append", type=int, metavar="N", help="repeat; default: the product's, and 1"
    )
    parser.add_argument("--no-upstream", action="store_true", help="leave MindSpore out (and the comparison with it)")
    parser.add_argument("--only", choices=PARTS, action="append", help="repeat; default all")
    parser.add_argument("--auto-dst", action="append", metavar="mp=2", help="layouts that a job starts with; repeat")
    parser.add_argument("--large-gb", type=float, default=0, help="also one run of this size, for its peak memory")
    parser.add_argument(
        "--dist-opt-gb", type=float, default=4.3, help="size of the Megatron checkpoints (6 times that)"
    )
    parser.add_argument("--plan-model", default="llama70b")
    parser.add_argument("--plan-src", default="dp=2,mp=8,pp=4,opt=1", help="64 ranks")
    parser.add_argument("--plan-dst", default="mp=8,pp=6", help="48 ranks")
    parser.add_argument("--quick", action="store_true", help="one run of 6 MB")
    parser.add_argument("--keep", action="store_true", help="keep the outputs of the last run")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the report there too")
    args = parser.parse_args(argv)
    if args.quick:
        args.runs, args.gb, args.dist_opt_gb = 1, 0.006, 0.006
    args.auto_dst = args.auto_dst or list(auto.TARGETS[:1] if args.quick else auto.TARGETS)
    args.auto_join = (4,) if args.quick else auto.JOIN_SIZES
    return args


def bench_start(args: argparse.Namespace, log: Path) -> list[Row]:
    """Import and --help; the first, cold run is not counted."""
    cases = start_cases()
    measure(cases, 1, log)
    return measure(cases, args.runs, log)


def bench_plan(args: argparse.Namespace, log: Path) -> list[Row]:
    """Planning from headers alone."""
    plan = args.dir / "plan"
    formats = args.format or FORMATS
    chosen = [flag for fmt in formats for flag in ("--format", fmt)]
    generate(
        "make_state",
        plan,
        "--model",
        args.plan_model,
        "--sparse",
        "--src",
        args.plan_src,
        "--dst",
        args.plan_dst,
        *chosen,
    )
    return [row for fmt in formats for row in measure(plan_cases(plan, fmt, args), args.runs, log)]


def reshard_state(args: argparse.Namespace) -> Path:
    """The state that is resharded, and that jobs start from."""
    flags = ("--gb", str(args.gb), "--layers", str(args.layers), "--src", args.src, "--dst", args.dst)
    state: Path = args.dir / "state"
    generate("make_state", state, *flags, "--seed", str(args.seed))
    return state


def bench_reshard(args: argparse.Namespace, log: Path) -> tuple[list[Row], list[str], dict[str, int]]:
    """Resharding, one format after the other; then the comparison."""
    state, rows, sizes = reshard_state(args), [], {}
    for fmt in args.format or FORMATS:
        cases = reshard_cases(state, fmt, args)
        sizes[cases[0].group] = tree_nbytes(state / f"src_{fmt}")
        rows += measure(cases, args.runs, log)
    checks = compare(rows)
    if not args.keep:
        shutil.rmtree(state / "out", ignore_errors=True)
    return rows, checks, sizes


def bench_large(args: argparse.Namespace, log: Path) -> tuple[list[Row], dict[str, int]]:
    """One run each of a much larger state, for its memory; one format after the other, to spare the disk."""
    state, rows, sizes = args.dir / "large", [], {}
    for fmt in args.format or FORMATS:
        shape = ("--gb", str(args.large_gb), "--layers", str(args.layers), "--src", args.src, "--dst", args.dst)
        generate("make_state", state, *shape, "--format", fmt, "--seed", str(args.seed))
        src, dst = state / f"src_{fmt}", state / "out" / fmt
        group = f"memory at {args.large_gb:g} GB, {fmt}"
        rows += measure([Case(group, "transform-ckpt convert", convert(state, src, dst), src, dst)], 1, log)
        sizes[group] = tree_nbytes(src)
        shutil.rmtree(state)
    return rows, sizes


def bench(args: argparse.Namespace) -> tuple[str, bool]:
    """Everything asked for; the report, and whether all comparisons were equal."""
    args.dir.mkdir(parents=True, exist_ok=True)
    log, parts = args.dir / "last.log", args.only or PARTS
    rows: list[Row] = []
    checks: list[str] = []
    sizes: dict[str, int] = {}
    if "reshard" in parts:
        rows, checks, sizes = bench_reshard(args, log)
    if args.large_gb:
        more, large = bench_large(args, log)
        rows, sizes = rows + more, sizes | large
    simple: dict[str, Callable[[argparse.Namespace, Path], list[Row]]] = {"start": bench_start, "plan": bench_plan}
    for part, measured in simple.items():
        if part in parts:
            rows += measured(args, log)
    if "dist_opt" in parts:
        more, equal, found = dist_opt.bench(args, log)
        rows, checks, sizes = rows + more, checks + equal, sizes | found
    sections, good = auto.bench(reshard_state(args), args, log) if "auto" in parts else ([], True)
    return report(rows, checks, args, sizes, sections), good and not any("DIFFERENT" in line for line in checks)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse_args(argv)
    try:
        text, equal = bench(args)
    except CommandFailedError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
