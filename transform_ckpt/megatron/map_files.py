"""Files of parameter maps: JSON that says where each parameter lies in the distributed optimizer's buffers.

`param_map_buffer{b}_dp{d}tp{t}pp{p}vpp{v}.json`, as MindSpeed-Core-MS's param_map.patch writes them, holds
{"module.{name}": [dtype, shape, start, end, bucket]} in buffer order, start and end in elements of the whole padded
buffer.  Beyond the patch: maps of expert buffers, whose names end in `ep{e}.json`, and
`param_map_sizes_tp{t}pp{p}[ep{e}].json` with what ranges do not tell, the sizes of the buckets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from transform_ckpt.errors import InputError, Problems
from transform_ckpt.formats.files import listing, open_binary, storage_error
from transform_ckpt.megatron.buckets import BucketError, BufferMap, Range

_MAX_NBYTES = 1 << 28
_MAX_ELEMENTS = 1 << 62
_MAX_DIMENSIONS = 64
_MAX_NAME = 1000
PREFIX = "module."
DIRECTORY = "param_map"
_NUMBER = "(0|[1-9][0-9]{0,8})"
_NAME = re.compile(rf"param_map_buffer{_NUMBER}_dp{_NUMBER}tp{_NUMBER}pp{_NUMBER}vpp{_NUMBER}(?:ep{_NUMBER})?\.json")
_DTYPE = re.compile(r"torch\.[a-z0-9_]{1,40}")
_AGAIN = "write the maps and the sizes beside them again (transform_ckpt.param_map.save), or fetch them again"


class FileName(NamedTuple):
    """What the name of a map says; `ep` is None for the buffers that every expert rank shares."""

    buffer: int
    dp: int
    tp: int
    pp: int
    vpp: int
    ep: int | None = None

    @property
    def key(self) -> MapKey:
        """The buffer."""
        return MapKey(self.tp, self.pp, self.vpp, self.ep, self.buffer)


class MapKey(NamedTuple):
    """Whose buffer a map is of: dp ranks have the same one."""

    tp: int
    pp: int
    vpp: int
    ep: int | None
    buffer: int


def file_name(buffer: int, dp: int, tp: int, pp: int, vpp: int, ep: int | None = None) -> str:
    """Name of a map's file."""
    return f"param_map_buffer{buffer}_dp{dp}tp{tp}pp{pp}vpp{vpp}{_ending(ep)}.json"


def parse_file_name(name: str) -> FileName | None:
    """The inverse of `file_name`; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    buffer, dp, tp, pp, vpp, ep = found.groups()
    return FileName(int(buffer), int(dp), int(tp), int(pp), int(vpp), None if ep is None else int(ep))


def sizes_name(tp: int, pp: int, ep: int | None) -> str:
    """Name of the file with the sizes of the buckets of a rank's buffers."""
    return f"param_map_sizes_tp{tp}pp{pp}{_ending(ep)}.json"


def _ending(ep: int | None) -> str:
    return "" if ep is None else f"ep{ep}"


def read(path: str) -> BufferMap:
    """One map, names without "module."; with the sizes of its buckets where `save` wrote them beside it.

    InputError names the file and every parameter that cannot be so.
    """
    problems = Problems()
    ranges: list[Range] = []
    for name, entry in _read_object(path).items():
        try:
            ranges.append(_range(name, entry))
        except BucketError as error:
            problems.add(f"{path}: {error}: {_AGAIN}")
    problems.raise_if_any(InputError)
    ranges.sort(key=lambda found: found.start)
    try:
        return BufferMap(tuple(ranges), *_read_sizes(path))
    except BucketError as error:
        raise InputError(f"{path}: {error}: {_AGAIN}") from None


def _read_object(path: str) -> dict[str, Any]:
    """A JSON object of a file of bounded size, no key twice in it."""
    with open_binary(path, "reading a parameter map") as (fd, nbytes):
        if nbytes > _MAX_NBYTES:
            raise InputError(f"{path}: {nbytes:,} bytes, more than any parameter map ({_MAX_NBYTES:,}): check the path")
        data = os.pread(fd, nbytes, 0)
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise InputError(f"{path}: is no JSON of a parameter map ({error!s:.200}): {_AGAIN}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not an object of parameters: {_AGAIN}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.200} is there twice")
        found[key] = value
    return found


