"""A process per megatron-core version that imports it once and forks the ranks of one request after the other.

The interpreter is the running one; a version that is not installed comes first on its path, as an unpacked wheel.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WHEELS = Path(sys.prefix) / "megatron-wheels"
_PIP_SECONDS = 120


class Unavailable(Exception):  # noqa: N818 - a reason to skip, not a failure
    """A version cannot be had here; the text says why."""


class Failed(Exception):  # noqa: N818
    """A rank raised; the text is its traceback."""


def installed() -> str | None:
    """The version of megatron-core in this environment."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return None


def wheel(wanted: str) -> Path:
    """The unpacked wheel of a version, fetched with pip the first time."""
    target = WHEELS / wanted
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=_make(WHEELS)) as scratch:
            unpacked = Path(scratch, "unpacked")
            zipfile.ZipFile(_download(wanted, Path(scratch))).extractall(unpacked)
            _move(unpacked, target)
    return target


def _make(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _download(wanted: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(directory), f"megatron-core=={wanted}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"megatron-core {wanted}: pip did not answer in {_PIP_SECONDS} s") from None
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"megatron-core {wanted}: pip cannot fetch its wheel: {last}")
    return next(directory.glob("megatron_core-*.whl"))


def _move(unpacked: Path, target: Path) -> None:
    try:
        unpacked.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another worker was faster
            raise


class Environment:
    """A running server process of tests.megatron_real.server; `call` sends one request and waits for its answer."""

    def __init__(self, wanted: str) -> None:
        if importlib.util.find_spec("torch") is None:
            raise Unavailable("torch is not installed: make venv")
        path = [str(ROOT)] if wanted == installed() else [str(wheel(wanted)), str(ROOT)]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
        variables |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        read_end, write_end = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.megatron_real.server", wanted, str(write_end)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=variables,
            cwd=ROOT,
            pass_fds=(write_end,),
            text=True,
        )
        os.close(write_end)
        self._answers = os.fdopen(read_end, encoding="utf-8")
        atexit.register(self.close)

    def call(self, request: dict[str, Any]) -> Any:
        """What the job returns for every rank, by rank; raises Failed where one raised."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise Failed(f"its process ended: {self._log.read().decode(errors='replace')[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["ranks"]

    def close(self) -> None:
        """Ends the process: it leaves when its input closes."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # what a process that has ended did not read
                self._process.stdin.close()
            self._process.wait(timeout=60)
            self._answers.close()
            self._log.close()


@functools.cache
def environment(wanted: str) -> Environment:
    """The one server of a version in this process."""
    return Environment(wanted)
