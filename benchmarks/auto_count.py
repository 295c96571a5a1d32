"""Bytes that this process really reads, counted where they enter it: positioned reads, and the kernel's own count."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_chars() -> int:
    """Bytes that this process has got from read calls of any kind (proc(5), io: rchar)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "rchar":
            return int(value)
    raise RuntimeError("/proc/self/io has no rchar")


def mapped(directory: str) -> list[str]:
    """Files below a directory that are mapped into this process: bytes of those would pass uncounted."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(None, 5)[5] for line in lines if "/" in line}
    return sorted(path for path in paths if path.startswith(os.path.join(directory, "")))


class Counter:
    """From birth on, every os.pread and os.preadv of a file below `directory` counts for the current phase."""

    def __init__(self, directory: str) -> None:
        self.phase, self.nbytes = "", dict[str, int]()
        self._directory = os.path.join(os.path.realpath(directory), "")
        self._began = read_chars()
        os.pread = self._counted(os.pread, len)
        os.preadv = self._counted(os.preadv, int)

    def _counted(self, call: Callable[..., Any], size: Callable[[Any], int]) -> Callable[..., Any]:
        def counted(fd: int, *args: Any) -> Any:
            found = call(fd, *args)
            if os.readlink(f"/proc/self/fd/{fd}").startswith(self._directory):
                self.nbytes[self.phase] = self.nbytes.get(self.phase, 0) + size(found)
            return found

        return counted

    def report(self) -> dict[str, Any]:
        """Bytes of each phase, all bytes of any kind since birth, and what is mapped."""
        return {"phases": self.nbytes, "rchar": read_chars() - self._began, "mapped": mapped(self._directory)}
