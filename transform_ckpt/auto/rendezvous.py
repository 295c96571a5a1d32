"""The ranks of one job find each other through the output directory: a run id, milestones, failures.

Files below `{output}/auto_trans/`:

    join/rank_{r}.json                  who rank r is: nonce, host, process, world
    join/run.json                       written by rank 0: the run's id and everyone's nonce
    {run}/ranks/{milestone}/rank_{r}    rank r has reached the milestone
    {run}/ranks/failed/rank_{r}.json    rank r has failed, and why

A rank belongs to the run when run.json holds the nonce that the rank has just drawn, so files of an earlier run are
never taken for this one's.  Every wait has a timeout and names the ranks it waits for.  A rank that fails, or is seen
dead by a neighbour on its host, ends the others within seconds.  Cost at world size N: one directory listing a poll.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from transform_ckpt.errors import InputError, PartialError, StorageError, TransformError, rank_ranges
from transform_ckpt.formats.files import storage_error
from transform_ckpt.launcher import Launcher

DIRECTORY = "auto_trans"
LOADED = "loaded"
"""The last milestone: a rank that has reached it is no longer watched."""

_POLL_SECONDS = (0.02, 0.5)
"""First and longest pause between two looks."""

_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 3.0
"""How long a rank that saw another's failure may still take to end by itself, with a message of its own."""


