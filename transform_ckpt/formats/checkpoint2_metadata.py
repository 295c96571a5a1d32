"""Checkpoint 2.0: metadata.json as values.  Parses and checks the file alone; no tensor file is opened here.

May import transform_ckpt.{dtypes,errors,views}, strategy.layout and checkpoint2_common.

Facts (MindFormers 1.9.0 checkpoint/metadata.py `save_metadata`, checkpoint/sharded_tensor.py
`get_sharded_tensor_from_strategy_metadata`, checkpoint/reshard.py `ReshardHandler`):

- `global_offset` is NOT an element offset: it is one number, the slice's position in the row-major grid that
  `axis_fragmentations` cuts the tensor into.  A slice is global_shape / axis_fragmentations.
- The loader takes the geometry from `layout` (device_matrix, tensor_map counted from the right, rank_list) and uses the
  number only as a key of `storage_data`, "('name', (number,))".  Both must agree, so both are compared here.
- Several ranks may store one slice (`remove_redundancy` off); with it on one rank does and `rank_group` lists the rest.
- `layout` and `dtype` are those of the first rank that has the parameter.  dtype is a MindSpore name ("Float32"), in
  any case; "None" after a load and save of a name that MindFormers does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from strategy.layout import Layout, LayoutError
from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, Problems
from transform_ckpt.formats.checkpoint2_common import shard_id
from transform_ckpt.views import Box, Shape

_DTYPES = {dtype.mindspore.lower(): dtype.code for dtype in dtypes.BY_CODE.values() if dtype.code != dtypes.STRING}
_MAX = 2**63


@dataclass(frozen=True, slots=True)
class Stored:
    """One copy of a slice: which file, whose."""

    file: str
    rank: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One slice of a parameter and where its copies are."""

    number: int
    box: Box
    stored: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter.  `dtype` is None where the file does not say."""

    name: str
    dtype: str | None
    shape: Shape
    cuts: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """All of metadata.json.  `unused` are keys of storage_data that no chunk has."""

    entries: tuple[Entry, ...]
    files: Mapping[str, int]
    unused: tuple[str, ...]


class _BadError(Exception):
    """What is wrong with one parameter."""


def parse_metadata(path: str, content: Mapping[str, Any]) -> Metadata:
    """Metadata from the JSON object; InputError with all problems found."""
    state, storage = content.get("state_dict_metadata"), content.get("storage_data")
    if not isinstance(state, dict) or not isinstance(storage, dict):
        raise InputError(f"{path}: expected the objects state_dict_metadata and storage_data: not Checkpoint 2.0's")
    problems = Problems()
    entries: list[Entry] = []
    used: set[str] = set()
    for name, item in state.items():
        try:
            entry = _entry(name, item, storage)
        except (_BadError, LayoutError) as error:
            problems.add(f"{path}: {name!r}: {error}")
            continue
        used.update(shard_id(name, chunk.number) for chunk in entry.chunks)
        entries.append(entry)
    files = _ranks_of_files(path, entries, problems)
    problems.raise_if_any(InputError)
    return Metadata(tuple(entries), files, tuple(sorted(storage.keys() - used)))


def _ranks_of_files(path: str, entries: list[Entry], problems: Problems) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for stored in (s for entry in entries for chunk in entry.chunks for s in chunk.stored):
        other = ranks.setdefault(stored.file, stored.rank)
        if other != stored.rank:
            problems.add(f"{path}: {stored.file} is rank {other}'s and rank {stored.rank}'s file at once: correct it")
    return ranks


def _entry(name: str, item: Any, storage: Mapping[str, Any]) -> Entry:
    if not isinstance(item, dict):
        raise _BadError("has no description")
    shape = _naturals(item.get("global_shape"), "global_shape")
    cuts = _naturals(item.get("axis_fragmentations"), "axis_fragmentations")
    if len(cuts) != len(shape) or 0 in cuts:
        raise _BadError(f"axis_fragmentations {list(cuts)} do not fit global_shape {list(shape)}")
    if any(n % cut for n, cut in zip(shape, cuts, strict=True)):
        raise _BadError(f"global_shape {list(shape)} does not divide by axis_fragmentations {list(cuts)}")
    items = item.get("chunk")
    if not isinstance(items, list) or not items:
        raise _BadError("has no chunk")
    chunks = tuple(_chunk(name, chunk, shape, cuts, storage) for chunk in items)
    if len({chunk.number for chunk in chunks}) != len(chunks):
        raise _BadError("lists a chunk twice")
    _check_layout(item.get("layout"), cuts, chunks)
    return Entry(name, _dtype(item.get("properties")), shape, cuts, chunks)


def _naturals(value: Any, what: str) -> Shape:
    good = isinstance(value, list) and all(type(n) is int and 0 <= n < _MAX for n in value)
    if not good:
        raise _BadError(f"{what} is {value!r}, expected a list of whole numbers")
    return tuple(value)


def _dtype(properties: Any) -> str | None:
    text = properties.get("dtype") if isinstance(properties, dict) else None
    if text is None or text == "None":
        return None
    code = _DTYPES.get(text.lower()) if isinstance(text, str) else None
    if code is None:
        raise _BadError(f"dtype {text!r} is unknown here; known: {', '.join(sorted(_DTYPES))}")
    return code


def slice_box(number: int, shape: Shape, cuts: Shape) -> Box:
    """The rectangle of slice `number` of the row-major grid of equal slices."""
    index: list[int] = []
    for cut in reversed(cuts):
        number, at = divmod(number, cut)
        index.append(at)
    size = tuple(n // cut for n, cut in zip(shape, cuts, strict=True))
    return Box(tuple(i * n for i, n in zip(reversed(index), size, strict=True)), size)


def _chunk(name: str, item: Any, shape: Shape, cuts: Shape, storage: Mapping[str, Any]) -> Chunk:
    if not isinstance(item, dict):
        raise _BadError("has a chunk without description")
    offset = _naturals(item.get("global_offset"), "global_offset")
    if len(offset) != 1:
        raise _BadError(f"global_offset {list(offset)} has {len(offset)} numbers, expected 1, the number of the slice")
    number = offset[0]
    if number >= prod(cuts):
        raise _BadError(
            f"global_offset {number} lies outside the tensor: {list(cuts)} axis_fragmentations make {prod(cuts)} slices"
        )
    box = slice_box(number, shape, cuts)
    local = _naturals(item.get("local_shape"), "local_shape")
    if local != box.size:
        raise _BadError(
            f"local_shape of slice {number} is {list(local)}, expected {list(box.size)} "
            f"(global_shape {list(shape)} by axis_fragmentations {list(cuts)})"
        )
    key = shard_id(name, number)
    entries = storage.get(key)
    if not isinstance(entries, list) or not entries:
        raise _BadError(f"storage_data has no {key!r}: the checkpoint is incomplete: save it again")
    return Chunk(number, box, tuple(dict.fromkeys(_stored(entry) for entry in entries)))


def _stored(item: Any) -> Stored:
    name, rank = (item.get("file_name"), item.get("storage_rank")) if isinstance(item, dict) else (None, None)
    if type(rank) is not int or not 0 <= rank < _MAX:
        raise _BadError(f"storage_rank is {rank!r}, expected a rank")
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise _BadError(f"file_name is {name!r}, expected the name of a .safetensors file")
    if Path(name).name != name or "\\" in name or "\0" in name:
        raise _BadError(f"file_name {name!r} leaves the directory: refused")
    return Stored(name, rank)


def _check_layout(item: Any, cuts: Shape, chunks: tuple[Chunk, ...]) -> None:
    """The loader goes by the layout: it must put every storing rank that it lists at the slice that is stored."""
    if item is None:
        return
    if not isinstance(item, dict):
        raise _BadError("layout is not an object")
    if item.get("interleaved_parallel"):
        raise _BadError("interleaved_parallel layouts are not supported: save without it")
    matrix = _naturals(item.get("device_matrix"), "device_matrix")
    ranks = _naturals(item.get("rank_list"), "rank_list")
    axes = item.get("tensor_map")
    if not isinstance(axes, list):
        raise _BadError(f"tensor_map is {axes!r}, expected a list")
    if prod(matrix) != len(ranks):
        raise _BadError(f"rank_list has {len(ranks)} ranks, device_matrix {list(matrix)} {prod(matrix)}")
    numbers = _slice_numbers(matrix, tuple(_axes(dim) for dim in axes), ranks, cuts)
    for chunk in chunks:
        for stored in chunk.stored:
            if numbers.get(stored.rank, chunk.number) != chunk.number:
                raise _BadError(
                    f"rank {stored.rank} stores slice {chunk.number}, its layout says {numbers[stored.rank]}"
                )


def _axes(dim: Any) -> Shape:
    """Mesh axes that split one dimension, most significant first; -1 is none."""
    values = dim if isinstance(dim, list) else [dim]
    if not all(type(axis) is int and axis >= -1 for axis in values):
        raise _BadError(f"tensor_map has {dim!r}, expected an axis or -1")
    return tuple(axis for axis in values if axis >= 0)


@lru_cache(maxsize=64)
def _slice_numbers(matrix: Shape, axes: tuple[Shape, ...], ranks: Shape, cuts: Shape) -> Mapping[int, int]:
    """Rank -> its slice's number by the layout.  Cached: the parameters of a model share a few layouts."""
    layout = Layout(matrix, axes)
    if layout.cuts(len(cuts)) != cuts:
        raise _BadError(
            f"layout cuts the axes in {list(layout.cuts(len(cuts)))} parts, axis_fragmentations in {list(cuts)}"
        )
    numbers: dict[int, int] = {}
    for position, rank in enumerate(ranks):
        number = 0
        for at, cut in zip(layout.index(position) or (0,) * len(cuts), cuts, strict=True):
            number = number * cut + at
        numbers[rank] = number
    return numbers
