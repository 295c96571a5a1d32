"""One configuration while it is read: its sections, and what is found wrong with them.

Pure; may import only strategy.generate_values and transform_ckpt.errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from strategy.generate_values import Values
from transform_ckpt.errors import Problems


@dataclass
class Reading:
    """One configuration while it is read."""

    where: str
    document: Mapping[str, Any]
    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)

    def section(self, *path: str) -> Mapping[str, Any]:
        """A mapping below the top level; empty when absent or null."""
        found: Mapping[str, Any] = self.document
        for key in path:
            below = found.get(key) or {}
            if not isinstance(below, dict):
                self.problems.add(f"{self.where}: {'.'.join(path)}: expected keys and values, found {below!r}")
                return {}
            found = below
        return found

    def values(self, *path: str, **defaults: Any) -> Values:
        """A section with its defaults."""
        return Values(f"{self.where}: {'.'.join(path)}", self.section(*path), defaults, self.problems)
