"""Values that headers are read into and files are laid out from: no tensor bytes here.

A stored `Tensor` is a list of segments, because MindSpore cuts a tensor over 512 MiB into several values of one .ckpt.
A `Skeleton` is a file without its tensor bytes: the exact header bytes, the exact size, and where each tensor lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from transform_ckpt import dtypes
from transform_ckpt.views import Box, Shape


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes at `offset_bytes` of one file."""

    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a file is asked to hold: name, neutral dtype code, shape.  `string_nbytes` is given only for strings."""

    name: str
    dtype: str
    shape: Shape
    string_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        if self.dtype == dtypes.STRING:
            return self.string_nbytes
        return prod(self.shape) * dtypes.itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as one file stores it: C order, little endian, in the extents' order.

    `inline` holds the bytes of a small value that no tensor file stores (a string, a number of a JSON file); `path`
    then names the file that it comes from and `extents` is empty.
    """

    name: str
    dtype: str
    shape: Shape
    path: str
    extents: tuple[Extent, ...]
    inline: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        if self.inline is not None:
            return len(self.inline)
        return sum(extent.nbytes for extent in self.extents)

    def spec(self) -> TensorSpec:
        """The same tensor as a wish for another file."""
        return TensorSpec(self.name, self.dtype, self.shape, self.nbytes if self.dtype == dtypes.STRING else 0)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one checkpoint file says of itself.

    `digest` is the XXH3-128 of everything but tensor bytes (a source fingerprint); `crc32` is the stored checksum of
    the file's first `crc_nbytes` bytes, or None where the file has none.
    """

    path: str
    format: str
    nbytes: int
    tensors: Mapping[str, Tensor]
    digest: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    crc32: int | None = None
    crc_nbytes: int = 0
    tensor_crcs: Mapping[str, int] = field(default_factory=dict)
    """CRC-32 of single tensors, where the file has one for each."""
    late: tuple[Extent, ...] = ()
    """Bytes beside the tensors' that are known only when these are: checksums."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A file to be: `chunks` are (offset_bytes, bytes) of header material, `places` where each tensor goes."""

    nbytes: int
    chunks: tuple[tuple[int, bytes], ...]
    places: Mapping[str, tuple[Extent, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor that holds exactly `box` of a logical one.  `rank` is the global rank whose file it is in."""

    tensor: Tensor
    box: Box
    rank: int


@dataclass(frozen=True, slots=True)
class Logical:
    """A whole parameter and where its parts are stored; several pieces with an equal box are replicas."""

    name: str
    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint as its headers (and, where it needs one, its strategy) describe it.

    `params` are laid-out parameters; `states` are names in no strategy (step, loss scale ...): whole tensors, one
    piece a rank.  `headers` are all files that were read, `root` is the absolute path that theirs lie below.
    """

    format: str
    root: str
    headers: tuple[FileHeader, ...]
    params: Mapping[str, Logical]
    states: Mapping[str, Logical]
    step: int | None = None
    notes: tuple[str, ...] = ()

    def paths(self) -> tuple[str, ...]:
        """The root and every file, which may lie elsewhere behind symbolic links."""
        return (self.root, *(header.path for header in self.headers))


class Seal(Protocol):
    """What can be written into a file only when all its tensors are there."""

    def __call__(self, crcs: Mapping[str, int]) -> tuple[tuple[int, bytes], ...]:
        """(offset, bytes) to be written over the skeleton, from the CRC-32 of every storage by its key."""


@dataclass(frozen=True, slots=True)
class TargetFile:
    """One tensor file to be written: its path below the destination, its skeleton, and which box each tensor is.

    `header_format` names the module that reads it back ("ckpt", "safetensors" or "torch").  A stored tensor that holds
    several boxes one behind the other is given as its parts, named by `part_name`; bytes of no part stay zero.
    """

    relpath: str
    header_format: str
    skeleton: Skeleton
    specs: tuple[TensorSpec, ...]
    boxes: Mapping[str, Box]
    logical: Mapping[str, str] = field(default_factory=dict)
    """Stored name -> logical name, where they differ."""
    storages: Mapping[str, Extent] = field(default_factory=dict)
    """Of a file with a seal: where each storage lies, by its key; every part lies in one of them."""
    seal: Seal | None = None


def part_name(name: str, start: int, stop: int) -> str:
    """Bytes `start` to `stop` of a stored tensor, as a name of their own."""
    return f"{name}[{start}:{stop}]"


def part_of(extents: tuple[Extent, ...], start: int, nbytes: int) -> tuple[Extent, ...]:
    """Some bytes of a stored tensor that lies in `extents`."""
    found: list[Extent] = []
    for extent in extents:
        take = min(extent.nbytes - start, nbytes)
        if start < extent.nbytes and take > 0:
            found.append(Extent(extent.offset_bytes + start, take))
            nbytes -= take
        start = max(0, start - extent.nbytes)
    return tuple(found) or extents[:1]


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file whose bytes are known while planning (JSON, trackers)."""

    relpath: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Witness:
    """A stored tensor of the source that must equal `box` of the logical tensor `name`, cast to its own dtype."""

    name: str
    box: Box
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """Everything that will lie in the destination."""

    format: str
    files: tuple[TargetFile, ...]
    small: tuple[SmallFile, ...] = ()
    dropped: tuple[str, ...] = ()
    """Names of source tensors that the user asked to leave out."""
    notes: tuple[str, ...] = ()
    witnesses: tuple[Witness, ...] = ()
    """Compared with what is written, while it is; only those of tensors that are wanted count."""
