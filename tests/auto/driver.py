"""Ranks of a job as real processes, for the tests of the automatic transform.

`python -m tests.auto.driver SPEC.json` imports everything once and forks one process for each entry of the spec; each
runs the steps of `AutoTransform` as a trainer would and ends through the interpreter's normal end (atexit included).
What a rank got goes into `{name}.json`, its streams into `{name}.out` and `{name}.err`, its end into `{name}.end`.
Imports neither pytest nor mindspore.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("join", "resolve", "strategy", "plan", "transform", "wait", "load", "end")

Spec = dict[str, Any]
"""name, rank, world, request (Request's fields), strategy (path or None), compiled (path), stages, before (step ->
{"sleep": s, "until": path, "raise": text, "kill": signal}), host, slow (seconds a write), unit, fsize, uid,
linger, early."""


def digest(dtype: str, shape: Sequence[int], data: bytes) -> str:
    """One tensor, in one word."""
    return f"{dtype}{list(shape)}:{hashlib.sha256(data).hexdigest()[:24]}"


def digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Of NumPy arrays, or strings."""
    return {
        name: digest("str", [len(a)], a.encode()) if isinstance(a, str) else digest(a.dtype.name, a.shape, a.tobytes())
        for name, a in arrays.items()
    }


# ------------------------------------------------------------------------------------------------------ one rank


def _before(spec: Spec, step: str) -> None:
    what = spec.get("before", {}).get(step, {})
    time.sleep(what.get("sleep", 0))
    end = time.monotonic() + 60
    while "until" in what and not Path(what["until"]).exists() and time.monotonic() < end:
        time.sleep(0.02)
    if "kill" in what:
        os.kill(os.getpid(), what["kill"])
        time.sleep(5)
    if "raise" in what:
        raise RuntimeError(what["raise"])


def _prepare(spec: Spec) -> None:
    """Faults and slowness that a spec asks for."""
    import resource
    import socket

    from transform_ckpt import execute, planner, store

    if "host" in spec:
        socket.gethostname = lambda: spec["host"]
    if "unit" in spec:
        planner.UNIT_NBYTES, execute.SMALL_NBYTES = spec["unit"], 0
    if "slow" in spec:
        write = store.write_fully

        def slowly(fd: int, path: str, offset: int, data: memoryview) -> None:
            time.sleep(spec["slow"])
            write(fd, path, offset, data)

        store.write_fully = slowly
    if "fsize" in spec:
        resource.setrlimit(resource.RLIMIT_FSIZE, (spec["fsize"], spec["fsize"]))
    if "uid" in spec:
        os.setgroups([])
        os.setgid(spec["uid"])
        os.setuid(spec["uid"])


def _read_chars() -> int:
    """Bytes that this process has asked the kernel for (proc(5), io); 0 after it has become another user."""
    with contextlib.suppress(PermissionError):
        (line,) = [text for text in Path("/proc/self/io").read_text().splitlines() if text.startswith("rchar")]
        return int(line.split()[1])
    return 0


def _rank(spec: Spec, report: dict[str, Any]) -> None:
    from transform_ckpt import api
    from transform_ckpt.auto.request import Request
    from transform_ckpt.auto.transform import AutoTransform
    from transform_ckpt.launcher import Launcher

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201 - the rank's log

    world = spec["world"]
    launcher = Launcher(spec["rank"], world, "test", local_world=world)
    job = AutoTransform(Request(**spec["request"]), launcher, say)
    began = _read_chars()
    with job.together():
        if spec.get("early"):
            raise RuntimeError(spec["early"])
        _before(spec, "join")
        if job.shares:
            report["directory"] = job.strategy_directory
        _before(spec, "resolve")
        job.resolve()
        _before(spec, "strategy")
        if spec.get("compiled"):
            mine = Path(job.strategy_directory) / f"ckpt_strategy_rank_{spec['rank']}.ckpt"
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.write_bytes((Path(spec["compiled"]) / mine.name).read_bytes())
            job.collect_strategy(spec["stages"])
        else:
            job.use_strategy(api.read_strategy(spec.get("strategy")))
        for step in ("plan", "transform", "wait"):
            _before(spec, step)
            getattr(job, step)()
        _before(spec, "load")
        held = dict(job.load())
        _before(spec, "end")
    report |= {"rchar": _read_chars() - began, "run": job.rendezvous.run_id, "read_nbytes": job.read_nbytes}
    report["tensors"] = digests(held)
    time.sleep(spec.get("linger", 0))


