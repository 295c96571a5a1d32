"""Reads a torch.save file without torch: the tree of its pickle, and where the bytes of every storage lie.

torch 2.13.0 torch/serialization.py `_save`: a zip archive whose entries lie below one root: data.pkl, byteorder,
data/{key} for every storage, version, .data/serialization_id.  Files from before torch 1.6 are in torch_legacy.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats import TORCH, torch_legacy
from transform_ckpt.formats.files import open_binary, xxh3
from transform_ckpt.formats.torch_archive import Archive, Entry, damaged, read_archive
from transform_ckpt.formats.torch_pickle import MAX_NBYTES, loads
from transform_ckpt.formats.torch_storages import Storages
from transform_ckpt.formats.torch_tree import tensors_of
from transform_ckpt.formats.torch_values import StoredTensor
from transform_ckpt.tensors import Extent, FileHeader, Tensor

_KEY = re.compile(r"[0-9A-Za-z_-]{1,64}")
_MAX_WORD_NBYTES = 16


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a file holds: `tree` of torch_values, and the bytes of every storage of it by its key.

    `digest` is the XXH3-128 of everything but tensor bytes; `root` is the archive's, "" for a file without one.
    """

    path: str
    nbytes: int
    tree: Any
    extents: dict[str, Extent]
    digest: str
    root: str = ""
    late: tuple[Extent, ...] = ()
    """Checksums of the archive: of entries and of all."""
    crcs: dict[str, int] = field(default_factory=dict)
    """CRC-32 of storages by key; those that torch was told not to compute (0) are left out."""

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor of the tree with its keys; see torch_tree."""
        return tensors_of(self.tree, self.extents, self.path)


def read(path: str) -> TorchFile:
    """One file of torch.save, of either format; no tensor byte is read and nothing is run.

    InputError, beginning with the path, for a file that breaks a rule or names what is not read here.
    """
    with open_binary(path) as (fd, nbytes):
        head = os.pread(fd, len(torch_legacy.MAGIC), 0)
        if head == torch_legacy.MAGIC:
            tree, extents, raw = torch_legacy.read(fd, path, nbytes)
            return TorchFile(path, nbytes, tree, extents, xxh3(raw))
        if not head.startswith(b"PK\3\4"):
            raise damaged(path, "begins neither as a zip archive nor as a pickle of torch")
        archive = read_archive(fd, path, nbytes)
        pickle, root = _pickle(fd, path, archive)
        _check_byteorder(fd, path, archive, root)
    storages = Storages(path)
    tree, end = loads(pickle, path, persistent=storages.load)
    if end != len(pickle):
        raise damaged(path, f"its pickle goes on {len(pickle) - end:,} bytes behind its end")
    extents = {key: _extent(path, archive, root, key, storage.nbytes) for key, storage in storages.found.items()}
    crcs = {key: crc for key in extents if (crc := archive.entries[f"{root}/data/{key}"].crc32)}
    return TorchFile(path, nbytes, tree, extents, xxh3(*archive.raw, pickle), root, tuple(_late(archive, root)), crcs)


def read_header(path: str) -> FileHeader:
    """The storages of a file as tensors of bytes, named as the archive names them: `data/0`."""
    return header_of(read(path))


def header_of(found: TorchFile) -> FileHeader:
    """The same of a file that is read already."""
    path = found.path
    tensors = {
        f"data/{key}": Tensor(f"data/{key}", "U8", (extent.nbytes,), path, (extent,))
        for key, extent in found.extents.items()
    }
    crcs = {f"data/{key}": crc for key, crc in found.crcs.items()}
    return FileHeader(path, TORCH, found.nbytes, tensors, found.digest, tensor_crcs=crcs, late=found.late)


def _late(archive: Archive, root: str) -> Iterator[Extent]:
    yield from (Extent(at, 4) for entry in archive.entries.values() for at in entry.crcs)
    identity = archive.entries.get(f"{root}/.data/serialization_id")
    if identity is not None:
        yield identity.extent


def _content(fd: int, path: str, entry: Entry, limit: int) -> bytes:
    """A small entry, checked by its CRC where it has one (torch can be told to write none)."""
    if entry.extent.nbytes > limit:
        raise damaged(path, f"{entry.name!r:.200} has {entry.extent.nbytes:,} bytes, more than {limit:,}")
    found = os.pread(fd, entry.extent.nbytes, entry.extent.offset_bytes)
    if entry.crc32 and zlib.crc32(found) != entry.crc32:
        raise damaged(path, f"the checksum of {entry.name!r:.200} is wrong")
    return found


def _pickle(fd: int, path: str, archive: Archive) -> tuple[bytes, str]:
    """The pickle, and the root directory that it lies in."""
    roots = {name.partition("/")[0] for name in archive.entries}
    root = next(iter(roots), "")
    entry = archive.entries.get(f"{root}/data.pkl")
    if len(roots) != 1 or entry is None:
        raise damaged(path, "has no data.pkl in one directory that holds all")
    if f"{root}/constants.pkl" in archive.entries:
        raise InputError(f"{path}: is a TorchScript archive, which holds code: give a file of torch.save")
    return _content(fd, path, entry, MAX_NBYTES), root


def _check_byteorder(fd: int, path: str, archive: Archive, root: str) -> None:
    entry = archive.entries.get(f"{root}/byteorder")
    order = b"little" if entry is None else _content(fd, path, entry, _MAX_WORD_NBYTES)
    if order != b"little":
        raise InputError(f"{path}: its byte order is {order!r}, and only little-endian files are read")


def _extent(path: str, archive: Archive, root: str, key: str, nbytes: int) -> Extent:
    """Where a storage lies; its entry has as many bytes as the pickle says."""
    if not _KEY.fullmatch(key):
        raise damaged(path, f"names a storage {key!r:.200}")
    entry = archive.entries.get(f"{root}/data/{key}")
    if entry is None:
        raise damaged(path, f"has no entry for storage {key}")
    if entry.extent.nbytes != nbytes:
        raise damaged(
            path, f"its pickle gives {nbytes:,} bytes for storage {key}, its entry has {entry.extent.nbytes:,}"
        )
    return entry.extent
