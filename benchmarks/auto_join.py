"""How long N ranks need to find each other: python -m benchmarks.auto_join N; prints seconds.

N processes, forked after all imports and held until the last is there, go from nothing to "every strategy is written",
as a job with auto_trans_ckpt does before it plans.  There are no tensors.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

from strategy.generate import for_parameters
from strategy.layout import Strategy
from transform_ckpt.auto.request import Request
from transform_ckpt.auto.transform import AutoTransform
from transform_ckpt.launcher import Launcher

LIMIT_SECONDS = 120.0
NAME = "model.layers.0.feed_forward.w1.weight"


def join(rank: int, world: int, output: str, strategy: Strategy) -> None:
    """One rank."""
    launcher = Launcher(rank, world, "benchmark", local_world=world)
    job = AutoTransform(Request(output, output, timeout=LIMIT_SECONDS), launcher, lambda _: None)
    job.use_strategy(strategy)
    job.rendezvous.wait("strategy_known", range(world))


def child(rank: int, world: int, output: str, strategy: Strategy, go: int, done: int) -> None:
    """Wait for the word, join, say when, stay until the parent ends this process."""
    os.read(go, 1)
    try:
        join(rank, world, output, strategy)
        os.write(done, time.monotonic().hex().encode() + b"\n")
        time.sleep(LIMIT_SECONDS)
    finally:
        os._exit(1)


def seconds(world: int, output: str) -> float:
    """Until the last rank is through."""
    strategy = for_parameters({NAME: (world * 8, 8)}, {NAME: "F32"}, f"mp={world}")
    (go, start), (reports, done) = os.pipe(), os.pipe()
    pids: list[int] = []
    try:
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                child(rank, world, output, strategy, go, done)
            pids.append(pid)
        os.close(done)
        began = time.monotonic()
        os.write(start, b"." * world)
        with os.fdopen(reports) as lines:
            ended = [float.fromhex(line) for _, line in zip(range(world), lines, strict=False)]
    finally:
        for pid in pids:
            os.kill(pid, 9)
        for pid in pids:
            os.waitpid(pid, 0)
    if len(ended) < world:
        raise SystemExit(f"{world - len(ended)} of {world} ranks have failed")
    return max(ended) - began


def main(count: str) -> None:
    """Entry point."""
    with tempfile.TemporaryDirectory() as output:
        print(f"{seconds(int(count), output):.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
