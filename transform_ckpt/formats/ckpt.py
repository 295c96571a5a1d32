"""MindSpore's .ckpt: a concatenation of one-value protobuf messages.  Walks the wire format, never parses content.

Schema (mindspore 2.9.0 train/checkpoint.proto; written by train/serialization.py `_write_parameter_data`):
    Checkpoint { repeated Value value = 1 }
    Value { required string tag = 1; oneof { TensorProto tensor = 2; MapTensorProto maptensor = 3 } }
    TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3 }
A tensor over 512 MiB is several consecutive values of one tag, each with the full dims.  `crc_check` adds the trailer
b"crc_num" + 10 bytes big-endian crc32 of all before.  Strings have type "str", dims [0], UTF-32LE content; dims [0] on
another type is an old way to write a scalar.  Encrypted files begin with a magic number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError
from transform_ckpt.formats.files import open_binary, xxh3
from transform_ckpt.tensors import Extent, FileHeader, Skeleton, Tensor, TensorSpec

FORMAT = "ckpt"
SUFFIX = ".ckpt"
SLICE_NBYTES = 512 * 1024 * 1024
CRC_MARK = b"crc_num"
CRC_VALUE_NBYTES = 10
CRC_NBYTES = len(CRC_MARK) + CRC_VALUE_NBYTES
_ENCRYPTION_MAGIC = {
    bytes.fromhex("d85e3a7f"): "AES-GCM",
    bytes.fromhex("d95e3a7f"): "AES-CBC",
    bytes.fromhex("da5e3a7f"): "SM4-CBC",
}
_WINDOW = 4096
_MAX_NDIM, _MAX_LENGTH, _MAX_NAME_NBYTES = 64, 1 << 63, 1 << 20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _DamagedError(Exception):
    """The wire format is violated at a byte offset."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"{what} at byte {offset:,}")


