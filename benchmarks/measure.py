"""Run one command to its end and say how long it took and how much memory it held.  Linux; standard library only.

The measuring process stays small: a child's peak RSS starts at its parent's (vfork, then exec), so nothing large is
imported here.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")
SAMPLE_SECONDS = 0.02


class CommandFailedError(Exception):
    """A measured command ended with an exit code that was not expected."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run.  `max_rss` is the largest single process (as /usr/bin/time), `sum_rss` all at one moment, in bytes."""

    seconds: float
    max_rss: int
    sum_rss: int


@dataclass(frozen=True, slots=True)
class Summary:
    """All runs of one case: median, fastest and slowest wall time; the highest memory."""

    seconds: float
    fastest: float
    slowest: float
    max_rss: int
    sum_rss: int
    runs: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Summary:
        """Summarise at least one run."""
        seconds = sorted(sample.seconds for sample in samples)
        return cls(
            seconds=median(seconds),
            fastest=seconds[0],
            slowest=seconds[-1],
            max_rss=max(sample.max_rss for sample in samples),
            sum_rss=max(sample.sum_rss for sample in samples),
            runs=len(samples),
        )


def children(pid: int) -> list[int]:
    """Direct children of a process, of all its threads; empty once it is gone."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and all its descendants now; shared pages count in each."""
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_NBYTES
    except (OSError, IndexError):
        return 0
    return total + sum(tree_rss(child) for child in children(pid))


class _Sampler(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, tree_rss(self.pid))


def run(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, ok: Sequence[int] = (0,)) -> Sample:
    """Measure one command; its output goes to `log`.  Raises CommandFailedError with the log's end."""
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        sampler = _Sampler(process.pid)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    sampler.done.set()
    sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in ok:
        tail = log.read_text(errors="replace")[-2000:]
        raise CommandFailedError(f"exit code {process.returncode} of: {' '.join(command)}\n{tail}")
    max_rss = usage.ru_maxrss * 1024
    return Sample(seconds, max_rss, max(max_rss, sampler.peak))
