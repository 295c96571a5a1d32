"""Conversions of a Megatron checkpoint with its distributed optimizer beside `cp -r` and a loop over torch.load.

Both containers: the list of buckets of megatron-core 0.6 with its param_map, and the coalesced one of 0.16 without.
What is made of them is compared with what the loop makes, with the same model written for the other layout, and (the
way back) with the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import FORMATS, QUIET, Case, Row, generate, measure, progress, python, tree_nbytes

CONTAINERS = ("list", "coalesced")
SRC, DST = (2, 2), (4, 1)
"""TP and PP."""
LOOP = "a torch.load / save_checkpoint loop, as MindSpeed's converter works"


@dataclass(frozen=True, slots=True)
class Check:
    """Two directories that must hold the same."""

    group: str
    name: str
    directories: tuple[Path, Path]


TOOLS = Path(__file__).resolve().parents[1] / "tools"


def to_mindspore(src: Path, dst: Path, fmt: str, maps: Sequence[str | Path] = ()) -> tuple[str, ...]:
    """With MindSpeed's flags."""
    flags = ("--megatron-path", src, "--ms-path", dst, "--format", fmt)
    return python(TOOLS / "convert_pt2ckpt.py", *flags, *maps)


def to_megatron(src: Path, dst: Path) -> tuple[str, ...]:
    """Back, with MindSpeed's flags; pt_meta/ knows the sizes."""
    return python(TOOLS / "convert_ckpt2pt.py", "--ms-path", src, "--megatron-path", dst)


def reshard(src: Path, dst: Path, maps: Sequence[str | Path] = ()) -> tuple[str, ...]:
    """To the other layout."""
    sizes = (text for name, size in zip(("--tp", "--pp"), DST, strict=True) for text in (name, str(size)))
    return python("-m", "transform_ckpt", "convert", src, dst, "--from", "megatron", "--to", "megatron", *sizes, *maps)


def source(args: argparse.Namespace, container: str) -> Path:
    """The checkpoint that is converted."""
    return _made(args, f"megatron_{container}", container, SRC)


def _made(args: argparse.Namespace, name: str, container: str, layout: tuple[int, int]) -> Path:
    out: Path = args.dir / name
    flags = {"gb": args.dist_opt_gb, "container": container, "tp": layout[0], "pp": layout[1], "seed": args.seed}
    generate("make_dist_opt", out, *(text for key, value in flags.items() for text in (f"--{key}", str(value))))
    return out


def title(container: str) -> str:
    """Of a table."""
    return f"Megatron with its distributed optimizer ({container}), TP {SRC[0]} PP {SRC[1]}"


def there(args: argparse.Namespace, container: str, src: Path, out: Path) -> tuple[list[Case], list[Check]]:
    """Copies and conversions of one checkpoint."""
    group = title(container)
    maps = ("--param-map-path", src / "param_map") if container == "list" else ()
    cases = [Case(group, "cp -r of the source", ("cp", "-r", str(src), str(out / "cp")), src, out / "cp", kept=False)]
    for fmt in args.format or FORMATS:
        command = to_mindspore(src, out / fmt, fmt, maps)
        cases.append(Case(group, f"convert_pt2ckpt.py, {fmt}", command, src, out / fmt, kept=fmt == "ckpt"))
    tp, pp = DST
    command = reshard(src, out / "megatron", maps)
    resharded = Case(group, f"transform-ckpt convert to TP {tp} PP {pp}", command, src, out / "megatron")
    checks = [Check(group, resharded.name, (out / "megatron", args.dir / "megatron_expected"))]
    cases.append(resharded)
    if container == "list" and not args.no_upstream and "ckpt" in (args.format or FORMATS):
        command = python("-m", "benchmarks.torch_loop", src, out / "loop")
        cases.append(Case(group, LOOP, command, src, out / "loop"))
        checks.append(Check(group, "convert_pt2ckpt.py, ckpt, and the loop", (out / "ckpt", out / "loop")))
    return cases, checks


def back(container: str, src: Path, converted: Path, out: Path) -> tuple[list[Case], list[Check]]:
    """From MindSpore's files to Megatron's again."""
    group = f"back from MindSpore (.ckpt) to {title(container)}"
    dst = out / "back"
    copies = ((converted, "cp -r of the source"), (src, "what comes out, copied by cp -r"))
    cases = [
        Case(group, name, ("cp", "-r", str(what), str(out / "cp")), what, out / "cp", kept=False)
        for what, name in copies
    ]
    cases.append(Case(group, "convert_ckpt2pt.py", to_megatron(converted, dst), converted, dst))
    return cases, [Check(group, "convert_ckpt2pt.py, and the source of the first conversion", (dst, src))]


def compare(checks: list[Check]) -> Iterator[str]:
    """A line each, with `DIFFERENT` in failures."""
    for check in checks:
        done = subprocess.run(
            python("-m", "benchmarks.dist_opt_same", *check.directories),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
            env={**os.environ, **QUIET},
        )
        progress(done.stdout if done.returncode else "")
        verdict = done.stdout.strip().splitlines()[-1] if done.stdout else "DIFFERENT: the comparison failed"
        yield f"{check.group}: {check.name}: {verdict}"


def bench(args: argparse.Namespace, log: Path) -> tuple[list[Row], list[str], dict[str, int]]:
    """Rows, comparisons, and how long the sources of each table are; one container after the other."""
    rows: list[Row] = []
    lines: list[str] = []
    sizes: dict[str, int] = {}
    for container in CONTAINERS:
        src, out = source(args, container), args.dir / "out_dist_opt"
        cases, checks = there(args, container, src, out)
        rows += measure(cases, args.runs, log)
        sizes[cases[0].group] = tree_nbytes(src)
        expected = _made(args, "megatron_expected", container, DST)
        lines += compare(checks)
        for path in (expected, out / "megatron", out / "loop"):
            shutil.rmtree(path, ignore_errors=True)
        if (out / "ckpt").is_dir():
            cases, checks = back(container, src, out / "ckpt", out)
            rows += measure(cases, args.runs, log)
            sizes[cases[0].group] = tree_nbytes(out / "ckpt")
            lines += compare(checks)
        for path in (out, src):
            if not args.keep:
                shutil.rmtree(path)
    return rows, lines, sizes
