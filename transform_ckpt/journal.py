"""What is done so far, in DST.partial/.journal: a second run continues, a second writer is kept out.

`plan.json` names the plan and the source files as they were; `units-<pid>.log` has one JSON line per finished unit with
the digests of what was written.  A torn last line (killed while writing) counts as not done.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from typing import Any

from transform_ckpt.errors import UsageError
from transform_ckpt.formats.files import storage_error

DIRECTORY = ".journal"


class Journal:
    """The journal of one destination; hold the lock while writing."""

    def __init__(self, partial: str) -> None:
        self.directory = os.path.join(partial, DIRECTORY)
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        """Is this our own partial output?"""
        return os.path.isdir(self.directory)

    def lock(self) -> None:
        """Keep other runs out until the process ends; UsageError when one is at work."""
        path = os.path.join(self.directory, "lock")
        try:
            os.makedirs(self.directory, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error(path, error, "creating the destination") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(fd))
        except OSError:
            same = False
        if not same:
            os.close(fd)
            raise UsageError(
                f"{os.path.dirname(self.directory)}: another run is writing into this destination: "
                "wait for it, or choose another destination"
            )
        self._lock = fd

    def retire(self) -> None:
        """Forget everything but the lock, which keeps others out until the output has its name."""
        names = [name for name in os.listdir(self.directory) if name != "lock"]
        for name in sorted(names, key=lambda n: n == "plan.json"):
            os.unlink(os.path.join(self.directory, name))

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_plan(self) -> Mapping[str, Any] | None:
        """What `write_plan` recorded, or None when the run ended before."""
        try:
            with open(os.path.join(self.directory, "plan.json"), encoding="utf-8") as stream:
                found = json.load(stream)
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def write_plan(self, record: Mapping[str, Any]) -> None:
        """Record the plan that the destination is being filled by; the last step of preparing it."""
        path = os.path.join(self.directory, "plan.json")
        try:
            with open(path + ".tmp", "w", encoding="utf-8") as stream:
                json.dump(record, stream)
            os.replace(path + ".tmp", path)
        except OSError as error:
            raise storage_error(path, error, "writing the journal") from None

    def open_log(self) -> int:
        """Descriptor of this process's own log."""
        path = os.path.join(self.directory, f"units-{os.getpid()}.log")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error(path, error, "opening the journal") from None
        _append(fd, b"\n")  # process numbers come again: an earlier log may end in a torn line
        return fd

    def keep(self, done: Mapping[int, list[str]]) -> None:
        """Only these units count as done: one log of them takes the place of all others."""
        path, new = (os.path.join(self.directory, name) for name in ("units-kept.log", "kept.tmp"))
        try:
            with open(new, "wb") as stream:
                stream.writelines(_line(unit, digests) for unit, digests in sorted(done.items()))
            os.replace(new, path)
            for name in os.listdir(self.directory):
                if name.startswith("units-") and name != os.path.basename(path):
                    os.unlink(os.path.join(self.directory, name))
        except OSError as error:
            raise storage_error(path, error, "writing the journal") from None

    def done(self) -> dict[int, list[str]]:
        """Unit -> digests, of every whole line of every log."""
        found: dict[int, list[str]] = {}
        for name in sorted(os.listdir(self.directory)):
            if name.startswith("units-"):
                found.update(_read_log(os.path.join(self.directory, name)))
        return found


def record(fd: int, unit: int, digests: list[str]) -> None:
    """Append one finished unit."""
    _append(fd, _line(unit, digests))


def _line(unit: int, digests: list[str]) -> bytes:
    return json.dumps([unit, digests]).encode() + b"\n"


def _append(fd: int, line: bytes) -> None:
    try:
        while line:
            line = line[os.write(fd, line) :]
    except OSError as error:
        raise storage_error(os.readlink(f"/proc/self/fd/{fd}"), error, "writing the journal") from None


def _read_log(path: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    with open(path, "rb") as stream:
        for line in stream:
            try:
                unit, digests = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                continue
            if line.endswith(b"\n") and type(unit) is int and unit >= 0 and isinstance(digests, list):
                found[unit] = digests
    return found
