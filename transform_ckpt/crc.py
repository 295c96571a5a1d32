"""Checksums in files: MindSpore's own (crc_check=True), checked on sources and written on request; zip entries'."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats import ckpt, safetensors
from transform_ckpt.formats.files import open_binary, storage_error
from transform_ckpt.store import read_fully, write_fully
from transform_ckpt.tensors import Extent, FileHeader, TargetFile, Tensor


def has_trailer(file: TargetFile) -> bool:
    """Is this a .ckpt with room for a crc?"""
    chunks = file.skeleton.chunks
    return file.header_format == ckpt.FORMAT and bool(chunks) and chunks[-1][1].startswith(ckpt.CRC_MARK)


def write_crc(path: str, file: TargetFile) -> None:
    """Fill the crc trailer of a .ckpt that has room for one, whose tensors are there; StorageError."""
    if not has_trailer(file):
        return
    end = file.skeleton.nbytes - ckpt.CRC_NBYTES
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error(path, error, "writing its crc") from None
    try:
        crc = crc32_of(fd, path, 0, end)
        trailer = ckpt.CRC_MARK + crc.to_bytes(ckpt.CRC_NBYTES - len(ckpt.CRC_MARK), "big")
        write_fully(fd, path, end, memoryview(trailer))
    finally:
        os.close(fd)


def crc32_of(fd: int, path: str, start: int, nbytes: int, crc: int = 0) -> int:
    """crc32 of a range of a file, through one buffer."""
    buffer = memoryview(bytearray(min(max(nbytes, 1), 1 << 20)))
    at = start
    while at < start + nbytes:
        part = buffer[: min(len(buffer), start + nbytes - at)]
        read_fully(fd, path, at, part)
        crc = crc32(part, crc)
        at += len(part)
    return crc


_POLYNOMIAL = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo that of CRC-32, bits reflected (x**0 is the highest bit)."""
    found, bit = 0, 1 << 31
    while bit:
        if a & bit:
            found ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
        bit >>= 1
    return found


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """x ** (8 * nbytes)."""
    found, power, left = 1 << 31, 1 << 23, nbytes
    while left:
        if left & 1:
            found = _multiply(found, power)
        power = _multiply(power, power)
        left >>= 1
    return found


def joined_crc32(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of two runs of bytes one behind the other, from those of each (as zlib's crc32_combine)."""
    return _multiply(_shift(second_nbytes), first) ^ second


def zeros_crc32(nbytes: int) -> int:
    """CRC-32 of so many zero bytes."""
    return _multiply(_shift(nbytes), 0xFFFFFFFF) ^ 0xFFFFFFFF


def storage_crcs(storages: Mapping[str, Extent], parts: Sequence[tuple[int, int, int]]) -> dict[str, int]:
    """CRC-32 of a file's storages, from (file offset, nbytes, CRC-32) of their parts; what no part fills is zero."""
    waiting = sorted(parts, reverse=True)
    found: dict[str, int] = {}
    for key, extent in sorted(storages.items(), key=lambda item: (item[1].offset_bytes, item[1].nbytes)):
        crc, at, end = 0, extent.offset_bytes, extent.offset_bytes + extent.nbytes
        while waiting and waiting[-1][0] < end:
            offset, nbytes, part = waiting.pop()
            if offset > at:
                crc = joined_crc32(crc, zeros_crc32(offset - at), offset - at)
            crc, at = joined_crc32(crc, part, nbytes), offset + nbytes
        found[key] = joined_crc32(crc, zeros_crc32(end - at), end - at) if at < end else crc
    return found


def crc32(data: memoryview | bytes, start: int = 0) -> int:
    """CRC-32 as zlib's; by ISA-L, twenty times faster, where it is installed."""
    return _crc32()(data, start)


@cache
def _crc32() -> Callable[[Any, int], int]:
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.crc32
    found: Callable[[Any, int], int] = isal_zlib.crc32
    return found


def has_crcs(header: FileHeader) -> bool:
    """Does the file say a checksum of its own, of all or of each tensor?"""
    return header.crc32 is not None or bool(header.tensor_crcs)


def check_tensor_crcs(header: FileHeader) -> None:
    """InputError when a tensor's bytes are not those that its own checksum was made of."""
    with open_binary(header.path, "checking its checksums") as (fd, _):
        for name, wanted in header.tensor_crcs.items():
            extent = header.tensors[name].extents[0]
            if crc32_of(fd, header.path, extent.offset_bytes, extent.nbytes) != wanted:
                raise InputError(
                    f"{header.path}: the bytes of {name!r} do not fit their checksum: the file is damaged: fetch or "
                    "save it again"
                )


def check_crc(header: FileHeader) -> None:
    """InputError when a file's own checksum, or that of a tensor, does not fit its bytes."""
    if header.tensor_crcs:
        check_tensor_crcs(header)
    if header.crc32 is None:
        return
    with open_binary(header.path, "checking its crc") as (fd, _):
        if header.format == safetensors.FORMAT:
            found = 0
            for name in sorted(n for n, t in header.tensors.items() if t.inline is None):
                found = _tensor_crc32(fd, header.tensors[name], zlib.crc32(name.encode(), found))
        else:
            found = crc32_of(fd, header.path, 0, header.crc_nbytes)
    if found != header.crc32:
        raise InputError(
            f"{header.path}: its crc_check value is {header.crc32}, its bytes give {found}: the file is damaged: "
            "fetch or save it again"
        )


def _tensor_crc32(fd: int, tensor: Tensor, crc: int) -> int:
    """As MindSpore computes it, by Python's bytes(array): for an integer n of shape () that is n zeros."""
    extent = tensor.extents[0]
    if tensor.shape or tensor.dtype[0] not in "IU":
        return crc32_of(fd, tensor.path, extent.offset_bytes, extent.nbytes, crc)
    left = int.from_bytes(os.pread(fd, extent.nbytes, extent.offset_bytes), "little")
    while 0 < left < 1 << 40:  # MindSpore could not have held more
        crc = zlib.crc32(bytes(min(left, 1 << 20)), crc)
        left -= min(left, 1 << 20)
    return crc