def _range(name: str, entry: Any) -> Range:
    """One entry; BucketError where its types or numbers are wrong."""
    short = name.removeprefix(PREFIX)
    if not short.isprintable() or not 0 < len(short) <= _MAX_NAME:
        raise BucketError(f"{name!r:.200} is no name of a parameter")
    if not isinstance(entry, list) or len(entry) != 5:
        raise BucketError(f"{name!r:.200} is not [dtype, shape, start, end, bucket]")
    dtype, shape, start, end, bucket = entry
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise BucketError(f"{name!r:.200} has the dtype {dtype!r:.80}, expected one like 'torch.bfloat16'")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise BucketError(f"{name!r:.200} has the shape {shape!r:.200}, expected a list of sizes")
    if not _are_counts([start, end, bucket]):
        raise BucketError(f"{name!r:.200} has start, end, bucket {start!r:.40}, {end!r:.40}, {bucket!r:.40}")
    return Range(short, dtype, tuple(shape), start, end, bucket)


def _are_counts(value: Any) -> bool:
    """A list of integers that can be sizes; True is none."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in value)


def _read_sizes(path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Unpadded and padded elements of the buckets of a map, () where nothing beside it says so."""
    directory, name = os.path.split(path)
    found = parse_file_name(name)
    if found is None:
        return (), ()
    sizes = os.path.join(directory, sizes_name(found.tp, found.pp, found.ep))
    if not os.path.exists(sizes):
        return (), ()
    try:
        entry = _read_object(sizes)["buffers"][f"buffer{found.buffer}vpp{found.vpp}"]
        unpadded, padded = entry["numel_unpadded"], entry["numel"]
    except (KeyError, TypeError):
        unpadded = padded = None
    if not (unpadded and padded and _are_counts(unpadded) and _are_counts(padded)):
        raise InputError(f"{sizes}: does not say the sizes of the buckets of {name}: {_AGAIN}")
    return tuple(unpadded), tuple(padded)


def dumps(buffer_map: BufferMap) -> bytes:
    """The bytes of a map's file, as the patch writes them."""
    return json.dumps(
        {f"{PREFIX}{r.name}": [r.dtype, r.shape, r.start, r.end, r.bucket] for r in buffer_map.ranges}
    ).encode()


def write(path: str, buffer_map: BufferMap) -> None:
    """Write one map; readers see it whole or not at all."""
    replace_file(path, dumps(buffer_map))


def replace_file(path: str, data: bytes) -> None:
    """Write a file that readers see whole or not at all."""
    part = f"{path}.{os.urandom(4).hex()}.tmp"
    with storage(path, "writing it"):
        with open(part, "wb") as stream:
            stream.write(data)
        os.replace(part, path)


@contextmanager
def storage(path: str, doing: str) -> Iterator[None]:
    """OSErrors as errors that name the file."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error, doing) from None


def find(directory: str) -> dict[MapKey, str]:
    """The maps of a run, in order of (tp, pp, vpp, ep, buffer).

    `directory` holds them itself or in `param_map`; expert maps may lie in `param_map_expert` or `{...}_expert` beside
    them.  InputError where there are none, and where two for the same buffer differ.
    """
    names = listing(directory)
    if not any(map(parse_file_name, names)) and DIRECTORY in names:
        directory = os.path.join(directory, DIRECTORY)
    whole = os.path.abspath(directory)
    beside = {f"{whole}_expert", os.path.join(os.path.dirname(whole), f"{DIRECTORY}_expert")}
    found: dict[MapKey, list[str]] = {}
    for place in (directory, *sorted(filter(os.path.isdir, beside))):
        for name in listing(place):
            parsed = parse_file_name(name)
            if parsed and (parsed.ep is not None or place == directory):
                found.setdefault(parsed.key, []).append(os.path.join(place, name))
    if not found:
        raise InputError(
            f"{directory}: holds no param_map_buffer*_dp*tp*pp*vpp*.json: give the directory that the training wrote "
            "them to (transform_ckpt.param_map.save)"
        )
    order = sorted(found, key=lambda key: (key.tp, key.pp, key.vpp, -1 if key.ep is None else key.ep, key.buffer))
    return {key: _same_content(found[key]) for key in order}


def _same_content(paths: Sequence[str]) -> str:
    """The first of several files for one buffer; InputError names two that differ."""
    first, *others = paths
    ranges = read(first).ranges if others else ()
    for other in others:
        if read(other).ranges != ranges:
            raise InputError(
                f"{first} and {other}: differ, but both say where the parameters of one buffer are: "
                "they are of two runs: keep those of the run that wrote the checkpoint"
            )
    return first
