"""The safetensors container: 8-byte length, JSON header, tensor bytes.  Reads headers and lays files out.

Rules of the format (safetensors 0.7.0, `SafeTensors::deserialize`): header at most 100 MB, offsets relative to the end
of the header, tensors cover the data without hole or overlap, header padded with spaces to 8 bytes.
MindSpore adds (2.9.0 train/serialization.py `_exec_save`): metadata format "ms", `remove_redundancy`, `crc_num` (crc32
over name and `bytes(array)` of every tensor in name order), and `"<param>": "Int4"` for packed 4-bit values, as I8.
It cannot store strings; ours go into the metadata under `STRINGS_KEY`: .ckpt -> safetensors -> .ckpt keeps them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeGuard

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, first_twice
from transform_ckpt.formats.files import open_binary, xxh3
from transform_ckpt.tensors import Extent, FileHeader, Skeleton, Tensor, TensorSpec

FORMAT = "safetensors"
SUFFIX = ".safetensors"
MAX_HEADER_NBYTES = 100_000_000
MAX_NDIM, MAX_LENGTH = 64, 1 << 63
"""More dimensions, or longer ones, are damage: NumPy has at most 64."""
STRINGS_KEY = "transform_ckpt.strings"
INT4 = "Int4"
_WRITE_ORDER = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64".split()
"""The real writer's order of dtypes, last first (safetensors 0.7.0 `Dtype`, sorted descending, then by name)."""


def _fail(path: str, what: str) -> InputError:
    return InputError(f"{path}: {what}; the file is damaged or not safetensors: fetch or save it again")


def read_header(path: str) -> FileHeader:
    """Header of one file; InputError where any rule of the format is violated."""
    with open_binary(path) as (fd, nbytes):
        head = os.pread(fd, 8, 0)
        if len(head) < 8:
            raise _fail(path, f"{nbytes} bytes are too few for a header length")
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER_NBYTES or 8 + length > nbytes:
            raise _fail(path, f"the header claims {length:,} bytes, the file has {nbytes:,}")
        raw = os.pread(fd, length, 8)
    return parse_header(path, raw, nbytes)


def _no_duplicates(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _fail(path, f"the header names {first_twice(key for key, _ in pairs)!r} twice")
    return found


def parse_header(path: str, raw: bytes, nbytes: int) -> FileHeader:
    """FileHeader from the JSON bytes of a file of `nbytes` bytes."""
    try:
        header = json.loads(raw.decode(), object_pairs_hook=lambda pairs: _no_duplicates(path, pairs))
    except (ValueError, RecursionError) as error:
        raise _fail(path, f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _fail(path, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _fail(path, "__metadata__ is not a map of strings")
    _check_names(path, (*header, *metadata, *metadata.values()))
    data_start = 8 + len(raw)
    tensors = {name: _tensor(path, name, item, data_start, metadata) for name, item in header.items()}
    _check_cover(path, tensors, data_start, nbytes)
    tensors.update(_strings(path, metadata, tensors))
    crc = metadata.get("crc_num")
    if crc is not None and not (crc.isascii() and crc.isdecimal() and len(crc) <= 20):
        raise _fail(path, f"crc_num {crc!r:.80} is not a number")
    return FileHeader(
        path, FORMAT, nbytes, tensors, xxh3(raw), metadata, None if crc is None else int(crc), nbytes - data_start
    )


def _check_names(path: str, names: Iterable[str]) -> None:
    """JSON can escape half a surrogate pair, which no file can hold again."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise _fail(path, "a name or text of the header is not UTF-8") from None


def _tensor(path: str, name: str, item: Any, data_start: int, metadata: Mapping[str, str]) -> Tensor:
    if not isinstance(item, dict):
        raise _fail(path, f"{name!r} has no description")
    code, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if not isinstance(code, str) or code not in dtypes.BY_CODE or code == dtypes.STRING:
        raise InputError(f"{path}: {name!r} has dtype {code!r}, which is unknown here; known: {', '.join(known())}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _fail(path, f"{name!r} has shape {shape!s:.200} and data_offsets {offsets!s:.200}")
    begin, end = offsets
    needed = prod(shape) * dtypes.itemsize(code)
    if end - begin != needed:
        raise _fail(path, f"header gives {end - begin:,} bytes for {name!r}, {code}{shape} needs {needed:,}")
    if metadata.get(name) == INT4 and dtypes.itemsize(code) == 1:
        code = "I4X2"
    return Tensor(name, code, tuple(shape), path, (Extent(data_start + begin, needed),))


def _naturals(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_NDIM:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_LENGTH for n in value)


def known() -> list[str]:
    """Dtype codes that a safetensors file can hold here."""
    return sorted(code for code in dtypes.BY_CODE if code not in (dtypes.STRING, "I4X2"))


def _check_cover(path: str, tensors: Mapping[str, Tensor], data_start: int, nbytes: int) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.extents[0].offset_bytes, t.nbytes)):
        extent = tensor.extents[0]
        if extent.offset_bytes != position:
            kind = "a hole before" if extent.offset_bytes > position else "an overlap at"
            raise _fail(path, f"{kind} {tensor.name!r}: it starts at byte {extent.offset_bytes:,}, not {position:,}")
        position += extent.nbytes
    if position > nbytes:
        raise InputError(
            f"{path}: expected {position:,} bytes, found {nbytes:,}: the file is truncated: fetch or save it again"
        )
    if position < nbytes:
        raise _fail(path, f"{nbytes - position:,} bytes behind the last tensor")


def _strings(path: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if STRINGS_KEY not in metadata:
        return {}
    try:
        values = json.loads(metadata[STRINGS_KEY])
        found = {name: value.encode("utf-32-le") for name, value in values.items()}
        _check_names(path, found)
    except (ValueError, AttributeError, RecursionError):
        raise _fail(path, f"metadata {STRINGS_KEY} is not a JSON map of strings") from None
    if not found.keys().isdisjoint(tensors):
        raise _fail(path, f"metadata {STRINGS_KEY} names a tensor of the file")
    return {name: Tensor(name, dtypes.STRING, (), path, (), data) for name, data in found.items()}


def _stored_code(code: str) -> str:
    return "I8" if code == "I4X2" else code


def skeleton(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], strings: Mapping[str, str] | None = None
) -> Skeleton:
    """Lay a file out as the real writer does, byte for byte: by dtype, widest first, then by name: all lie aligned.

    InputError where the header would be longer than readers accept.
    """
    metadata = dict(metadata)
    if strings:
        metadata[STRINGS_KEY] = json.dumps(dict(sorted(strings.items())), ensure_ascii=False)
    ordered = sorted(specs, key=lambda s: (-_WRITE_ORDER.index(_stored_code(s.dtype)), s.name))
    entries: dict[str, Any] = {}
    relative: dict[str, int] = {}
    position = 0
    for spec in ordered:
        if spec.dtype == "I4X2":
            metadata[spec.name] = INT4
        entries[spec.name] = {
            "dtype": _stored_code(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        relative[spec.name] = position
        position += spec.nbytes
    header = {"__metadata__": dict(sorted(metadata.items())), **entries} if metadata else entries
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_NBYTES:
        raise InputError(
            f"{len(ordered):,} tensors need a safetensors header of {len(raw):,} bytes, and nobody reads more than "
            f"{MAX_HEADER_NBYTES:,}: choose a layout with more files, or --format ckpt"
        )
    start = 8 + len(raw)
    places = {s.name: (Extent(start + relative[s.name], s.nbytes),) for s in ordered}
    return Skeleton(start + position, ((0, len(raw).to_bytes(8, "little") + raw),), places)
