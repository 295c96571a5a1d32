"""Are two checkpoints the same, tensor by tensor, whatever their layout?  And are a checkpoint's replicas equal?

Both sides are read as whole logical tensors in C order and digested chunk by chunk, so memory does not grow with the
tensor; only the first chunk that differs is read again, to name the element.  Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transform_ckpt import dtypes, manifest, planner
from transform_ckpt.errors import DifferenceError
from transform_ckpt.kernels import Mover
from transform_ckpt.planner import Group, Plan
from transform_ckpt.store import FileTable, TensorReader, Writer
from transform_ckpt.tensors import Logical, Piece, Skeleton, Source, Target, TargetFile, TensorSpec
from transform_ckpt.verify import check_tree
from transform_ckpt.views import Box, whole

CHUNK_NBYTES = 4 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between two checkpoints."""

    name: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


def logicals(source: Source) -> dict[str, Logical]:
    """Every tensor of a checkpoint by name."""
    return {**source.params, **source.states}


def compare(
    a: Source, b: Source, *, names: Sequence[str] | None = None, progress: Progress | None = None
) -> Iterator[Difference]:
    """Differences in names, types, shapes and bytes; `names` limits the question to some tensors."""
    left, right = logicals(a), logicals(b)
    asked = list(names) if names is not None else [*left, *(n for n in right if n not in left)]
    total = sum(nbytes_of(left[n]) for n in asked if n in left)
    done = 0
    one, two = _WholeReader(a, asked), _WholeReader(b, asked)
    try:
        for name in asked:
            if name not in left or name not in right:
                where = "first" if name in left else "second"
                yield Difference(name, "missing", f"is only in the {where}")
                continue
            described = tuple(f"{t.dtype}{list(t.shape)}" for t in (left[name], right[name]))
            if described[0] != described[1]:
                yield Difference(name, "type", f"{described[0]} in the first, {described[1]} in the second")
                continue
            detail = _value_difference(one, two, name, dtypes.itemsize(left[name].dtype))
            if detail:
                yield Difference(name, "value", detail)
            done += nbytes_of(left[name])
            if progress is not None:
                progress(done, total)
    finally:
        one.close()
        two.close()


def nbytes_of(logical: Logical) -> int:
    """Logical size in bytes."""
    return dtypes.itemsize(logical.dtype) * whole(logical.shape).numel


def _value_difference(one: _WholeReader, two: _WholeReader, name: str, width: int) -> str | None:
    left, right = one.digests(name), two.digests(name)
    if left == right:
        return None
    chunk = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right)))
    first, second = one.chunk(name, chunk), two.chunk(name, chunk)
    at = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), min(len(first), len(second)))
    element = (chunk * CHUNK_NBYTES + at) // width
    offset = at - at % width
    shown = [data[offset : offset + width].hex() or "nothing" for data in (first, second)]
    return f"differs from element {element:,} on (bytes {shown[0]} and {shown[1]})"


