"""Reads a destination again: digests against the manifest or the journal.

May import planner, store, manifest, formats.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from strategy.generate_files import DIRECTORY as STRATEGY_DIRECTORY
from transform_ckpt import manifest
from transform_ckpt.digests import range_digest
from transform_ckpt.errors import InputError, TransformError
from transform_ckpt.formats import FORMATS, TORCH, format_of, read_header
from transform_ckpt.formats.files import open_binary, storage_error, xxh3
from transform_ckpt.store import FileTable
from transform_ckpt.tensors import Extent, FileHeader, Source, Tensor, part_of

_PART = re.compile(r"(.+)\[(\d{1,19}):(\d{1,19})\]", re.DOTALL | re.ASCII)


def check_tree(root: str, found: Mapping[str, Any]) -> list[str]:
    """What differs between a directory and its manifest: one line per fault, empty when all is as it was written."""
    faults = check_files(root, found["files"])
    for relpath, entry in found.get("small_files", {}).items():
        faults += _check_small(os.path.join(root, relpath), relpath, entry)
    listed = {*found["files"], *found.get("small_files", {}), manifest.NAME}
    faults += [f"{name}: is not in {manifest.NAME}" for name in _tensor_files(root) if name not in listed]
    return faults


def check_files(root: str, entries: Mapping[str, Any]) -> list[str]:
    """What differs between some files below a directory and what a manifest says of them (`files` of it)."""
    table = FileTable(os.O_RDONLY)
    try:
        return [
            fault
            for relpath, entry in entries.items()
            for fault in _check_file(table, os.path.join(root, relpath), relpath, entry)
        ]
    finally:
        table.close()


def check_source(source: Source, *, full: bool) -> None:
    """A source that this tool wrote must still be what it wrote: sizes and headers, with `full` every byte.

    InputError names the files that are not.  Sources without a manifest have nothing to be checked against.
    """
    found = manifest.read(source.root) if os.path.isdir(source.root) else None
    if found is None:
        return
    faults: list[str] = []
    table = FileTable(os.O_RDONLY)
    try:
        for header in source.headers:
            relpath = os.path.relpath(header.path, source.root)
            entry = found["files"].get(relpath)
            if entry is not None and header.format in FORMATS:
                faults += _check_header(header, relpath, entry)
                faults += _check_tensors(table, header, relpath, entry["tensors"]) if full else []
    finally:
        table.close()
    if faults:
        raise InputError(
            f"{source.root}: is not what {manifest.NAME} says was written: {'; '.join(faults[:5])}: fetch or make it "
            f"again, or delete {manifest.NAME} when the change is meant"
        )


def _tensor_files(root: str) -> list[str]:
    names = (os.path.relpath(os.path.join(d, n), root) for d, _, files in os.walk(root) for n in files)
    return sorted(n for n in names if format_of(n) and not n.startswith(STRATEGY_DIRECTORY + os.sep))


def _check_file(table: FileTable, path: str, relpath: str, entry: Mapping[str, Any]) -> list[str]:
    if not os.path.isfile(path):
        return [f"{relpath}: is missing"]
    faults = _check_size(relpath, os.path.getsize(path), entry)
    if faults:
        return faults
    try:
        header = read_header(path)
    except TransformError as error:
        return [str(error)]
    return [*_check_header(header, relpath, entry), *_check_tensors(table, header, relpath, entry["tensors"])]


def _check_header(header: FileHeader, relpath: str, entry: Mapping[str, Any]) -> list[str]:
    faults = _check_size(relpath, header.nbytes, entry)
    if faults or header_bytes_digest(header) == entry["header"]:
        return faults
    return [f"{relpath}: its header was changed"]


def _check_size(relpath: str, nbytes: int, entry: Mapping[str, Any]) -> list[str]:
    return (
        [] if nbytes == entry["nbytes"] else [f"{relpath}: has {nbytes:,} bytes, was written with {entry['nbytes']:,}"]
    )


def _check_tensors(table: FileTable, header: FileHeader, relpath: str, wanted: Mapping[str, str]) -> list[str]:
    faults: list[str] = []
    stored = {name: tensor for name, tensor in header.tensors.items() if tensor.inline is None}
    parts = {name: part for name in wanted if (part := _part(stored, name)) is not None}
    whole = {name.rpartition("[")[0] if name not in stored else name for name in parts}
    if header.format == TORCH:
        whole.update(stored)  # its header says which storages there are; padding is nobody's part
    faults += [f"{relpath}: {name!r} is missing" for name in sorted(wanted.keys() - parts.keys())]
    faults += [f"{relpath}: {name!r} was added" for name in sorted(stored.keys() - whole)]
    for name in sorted(parts):
        at, tensor = 0, parts[name]
        for text in filter(None, wanted[name].split(",")):
            size, digest = text.split(":")
            start, at = at, at + int(size)
            if at > tensor.nbytes or range_digest(table, header.path, tensor.extents, start, int(size)) != digest:
                faults.append(f"{relpath}: the bytes of {name!r} are not what was written: the file is damaged")
                break
        else:
            if at != tensor.nbytes:
                faults.append(
                    f"{relpath}: {manifest.NAME} has digests of {at:,} of the {tensor.nbytes:,} bytes of {name!r}"
                )
    return faults


def _part(stored: Mapping[str, Tensor], name: str) -> Tensor | None:
    """A stored tensor by its name, or the part of one that `tensors.part_name` names."""
    if name in stored:
        return stored[name]
    match = _PART.fullmatch(name)
    if match is None or match[1] not in stored:
        return None
    tensor, start, stop = stored[match[1]], int(match[2]), int(match[3])
    if not start <= stop <= tensor.nbytes:
        return None
    return replace(tensor, name=name, extents=part_of(tensor.extents, start, stop - start))


def header_bytes_digest(header: FileHeader) -> str:
    """Digest of every byte of a file that is no tensor's, in order (as `manifest.skeleton_digest`)."""
    extents = sorted((e for t in header.tensors.values() for e in t.extents if e.nbytes), key=lambda e: e.offset_bytes)
    chunks: list[bytes] = []
    with open_binary(header.path, "reading the header again") as (fd, nbytes):
        at = 0
        for offset, end in [*((e.offset_bytes, e.offset_bytes + e.nbytes) for e in extents), (nbytes, nbytes)]:
            if offset > at:
                chunks.append(_without(os.pread(fd, offset - at, at), at, header.late))
            at = end
    return xxh3(*chunks)


def _without(data: bytes, at: int, late: Sequence[Extent]) -> bytes:
    """Bytes from offset `at` on, with zeros for what was known only after the file was filled."""
    found = bytearray(data)
    for extent in late:
        low, high = max(extent.offset_bytes, at), min(extent.offset_bytes + extent.nbytes, at + len(data))
        if low < high:
            found[low - at : high - at] = bytes(high - low)
    return bytes(found)


def _check_small(path: str, relpath: str, entry: Mapping[str, Any]) -> list[str]:
    if not os.path.isfile(path):
        return [f"{relpath}: is missing"]
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        return [str(storage_error(path, error, "verifying"))]
    return [] if xxh3(data) == entry["digest"] else [f"{relpath}: was changed"]


def headers_of(path: str) -> list[FileHeader]:
    """Headers of every tensor file below a path (or of the one file), each checked by its format's rules."""
    if os.path.isfile(path):
        return [read_header(path)]
    if not os.path.isdir(path):
        raise InputError(f"{path}: not found: check the path")
    found = [read_header(os.path.join(path, name)) for name in _tensor_files(path)]
    if not found:
        raise InputError(f"{path}: no .ckpt or .safetensors file below it")
    return found
