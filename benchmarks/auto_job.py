"""All ranks of one job as processes of their own: started together, measured until the slowest has its parameters."""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.common import QUIET, python
from benchmarks.measure import CommandFailedError

LIMIT_SECONDS = 1800.0
Process = subprocess.Popen[str]


@dataclass(frozen=True, slots=True)
class Job:
    """What became of one job; times in seconds, memory in bytes.

    `seconds`: from the first rank's start until the slowest has loaded.  `own_seconds`: the slowest without its
    imports.  `max_rss`, `sum_rss`: the ranks' peaks; `imported_rss`: the highest peak when only imports were done.
    """

    seconds: float
    own_seconds: float
    max_rss: int
    sum_rss: int
    imported_rss: int
    digests: tuple[Mapping[str, str], ...]
    counted: tuple[Mapping[str, Any] | None, ...]


def run_job(spec: Mapping[str, Any], log: Path) -> Job:
    """Start ranks 0 ... world - 1 of a spec (auto_rank.Spec without `rank`).  CommandFailedError when one fails."""
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        start = time.monotonic()
        ranks = [_start({**spec, "rank": rank}, output) for rank in range(spec["world"])]
        stack.callback(_end, ranks)
        limit = threading.Timer(LIMIT_SECONDS, _kill, [ranks])
        limit.start()
        stack.callback(limit.cancel)
        reports = _reports(ranks, log)
        for rank in ranks:
            _pipe(rank.stdin).write("\n")  # all have loaded: digests slow down nobody
            _pipe(rank.stdin).flush()
        return _summary(start, reports, _reports(ranks, log))


def _start(spec: Mapping[str, Any], output: IO[bytes]) -> Process:
    return subprocess.Popen(
        python("-m", "benchmarks.auto_rank", json.dumps(spec)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
        env={**os.environ, **QUIET},
    )


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("a rank without pipes")
    return stream


def _reports(ranks: Sequence[Process], log: Path) -> list[dict[str, Any]]:
    """One line of each rank; whichever fails first ends it."""
    waiting = {_pipe(rank.stdout).fileno(): number for number, rank in enumerate(ranks)}
    found: dict[int, dict[str, Any]] = {}
    while waiting:
        for fd in select.select(list(waiting), [], [])[0]:
            number = waiting.pop(fd)
            text = _pipe(ranks[number].stdout).readline()
            if not text:
                code = ranks[number].wait()
                tail = log.read_text(errors="replace")[-2000:]
                raise CommandFailedError(f"exit code {code} of rank {number}: {ranks[number].args!r}\n{tail}")
            found[number] = json.loads(text)
    return [found[number] for number in range(len(ranks))]


def _kill(ranks: Sequence[Process]) -> None:
    for rank in ranks:
        rank.kill()


def _end(ranks: Sequence[Process]) -> None:
    """Nobody is needed any more, and nobody is left behind."""
    _kill(ranks)
    for rank in ranks:
        rank.communicate()


def _summary(start: float, reports: Sequence[Mapping[str, Any]], digests: Sequence[Mapping[str, str]]) -> Job:
    peaks = [report["peak"] for report in reports]
    return Job(
        seconds=max(report["loaded"] for report in reports) - start,
        own_seconds=max(report["loaded"] - report["imported"] for report in reports),
        max_rss=max(peaks),
        sum_rss=sum(peaks),
        imported_rss=max(report["imported_peak"] for report in reports),
        digests=tuple(digests),
        counted=tuple(report["counted"] for report in reports),
    )
