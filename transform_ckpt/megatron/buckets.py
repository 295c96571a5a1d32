"""Where each parameter lies in Megatron's contiguous buffers, and so in the files of the distributed optimizer.

Pure integers, in elements; may import only transform_ckpt.views.

Facts (megatron-core 0.6.0 to 0.16.1, core/distributed/param_and_grad_buffer.py, optimizer/distrib_optimizer.py): a
buffer holds its parameters in reversed named_parameters order.  A bucket is closed by the parameter that fills
`bucket_size`; a tied embedding (`shared_embedding`, pp > 1) has a bucket of its own.  Bucket ends are padded, from 0.8
on also the starts of parameters.  Files hold whole buckets one by one (the list form, 0.6), or in one tensor what lies
in each bucket before its end padding (the coalesced form, 0.7 and later).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import lcm, prod

from transform_ckpt.views import Shape

Version = tuple[int, ...]
Parameter = tuple[str, str, Shape, bool]
"""Name, dtype as `torch.bfloat16`, shape, and whether it is a tied embedding with a bucket of its own."""

_DEFAULT_BUCKET_SIZE = 40_000_000
_DEFAULT_BUCKET_SIZE_PER_RANK = 1_000_000
_TIED_EMBEDDING = "word_embeddings.weight"


class BucketError(ValueError):
    """Ranges that no buffer has, or a buffer that Megatron would not build."""


@dataclass(frozen=True, slots=True)
class Range:
    """One parameter: elements `start <= i < end` of the whole padded buffer."""

    name: str
    dtype: str
    shape: Shape
    start: int
    end: int
    bucket: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise BucketError(f"{self.name!r} is at elements {self.start} to {self.end}; a range is 0 <= start < end")
        if prod(self.shape) != self.numel:
            raise BucketError(
                f"{self.name!r} has shape {list(self.shape)}, {prod(self.shape):,} elements, but {self.numel:,} from "
                f"{self.start} to {self.end}"
            )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.end - self.start


@dataclass(frozen=True)
class BufferMap:
    """The parameters of one buffer, in buffer order, and the sizes of its buckets.

    `unpadded[b]`: elements of bucket b that the coalesced form holds; () for the plain rule, up to the end of the
    bucket's last parameter.  `padded[b]`: all its elements, as in the list form; () where that is not known.
    """

    ranges: tuple[Range, ...]
    unpadded: tuple[int, ...] = ()
    padded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ranges:
            raise BucketError("a buffer without parameters")
        names: set[str] = set()
        for found in self.ranges:
            if found.name in names:
                raise BucketError(f"{found.name!r} is there twice")
            names.add(found.name)
        if self.ranges[0].bucket != 0:
            raise BucketError(f"{self.ranges[0].name!r} comes first and is in bucket {self.ranges[0].bucket}, not 0")
        for first, second in pairwise(self.ranges):
            if second.start < first.end:
                raise BucketError(
                    f"{second.name!r} starts at {second.start}, before {first.name!r} ends at {first.end}"
                )
            if second.bucket - first.bucket not in {0, 1}:
                raise BucketError(
                    f"{second.name!r} is in bucket {second.bucket}, but {first.name!r} before it in {first.bucket}: "
                    "buckets count up one by one"
                )
        if not self.unpadded:
            object.__setattr__(self, "unpadded", self._used)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Every bucket holds its parameters, and the next one starts where it ends."""
        for kind, sizes in (("unpadded", self.unpadded), ("padded", self.padded or self.unpadded)):
            if len(sizes) != len(self.bases):
                raise BucketError(f"{len(sizes)} {kind} sizes for {len(self.bases)} buckets")
        padded = self.padded or self.unpadded
        for number, (used, unpadded, size) in enumerate(zip(self._used, self.unpadded, padded, strict=True)):
            if not used <= unpadded <= size:
                raise BucketError(f"bucket {number} has {size:,} elements, {unpadded:,} unpadded and {used:,} in use")
        ends = zip(self.bases, padded, strict=True)
        for number, ((base, size), following) in enumerate(zip(ends, self.bases[1:], strict=False)):
            if base + size > following or (self.padded and base + size != following):
                raise BucketError(f"bucket {number} ends at {base + size}, bucket {number + 1} starts at {following}")

    @cached_property
    def bases(self) -> tuple[int, ...]:
        """Start of each bucket in the buffer: that of its first parameter."""
        starts: dict[int, int] = {}
        for found in self.ranges:
            starts.setdefault(found.bucket, found.start)
        return tuple(starts.values())

    @cached_property
    def _used(self) -> tuple[int, ...]:
        """Elements of each bucket up to the end of its last parameter."""
        ends = {found.bucket: found.end for found in self.ranges}
        return tuple(end - base for end, base in zip(ends.values(), self.bases, strict=True))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each bucket starts in the coalesced tensor."""
        return tuple(accumulate(self.unpadded[:-1], initial=0))

    @cached_property
    def coalesced_numel(self) -> int:
        """Elements of the coalesced tensor."""
        return sum(self.unpadded)

    def list_slice(self, found: Range) -> tuple[int, int, int]:
        """The bucket, and the first element and number of elements in that bucket's tensor."""
        return found.bucket, found.start - self.bases[found.bucket], found.numel

    def coalesced_slice(self, found: Range) -> tuple[int, int]:
        """The first element and number of elements in the coalesced tensor."""
        return self.offsets[found.bucket] + found.start - self.bases[found.bucket], found.numel

    def fitted(self, numel: int) -> BufferMap | None:
        """The map for a coalesced tensor of `numel` elements, or None where the two do not belong together.

        Padding between the last parameter and a tied embedding's bucket counts as unpadded: the start of the
        embedding rounded up to 64 (0.8 and later) or, where it would not divide among the ranks, to the next bucket
        (0.9 to 0.12).  The ranges alone do not tell which; the size of the tensor does.
        """
        if numel == self.coalesced_numel:
            return self
        tied = next((found for found in self.ranges if found.name.endswith(_TIED_EMBEDDING)), None)
        if tied is None or tied.bucket == 0 or sum(found.bucket == tied.bucket for found in self.ranges) > 1:
            return None
        before = tied.bucket - 1
        base = self.bases[before]
        for size in (_up(base + self._used[before], 64) - base, tied.start - base):
            fits = self.coalesced_numel - self.unpadded[before] + size == numel
            if fits and size <= tied.start - base:
                return replace(self, unpadded=(*self.unpadded[:before], size, *self.unpadded[before + 1 :]))
        return None


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _as_it_is(start: int, _end: int, dp: int) -> tuple[int, int]:
    if start % dp:
        raise BucketError(f"a tied embedding at element {start}, which {dp} ranks do not divide: Megatron stops there")
    return start, start