class Rendezvous:
    """One rank's view of its job.  `say` takes lines for the log."""

    def __init__(self, output: str, launcher: Launcher, timeout: float, say: Callable[[str], None]) -> None:
        self.root = os.path.join(os.path.abspath(output), DIRECTORY)
        self.launcher, self.timeout, self.say = launcher, timeout, say
        self.run_id = ""
        self._me = _identity(launcher)
        self._peers: Mapping[str, Any] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def directory(self) -> str:
        """This run's own directory."""
        return os.path.join(self.root, self.run_id)

    def _folder(self, milestone: str) -> str:
        return os.path.join(self.directory, "ranks", milestone)

    # ------------------------------------------------------------------------------------------- joining

    def join(self) -> str:
        """Become part of the run; its id.

        Rank 0 waits for everyone, the others for rank 0: InputError with who is not seen within the timeout,
        PartialError when one has failed already.
        """
        folder = os.path.join(self.root, "join")
        _make(folder)
        try:
            if self.launcher.rank == 0:
                self._open_run(folder)
            else:
                self._await_run(folder)
            _make(self._folder("failed"))
        except OSError as error:
            raise storage_error(folder, error, "joining the other ranks") from None
        self.reach("joined")
        if self.launcher.world > 1:
            self._thread = threading.Thread(target=self._watch, name="auto_trans", daemon=True)
            self._thread.start()
        return self.run_id

    def _open_run(self, folder: str) -> None:
        """Rank 0 gathers everyone before it goes on: MindSpore's init() keeps all other threads from running."""
        for rank in _ranks_in(folder):  # of an earlier run; a rank that was quicker than this one writes again
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, f"rank_{rank}.json"))
        self.run_id = time.strftime("%Y%m%d_%H%M%S_", time.gmtime()) + self._me["nonce"][:6]
        _make(self.directory)
        _write_json(os.path.join(folder, "rank_0.json"), self._me)
        for left in _pauses(self.timeout):
            found = {rank: _read_json(os.path.join(folder, f"rank_{rank}.json")) for rank in _ranks_in(folder)}
            peers = {str(rank): peer for rank, peer in found.items() if peer.get("nonce")}
            fault = self._fault(peers)
            if fault:
                _write_json(os.path.join(folder, "rank_0.json"), {**self._me, "failed": fault})
                raise PartialError(fault)
            if len(peers) == self.launcher.world:
                self._peers = peers
                _write_json(os.path.join(folder, "run.json"), {"run": self.run_id, "peers": peers})
                return
            if left <= 0:
                raise InputError(self._nobody(folder))

    def _fault(self, peers: Mapping[str, Any]) -> str | None:
        """Why these are not the ranks of one job."""
        if peers.get("0", {}).get("nonce") != self._me["nonce"]:
            return f"another job uses {self.root}: give each job an output_dir of its own"
        for rank, peer in peers.items():
            if peer.get("failed"):
                return f"rank {rank} has failed: {peer['failed']}"
            if peer.get("world") != self.launcher.world:
                return (
                    f"rank 0 belongs to {self.launcher.world} ranks, rank {rank} to {peer.get('world')}: start all "
                    "ranks of one job with one world size, and give each job an output_dir of its own"
                )
        return None

    def _await_run(self, folder: str) -> None:
        me = str(self.launcher.rank)
        mine, run = os.path.join(folder, f"rank_{me}.json"), os.path.join(folder, "run.json")
        began = 0.0
        for left in _pauses(self.timeout):
            if _read_json(mine).get("nonce") != self._me["nonce"]:
                _write_json(mine, self._me)
                began = began or os.stat(mine).st_mtime
            found = _read_json(run)
            peers = found.get("peers", {})
            if peers.get(me, {}).get("nonce") == self._me["nonce"]:
                self.run_id, self._peers = str(found["run"]), peers
                return
            _check_early_failures(folder, began)
            if left <= 0:
                raise InputError(self._nobody(folder))

    def _nobody(self, folder: str) -> str:
        seen = [rank for rank in _ranks_in(folder) if rank < self.launcher.world]
        absent = sorted(set(range(self.launcher.world)) - set(seen))
        hosts = {str(_read_json(os.path.join(folder, f"rank_{rank}.json")).get("host")) for rank in seen}
        missing = f"of ranks {rank_ranges(absent)} there is no sign" if absent else "rank 0 has not started the run"
        remedy = (
            f"only host {self._me['host']} writes here: output_dir must lie on storage that all nodes share, or set "
            "transform_in_memory: True, which shares nothing"
            if hosts == {self._me["host"]} and absent
            else "look at the logs of those ranks"
        )
        return f"{folder}: rank {self.launcher.rank} waited {self.timeout:g} s, {missing}: {remedy}"

    # ------------------------------------------------------------------------------------------- milestones

    def reach(self, milestone: str) -> bool:
        """Record that this rank is there; True for a rank that finds all ranks there (at least the last does)."""
        folder = self._folder(milestone)
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, f"rank_{self.launcher.rank}"), "w", encoding="utf-8"):
                pass
        except OSError as error:
            raise storage_error(folder, error, "recording the milestone") from None
        return len(_ranks_in(folder)) >= self.launcher.world

    def reached(self, milestone: str) -> set[int]:
        """Ranks that are there."""
        return set(_ranks_in(self._folder(milestone)))

    def wait(self, milestone: str, ranks: Iterable[int]) -> None:
        """Until all `ranks` are there; PartialError when one has failed, or naming who is not there in time."""
        wanted = set(ranks)
        for left in _pauses(self.timeout):
            absent = wanted - self.reached(milestone)
            if not absent:
                return
            self.check()
            if left <= 0:
                raise PartialError(
                    f"{self.directory}: rank {self.launcher.rank} waited {self.timeout:g} s for {milestone!r} of ranks "
                    f"{rank_ranges(absent)}: look at their logs; transform_timeout is the limit"
                )

    # ------------------------------------------------------------------------------------------- failures

    def check(self) -> None:
        """PartialError when a rank of this run has failed."""
        for rank, reason in self._failures():
            raise PartialError(f"rank {rank} has failed, so rank {self.launcher.rank} ends too: {reason}")

    def fail(self, reason: str) -> None:
        """Tell the others; never raises, for it is called while an error is on its way."""
        with suppress(OSError, TransformError):
            if self.run_id:
                self._record_failure(self.launcher.rank, reason)
            elif self.launcher.world > 1:
                folder = os.path.join(self.root, "join")
                _make(folder)
                _write_json(os.path.join(folder, f"rank_{self.launcher.rank}.json"), {**self._me, "failed": reason})

    def loaded(self) -> None:
        """This rank has all that it needs of the others, and need not be watched any more."""
        self.reach(LOADED)

    def leave(self) -> None:
        """No longer watch, nor be ended by, the others."""
        self._ended.set()

    def _failures(self) -> list[tuple[int, str]]:
        folder = self._folder("failed")
        found = []
        for rank in _ranks_in(folder):
            if rank != self.launcher.rank:
                reason = _read_json(os.path.join(folder, f"rank_{rank}.json")).get("reason", "no reason given")
                found.append((rank, str(reason)))
        return found

    def _record_failure(self, rank: int, reason: str) -> None:
        _write_json(os.path.join(self._folder("failed"), f"rank_{rank}.json"), {"rank": rank, "reason": reason})

    def _watch(self) -> None:
        """Everyone watches its host's processes, and the record of failures, until all have loaded."""
        watching = True
        while watching and not self._ended.is_set():
            try:
                watching = self._look_around()
            except (OSError, TransformError) as error:  # storage hiccups: the next round may be better
                self.say(f"watching the other ranks: {error}")
            self._ended.wait(_WATCH_SECONDS)

    def _look_around(self) -> bool:
        """End this process when another rank has failed; False when all have loaded."""
        for rank, reason in self._failures():
            self._end_here(rank, reason)
        loaded = self.reached(LOADED)
        for key, peer in self._peers.items():
            rank = int(key)
            if rank != self.launcher.rank and rank not in loaded and peer.get("host") == self._me["host"]:
                self._check_alive(rank, peer)
        return len(loaded) < self.launcher.world

    def _check_alive(self, rank: int, peer: Mapping[str, Any]) -> None:
        if _started(int(peer["pid"])) == peer["started"] or rank in self.reached(LOADED):
            return
        self._record_failure(rank, f"its process ({peer['pid']} on {peer['host']}) is gone")

    def _end_here(self, rank: int, reason: str) -> None:
        """The main thread gets a moment to end with a message of its own; in a collective it never would."""
        if self._ended.wait(_GRACE_SECONDS):
            return
        text = f"error: rank {rank} has failed, so rank {self.launcher.rank} ends too: {reason}\n"
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()
        os._exit(PartialError.exit_code)