class _Cursor:
    """Varints and short byte strings of a file through one small window; content is skipped, not read."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd, self.nbytes, self.at = fd, nbytes, 0
        self._window, self._start = b"", 0

    def take(self, count: int, end: int) -> bytes:
        """The next `count` bytes, which must end before `end`."""
        if count > end - self.at:
            raise _DamagedError(self.at, f"{count:,} bytes announced, {end - self.at:,} left")
        low = self.at - self._start
        if low < 0 or low + count > len(self._window):
            self._window, self._start, low = os.pread(self.fd, max(_WINDOW, count), self.at), self.at, 0
            if len(self._window) < count:
                raise _DamagedError(self.at, "the file ended while it was read")
        self.at += count
        return self._window[low : low + count]

    def varint(self, end: int) -> int:
        value = shift = 0
        while True:
            byte = self.take(1, end)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise _DamagedError(self.at, "a number of more than 10 bytes")

    def field(self, end: int) -> tuple[int, int]:
        """Field number and wire type."""
        key = self.varint(end)
        return key >> 3, key & 7

    def length(self, end: int) -> int:
        """Length prefix of a nested field; returns where the field ends."""
        start = self.at
        length = self.varint(end)
        if length > end - self.at:
            raise _DamagedError(start, f"a field of {length:,} bytes, {end - self.at:,} left")
        return self.at + length

    def skip(self, wire: int, end: int) -> None:
        """Step over a field that this reader does not know."""
        if wire == _VARINT:
            self.varint(end)
        elif wire == _BYTES:
            self.at = self.length(end)
        elif wire in (_FIXED64, _FIXED32):
            self.take(8 if wire == _FIXED64 else 4, end)
        else:
            raise _DamagedError(self.at, f"wire type {wire}")


@dataclass
class _Value:
    """One value as it stands in the file."""

    tag: str = ""
    dims: list[int] = field(default_factory=list)
    kind: str = ""
    content: Extent | None = None
    is_map: bool = False


def _text(cursor: _Cursor, end: int) -> str:
    stop = cursor.length(end)
    start = cursor.at
    if stop - start > _MAX_NAME_NBYTES:
        raise _DamagedError(start, f"a name of {stop - start:,} bytes")
    try:
        return cursor.take(stop - start, end).decode()
    except UnicodeDecodeError:
        raise _DamagedError(start, "a name that is not UTF-8") from None


def _read_tensor(cursor: _Cursor, end: int, value: _Value) -> None:
    while cursor.at < end:
        match cursor.field(end):
            case (1, 0):
                value.dims.append(cursor.varint(end))
            case (1, 2):
                stop = cursor.length(end)
                while cursor.at < stop:
                    value.dims.append(cursor.varint(stop))
            case (2, 2):
                value.kind = _text(cursor, end)
            case (3, 2):
                stop = cursor.length(end)
                value.content = Extent(cursor.at, stop - cursor.at)
                cursor.at = stop
            case (_, wire):
                cursor.skip(wire, end)


def _read_value(cursor: _Cursor, end: int) -> _Value:
    value = _Value()
    while cursor.at < end:
        match cursor.field(end):
            case (1, 2):
                value.tag = _text(cursor, end)
            case (2, 2):
                _read_tensor(cursor, cursor.length(end), value)
            case (3, 2):
                value.is_map = True
                cursor.at = cursor.length(end)
            case (_, wire):
                cursor.skip(wire, end)
    return value


def _walk(cursor: _Cursor) -> tuple[list[_Value], int | None]:
    """All values in file order, and the crc of the trailer where there is one."""
    values: list[_Value] = []
    while cursor.at < cursor.nbytes:
        start = cursor.at
        if cursor.nbytes - start == CRC_NBYTES:
            trailer = os.pread(cursor.fd, CRC_NBYTES, start)
            if trailer.startswith(CRC_MARK):
                return values, int.from_bytes(trailer[len(CRC_MARK) :], "big")
        number, wire = cursor.field(cursor.nbytes)
        if (number, wire) != (1, _BYTES):
            raise _DamagedError(start, f"field {number} of wire type {wire} where a value should begin")
        values.append(_read_value(cursor, cursor.length(cursor.nbytes)))
    return values, None


def read_header(path: str) -> FileHeader:
    """Names, types, shapes and byte ranges of one .ckpt; InputError where it is damaged, truncated or encrypted."""
    with open_binary(path) as (fd, nbytes):
        mode = _ENCRYPTION_MAGIC.get(os.pread(fd, 4, 0))
        if mode:
            raise InputError(
                f"{path}: the file is encrypted ({mode}, save_checkpoint's enc_key), which is not supported: "
                "load it with mindspore.load_checkpoint(dec_key=...) and save it without enc_key"
            )
        if nbytes == 0:
            raise InputError(f"{path}: the file is empty (0 bytes): fetch or save it again")
        try:
            values, crc = _walk(_Cursor(fd, nbytes))
        except _DamagedError as damage:
            raise InputError(
                f"{path}: not a whole MindSpore .ckpt: {damage} of {nbytes:,}; the file is truncated, damaged or of "
                "another format: fetch or save it again"
            ) from None
    tensors = _join(path, values)
    listing = repr([(t.name, t.dtype, t.shape, t.extents) for t in tensors.values()]).encode()
    crc_nbytes = nbytes - CRC_NBYTES if crc is not None else 0
    late = (Extent(nbytes - CRC_VALUE_NBYTES, CRC_VALUE_NBYTES),) if crc is not None else ()
    return FileHeader(path, FORMAT, nbytes, tensors, xxh3(listing), {}, crc, crc_nbytes, late=late)


def _join(path: str, values: Sequence[_Value]) -> dict[str, Tensor]:
    """Consecutive values of one tag are the pieces of one tensor."""
    tensors: dict[str, Tensor] = {}
    first = 0
    while first < len(values):
        last = first + 1
        while last < len(values) and values[last].tag == values[first].tag:
            last += 1
        tensor = _tensor(path, values[first:last])
        if tensor.name in tensors:
            raise InputError(f"{path}: the tensor {tensor.name!r} is in the file twice: save it again")
        tensors[tensor.name] = tensor
        first = last
    return tensors


def _tensor(path: str, pieces: Sequence[_Value]) -> Tensor:
    head = pieces[0]
    if head.is_map:
        raise InputError(f"{path}: {head.tag!r} is a map (embedding hash table), which has no layout to transform")
    if not head.tag or not head.kind or any(p.content is None for p in pieces):
        raise InputError(f"{path}: a value without {'content' if head.kind else 'tensor_type'} ({head.tag!r})")
    if any((p.dims, p.kind) != (head.dims, head.kind) for p in pieces):
        raise InputError(f"{path}: the pieces of {head.tag!r} differ in shape or type: the file is damaged")
    dtype = dtypes.BY_MINDSPORE.get(head.kind)
    if dtype is None:
        raise InputError(
            f"{path}: {head.tag!r} has the unknown type {head.kind!r}; known: {sorted(dtypes.BY_MINDSPORE)}"
        )
    extents = tuple(p.content for p in pieces if p.content is not None)
    nbytes = sum(e.nbytes for e in extents)
    if dtype.code == dtypes.STRING and any(e.nbytes < SLICE_NBYTES for e in extents[:-1]):
        raise InputError(f"{path}: the string {head.tag!r} is in the file twice: save it again")
    if dtype.code == dtypes.STRING and nbytes % 4 == 0:
        return Tensor(head.tag, dtype.code, (), path, extents)
    if dtype.code == dtypes.STRING or len(head.dims) > _MAX_NDIM or any(n >= _MAX_LENGTH for n in head.dims):
        dims = f"{head.dims!s:.200}"
        raise InputError(
            f"{path}: {head.tag!r} is {head.kind} {dims} with {nbytes:,} bytes: the file is damaged: save it again"
        )
    shape = () if head.dims == [0] and nbytes == dtype.itemsize else tuple(head.dims)
    needed = prod(shape) * dtype.itemsize
    if needed != nbytes:
        raise InputError(
            f"{path}: {head.tag!r} has {nbytes:,} bytes, {head.kind}{list(shape)} needs {needed:,}: the file is damaged"
        )
    return Tensor(head.tag, dtype.code, shape, path, extents)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _head(spec: TensorSpec, content_nbytes: int) -> bytes:
    """Everything of one value before its content."""
    tag = spec.name.encode()
    kind = dtypes.BY_CODE[spec.dtype].mindspore.encode()
    dims = [0] if spec.dtype == dtypes.STRING else spec.shape
    tensor = b"".join(b"\x08" + _varint(n) for n in dims)
    tensor += b"\x12" + _varint(len(kind)) + kind + b"\x1a" + _varint(content_nbytes)
    value = b"\x0a" + _varint(len(tag)) + tag + b"\x12" + _varint(len(tensor) + content_nbytes) + tensor
    return b"\x0a" + _varint(len(value) + content_nbytes) + value


def skeleton(specs: Sequence[TensorSpec], *, crc: bool = False) -> Skeleton:
    """Lay a file out in the order given, as `save_checkpoint` writes it; `crc` leaves room for the trailer."""
    chunks: list[tuple[int, bytes]] = []
    places: dict[str, tuple[Extent, ...]] = {}
    position = 0
    for spec in specs:
        extents: list[Extent] = []
        left = spec.nbytes
        while left or not extents:
            count = min(left, SLICE_NBYTES)
            head = _head(spec, count)
            chunks.append((position, head))
            extents.append(Extent(position + len(head), count))
            position += len(head) + count
            left -= count
        places[spec.name] = tuple(extents)
    if crc:
        chunks.append((position, CRC_MARK + bytes(CRC_VALUE_NBYTES)))
        position += CRC_NBYTES
    return Skeleton(position, tuple(chunks), places)
