"""Starts a script under the real msrun and always ends what it started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 400
"""Starting takes 15 to 40 s; with several jobs on two cores everything takes ten times longer."""


class MsrunError(AssertionError):
    """The job failed or took too long; the message ends with the end of every log."""


def run_msrun(
    script_args: Sequence[str | os.PathLike[str]],
    workers: int,
    cwd: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT_S,
) -> dict[str, str]:
    """Run `script_args` (the script first) in `workers` processes and a scheduler; log by name ("worker_0").

    msrun calls plain `python`: that of this environment is put first on the path.  `env` is added to the environment.
    MsrunError when msrun does not end with 0 within `timeout` seconds.
    """
    logs = Path(cwd) / "msrun_log"
    logs.mkdir(parents=True, exist_ok=True)
    binaries = sysconfig.get_path("scripts")
    command = [
        str(Path(binaries) / "msrun"), f"--worker_num={workers}", f"--local_worker_num={workers}",
        f"--master_port={free_port()}", f"--log_dir={logs}", "--join=True", f"--cluster_time_out={int(timeout)}",
        *map(os.fspath, script_args),
    ]  # fmt: skip
    name = "MSRUN_TEST_JOB"
    mark = f"{name}={os.getpid()}-{secrets.token_hex(8)}"
    environment = {**os.environ, **(env or {}), name: mark.partition("=")[2]}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), binaries, environment.get("PATH", "")])
    with (logs / "msrun.log").open("wb") as own:
        job = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=own, stderr=own, start_new_session=True
        )
        try:
            code: int | None = job.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(mark)
            job.wait()
    found = read_logs(logs)
    if code != 0:
        ends = "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in found.items())
        raise MsrunError(f"msrun {'took too long' if code is None else f'ended with {code}'}\n{ends}")
    return found


def read_logs(logs: Path) -> dict[str, str]:
    """Text of every log by its name without suffix."""
    return {path.stem: path.read_text(errors="replace") for path in sorted(logs.glob("*.log"))}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(mark: str) -> None:
    """Kill what has `mark` in its environment: msrun gives each worker a session of its own, and may be gone itself.

    Again until nothing is found, because a process may start another while they are read.
    """
    deadline = time.monotonic() + 20
    while (found := marked(mark)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Living processes with `mark` in the environment that they were started with; a zombie has none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found