def _identity(launcher: Launcher) -> dict[str, Any]:
    return {
        "nonce": secrets.token_hex(16),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "world": launcher.world,
    }


def _started(pid: int) -> str:
    """When a process of this host was started (clock ticks since boot, proc(5) field 22); "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _check_early_failures(folder: str, began: float) -> None:
    """InputError when rank 0 has failed before it could start the run, since `began` (a time of the file system)."""
    path = os.path.join(folder, "rank_0.json")
    reason = _read_json(path).get("failed")
    with suppress(FileNotFoundError):
        if reason and os.stat(path).st_mtime >= began:
            raise PartialError(f"rank 0 has failed: {reason}")


def _pauses(timeout: float) -> Iterable[float]:
    """Seconds left, with a pause before each but the first; the last is 0 or less."""
    end, pause = time.monotonic() + timeout, _POLL_SECONDS[0]
    while True:
        left = end - time.monotonic()
        yield left
        if left <= 0:
            return
        time.sleep(min(pause, max(left, 0.001)))
        pause = min(pause * 1.5, _POLL_SECONDS[1])


def _make(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be made ({error.strerror}): output_dir must be a directory that every rank may write"
        ) from None


def _ranks_in(folder: str) -> Sequence[int]:
    """Ranks that have an entry `rank_{r}` or `rank_{r}.json` in a folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    stems = (n.removesuffix(".json") for n in names)
    return sorted(int(s[5:]) for s in stems if s.startswith("rank_") and s[5:].isdigit())


def _read_json(path: str) -> dict[str, Any]:
    """A small file's content; {} when it is not there, or not whole (it is replaced in one step, so: soon)."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: str, content: Mapping[str, Any]) -> None:
    part = f"{path}.{os.getpid()}.tmp"
    with open(part, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
    os.replace(part, path)