def _child(spec: Spec, folder: Path) -> int:
    """A rank's exit code: that of the command line."""
    from transform_ckpt.errors import TransformError

    name = spec["name"]
    for fd, suffix in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, fd)
    result = os.open(folder / f"{name}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    report: dict[str, Any] = {}
    try:
        _prepare(spec)
        _rank(spec, report)
    except TransformError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: OSError {error}\n")
        return 5
    finally:
        os.write(result, json.dumps(report).encode())
    return 0


def main() -> None:
    """The launcher: forks, waits, records each end."""
    import ml_dtypes  # noqa: F401
    import numpy as np  # noqa: F401
    import xxhash  # noqa: F401

    from transform_ckpt import coordinate, kernels, memory  # noqa: F401
    from transform_ckpt.auto import transform  # noqa: F401
    from transform_ckpt.formats import checkpoint2, safetensors  # noqa: F401

    for name in ("ascii", "utf-8", "latin-1"):  # another user may not read the interpreter's own files
        codecs.lookup(name)
    folder = Path(sys.argv[1]).parent
    names: dict[int, str] = {}
    began = time.monotonic()
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        time.sleep(spec.get("delay", 0))  # before this one and all after it
        pid = os.fork()
        if pid == 0:
            time.sleep(spec.get("own_delay", 0))
            sys.exit(_child(spec, folder))
        names[pid] = spec["name"]
        (folder / f"{spec['name']}.pid").write_text(str(pid))
    while names:
        pid, status = os.wait()
        name = names.pop(pid)
        end = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}
        (folder / f"{name}.tmp").write_text(json.dumps(end))
        os.replace(folder / f"{name}.tmp", folder / f"{name}.end")


# ------------------------------------------------------------------------------------------------------ for tests


@dataclass(frozen=True)
class Ended:
    """What became of one rank; `code` is a negative signal when it was killed."""

    code: int
    seconds: float
    out: str
    err: str
    report: Mapping[str, Any]

    @property
    def tensors(self) -> Mapping[str, str]:
        """Digests of what it loaded."""
        found: Mapping[str, str] = self.report["tensors"]
        return found


class Ranks:
    """Processes of one or more jobs."""

    def __init__(self, folder: Path, specs: Sequence[Spec]) -> None:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        self.folder, self.names = folder, [spec["name"] for spec in specs]
        assert len(set(self.names)) == len(self.names)
        (folder / "spec.json").write_text(json.dumps(list(specs)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.auto.driver", str(folder / "spec.json")],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """A signal to one rank."""
        os.kill(int((self.folder / f"{name}.pid").read_text()), number)

    def ended(self, name: str) -> bool:
        """Has it?"""
        return (self.folder / f"{name}.end").exists()

    def result(self, name: str) -> Ended:
        """Of a rank that has ended."""
        read = {suffix: (self.folder / f"{name}.{suffix}").read_text() for suffix in ("end", "out", "err", "json")}
        end = json.loads(read["end"])
        return Ended(end["code"], end["seconds"], read["out"], read["err"], json.loads(read["json"] or "{}"))

    def finish(self, timeout: float = 40) -> dict[str, Ended]:
        """All of them, within the time."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            left = [name for name in self.names if not self.ended(name)]
            raise AssertionError(f"{left} still run after {timeout} s") from None
        error = self.process.stderr.read().decode() if self.process.stderr else ""
        assert self.process.returncode == 0, error
        return {name: self.result(name) for name in self.names}

    def end(self) -> None:
        """Nobody is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()


@contextlib.contextmanager
def ranks(folder: Path, specs: Sequence[Spec]) -> Iterator[Ranks]:
    """Started, and killed at the end whatever happens; `folder` takes their reports."""
    started = Ranks(folder, specs)
    try:
        yield started
    finally:
        started.end()


def request_of(case: Any, output: Path, **more: Any) -> dict[str, Any]:
    """Request's fields for a case of tests.hostile.driver."""
    paths = {"load_checkpoint": str(case.src), "src_strategy": str(case.strategy), "output_dir": str(output)}
    return {**paths, "timeout": 20.0, **more}


def job_of(world: int, request: Mapping[str, Any], *, prefix: str = "r", **more: Any) -> list[Spec]:
    """The specs of one job; `more` goes to every rank, or where its value is a dictionary by rank, to these."""
    found = []
    for rank in range(world):
        spec: Spec = {"name": f"{prefix}{rank}", "rank": rank, "world": world, "request": dict(request)}
        for key, value in more.items():
            by_rank = isinstance(value, dict) and all(isinstance(k, int) for k in value)
            if not by_rank:
                spec[key] = value
            elif rank in value:
                spec[key] = value[rank]
        found.append(spec)
    return found


def run(folder: Path, specs: Sequence[Spec], timeout: float = 40) -> dict[str, Ended]:
    """Start them, wait for all, and kill what is left."""
    with ranks(folder, specs) as started:
        return started.finish(timeout)


def all_done(found: Mapping[str, Ended]) -> Mapping[str, Ended]:
    """AssertionError with what was said, unless everyone ended well."""
    bad = {name: (end.code, end.err, end.out) for name, end in found.items() if end.code}
    assert not bad, bad
    return found


if __name__ == "__main__":
    main()
