"""Configuration files in: MindFormers' YAML and Hugging Face's config.json, as plain mappings.

The boundary to pyyaml: safe values only, keys given twice refused (pyyaml would take the last one silently).
May import only pyyaml and transform_ckpt.errors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from typing import Any

import yaml

from transform_ckpt.errors import InputError, StorageError

_MAX_NBYTES = 4 << 20


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key != "<<" and key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file whose top level is a mapping; InputError names the line."""
    try:
        found = yaml.load(_read_text(path), _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}:{line} not a valid YAML: {what}") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply for a configuration") from error
    return _mapping(found, path, "YAML")


def read_hf_config(path: str) -> dict[str, Any]:
    """Hugging Face's config.json, given as the file or its directory."""
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        found = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a valid JSON: {error}") from error
    return _mapping(found, file, "config.json")


def _mapping(found: Any, path: str, kind: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a {kind} of keys and values, found {type(found).__name__}")
    return found


def _read_text(path: str) -> str:
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is not a regular file; give the configuration file itself")
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_NBYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected a configuration") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_NBYTES:
        raise InputError(f"{path}: larger than {_MAX_NBYTES >> 20} MiB, so it is not a configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text (byte {error.start}); expected a configuration") from error
