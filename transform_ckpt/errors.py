"""The one tree of errors, each with the exit code the command line ends with.  Imports nothing.

A message says what, where, expected and found, and what to do.  Problems that can be found together are raised
together (`Problems`), so that a user fixes a strategy once and not name by name.
"""

from __future__ import annotations

from collections.abc import Iterable


class TransformError(Exception):
    """Base of every error a user can cause or meet; never shown with a traceback."""

    exit_code = 1


class UsageError(TransformError):
    """Wrong flags, or a destination that is occupied."""

    exit_code = 2


class InputError(TransformError):
    """A source, strategy or world size that is invalid or unsupported."""

    exit_code = 3


class PlanError(TransformError):
    """The plan is ambiguous, or does not cover every element."""

    exit_code = 4


class StorageError(TransformError):
    """The file system refused: disk full, permission, I/O error."""

    exit_code = 5


class DifferenceError(TransformError):
    """verify or diff found differences."""

    exit_code = 6


class PartialError(TransformError):
    """A worker died; what is done is recorded and the same command continues."""

    exit_code = 7


class Problems:
    """Collects messages and raises them as one error."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Record one problem; equal messages count once."""
        if message not in self.messages:
            self.messages.append(message)

    def raise_if_any(self, error: type[TransformError], *, limit: int = 20) -> None:
        """Raise `error` with all messages (the first `limit` in full, the rest counted)."""
        if not self.messages:
            return
        shown = self.messages[:limit]
        if len(self.messages) > limit:
            shown.append(f"... and {len(self.messages) - limit} more problems of this kind")
        raise error("\n".join(shown))


def name_some(names: Iterable[str], *, limit: int = 5) -> str:
    """`a, b, c ... and 7 more`: sorted, for messages about many tensors."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} ... and {len(ordered) - limit} more"


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that was there before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def rank_ranges(ranks: Iterable[int]) -> str:
    """`0-3, 6`: ranks as people write them."""
    ordered = sorted(set(ranks))
    parts: list[str] = []
    start = previous = None
    for rank in [*ordered, None]:
        if start is not None and previous is not None and rank != previous + 1:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = None
        if rank is not None and start is None:
            start = rank
        previous = rank
    return ", ".join(parts)
