"""transform_ckpt.json: what a destination holds and where it came from, with digests.  No path, time or host name.

Digests are XXH3-128.  A tensor's bytes are digested in parts as they are written (a part is what one unit of work wrote
of it), recorded as "nbytes:digest" and in order; one part is the usual case.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transform_ckpt import version
from transform_ckpt.errors import InputError
from transform_ckpt.formats.files import storage_error, xxh3
from transform_ckpt.planner import Plan
from transform_ckpt.tensors import FileHeader, Skeleton

NAME = "transform_ckpt.json"
FORMAT_VERSION = 1
_PARTS = re.compile(r"(\d{1,19}:[0-9a-f]{32}(,(?!$)|$))*", re.ASCII)

Digests = Mapping[int, Mapping[str, Sequence[tuple[int, str]]]]
"""File number -> stored name -> (nbytes, digest) of each part in order."""


def source_files(plan: Plan) -> list[dict[str, Any]]:
    """Fingerprints of the source files: path below the source, size, digest of the header."""
    return [fingerprint_of(header, plan.source.root) for header in plan.source.headers]


def fingerprint_of(header: FileHeader, root: str) -> dict[str, Any]:
    """One source file's fingerprint."""
    base = root if os.path.isdir(root) else os.path.dirname(root)
    return {"file": os.path.relpath(header.path, base), "nbytes": header.nbytes, "header": header.digest}


def plan_fingerprint(plan: Plan) -> str:
    """Digest of everything that decides the output: source headers and layout, target layout and header bytes."""
    layout = [
        [(p.name, p.dtype, p.shape, [(q.rank, q.box.start, q.box.size) for q in p.pieces]) for p in kind.values()]
        for kind in (plan.source.params, plan.source.states)
    ]
    inline = [q.tensor.inline for p in plan.source.states.values() for q in p.pieces]
    chunks = [repr((source_files(plan), layout, inline, version.VERSION)).encode()]
    for file in plan.target.files:
        boxes = [(name, file.logical.get(name), box.start, box.size) for name, box in file.boxes.items()]
        chunks.append(repr((file.relpath, file.skeleton.nbytes, boxes)).encode())
        chunks.extend(data for _, data in file.skeleton.chunks)
    for small in plan.target.small:
        chunks += (repr((small.relpath, len(small.data))).encode(), small.data)
    return xxh3(*chunks)


def skeleton_digest(skeleton: Skeleton) -> str:
    """Digest of a file's header bytes."""
    return xxh3(*(data for _, data in skeleton.chunks))


def content(plan: Plan, fingerprint: str, digests: Digests) -> bytes:
    """The manifest's bytes."""
    files = {}
    for number, file in enumerate(plan.target.files):
        found = digests.get(number, {})
        files[file.relpath] = {
            "nbytes": file.skeleton.nbytes,
            "header": skeleton_digest(file.skeleton),
            "tensors": {s.name: ",".join(f"{n}:{d}" for n, d in found.get(s.name, ())) for s in file.specs},
        }
    whole = {
        "format_version": FORMAT_VERSION,
        "tool": f"transform_ckpt {version.VERSION}",
        "plan": fingerprint,
        "source": {"format": plan.source.format, "step": plan.source.step, "files": source_files(plan)},
        "target": {"format": plan.target.format, "dropped": sorted(plan.target.dropped)},
        "files": files,
        "small_files": {
            small.relpath: {"nbytes": len(small.data), "digest": xxh3(small.data)} for small in plan.target.small
        },
    }
    return json.dumps(whole, indent=1).encode() + b"\n"


def read(directory: str) -> Mapping[str, Any] | None:
    """The manifest of a directory, or None where there is none."""
    path = os.path.join(directory, NAME)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except OSError as error:
        raise storage_error(path, error, "reading the manifest") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}): the manifest is damaged: fetch it again") from None
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: not a manifest of version {FORMAT_VERSION}: use the version that wrote it")
    bad = _first_fault(found)
    if bad:
        raise InputError(f"{path}: {bad}: the manifest is damaged: fetch it again")
    return found


def _first_fault(found: Mapping[str, Any]) -> str | None:
    """What is not as `content` writes it."""
    target, files, small = found.get("target"), found.get("files"), found.get("small_files")
    if not isinstance(target, dict) or not isinstance(target.get("dropped"), list):
        return "'target' has no list of what was dropped"
    if not isinstance(files, dict) or not isinstance(small, dict):
        return "'files' or 'small_files' is not a map"
    for name, entry in [*files.items(), *small.items()]:
        if os.path.isabs(name) or ".." in name.split("/"):
            return f"the file name {name!r} leaves the directory"
        if not isinstance(entry, dict) or type(entry.get("nbytes")) is not int:
            return f"{name!r} has no size"
        tensors = entry.get("tensors") if name in files else {}
        if not isinstance(tensors, dict):
            return f"{name!r} has no digests"
        texts = [entry.get("header" if name in files else "digest"), *tensors.values()]
        if not all(isinstance(text, str) for text in texts):
            return f"{name!r} has no digests"
        wrong = [key for key, text in tensors.items() if not _PARTS.fullmatch(text)]
        if wrong:
            return f"the digest of {wrong[0]!r} in {name!r} is {tensors[wrong[0]]!r:.100}"
    return None
