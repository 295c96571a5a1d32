"""Reads what torch.save wrote before torch 1.6 (and still does with _use_new_zipfile_serialization=False).

torch 2.13.0 torch/serialization.py `_legacy_save`: pickles of a magic number, the protocol, the machine, the object,
the list of storage keys; then for every key in that order an int64 with the number of elements, and the bytes.
"""

from __future__ import annotations

import os
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats.torch_archive import damaged
from transform_ckpt.formats.torch_machine import TruncatedError
from transform_ckpt.formats.torch_pickle import MAX_NBYTES, loads
from transform_ckpt.formats.torch_storages import Storages
from transform_ckpt.formats.torch_values import BY_CODE, Storage
from transform_ckpt.tensors import Extent

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickle, of protocol 2, of the number 0x1950a86a20f9469cfc6c."""
PROTOCOL = 1001
FIRST_NBYTES = 1 << 20


def read(fd: int, path: str, nbytes: int) -> tuple[Any, dict[str, Extent], bytes]:
    """The tree, the extent of every storage by its key, and all bytes but those of tensors."""
    size = FIRST_NBYTES
    while True:
        data = os.pread(fd, min(size, nbytes), 0)
        storages = Storages(path, items=6)
        try:
            tree, keys, end = _pickles(data, path, storages)
            break
        except TruncatedError:
            if len(data) >= min(nbytes, MAX_NBYTES):
                raise
            size *= 4
    extents, lengths = _extents(fd, path, nbytes, storages.found, keys, end)
    return tree, extents, data[:end] + lengths


def _pickles(data: bytes, path: str, storages: Storages) -> tuple[Any, list[str], int]:
    protocol, at = loads(data, path, pos=len(MAGIC))
    if protocol != PROTOCOL:
        raise damaged(path, f"its protocol is not {PROTOCOL}")
    machine, at = loads(data, path, pos=at)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise InputError(f"{path}: was not written on a little-endian machine, and only such files are read")
    tree, at = loads(data, path, persistent=storages.load, pos=at)
    keys, at = loads(data, path, pos=at)
    if type(keys) is not list or any(type(key) is not str for key in keys) or len(set(keys)) != len(keys):
        raise damaged(path, "its list of storages is none")
    if set(keys) != set(storages.found):
        raise damaged(path, f"lists {len(keys):,} storages, and its pickle names {len(storages.found):,} or others")
    return tree, keys, at


def _extents(
    fd: int, path: str, nbytes: int, storages: dict[str, Storage], keys: list[str], at: int
) -> tuple[dict[str, Extent], bytes]:
    found: dict[str, Extent] = {}
    lengths = b""
    for key in keys:
        storage = storages[key]
        raw = os.pread(fd, 8, at)
        numel = storage.nbytes // (BY_CODE[storage.dtype].itemsize if storage.dtype else 1)
        if len(raw) < 8 or at + 8 + storage.nbytes > nbytes:
            raise InputError(f"{path}: is cut off within storage {key:.80}: fetch or save it again")
        if int.from_bytes(raw, "little") != numel:
            raise damaged(path, f"its pickle gives {numel:,} elements for storage {key:.80}, its data others")
        found[key] = Extent(at + 8, storage.nbytes)
        lengths += raw
        at += 8 + storage.nbytes
    if at != nbytes:
        raise damaged(path, f"{nbytes - at:,} bytes behind the last storage")
    return found, lengths
