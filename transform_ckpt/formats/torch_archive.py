"""The zip container of torch.save: its directory, checked field by field, as entries with byte extents.

Stricter than a zip reader has to be: stored entries only, one directory at the very end, nothing behind it, entries
that do not overlap, every local header equal to the directory.  Format: PKWARE APPNOTE 6.3.10; what torch writes of it
is in torch_zip_write.  Reads the directory, and 30 bytes and the name of every entry.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from transform_ckpt.errors import InputError
from transform_ckpt.tensors import Extent

MAX_DIRECTORY_NBYTES = 1 << 28
LIMIT = 0xFFFFFFFF
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_DESCRIPTOR_FOLLOWS = 0x8
_CRC_IN_CENTRAL = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored file: name as in the directory, CRC-32, where its local header starts and where its bytes lie.

    `crcs` are the offsets in the file where its CRC-32 stands beside the local header.
    """

    name: str
    crc32: int
    header: int
    extent: Extent
    crcs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Archive:
    """All entries by name, and the bytes that say so (`raw`: headers, directory and end)."""

    entries: dict[str, Entry]
    raw: tuple[bytes, ...]


def damaged(path: str, what: str) -> InputError:
    """What is wrong with a file, as an error."""
    return InputError(f"{path}: {what}; the file is damaged or not of torch.save: fetch or save it again")


def read_archive(fd: int, path: str, nbytes: int) -> Archive:
    """The directory of a file; InputError where any rule is violated."""
    start, size, count, ending = _find_directory(fd, nbytes, path)
    raw = os.pread(fd, size, start)
    found = _parse_directory(raw, count, start, path)
    entries: dict[str, Entry] = {}
    locals_: list[bytes] = []
    for name, flags, crc, length, header, at in found:
        head, data = _check_local(fd, name, flags, crc, length, header, start, path)
        if name in entries:
            raise damaged(path, f"holds {name!r:.200} twice")
        descriptor = (data + length + 4,) if flags & _DESCRIPTOR_FOLLOWS else ()
        entries[name] = Entry(name, crc, header, Extent(data, length), (*descriptor, start + at))
        locals_.append(head)
    _check_overlap(entries, path)
    return Archive(entries, (*locals_, raw, ending))


def _find_directory(fd: int, nbytes: int, path: str) -> tuple[int, int, int, bytes]:
    """Offset and size of the central directory, how many entries it has, and the bytes behind it."""
    tail_nbytes = min(nbytes, _END.size + _LOCATOR.size + _END64.size)
    tail = os.pread(fd, tail_nbytes, nbytes - tail_nbytes)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        raise InputError(
            f"{path}: does not end as a torch file ends: it is cut off, or has bytes "
            "behind its end: fetch or save it again"
        )
    _, disk, first, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    if disk or first or here != count or comment:
        raise damaged(path, "the end of its directory names several disks or a comment")
    ending_nbytes = _END.size
    if tail[-_END.size - _LOCATOR.size :][:4] == b"PK\6\7" and len(tail) == _END.size + _LOCATOR.size + _END64.size:
        _, _, at, _ = _LOCATOR.unpack(tail[_END64.size : _END64.size + _LOCATOR.size])
        sign, length, _, _, disk, first, here, count64, size64, start64 = _END64.unpack(tail[: _END64.size])
        wrong = (sign, length, disk, first, here, at) != (b"PK\6\6", 44, 0, 0, count64, nbytes - len(tail))
        short = ((count, count64, 0xFFFF), (size, size64, LIMIT), (start, start64, LIMIT))
        if wrong or any(small != min(large, limit) for small, large, limit in short):
            raise damaged(path, "the two ends of its directory differ")
        count, size, start, ending_nbytes = count64, size64, start64, len(tail)
    if start + size + ending_nbytes != nbytes:
        raise damaged(path, f"its directory of {size:,} bytes at byte {start:,} does not end where it should")
    if size > MAX_DIRECTORY_NBYTES or count * _CENTRAL.size > size:
        raise damaged(path, f"claims {count:,} entries in {size:,} bytes of directory")
    return start, size, count, tail[-ending_nbytes:]