class _WholeReader:
    """Logical tensors of one checkpoint as streams of bytes in C order."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        known = logicals(source)
        kept = {n: known[n] for n in names if n in known}
        boxes = {n: whole(t.shape) for n, t in kept.items()}
        specs = tuple(TensorSpec(n, t.dtype, t.shape) for n, t in kept.items())
        file = TargetFile("", "", Skeleton(0, (), dict.fromkeys(kept, ())), specs, boxes)
        plan = planner.build(replace(source, params=kept, states={}), Target("memory", (file,)))
        self._groups: dict[str, Group] = {group.name: group for group in plan.groups}
        self._table, self._mover = FileTable(os.O_RDONLY), Mover()

    def close(self) -> None:
        self._table.close()

    def digests(self, name: str) -> list[bytes]:
        """One digest for each chunk; none for an empty tensor."""
        sink = _Digests()
        self._stream(name, sink)
        return sink.finish()

    def chunk(self, name: str, number: int) -> bytes:
        """The bytes of one chunk."""
        sink = _Capture(number * CHUNK_NBYTES)
        self._stream(name, sink)
        return bytes(sink.data)

    def _stream(self, name: str, sink: Writer) -> None:
        group = self._groups.get(name)
        if group is None:
            return
        readers = [TensorReader(self._table, tensor) for tensor in group.reads]
        self._mover.move(group.component, (0, group.component.shape[0]), readers, [sink])


class _Digests:
    """Digests a stream in chunks of CHUNK_NBYTES."""

    def __init__(self) -> None:
        import xxhash

        self._new = xxhash.xxh3_128
        self._hasher, self._filled = self._new(), 0
        self._done: list[bytes] = []

    def write(self, offset: int, data: memoryview) -> None:
        while len(data):
            part = data[: CHUNK_NBYTES - self._filled]
            self._hasher.update(part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == CHUNK_NBYTES:
                self._done.append(self._hasher.digest())
                self._hasher, self._filled = self._new(), 0

    def finish(self) -> list[bytes]:
        return [*self._done, self._hasher.digest()] if self._filled else self._done


class _Capture:
    """Keeps the bytes of one chunk of a stream."""

    def __init__(self, start: int) -> None:
        self._start = start
        self.data = bytearray()

    def write(self, offset: int, data: memoryview) -> None:
        low, high = max(offset, self._start), min(offset + len(data), self._start + CHUNK_NBYTES)
        if low < high:
            self.data += data[low - offset : high - offset]


def replica_differences(source: Source, progress: Progress | None = None) -> Iterator[Difference]:
    """Copies of one slice on several ranks that are not the same bytes."""
    copies: dict[int, dict[str, tuple[Piece, ...]]] = {}
    for name, logical in logicals(source).items():
        numbers = _copy_numbers(tuple(piece.box for piece in logical.pieces))
        for number in range(max(numbers, default=0) + 1):
            mine = (piece for piece, n in zip(logical.pieces, numbers, strict=True) if n == number)
            copies.setdefault(number, {})[name] = tuple(mine)
    first = copies.pop(0, {})
    known = logicals(source)
    for number, others in sorted(copies.items()):
        # what a copy does not hold comes from the first that does: a plan takes every element from its first holder
        params = {n: replace(known[n], pieces=(*mine, *known[n].pieces)) for n, mine in others.items()}
        for found in compare(source, replace(source, params=params, states={}), names=[*others], progress=progress):
            ranks = sorted({p.rank for p in (*others[found.name], *first[found.name])})
            yield Difference(
                found.name, "replica", f"its copies on ranks {ranks} differ (copy 0 and {number}): {found.detail}"
            )


@lru_cache(maxsize=256)
def _copy_numbers(boxes: tuple[Box, ...]) -> tuple[int, ...]:
    """The copy of the tensor that each box is counted to; boxes of one copy share no element.

    Equal boxes are replicas; others overlap where stages cut a tied parameter in different ways.
    """
    copies: list[set[Box]] = []
    numbers: list[int] = []
    for box in boxes:
        number = next(
            (n for n, held in enumerate(copies) if box not in held and not any(map(box.intersect, held))), len(copies)
        )
        if number == len(copies):
            copies.append(set())
        copies[number].add(box)
        numbers.append(number)
    return tuple(numbers)


def check_output(plan: Plan, dst: str, reopened: Source, progress: Progress | None = None) -> None:
    """DifferenceError unless the files of `dst` have their digests and, read anew, equal the source's tensors."""
    found = manifest.read(dst)
    faults = check_tree(dst, found) if found is not None else [f"{dst}: has no {manifest.NAME}"]
    names = [n for n in logicals(plan.source) if n not in plan.target.dropped]
    faults += [str(d) for d in compare(plan.source, reopened, names=names, progress=progress)]
    faults += [str(d) for d in replica_differences(plan.source)]
    if faults:
        raise DifferenceError(f"{dst}: {len(faults)} differences from the source:\n" + "\n".join(faults[:20]))
