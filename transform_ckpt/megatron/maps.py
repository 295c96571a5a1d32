"""Finds out which parameter lies where in a rank's buffers: by the param_map of the run, or rebuilt from the model.

The rebuilt order is Megatron's own (megatron-core distributed/param_and_grad_buffer.py): parameters by dtype, in the
reverse of named_parameters; bucket and padding rules by version.  A list of buckets says its sizes itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from transform_ckpt import param_map
from transform_ckpt.errors import InputError, name_some
from transform_ckpt.formats.torch_values import BY_CODE
from transform_ckpt.megatron import buckets
from transform_ckpt.megatron.buckets import BucketError, BufferMap, Range
from transform_ckpt.megatron.containers import State
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.map_files import MapKey
from transform_ckpt.megatron.model import Chunk, is_tied_head
from transform_ckpt.megatron.names import is_expert

LATEST = (0, 16, 1)
_COALESCED = (LATEST, (0, 10), (0, 9), (0, 8), (0, 7))
"""Versions with rules of their own, the newest first."""
_ALIGNMENT = 64
"""Elements: where parameters start from 0.8 on."""


@dataclass(frozen=True, slots=True)
class MapOptions:
    """What the user says of the buffers: a directory of maps, or what the rules need and args lack."""

    directory: str | None = None
    version: tuple[int, ...] | None = None
    bucket_size: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """The parameters of one buffer, and the chunk that they are of."""

    chunk: int
    map: BufferMap


class Maps:
    """Maps of every rank of a checkpoint, whose root may hold the run's param_map/: used where it fits, unasked."""

    def __init__(self, options: MapOptions, facts: Facts, root: str) -> None:
        self._options, self._facts = options, facts
        self._unasked = os.path.join(root, "param_map") if options.directory is None else None
        self.misfit = ""
        self._files: Mapping[MapKey, str] = {}
        if options.directory:
            self._files = param_map.find(options.directory)
        elif self._unasked and os.path.isdir(self._unasked):
            try:
                self._files = param_map.find(self._unasked)
            except InputError as error:
                self.misfit = str(error)
        self._read: dict[str, BufferMap] = {}
        self.rebuilt: set[str] = set()
        self.versions: set[tuple[int, ...]] = set()

    def of(
        self, where: str, place: tuple[int, int, int], chunks: Sequence[Chunk], state: State, *, experts: bool
    ) -> list[Placed]:
        """One map a buffer, in the buffers' order; InputError where they do not fit the file."""
        tp, pp, ep = place
        keys = sorted(
            key for key in self._files if (key.tp, key.pp) == (tp, pp) and key.ep == (ep if experts else None)
        )
        if keys:
            try:
                return self._from_files(where, sorted(keys, key=lambda k: (k.vpp, k.buffer)), chunks, state)
            except InputError as error:
                if self._unasked is None:
                    raise
                self.misfit = str(error)
        if self._options.directory and not experts:
            raise InputError(
                f"{self._options.directory}: has no map of tp {tp}, pp {pp}: give the whole param_map directory of the "
                "run, or none to have it rebuilt from the model"
            )
        self.rebuilt.add("experts" if experts else "dense")
        return self._rebuilt(where, pp, chunks, state, experts=experts)

    def _from_files(self, where: str, keys: Sequence[MapKey], chunks: Sequence[Chunk], state: State) -> list[Placed]:
        found = [Placed(key.vpp, self._map(self._files[key])) for key in keys]
        folder = os.path.dirname(self._files[keys[0]])
        if len(found) != len(state.buffers):
            raise InputError(
                f"{where}: has {len(state.buffers)} buffers, {folder} describes {len(found)} of tp {keys[0].tp}, "
                f"pp {keys[0].pp}: it is the param_map of another run, or of an earlier one with more chunks"
            )
        for placed, key in zip(found, keys, strict=True):
            names = chunks[placed.chunk].tensors if placed.chunk < len(chunks) else {}
            odd = [p.name for p in placed.map.ranges if p.name not in names or names[p.name].shape != p.shape]
            if odd:
                raise InputError(
                    f"{self._files[key]}: {name_some(odd)} are not in the model of {where}, or with other shapes: it "
                    "is the param_map of another run"
                )
        fitted = [
            replace(placed, map=buffer.fitted(placed.map)) for placed, buffer in zip(found, state.buffers, strict=True)
        ]
        self.versions.update(
            version
            for placed, buffer in zip(fitted, state.buffers, strict=True)
            if (version := _version_of(placed.map, coalesced=buffer.coalesced)) is not None
        )
        return fitted

    def _map(self, path: str) -> BufferMap:
        if path not in self._read:
            self._read[path] = param_map.read(path)
        return self._read[path]

    def _rebuilt(self, where: str, pp: int, chunks: Sequence[Chunk], state: State, *, experts: bool) -> list[Placed]:
        wanted = [
            (number, params)
            for number, chunk in enumerate(chunks)
            for params in _by_dtype(parameters(chunk, self._facts, experts=experts))
        ]
        if len(wanted) != len(state.buffers):
            raise InputError(
                f"{where}: has {len(state.buffers)} buffers, its model has parameters for {len(wanted)}: frozen "
                "parameters have none, and only a param_map tells which these are: give --param-map-path"
            )
        found: list[Placed] = []
        for (number, params), buffer in zip(wanted, state.buffers, strict=True):
            if buffer.unpadded:
                found.append(Placed(number, _by_sizes(buffer.where, params, buffer.unpadded)))
                self.versions.add((0, 6))
                continue
            for version, size in self._candidates(pp, number, coalesced=buffer.coalesced):
                try:
                    built = buckets.build(params, version=version, dp=self._dp(experts=experts), bucket_size=size)
                except BucketError:
                    continue
                fits = built if not buffer.coalesced or built.coalesced_numel == buffer.numel else None
                if fits is not None:
                    self.versions.add(version)
                    found.append(Placed(number, buffer.fitted(fits)))
                    break
            else:
                raise InputError(
                    f"{buffer.where}: {buffer.numel:,} elements are not what the rules give for its parameters "
                    f"({sum(prod(p[2]) for p in params):,} elements): give --param-map-path, or what args lacks: "
                    "--megatron-core-version, --bucket-size, --src-dp"
                )
        return found

    def _dp(self, *, experts: bool) -> int:
        sizes = self._facts.sizes
        return self._facts.experts_dp if experts else sizes.dp * sizes.cp

    def _candidates(self, pp: int, chunk: int, *, coalesced: bool) -> Iterator[tuple[tuple[int, ...], int | None]]:
        versions = (self._options.version,) if self._options.version else _COALESCED if coalesced else ((0, 6),)
        for version in versions:
            yield from (
                (version, size) for size in bucket_sizes(self._facts, version, self._options.bucket_size, pp, chunk)
            )


