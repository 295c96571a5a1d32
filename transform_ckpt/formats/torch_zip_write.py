"""Lays out a torch.save file: every byte but those of the storages, and what to patch once their CRCs are known.

torch 2.13.0 (caffe2/serialize/inline_container.cc and its miniz; behaviour seen by comparing files, one over 4 GiB):
stored records; data at multiples of 64 bytes by an extra field "FB" of Zs; local headers without CRC and sizes, which
follow the data in a descriptor; UTF-8 names; no descriptor behind an empty record; zip64 fields from 0xffffffff on;
a zip64 end of central directory always.  Read by torch.load and byte-identical to torch.save (`seal`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transform_ckpt.errors import PlanError
from transform_ckpt.formats.torch_pickler import Pickler
from transform_ckpt.formats.torch_serialization_id import names_hash, serialization_id
from transform_ckpt.tensors import Extent, Skeleton

ALIGNMENT = 64
LIMIT = 0xFFFFFFFF
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_UTF8, _DESCRIPTOR_FOLLOWS = 0x800, 0x8
_ID = ".data/serialization_id"
_ID_NBYTES = 40


@dataclass(frozen=True, slots=True)
class _Record:
    """One entry: its name below the root, its size, and its content, which a storage has not yet."""

    name: str
    nbytes: int
    content: bytes | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an entry's local header, data, descriptor CRC and central CRC lie."""

    header: int
    data: int
    descriptor_crc: int | None
    central_crc: int


@dataclass(frozen=True, slots=True)
class TorchSkeleton:
    """A torch.save file to be.  `skeleton.places` are the storages by their key; CRC fields in its chunks are 0.

    `seal` gives what is written last.  A file without it is read by torch.load, which compares no CRC, but not by
    tools that do (unzip, zipfile).
    """

    skeleton: Skeleton
    records: tuple[_Record, ...]
    placed: tuple[_Place, ...]
    names: int

    def seal(self, crcs: Mapping[str, int]) -> tuple[tuple[int, bytes], ...]:
        """(offset, bytes) to be written over the chunks, from the CRC-32 of every storage's bytes by its key.

        One difference to torch.save is known: there, a storage that begins as a data descriptor does (PK, 7, 8)
        counts once more in the serialization id.
        """
        known = [zlib.crc32(r.content) if r.content is not None else crcs[r.key] for r in self.records[:-1]]
        filled = [crc for crc, record in zip(known, self.records[:-1], strict=True) if record.nbytes]
        content = serialization_id(self.names, filled)
        patches = [(self.placed[-1].data, content)]
        for crc, place in zip([*known, zlib.crc32(content)], self.placed, strict=True):
            raw = crc.to_bytes(4, "little")
            patches += [(at, raw) for at in (place.descriptor_crc, place.central_crc) if at is not None]
        return tuple(patches)


def root_of(file_name: str) -> str:
    """The root directory that torch.save(path) gives its archive: the file's name without its last suffix."""
    return file_name.rpartition(".")[0] or file_name


def skeleton(tree: Any, *, root: str = "archive") -> TorchSkeleton:
    """Lay out the file of a tree of torch_values; PlanError where it cannot be written.

    `root` is what torch calls the archive: `root_of(name)` for torch.save(path), "archive" for torch.save(buffer).
    """
    pickler = Pickler()
    pickle = pickler.dump(tree)
    keys = [storage.key for storage in pickler.storages]
    if len(set(keys)) != len(keys):
        raise PlanError("two storages of a torch file to be written have the same key")
    records = (
        *(_content("data.pkl", pickle), _content(".format_version", b"1"), _content(".storage_alignment", b"64")),
        _content("byteorder", b"little"),
        *(_Record(f"data/{n}", storage.nbytes, None, storage.key) for n, storage in enumerate(pickler.storages)),
        *(_content("version", b"3\n"), _content(_ID, bytes(_ID_NBYTES))),
    )
    return _lay_out(root, records)


def _content(name: str, content: bytes) -> _Record:
    return _Record(name, len(content), content)


def _zip64(sizes: Sequence[int]) -> bytes:
    """The extra field of the numbers that do not fit 32 bits."""
    large = b"".join(n.to_bytes(8, "little") for n in sizes if n >= LIMIT)
    return struct.pack("<HH", 1, len(large)) + large if large else b""


def _local_header(full: bytes, record: _Record, at: int) -> bytes:
    zip64 = bytearray(_zip64([record.nbytes, record.nbytes, at]))
    if record.nbytes >= LIMIT:
        zip64[12:20] = bytes(8)  # miniz knows no compressed size yet
    start = at + _LOCAL.size + len(full) + len(zip64) + 4
    padding = -start % ALIGNMENT
    extra = zip64 + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    head = _LOCAL.pack(b"PK\3\4", 0, _flags(record), 0, 0, 0, 0, 0, 0, len(full), len(extra))
    return head + full + extra


def _flags(record: _Record) -> int:
    return _UTF8 | (_DESCRIPTOR_FOLLOWS if record.nbytes else 0)


def _descriptor(record: _Record, at: int) -> bytes:
    if not record.nbytes:
        return b""
    wide = 8 if max(record.nbytes, at) >= LIMIT else 4
    return b"PK\7\10" + bytes(4) + record.nbytes.to_bytes(wide, "little") * 2


def _central(full: bytes, record: _Record, at: int) -> bytes:
    zip64 = _zip64([record.nbytes, record.nbytes, at])
    size, offset = min(record.nbytes, LIMIT), min(at, LIMIT)
    lengths = (len(full), len(zip64), 0, 0, 0, 0)
    return _CENTRAL.pack(b"PK\1\2", 0, 0, _flags(record), 0, 0, 0, 0, size, size, *lengths, offset) + full + zip64


def _ending(count: int, start: int, nbytes: int) -> bytes:
    """The zip64 end of the central directory, its locator, and the old end."""
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, nbytes, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + nbytes, 1)
    short, size, offset = min(count, 0xFFFF), min(nbytes, LIMIT), min(start, LIMIT)
    return end64 + locator + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, short, short, size, offset, 0)


def _lay_out(root: str, records: tuple[_Record, ...]) -> TorchSkeleton:
    chunks: list[tuple[int, bytes]] = []
    places: dict[str, tuple[Extent, ...]] = {}
    found: list[tuple[int, int, int | None]] = []
    chunk, start, at = bytearray(), 0, 0
    directory = bytearray()
    crcs: list[int] = []
    for record in records:
        full = f"{root}/{record.name}".encode()
        header = at
        chunk += _local_header(full, record, at)
        data = start + len(chunk)
        if record.content is None:
            chunks.append((start, bytes(chunk)))
            places[record.key] = (Extent(data, record.nbytes),)
            chunk, start = bytearray(), data + record.nbytes
        else:
            chunk += record.content
        behind = start + len(chunk)
        chunk += _descriptor(record, header)
        at = start + len(chunk)
        found.append((header, data, behind + 4 if record.nbytes else None))
        crcs.append(len(directory) + 16)
        directory += _central(full, record, header)
    chunk += directory + _ending(len(records), at, len(directory))
    chunks.append((start, bytes(chunk)))
    placed = tuple(_Place(*place, at + crc) for place, crc in zip(found, crcs, strict=True))
    names = names_hash([record.name for record in records[:-1]])
    return TorchSkeleton(Skeleton(start + len(chunk), tuple(chunks), places), records, placed, names)
