"""Digests of what a unit of work writes: their order in the journal, and reading them again.

May import planner and store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from transform_ckpt.planner import Plan
from transform_ckpt.store import FileTable, pieces_of, read_fully
from transform_ckpt.tensors import Extent
from transform_ckpt.views import row_major

_BUFFER_NBYTES = 1 << 20
DIGEST_DIGITS = 32
"""Of an XXH3-128 in the journal; the CRC-32 of what goes into a file with a seal follows in 8 more."""


def part_ranges(plan: Plan, unit: int) -> Iterator[tuple[int, int, int, int]]:
    """(group, write, first byte in the target tensor, nbytes) of every part a unit writes, in the journal's order."""
    for task in plan.units[unit]:
        component = plan.groups[task.group].component
        for index in plan.active(task):
            side = component.writes[index]
            box = side.box
            low, high = max(task.start, box.start[0]), min(task.stop, box.start[0] + box.size[0])
            row_nbytes = row_major(box.size)[0]
            at, nbytes = (low - box.start[0]) * row_nbytes, (high - low) * row_nbytes
            yield task.group, index, side.stored_nbytes(at), side.stored_nbytes(nbytes)


def range_digest(table: FileTable, path: str, extents: Sequence[Extent], at: int, nbytes: int) -> str:
    """XXH3-128 of some bytes of a stored tensor."""
    import xxhash

    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_BUFFER_NBYTES, max(nbytes, 1))))
    fd = table.fd(path)
    end = at + nbytes
    while at < end:
        part = buffer[: min(len(buffer), end - at)]
        for offset, piece in pieces_of(extents, at, part):
            read_fully(fd, path, offset, piece)
        hasher.update(part)
        at += len(part)
    return hasher.hexdigest()


def collect_digests(plan: Plan, done: dict[int, list[str]]) -> dict[int, dict[str, list[tuple[int, str]]]]:
    """Digests of the journal, by file and tensor, each tensor's parts in the order of its bytes."""
    found: dict[int, dict[str, list[tuple[int, str]]]] = {}
    for unit in range(len(plan.units)):
        for (group, write, _, nbytes), digest in zip(part_ranges(plan, unit), done[unit], strict=True):
            for place in plan.groups[group].writes[write]:
                found.setdefault(place.file, {}).setdefault(place.name, []).append((nbytes, digest[:DIGEST_DIGITS]))
    return found


def collect_crcs(plan: Plan, done: Mapping[int, Sequence[str]]) -> dict[int, list[tuple[int, int, int]]]:
    """By file: (offset in the file, nbytes, CRC-32) of every part that was written, for parts in one piece."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for unit in range(len(plan.units)):
        for (group, write, at, nbytes), digest in zip(part_ranges(plan, unit), done[unit], strict=True):
            crc = digest[DIGEST_DIGITS:]
            for place in plan.groups[group].writes[write] if crc else ():
                found.setdefault(place.file, []).append((place.extents[0].offset_bytes + at, nbytes, int(crc, 16)))
    return found