def _version_of(found: BufferMap, *, coalesced: bool) -> tuple[int, ...] | None:
    """The newest megatron-core that lays parameters out so; None where several rules give the same."""
    if not coalesced:
        return (0, 6)
    if any(param.start % _ALIGNMENT for param in found.ranges):
        return (0, 7)
    gaps = any(a.end != b.start and a.bucket == b.bucket for a, b in pairwise(found.ranges))
    return LATEST if gaps else None


def bucket_sizes(facts: Facts, version: tuple[int, ...], given: int | None, pp: int, chunk: int) -> list[int | None]:
    """What Megatron may have taken: buckets exist with overlap_grad_reduce, in the first chunk of the first stage."""
    overlap = facts.args.get("overlap_grad_reduce")
    if pp or chunk or overlap is False:
        return [None]
    size = given or facts.args.get("ddp_bucket_size") or buckets.default_bucket_size(version, facts.sizes.dp)
    return [size] if overlap else [size, None] if given else [None, size]


def inferred_bucket_size(found: BufferMap | None, facts: Facts) -> int | None:
    """The bucket size of the run whose first chunk has this buffer; None where args say it, or there are no buckets.

    A bucket is closed by the parameter that fills it, so the size is at most the bucket's length, and more than its
    length without that parameter.  The last bucket, and one before a shared embedding's own, may be closed earlier.
    """
    overlap = facts.args.get("overlap_grad_reduce")
    if found is None or overlap is False or (overlap and facts.args.get("ddp_bucket_size")):
        return None
    names = [param.name for param in found.ranges]
    closed = found.unpadded[: -2 if is_shared(names[-1], names, facts) else -1]
    if not closed:
        return None
    last = {param.bucket: param.numel for param in found.ranges}
    least = max(size - last[bucket] + 1 for bucket, size in enumerate(closed))
    most = min(closed)
    default = buckets.default_bucket_size(LATEST, facts.sizes.dp)
    if overlap and least <= default <= most:
        return None
    return most if least <= most else None


def parameters(chunk: Chunk, facts: Facts, *, experts: bool) -> list[buckets.Parameter]:
    """The trainable parameters of a chunk that one optimizer has, in named_parameters order."""
    apart = facts.sizes.ep > 1 or facts.extend_ep
    return [
        (
            name,
            f"torch.{BY_CODE[tensor.dtype].name}",
            tensor.shape,
            is_shared(name, chunk.tensors, facts),
        )
        for name, tensor in chunk.parameters().items()
        if (apart and is_expert(name)) == experts
    ]


def is_shared(name: str, names: Iterable[str], facts: Facts) -> bool:
    """Is it an embedding that two stages hold, in a chunk of these names?  Megatron gives such one a bucket of its own.

    Multi-token prediction has the embedding in the last stage; a tied output layer beside it is no longer shared.
    """
    if facts.sizes.pp == 1 or not (is_tied_head(name) or name.endswith("embedding.word_embeddings.weight")):
        return False
    predicts = any(other.startswith("mtp.") for other in names)
    if is_tied_head(name):
        return bool(facts.tied) and not predicts
    return bool(facts.tied or predicts or facts.args.get("mtp_num_layers"))


def _by_dtype(params: Sequence[buckets.Parameter]) -> list[list[buckets.Parameter]]:
    groups: dict[str, list[buckets.Parameter]] = {}
    for param in params:
        groups.setdefault(param[1], []).append(param)
    return list(groups.values())


def _by_sizes(where: str, params: Sequence[buckets.Parameter], unpadded: Sequence[int]) -> BufferMap:
    """Buckets without padding between parameters, of known sizes."""
    left = list(reversed(params))
    ranges: list[Range] = []
    start = 0
    for bucket, size in enumerate(unpadded):
        end = start + size
        while left and start < end:
            name, dtype, shape, _ = left.pop(0)
            ranges.append(Range(name, dtype, shape, start, start + prod(shape), bucket))
            start += prod(shape)
        if start != end:
            break
    if left or start != sum(unpadded):
        raise InputError(
            f"{where}: its buckets of {list(unpadded)} elements are not cut between parameters of its model: the files "
            "are not of one run, or parameters are frozen: give --param-map-path"
        )
    return BufferMap(tuple(ranges), tuple(unpadded))
