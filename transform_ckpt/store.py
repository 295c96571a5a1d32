"""Where tensor bytes come from and go to: positioned reads and writes, passed in so that tests can inject faults.

The only module besides execute.py and the format readers that opens tensor files.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from transform_ckpt import dtypes
from transform_ckpt.casts import first_difference
from transform_ckpt.errors import InputError, StorageError
from transform_ckpt.formats.files import storage_error
from transform_ckpt.tensors import Extent, Tensor

MAX_OPEN_FILES = 256


class Reader(Protocol):
    """Bytes of one stored tensor."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the tensor."""


class Writer(Protocol):
    """Bytes of one target tensor, in all its replicas."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at byte `offset` of the tensor."""


class FileTable:
    """Open file descriptors by path, the least recently used closed first."""

    def __init__(self, flags: int, limit: int = MAX_OPEN_FILES) -> None:
        self._flags, self._limit = flags | os.O_CLOEXEC, limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def fd(self, path: str) -> int:
        """A descriptor of the file, open until it is the least recently used."""
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        while len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        while True:
            try:
                fd = os.open(path, self._flags)
                break
            except OSError as error:
                if error.errno != errno.EMFILE or not self._open:
                    raise storage_error(path, error, "opening the file") from None
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = fd
        return fd

    def close(self) -> None:
        """Close every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])


class TensorReader:
    """A stored tensor of a file, or an inline value."""

    def __init__(self, table: FileTable, tensor: Tensor) -> None:
        self._table, self._tensor = table, tensor

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; StorageError when the file is shorter than its header said."""
        tensor = self._tensor
        if tensor.inline is not None:
            buffer[:] = tensor.inline[offset : offset + len(buffer)]
            return
        fd = self._table.fd(tensor.path)
        for at, part in pieces_of(tensor.extents, offset, buffer):
            read_fully(fd, tensor.path, at, part)


class PlaceWriter:
    """A target tensor at one or more (path, extents)."""

    def __init__(self, table: FileTable, places: Sequence[tuple[str, Sequence[Extent]]]) -> None:
        self._table, self._places = table, places

    def write(self, offset: int, data: memoryview) -> None:
        """The same bytes into every replica."""
        for path, extents in self._places:
            fd = self._table.fd(path)
            for at, part in pieces_of(extents, offset, data):
                write_fully(fd, path, at, part)


class WitnessWriter:
    """Writes nothing: what would be written must be what a stored tensor of the source holds already."""

    def __init__(self, table: FileTable, tensor: Tensor, name: str, buffer: bytearray) -> None:
        """`buffer` is used for every block, by any number of witnesses; it grows to the length of the longest."""
        self._reader, self._tensor, self._name, self._buffer = TensorReader(table, tensor), tensor, name, buffer

    def write(self, offset: int, data: memoryview) -> None:
        """InputError naming the tensor and its first element that differs; NaNs are equal."""
        held = self._buffer
        if len(held) != len(data):  # so it seldom is: blocks are of one length
            del held[len(data) :]
            held.extend(bytes(len(data) - len(held)))
        with memoryview(held) as window:
            self._reader.read_into(offset, window)
        at = first_difference(held, data, self._tensor.dtype)
        if at is not None:
            width = dtypes.itemsize(self._tensor.dtype)
            shown = [part[at * width : (at + 1) * width].hex() for part in (data, held)]
            raise InputError(
                f"{self._name!r} as {self._tensor.dtype} is not {self._tensor.name!r} of {self._tensor.path}: element "
                f"{offset // width + at:,} is {shown[0]} and {shown[1]} there: the two are not of one step, or the "
                "bytes were found by the description of another run"
            )


class AllWriters:
    """Several writers of the same bytes as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def write(self, offset: int, data: memoryview) -> None:
        """To each of them."""
        for writer in self._writers:
            writer.write(offset, data)


class MemoryWriter:
    """A target tensor in memory."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def write(self, offset: int, data: memoryview) -> None:
        """Copy into the buffer."""
        self._buffer[offset : offset + len(data)] = data


def pieces_of(extents: Sequence[Extent], offset: int, buffer: memoryview) -> list[tuple[int, memoryview]]:
    """(file offset, part of the buffer) for bytes `offset` ... of a tensor that lies in `extents`."""
    first = extents[0]
    if offset + len(buffer) <= first.nbytes:
        return [(first.offset_bytes + offset, buffer)]
    found: list[tuple[int, memoryview]] = []
    done = 0
    for extent in extents:
        if offset < extent.nbytes and done < len(buffer):
            count = min(extent.nbytes - offset, len(buffer) - done)
            found.append((extent.offset_bytes + offset, buffer[done : done + count]))
            done += count
            offset = 0
        else:
            offset = max(0, offset - extent.nbytes)
    return found


def read_part(table: FileTable, tensor: Tensor, offset: int, nbytes: int) -> bytes:
    """Some bytes of a stored tensor."""
    buffer = bytearray(nbytes)
    if buffer:
        TensorReader(table, tensor).read_into(offset, memoryview(buffer))
    return bytes(buffer)


def read_tensor(table: FileTable, tensor: Tensor) -> bytes:
    """All bytes of a (small) tensor."""
    return read_part(table, tensor, 0, tensor.nbytes)


def read_fully(fd: int, path: str, offset: int, buffer: memoryview) -> None:
    """preadv until the buffer is full."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:] if done else buffer], offset + done)
        except OSError as error:
            raise storage_error(path, error, "reading") from None
        if count == 0:
            raise StorageError(
                f"{path}: ends at byte {offset + done:,}, expected more: it was changed while being read"
            )
        done += count


def write_fully(fd: int, path: str, offset: int, data: memoryview) -> None:
    """pwrite until all is written."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:] if done else data, offset + done)
        except OSError as error:
            raise storage_error(path, error, "writing") from None
