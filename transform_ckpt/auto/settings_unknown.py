"""Keys that nobody reads: a slip of the pen is an error that says what was meant, any other one a note.

Pure; may import only transform_ckpt.auto.settings_keys and transform_ckpt.errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transform_ckpt.auto.settings_keys import SECTIONS
from transform_ckpt.errors import Problems, name_some

_NEAR = 0.8
"""difflib's ratio from which a key is taken for a misspelt one; `lr_scale` and `layer_scale` have 0.74."""
_START = 8
"""So many letters that a known key begins with are taken for that key: src_strategy, auto_trans."""


def check_keys(document: Mapping[str, Any], where: str, problems: Problems) -> list[str]:
    """Record keys that are misspelt, and any unknown one where MindFormers refuses them; notes name the others."""
    notes: list[str] = []
    for path, section in SECTIONS.items():
        found = section_of(document, path, where, problems)
        unread: list[str] = []
        for key in (str(key) for key in found if key not in section.keys):
            name = ".".join((*path, key))
            near = near_key(key, section.keys)
            if near:
                problems.add(f"{where}: {name}: did you mean {near}?")
            elif section.strict:
                problems.add(f"{where}: {name} is not a key that MindFormers takes; it takes {', '.join(section.keys)}")
            else:
                unread.append(name)
        if unread:
            notes.append(f"nothing is known to read {name_some(unread)}: check the spelling")
    return notes


def near_key(written: str, known: tuple[str, ...]) -> str | None:
    """The known key that was meant, or None."""
    near = get_close_matches(written, known, n=1, cutoff=_NEAR)
    near += [key for key in known if len(written) >= _START and key.startswith(f"{written}_")]
    return near[0] if near else None


def section_of(document: Mapping[str, Any], path: tuple[str, ...], where: str, problems: Problems) -> Mapping[str, Any]:
    """A mapping below the top level; empty when absent or null, recorded when it is something else."""
    found: Mapping[str, Any] = document
    for depth, key in enumerate(path, 1):
        below = found.get(key)
        if below is None:
            return {}
        if not isinstance(below, Mapping):
            problems.add(f"{where}: {'.'.join(path[:depth])}: expected keys and values, found {below!r}")
            return {}
        found = below
    return found
