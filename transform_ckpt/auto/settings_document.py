"""A job's YAML as one plain tree: base configurations merged in, anchors copied out, values set by dotted key.

Source: MindFormers 1.9.0 tools/register/config.py.  `base_config` names one file or a list, relative to the file that
names them; later bases replace whole sections of earlier ones, the file itself is merged key by key.  `${...}` means
nothing there and nothing here.  May import only strategy.generate_yaml and transform_ckpt.errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from strategy.generate_yaml import read_yaml
from transform_ckpt.errors import InputError, UsageError

_BASE = "base_config"
_MOST_NODES = 1_000_000
_MOST_LEVELS = 100


def read_document(path: str) -> dict[str, Any]:
    """The YAML with its base configurations; InputError names the file that is wrong."""
    return plain(_read(path, ()), path)


def _read(path: str, readers: tuple[str, ...]) -> dict[str, Any]:
    real = os.path.realpath(path)
    if real in readers:
        raise InputError(f"{path}: {_BASE} leads back to the file that names it")
    found = read_yaml(path)
    named = found.pop(_BASE, None)
    bases = [] if named is None else named if isinstance(named, list) else [named]
    merged: dict[str, Any] = {}
    for base in bases:
        if not isinstance(base, str):
            raise InputError(f"{path}: {_BASE}: expected a file name or a list of them, found {base!r}")
        merged.update(_read(os.path.join(os.path.dirname(path), base), (*readers, real)))
    return merge(found, merged)


def merge(over: Mapping[str, Any], under: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over`; mappings are merged, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(value, below)
        else:
            merged[key] = value
    return merged


def plain(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tree of dicts and lists that shares nothing: what a YAML says by anchor is copied to each place.

    MindFormers' configurations are mappings, too, or have a to_dict (TransformerOpParallelConfig, which takes the place
    of parallel_config once a job is set up).  InputError when the tree is endless or too large.
    """
    left = _MOST_NODES

    def copied(value: Any, levels: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or levels > _MOST_LEVELS:
            raise InputError(f"{where}: its anchors unfold to more than a configuration can hold")
        if isinstance(value, Mapping):
            return {key: copied(below, levels + 1) for key, below in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied(below, levels + 1) for below in value]
        if hasattr(value, "to_dict"):
            return copied(value.to_dict(), levels + 1)
        return value

    found: dict[str, Any] = copied(document, 0)
    return found


def get(document: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or None."""
    found: Any = document
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def put(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the sections above it; UsageError when one of those is a plain value."""
    *above, last = key.split(".")
    found: dict[str, Any] = document
    for depth, name in enumerate(above, 1):
        below = found.get(name)
        if below is None:
            below = found[name] = {}
        if not isinstance(below, dict):
            raise UsageError(f"{key}: {'.'.join(above[:depth])} is {below!r}, which has no keys below it")
        found = below
    found[last] = value