def _parse_directory(raw: bytes, count: int, limit: int, path: str) -> list[tuple[str, int, int, int, int, int]]:
    """Name, flags, CRC, size, offset of the local header, where the CRC stands in `raw`, per entry."""
    found, at = [], 0
    for _ in range(count):
        if at + _CENTRAL.size > len(raw):
            raise damaged(path, "its directory ends early")
        fields = _CENTRAL.unpack_from(raw, at)
        sign, _, _, flags, method, _, _, crc, packed, size, name_nbytes, extra_nbytes, comment, disk, _, _, header = (
            fields
        )
        name_end = at + _CENTRAL.size + name_nbytes
        extra = raw[name_end : name_end + extra_nbytes]
        name = raw[at + _CENTRAL.size : name_end]
        crc_at = at + _CRC_IN_CENTRAL
        at = name_end + extra_nbytes + comment
        if sign != b"PK\1\2" or at > len(raw) or disk:
            raise damaged(path, "its directory is no list of entries")
        text = _text(name, path)
        size, packed, header = _wide(text, extra, size, packed, header, path)
        if flags & _ENCRYPTED:
            raise damaged(path, f"{text!r:.200} is encrypted")
        if method or packed != size:
            raise InputError(
                f"{path}: {text!r:.200} is compressed (method {method}), and only stored "
                "entries are read: load the file and save it again with torch.save"
            )
        if header + size > limit:
            raise damaged(
                path, f"{text!r:.200} has {size:,} bytes at byte {header:,}, behind the directory at {limit:,}"
            )
        found.append((text, flags, crc, size, header, crc_at))
    if at != len(raw):
        raise damaged(path, f"its directory has {len(raw) - at:,} bytes behind its last entry")
    return found


def _text(name: bytes, path: str) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise damaged(path, f"the name {name!r:.200} is not UTF-8") from None
    if "\0" in text or "\\" in text or any(part in {"", ".", ".."} for part in text.split("/")):
        raise damaged(path, f"the name {text!r:.200} leaves the archive")
    return text


def _wide(name: str, extra: bytes, size: int, packed: int, header: int, path: str) -> tuple[int, int, int]:
    """The 64-bit numbers of the extra field in place of those that are 0xffffffff."""
    numbers = [size, packed, header]
    if LIMIT not in numbers:
        return size, packed, header
    wide: Iterator[int] = iter(())
    at = 0
    while at + 4 <= len(extra):
        tag, nbytes = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            content = extra[at + 4 : at + 4 + nbytes]
            wide = iter(struct.unpack_from(f"<{len(content) // 8}Q", content))
            break
        at += 4 + nbytes
    numbers = [next(wide, -1) if n == LIMIT else n for n in numbers]
    if any(n < 0 for n in numbers):
        raise damaged(path, f"{name!r:.200} has no zip64 sizes")
    return numbers[0], numbers[1], numbers[2]


def _check_local(
    fd: int, name: str, flags: int, crc: int, size: int, header: int, limit: int, path: str
) -> tuple[bytes, int]:
    """The local header's bytes and the offset of the data; what it says must be what the directory says."""
    encoded = name.encode()
    head = os.pread(fd, _LOCAL.size + len(encoded), header)
    if len(head) < _LOCAL.size + len(encoded) or not head.startswith(b"PK\3\4"):
        raise damaged(path, f"there is no entry at byte {header:,}, where {name!r:.200} should be")
    _, _, flags_here, method, _, _, crc_here, packed, unpacked, name_nbytes, extra_nbytes = _LOCAL.unpack_from(head)
    late = {0} if flags & _DESCRIPTOR_FOLLOWS else set()
    sizes = {min(size, LIMIT), LIMIT} | late
    same = flags_here == flags and method == 0 and name_nbytes == len(encoded) and head[_LOCAL.size :] == encoded
    if not same or crc_here not in {crc} | late or packed not in sizes or unpacked not in sizes:
        raise damaged(path, f"the header of {name!r:.200} differs from the directory")
    data = header + _LOCAL.size + name_nbytes + extra_nbytes
    if data + size > limit:
        raise damaged(path, f"{name!r:.200} has {size:,} bytes at byte {data:,}, behind the directory at {limit:,}")
    return head, data


def _check_overlap(entries: dict[str, Entry], path: str) -> None:
    end, last = 0, ""
    for entry in sorted(entries.values(), key=lambda e: e.header):
        if entry.header < end:
            raise damaged(path, f"{entry.name!r:.200} overlaps {last!r:.200}")
        end, last = entry.extent.offset_bytes + entry.extent.nbytes, entry.name