def _moved_unless_divisible(start: int, end: int, dp: int) -> tuple[int, int]:
    return (end, end) if start % dp else (start, start)


def _moved(start: int, end: int, _dp: int) -> tuple[int, int]:
    return start, end


@dataclass(frozen=True, slots=True)
class Padding:
    """What megatron-core does from version `since` on.

    Bucket ends are multiples of lcm(dp, `end`), parameter starts of `start`.  `tied`: where a bucket is closed, and
    where the tied embedding behind it starts, from where it would start, the padded end of that bucket and dp.
    """

    since: Version
    end: int
    start: int
    tied: Callable[[int, int, int], tuple[int, int]]


PADDINGS = (
    Padding((0, 6), 1, 1, _as_it_is),
    Padding((0, 7), 128, 1, _as_it_is),
    Padding((0, 8), 128, 64, _as_it_is),
    Padding((0, 9), 128, 64, _moved_unless_divisible),
    Padding((0, 13), 128, 64, _moved),
)
_HIGH_NCCL_BUSBW_END = 65536
_HIGH_NCCL_BUSBW_SINCE = (0, 12)


def parse_version(text: str) -> Version:
    """(0, 16, 1) from `0.16.1`, `core_r0.16.1` or `0.16.1rc0`."""
    found = re.search(r"(?<![0-9.])([0-9]{1,4})\.([0-9]{1,4})(?:\.([0-9]{1,4}))?", text)
    if found is None:
        raise BucketError(f"{text!r} is no version of megatron-core: say it as 0.16.1")
    return tuple(int(part) for part in found.groups() if part is not None)


def padding_of(version: Version) -> Padding:
    """The rules of a version; BucketError before 0.6, whose buffers are others."""
    known = [padding for padding in PADDINGS if padding.since <= version]
    if not known:
        raise BucketError(f"megatron-core {'.'.join(map(str, version))} is older than 0.6, whose buffers are not known")
    return known[-1]


def default_bucket_size(version: Version, dp: int) -> int:
    """Elements; `dp` without context parallelism.

    Holds with overlap_grad_reduce in the first chunk of the first stage; everything else has no bucket size.
    """
    return _DEFAULT_BUCKET_SIZE if version < (0, 7) else max(_DEFAULT_BUCKET_SIZE, _DEFAULT_BUCKET_SIZE_PER_RANK * dp)


def build(
    params: Sequence[Parameter],
    *,
    version: Version,
    dp: int,
    bucket_size: int | None,
    pad_for_high_nccl_busbw: bool = False,
) -> BufferMap:
    """The buffer that Megatron makes of trainable parameters of one dtype, in named_parameters order.

    `dp`: size of the group that shares the buffer (dp * cp; of an expert buffer the expert data parallel size).
    `bucket_size`: None is no limit.  BucketError where Megatron stops, and where it builds a buffer whose checkpoints
    lack elements (0.7 to 0.12 let some tied embeddings start inside the padding of the bucket before).
    """
    rules = padding_of(version)
    if len({dtype for _, dtype, _, _ in params}) > 1:
        raise BucketError("parameters of several dtypes, which have a buffer each")
    divisor = lcm(dp, rules.end)
    if pad_for_high_nccl_busbw and version >= _HIGH_NCCL_BUSBW_SINCE:
        divisor = lcm(divisor, _HIGH_NCCL_BUSBW_END)
    ranges: list[Range] = []
    unpadded: list[int] = []
    padded: list[int] = []
    base = start = 0
    for name, dtype, shape, is_tied in reversed(params):
        start = _up(start, rules.start)
        if is_tied and ranges and ranges[-1].bucket == len(unpadded):
            end, start = rules.tied(start, _up(start, divisor), dp)
            unpadded.append(end - base)
            padded.append(_up(end, divisor) - base)
            base += padded[-1]
            if start != base:
                raise BucketError(
                    f"megatron-core {'.'.join(map(str, version))} starts the tied embedding {name!r} at element "
                    f"{start}, in the padding before its bucket at {base}, and does not save what lies there"
                )
        ranges.append(Range(name, dtype, shape, start, start + prod(shape), len(unpadded)))
        start = ranges[-1].end
        if is_tied or (bucket_size is not None and start - base >= bucket_size):
            unpadded.append(start - base)
            padded.append(_up(start, divisor) - base)
            base = start = base + padded[-1]
    if ranges and ranges[-1].bucket == len(unpadded):
        unpadded.append(start - base)
        padded.append(_up(start, divisor) - base)
    return BufferMap(tuple(ranges), tuple(unpadded), tuple(padded))
