"""The ranks of one job find each other by notes: a run id, milestones, failures.

Notes (board.py) lie in `{output}/auto_trans/`, on ModelArts in the bucket:

    join/rank_{r}.json                       who rank r is: nonce, host, process, world
    join/run.json                            written by rank 0: the run's id and everyone's nonce
    {run}/ranks/{milestone}/rank_{r}.json    rank r has reached the milestone
    {run}/ranks/failed/rank_{r}.json         rank r has failed, and why

A rank belongs to the run when run.json holds the nonce that the rank has just drawn, so notes of an earlier run are
never taken for this one's.  Every wait has a timeout and names the ranks it waits for.  A rank that fails, or is seen
dead by a neighbour on its host, ends the others within seconds.  Cost at world size N: one listing a poll.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from transform_ckpt.auto.board import Board, LocalBoard
from transform_ckpt.errors import InputError, PartialError, TransformError, rank_ranges
from transform_ckpt.launcher import Launcher

DIRECTORY = "auto_trans"
LOADED = "loaded"
"""The last milestone: a rank that has reached it is no longer watched."""

_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 3.0
"""How long a rank that saw another's failure may still take to end by itself, with a message of its own; and how long
one that fails before the run is there stays, to tell those who come later."""


class OtherRankError(PartialError):
    """This rank ends because another has failed."""


class Rendezvous:
    """One rank's view of its job.  `say` takes lines for the log; `board` is where notes go, default the output."""

    def __init__(
        self,
        output: str,
        launcher: Launcher,
        timeout: float,
        say: Callable[[str], None],
        board: Board | None = None,
    ) -> None:
        self.root = os.path.join(os.path.abspath(output), DIRECTORY)
        self.launcher, self.timeout, self.say = launcher, timeout, say
        self.board = board or LocalBoard(self.root)
        self.run_id = ""
        self._me = _identity(launcher)
        self._peers: Mapping[str, Any] = {}
        self._ended = threading.Event()

    @property
    def directory(self) -> str:
        """This run's own directory, on this host."""
        return os.path.join(self.root, self.run_id)

    def _folder(self, milestone: str) -> str:
        return f"{self.run_id}/ranks/{milestone}"

    # ------------------------------------------------------------------------------------------- joining

    def join(self) -> str:
        """Become part of the run; its id.

        Rank 0 waits for everyone, the others for rank 0: InputError with who is not seen within the timeout,
        PartialError when one has failed already.
        """
        if self.launcher.rank == 0:
            self._open_run()
        else:
            self._await_run()
        self.reach("joined")
        if self.launcher.world > 1:
            threading.Thread(target=self._watch, name="auto_trans", daemon=True).start()
        return self.run_id

    def _open_run(self) -> None:
        """Rank 0 gathers everyone before it goes on: MindSpore's init() keeps all other threads from running."""
        for rank in self._ranks_in("join"):  # of an earlier run; a rank that was quicker than this one writes again
            self.board.delete(_hello(rank))
        run_id = time.strftime("%Y%m%d_%H%M%S_", time.gmtime()) + self._me["nonce"][:6]
        self.board.write(_hello(0), self._me)
        for left in self._pauses():
            found = {rank: self.board.read(_hello(rank)) for rank in self._ranks_in("join")}
            peers = {str(rank): peer for rank, peer in found.items() if peer.get("nonce")}
            fault = self._fault(peers)
            if fault:
                self.board.write(_hello(0), {**self._me, "failed": fault})
                raise PartialError(fault)
            if len(peers) == self.launcher.world:
                self.run_id, self._peers = run_id, peers
                self.board.write("join/run.json", {"run": run_id, "peers": peers})
                return
            if left <= 0:
                raise InputError(self._nobody())

    def _fault(self, peers: Mapping[str, Any]) -> str | None:
        """Why these are not the ranks of one job."""
        if peers.get("0", {}).get("nonce") != self._me["nonce"]:
            return f"another job uses {self.board.where}: give each job an output_dir of its own"
        for rank, peer in peers.items():
            if peer.get("failed"):
                return f"rank {rank} has failed: {peer['failed']}"
            if peer.get("world") != self.launcher.world:
                return (
                    f"rank 0 belongs to {self.launcher.world} ranks, rank {rank} to {peer.get('world')}: start all "
                    "ranks of one job with one world size, and give each job an output_dir of its own"
                )
        return None

    def _await_run(self) -> None:
        mine = _hello(self.launcher.rank)
        began: float | None = None
        written = False
        for left in self._pauses():
            holder = self.board.read(mine).get("nonce")
            if written and holder not in (None, self._me["nonce"]):
                raise InputError(
                    f"{self.board.where}: another process is rank {self.launcher.rank}, too: give each job an "
                    "output_dir of its own, and end what an earlier job has left running"
                )
            if holder != self._me["nonce"]:  # of an earlier run, or removed by rank 0, which was slower than this one
                self.board.write(mine, self._me)
                written, began = True, began or self.board.time(mine)
            found = self.board.read("join/run.json")
            peers = found.get("peers", {})
            if peers.get(str(self.launcher.rank), {}).get("nonce") == self._me["nonce"]:
                self.run_id, self._peers = str(found["run"]), peers
                return
            reason = self._of_rank_0(began)
            if reason:
                raise OtherRankError(reason if reason.startswith("rank ") else f"rank 0 has failed: {reason}")
            if left <= 0:
                raise InputError(self._nobody())

    def _of_rank_0(self, began: float | None) -> str | None:
        """Why rank 0 has failed before it could start the run: its note is newer than this rank's."""
        reason, written = self.board.read(_hello(0)).get("failed"), self.board.time(_hello(0))
        newer = began is not None and written is not None and written >= began
        return str(reason) if reason and newer else None

    def _nobody(self) -> str:
        seen = [rank for rank in self._ranks_in("join") if rank < self.launcher.world]
        absent = sorted(set(range(self.launcher.world)) - set(seen))
        hosts = {str(self.board.read(_hello(rank)).get("host")) for rank in seen}
        missing = f"of ranks {rank_ranges(absent)} there is no sign" if absent else "rank 0 has not started the run"
        remedy = (
            f"only host {self._me['host']} writes here: output_dir must lie on storage that all nodes share, or set "
            "transform_in_memory: True, which shares nothing"
            if hosts == {self._me["host"]} and absent
            else "look at the logs of those ranks"
        )
        return f"{self.board.where}: rank {self.launcher.rank} waited {self.timeout:g} s, {missing}: {remedy}"

    # ------------------------------------------------------------------------------------------- milestones

    def reach(self, milestone: str) -> bool:
        """Record that this rank is there; True for a rank that finds all ranks there (at least the last does)."""
        self.board.write(f"{self._folder(milestone)}/rank_{self.launcher.rank}.json", {})
        return len(self.reached(milestone)) >= self.launcher.world

    def reached(self, milestone: str) -> set[int]:
        """Ranks that are there."""
        return self._ranks_in(self._folder(milestone))

    def wait(self, milestone: str, ranks: Iterable[int]) -> None:
        """Until all `ranks` are there; PartialError when one has failed, or naming who is not there in time."""
        wanted = set(ranks)
        for left in self._pauses():
            absent = wanted - self.reached(milestone)
            if not absent:
                return
            self.check()
            if left <= 0:
                raise PartialError(
                    f"{self.board.where}: rank {self.launcher.rank} waited {self.timeout:g} s for {milestone!r} of "
                    f"ranks {rank_ranges(absent)}: look at their logs; transform_timeout is the limit"
                )

    # ------------------------------------------------------------------------------------------- failures

    def check(self) -> None:
        """OtherRankError when a rank of this run has failed."""
        for rank, reason in self._failures():
            raise OtherRankError(self._why(rank, reason))

    def _why(self, rank: int, reason: str) -> str:
        me = self.launcher.rank
        return reason if rank == me else f"rank {rank} has failed, so rank {me} ends too: {reason}"

    def fail(self, error: BaseException) -> None:
        """Tell the others; never raises, for it is called while an error is on its way.

        Nothing is told of an error that is another rank's: its own note says more.
        """
        reason = str(error) or type(error).__name__
        if isinstance(error, OtherRankError):
            return
        with suppress(OSError, TransformError):
            if self.run_id:
                self._record_failure(self.launcher.rank, reason)
            elif self.launcher.world > 1:
                self._fail_early(reason)

    def _fail_early(self, reason: str) -> None:
        """Again and again: for those who come later, and since rank 0 clears the folder when it does."""
        mine = _hello(self.launcher.rank)
        began: float | None = None
        for _ in self._pauses(_GRACE_SECONDS):
            self.board.write(mine, {**self._me, "failed": reason})
            began = began or self.board.time(mine)
            if self.launcher.rank != 0 and self._of_rank_0(began):
                return

    def loaded(self) -> None:
        """This rank has all that it needs of the others, and need not be watched any more."""
        self.reach(LOADED)

    def leave(self) -> None:
        """No longer watch, nor be ended by, the others."""
        self._ended.set()

    def _failures(self) -> list[tuple[int, str]]:
        folder = self._folder("failed")
        ranks = sorted(self._ranks_in(folder))
        return [(r, str(self.board.read(f"{folder}/rank_{r}.json").get("reason", "no reason given"))) for r in ranks]

    def _record_failure(self, rank: int, reason: str) -> None:
        """The first word counts: a rank that ends says why before it is gone."""
        if rank not in self._ranks_in(self._folder("failed")):
            self.board.write(f"{self._folder('failed')}/rank_{rank}.json", {"rank": rank, "reason": reason})

    def _watch(self) -> None:
        """Everyone watches its host's processes, and the record of failures, until all have loaded."""
        pause = max(_WATCH_SECONDS, self.board.poll_seconds[1])
        watching = True
        while watching and not self._ended.is_set():
            try:
                watching = self._look_around()
            except (OSError, TransformError) as error:  # storage hiccups: the next round may be better
                self.say(f"watching the other ranks: {error}")
            self._ended.wait(pause)

    def _look_around(self) -> bool:
        """End this process when another rank has failed; False when all have loaded."""
        for rank, reason in self._failures():
            self._end_here(rank, reason)
        loaded = self.reached(LOADED)
        for key, peer in self._peers.items():
            rank = int(key)
            here = all(peer.get(key) == self._me[key] for key in ("host", "machine"))
            if rank != self.launcher.rank and rank not in loaded and here:
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
        with suppress(OSError, ValueError):
            sys.stderr.write(f"error: {self._why(rank, reason)}\n")
            sys.stderr.flush()
        os._exit(PartialError.exit_code)

    # ------------------------------------------------------------------------------------------- notes

    def _ranks_in(self, folder: str) -> set[int]:
        """Ranks that have a note `rank_{r}.json` in a folder."""
        stems = (name.removesuffix(".json") for name in self.board.names(folder))
        return {int(stem[5:]) for stem in stems if stem.startswith("rank_") and stem[5:].isdigit()}

    def _pauses(self, seconds: float | None = None) -> Iterable[float]:
        """Seconds left (of the timeout), with a pause before each but the first; the last is 0 or less."""
        pause, longest = self.board.poll_seconds
        end = time.monotonic() + (self.timeout if seconds is None else seconds)
        while True:
            left = end - time.monotonic()
            yield left
            if left <= 0:
                return
            time.sleep(min(pause, max(left, 0.001)))
            pause = min(pause * 1.5, longest)


def _hello(rank: int) -> str:
    return f"join/rank_{rank}.json"


def _identity(launcher: Launcher) -> dict[str, Any]:
    return {
        "nonce": secrets.token_hex(16),
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "world": launcher.world,
    }


def _machine() -> str:
    """Where a process number means the same: nodes may all be named localhost, containers may share a name."""
    boot, numbers = "", ""
    with suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            boot = stream.read().strip()
        numbers = os.readlink("/proc/self/ns/pid")
    return f"{boot} {numbers}"


def _started(pid: int) -> str:
    """When a process of this host was started (clock ticks since boot, proc(5) field 22); "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
