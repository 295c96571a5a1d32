"""Where the ranks of a job leave each other small notes: a shared directory, or on ModelArts a bucket.

A note appears whole or not at all (a file is renamed into place, an object is put at once).  Names are relative, with
'/' between folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from transform_ckpt.auto.remote import Remote
from transform_ckpt.errors import StorageError
from transform_ckpt.formats.files import read_json, storage_error, write_json


class Board(Protocol):
    """Notes of a job.  `where` names the place for messages; errors are StorageError."""

    where: str
    poll_seconds: tuple[float, float]
    """First and longest pause between two looks."""

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Leave a note, or replace it."""

    def read(self, name: str) -> dict[str, Any]:
        """A note's content; {} when it is not there."""

    def names(self, folder: str) -> Sequence[str]:
        """Names of the notes directly in a folder, in no order."""

    def delete(self, name: str) -> None:
        """Take a note away, if it is there."""

    def time(self, name: str) -> float | None:
        """When a note was written by the clock that all notes share; None when that is not known."""


class LocalBoard:
    """A directory that all ranks see."""

    poll_seconds = (0.02, 0.5)

    def __init__(self, where: str) -> None:
        self.where = where

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """A file, renamed into place."""
        path = os.path.join(self.where, name)
        self._make(os.path.dirname(path))
        try:
            write_json(path, content)
        except OSError as error:
            raise storage_error(path, error, "leaving a note for the other ranks") from None

    def read(self, name: str) -> dict[str, Any]:
        """{} also for a file that cannot be read now: the next look may be better."""
        return read_json(os.path.join(self.where, name))

    def names(self, folder: str) -> Sequence[str]:
        """One directory listing."""
        try:
            return [n for n in os.listdir(os.path.join(self.where, folder)) if not n.endswith(".tmp")]
        except (FileNotFoundError, NotADirectoryError):  # who writes says what is wrong
            return []
        except OSError as error:
            raise storage_error(os.path.join(self.where, folder), error, "looking for the other ranks") from None

    def delete(self, name: str) -> None:
        """Unlink."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.where, name))

    def time(self, name: str) -> float | None:
        """The file system's clock."""
        try:
            return os.stat(os.path.join(self.where, name)).st_mtime
        except OSError:
            return None

    @staticmethod
    def _make(folder: str) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be made ({error.strerror}): output_dir must be a directory that every rank may write"
            ) from None


class RemoteBoard:
    """A prefix of a bucket."""

    poll_seconds = (0.5, 5.0)

    def __init__(self, remote: Remote, prefix: str) -> None:
        self._remote, self._prefix = remote, prefix
        self.where = remote.join(prefix)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """One object."""
        self._remote.write(f"{self._prefix}/{name}", json.dumps(content).encode())

    def read(self, name: str) -> dict[str, Any]:
        """{} also for an object that cannot be read now."""
        full = f"{self._prefix}/{name}"
        try:
            found = json.loads(self._remote.read(full)) if self._remote.exists(full) else {}
        except (StorageError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def names(self, folder: str) -> Sequence[str]:
        """One listing."""
        prefix = f"{self._prefix}/{folder}"
        return [name.rpartition("/")[2] for name in self._remote.list(prefix)]

    def delete(self, name: str) -> None:
        """Remove the object."""
        self._remote.delete(f"{self._prefix}/{name}")

    def time(self, name: str) -> float | None:
        """Not known."""
        return None
