"""`.data/serialization_id` of a torch.save file: 20 digits over the record names, 20 over their CRCs.

torch 2.13.0 on Linux (caffe2/serialize/inline_container.cc `writeSerializationId`, behaviour seen by comparing files):
c10::hash_combine over the std::hash of every record name, in the order in which libstdc++ walks a
std::unordered_set<std::string>, and over every CRC-32 in the order of the file; empty records have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

_MASK = (1 << 64) - 1
_MULTIPLIER = 0xC6A4A7935BD1E995
_SEED = 0xC70F6907
_BUCKETS = (
    1, 13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172933, 351061, 712697, 1447153,
    2938679, 5967347, 12117689,
)  # fmt: skip
"""Numbers of buckets that a growing libstdc++ table passes through."""


def name_hash(name: bytes) -> int:
    """std::hash<std::string> of libstdc++: MurmurHash64A with its fixed seed."""
    found = (_SEED ^ (len(name) * _MULTIPLIER)) & _MASK
    whole = len(name) - len(name) % 8
    for at in range(0, whole, 8):
        part = int.from_bytes(name[at : at + 8], "little") * _MULTIPLIER & _MASK
        part = (part ^ (part >> 47)) * _MULTIPLIER & _MASK
        found = (found ^ part) * _MULTIPLIER & _MASK
    if whole < len(name):
        found = (found ^ int.from_bytes(name[whole:], "little")) * _MULTIPLIER & _MASK
    found = (found ^ (found >> 47)) * _MULTIPLIER & _MASK
    return found ^ (found >> 47)


def combine(values: Iterable[int]) -> int:
    """c10::hash_combine, from 0."""
    seed = 0
    for value in values:
        seed ^= (value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & _MASK
    return seed


class _Set:
    """The order of a libstdc++ hash set: one linked list; a bucket knows the node before its first."""

    def __init__(self) -> None:
        self.buckets = _BUCKETS[0]
        self.count = 0
        self.following: dict[int | None, int | None] = {None: None}
        self.before: dict[int, int | None] = {}

    def insert(self, value: int) -> None:
        if self.count + 1 > self.buckets or not self.count:
            self._grow()
        self.count += 1
        self._link(value)

    def _grow(self) -> None:
        values = list(self)
        self.buckets = _BUCKETS[_BUCKETS.index(self.buckets) + 1]
        self.following, self.before = {None: None}, {}
        for value in values:
            self._link(value)

    def _link(self, value: int) -> None:
        bucket = value % self.buckets
        before = self.before.get(bucket)
        first = self.following[before]
        self.following[before], self.following[value] = value, first
        if bucket not in self.before:
            self.before[bucket] = None
            if first is not None:
                self.before[first % self.buckets] = value

    def __iter__(self) -> Iterator[int]:
        value = self.following[None]
        while value is not None:
            yield value
            value = self.following[value]


def names_hash(names: Sequence[str]) -> int:
    """The first half, of record names without the archive's root."""
    order = _Set()
    for name in names:
        order.insert(name_hash(name.encode()))
    return combine(order)


def serialization_id(names: int, crcs: Iterable[int]) -> bytes:
    """The record's content: `names_hash` and the CRCs of all non-empty records before it, in file order."""
    return b"%020d%020d" % (names, combine(crcs))
