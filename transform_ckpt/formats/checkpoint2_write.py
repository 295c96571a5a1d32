"""Checkpoint 2.0: everything that lies in the destination, as MindFormers writes it with `remove_redundancy: True`.

May import transform_ckpt.{dtypes,errors,tensors,views}, strategy.layout and its own formats.

Facts (MindFormers 1.9.0 checkpoint/fully_parallel.py `distribute_shards`, `BalancedSaveStrategy`; checkpoint/utils.py
`_get_shard_size`; checkpoint/metadata.py; mindspore 2.9.0 parallel/strategy.py `_layout_process`):

- Weights and optimizer states are distributed apart: slices with fewer holders first, then larger ones, then by key;
  each goes to its least loaded holder, the lowest rank on a tie.  `rank_group` lists all holders.
- Sizes are counted in bits of the dtype's name: 1 for Bool, 16 for a name that its table lacks (Float8).
- Files are numbered over the ranks that store something; the total counts these.
- `layout` has one letter per mesh axis, the optimizer shard as axes of dimension 0, -1 for an axis that is not split;
  its five keys must come in this order (`_deserialize_sharded_tensor_layout` unpacks the values).
- `replica_id` lists, in rank_list's order, how many earlier ranks hold the same slice.
- The loader ignores an empty slice (`infer_intersection` finds no common area), so empty parameters stay unloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from strategy.layout import Layout
from transform_ckpt import dtypes
from transform_ckpt.errors import PlanError, Problems, UsageError, name_some, rank_ranges
from transform_ckpt.formats import safetensors
from transform_ckpt.formats.checkpoint2_common import (
    COMMON,
    COMMON_FIELDS,
    METADATA,
    TRACKER,
    Scalar,
    dump_common,
    dump_json,
    file_name,
    iteration_name,
    shard_id,
)
from transform_ckpt.formats.checkpoint2_metadata import slice_box
from transform_ckpt.tensors import SmallFile, Target, TargetFile, TensorSpec
from transform_ckpt.views import Box, Shape

FORMAT = "mindspore-checkpoint-2.0"

_UNKNOWN_BITS = 16
_BITS = {name: dtype.itemsize * 8 for name, dtype in dtypes.BY_MINDSPORE.items() if not name.startswith("Float8")}
_BITS |= {"Bool": 1, "Int4": 4}
"""`MS_TYPE_TO_SIZE`."""

_OPTIMIZER_PREFIXES = frozenset(
    "adam_m adam_v accu_grads exp_avg exp_avg_sq moments moment1 moment2 vhat lamb_m lamb_v".split()
)
_OPTIMIZER_NAMES = ("global_step", "learning_rate", "beta1_power", "beta2_power", "momentum")
_NEEDED_TO_RESUME = ("epoch_num", "global_batch_size")


@dataclass(frozen=True, slots=True)
class _Param:
    """One parameter: the grid that it is cut into and the ranks that hold each slice, in rank order."""

    name: str
    dtype: str
    shape: Shape
    cuts: Shape
    ranks: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Assigned:
    """One slice and the rank that stores it."""

    param: _Param
    number: int
    rank: int
    group: tuple[int, ...]


def plan_target(
    params: Mapping[str, tuple[str, Shape]],
    placements: Sequence[tuple[int, str, Box]],
    scalars: Mapping[str, Scalar],
    prefix: str,
    step: int,
) -> Target:
    """The destination: tracker, common.json, metadata.json and the tensor files' skeletons.

    `params` is name -> (dtype code, full shape); `placements` says which rank would hold which box, every replica of
    them.  `scalars` that common.json has no field for are named in `dropped`: to carry one, give it as a parameter
    with a whole box.  PlanError where a parameter is not cut into one grid of equal slices.
    """
    if not 0 <= step < 10**19 or Path(prefix).name != prefix:
        raise UsageError(f"iteration {step}, prefix {prefix!r}: expected a whole number and a plain file name")
    gridded = _grids(params, placements)
    folder = iteration_name(step)
    files: list[TargetFile] = []
    storage: dict[str, list[dict[str, Any]]] = {}
    for kind in ("model", "opt"):
        members = [p for p in gridded if _is_optimizer(p.name, params) == (kind == "opt")]
        by_rank = _distribute(members)
        for index, (rank, assigned) in enumerate(by_rank.items()):
            name = file_name(prefix, kind, index, len(by_rank))
            files.append(_target_file(f"{folder}/{name}", assigned))
            for slot in assigned:
                item = {"file_name": name, "storage_rank": rank, "rank_group": list(slot.group)}
                storage.setdefault(shard_id(slot.param.name, slot.number), []).append(item)
    metadata = {"state_dict_metadata": {p.name: _describe(p) for p in gridded}, "storage_data": storage}
    small = (
        SmallFile(TRACKER, str(step).encode()),
        SmallFile(f"{folder}/{COMMON}", dump_common(scalars, step)),
        SmallFile(f"{folder}/{METADATA}", dump_json(metadata)),
    )
    foreign = tuple(sorted(scalars.keys() - set(COMMON_FIELDS)))
    return Target(FORMAT, tuple(files), small, foreign, _notes(gridded, scalars, foreign))


def _notes(gridded: Sequence[_Param], scalars: Mapping[str, Scalar], foreign: Sequence[str]) -> tuple[str, ...]:
    notes = [f"{COMMON} has no field for {name_some(foreign)}: left out"] if foreign else []
    missing = [name for name in _NEEDED_TO_RESUME if name not in scalars]
    if missing:
        notes.append(f"{COMMON}: {' and '.join(missing)} unknown: resuming needs it, loading weights does not")
    empty = [p.name for p in gridded if 0 in p.shape]
    if empty:
        notes.append(f"MindFormers does not load tensors without elements: {name_some(empty)}")
    return tuple(notes)


def _is_optimizer(name: str, params: Mapping[str, tuple[str, Shape]]) -> bool:
    """MindSpore names a state `{prefix}.{parameter}` (`Parameter.clone`), so a name behind a dot tells it."""
    first, _, rest = name.partition(".")
    return rest in params or (rest != "" and first in _OPTIMIZER_PREFIXES) or name in _OPTIMIZER_NAMES


def _grids(params: Mapping[str, tuple[str, Shape]], placements: Sequence[tuple[int, str, Box]]) -> list[_Param]:
    """Each parameter's grid; all problems are raised at once."""
    held: dict[str, dict[int, Box]] = {name: {} for name in params}
    problems = Problems()
    for rank, name, box in placements:
        if name not in held:
            problems.add(f"{name}: placed on rank {rank}, but not a parameter")
        elif held[name].setdefault(rank, box) != box:
            problems.add(f"{name}: rank {rank} holds two slices of it: Checkpoint 2.0 stores one per rank")
    found: list[_Param] = []
    for name, (dtype, shape) in params.items():
        if dtype == dtypes.STRING:
            problems.add(f"{name}: Checkpoint 2.0 cannot store a string: leave it out")
            continue
        try:
            found.append(_grid(name, dtype, shape, held[name]))
        except PlanError as error:
            problems.add(str(error))
    problems.raise_if_any(PlanError)
    return found


def _grid(name: str, dtype: str, shape: Shape, held: Mapping[int, Box]) -> _Param:
    """Stages that share a parameter may cut it in different ways; the first rank's way is kept, if it is complete."""
    ranks = sorted(held)
    if not ranks:
        raise PlanError(f"{name}: no rank holds it")
    size = held[ranks[0]].size
    if len(size) != len(shape) or any(b > n or (b == 0) != (n == 0) for n, b in zip(shape, size, strict=True)):
        raise PlanError(f"{name}: rank {ranks[0]} holds {list(size)} of shape {list(shape)}")
    cuts = tuple(n // b if b else 1 for n, b in zip(shape, size, strict=True))
    numbers: dict[int, int] = {}
    for rank in (r for r in ranks if held[r].size == size):
        number = 0
        for at, n, cut in zip(held[rank].start, size, cuts, strict=True):
            number = number * cut + (at // n if n else 0)
        if number >= prod(cuts) or slice_box(number, shape, cuts) != held[rank]:
            start = list(held[rank].start)
            raise PlanError(f"{name}: rank {rank} holds {list(size)} at {start} of {list(shape)}, not an equal slice")
        numbers[rank] = number
    if len(set(numbers.values())) != prod(cuts):
        missing = sorted(set(range(prod(cuts))) - set(numbers.values()))
        raise PlanError(f"{name}: no rank holds slices {rank_ranges(missing)} of {prod(cuts)}")
    return _Param(name, dtype, shape, cuts, tuple(numbers), tuple(numbers.values()))


def _distribute(params: Sequence[_Param]) -> dict[int, list[_Assigned]]:
    """Storing rank -> its slices, as `distribute_shards` does it."""
    shards: list[tuple[int, int, str, _Param, int, tuple[int, ...]]] = []
    for param in params:
        holders: dict[int, list[int]] = {}
        for rank, number in zip(param.ranks, param.numbers, strict=True):
            holders.setdefault(number, []).append(rank)
        bits = _BITS.get(dtypes.BY_CODE[param.dtype].mindspore, _UNKNOWN_BITS) * prod(param.shape) // prod(param.cuts)
        for number, ranks in holders.items():
            shards.append((len(ranks), -bits, shard_id(param.name, number), param, number, tuple(ranks)))
    load: dict[int, int] = {}
    found: dict[int, list[_Assigned]] = {}
    for _, negative_bits, _, param, number, group in sorted(shards, key=lambda shard: shard[:3]):
        rank = min(group, key=lambda r: load.get(r, 0))
        load[rank] = load.get(rank, 0) - negative_bits
        found.setdefault(rank, []).append(_Assigned(param, number, rank, group))
    return dict(sorted(found.items()))


def _target_file(relpath: str, assigned: Sequence[_Assigned]) -> TargetFile:
    boxes = {a.param.name: slice_box(a.number, a.param.shape, a.param.cuts) for a in assigned}
    specs = tuple(TensorSpec(a.param.name, a.param.dtype, boxes[a.param.name].size) for a in assigned)
    return TargetFile(relpath, safetensors.FORMAT, safetensors.skeleton(specs, {"format": "ms"}), specs, boxes)


def _describe(param: _Param) -> dict[str, Any]:
    layout, replica_id = _layout(param.ranks, param.numbers, param.cuts)
    return {
        "properties": {
            "dtype": dtypes.BY_CODE[param.dtype].mindspore,
            "replica_id": replica_id,
            "allow_shape_mismatch": False,
            "allow_to_save": True,
        },
        "global_shape": param.shape,
        "axis_fragmentations": param.cuts,
        "layout": layout,
        "chunk": [
            {"global_offset": [n], "local_shape": slice_box(n, param.shape, param.cuts).size}
            for n in dict.fromkeys(param.numbers)
        ],
    }


@lru_cache(maxsize=256)
def _layout(ranks: tuple[int, ...], numbers: tuple[int, ...], cuts: Shape) -> tuple[dict[str, Any], list[int]]:
    """`layout` and `replica_id`.  Cached: the parameters of a model share a few layouts."""
    cells = [slice_box(number, cuts, cuts).start for number in numbers]
    layout = infer_mesh(cells, cuts)
    if layout is None:
        layout, order = _any_mesh(numbers, cuts)
        ranks, numbers = tuple(ranks[i] for i in order), tuple(numbers[i] for i in order)
    seen: dict[int, int] = {}
    replica_id: list[int] = []
    for number in numbers:
        replica_id.append(seen.get(number, 0))
        seen[number] = replica_id[-1] + 1
    described = {
        "device_matrix": layout.dev_matrix,
        "tensor_map": [dim[0] if len(dim) == 1 else list(dim) or -1 for dim in layout.tensor_map],
        "interleaved_parallel": False,
        "alias_name": [_alias(axis) for axis in range(len(layout.dev_matrix))],
        "rank_list": ranks,
    }
    return described, replica_id


def _alias(axis: int) -> str:
    """a, b, ... z, then a1, b1, ...: the real writer stops at z."""
    return chr(ord("a") + axis % 26) + (str(axis // 26) if axis >= 26 else "")


def infer_mesh(cells: Sequence[Shape], cuts: Shape) -> Layout | None:
    """The mesh under which device i holds cell `cells[i]`, or None where no mesh in rank order does that."""
    axes: list[tuple[int, int | None, int]] = []  # extent, dimension, how far one step moves; fastest first
    stride = 1
    while stride < len(cells):
        axis = _axis_at(cells, stride)
        if axis is None:
            return None
        axes.append(axis)
        stride *= axis[0]
    tensor_map: list[Shape] = []
    for dim in range(len(cuts)):
        mine = [(move, number) for number, (_, d, move) in enumerate(axes) if d == dim]
        tensor_map.append(tuple(number for _, number in sorted(mine, reverse=True)))
    layout = Layout(tuple(extent for extent, _, _ in reversed(axes)) or (1,), tuple(tensor_map))
    good = layout.cuts(len(cuts)) == cuts and all(layout.index(i) == cell for i, cell in enumerate(cells))
    return layout if good else None


def _axis_at(cells: Sequence[Shape], stride: int) -> tuple[int, int | None, int] | None:
    """The mesh axis whose neighbours are `stride` devices apart: as far as the cells go on in equal steps."""
    steps = [b - a for a, b in zip(cells[0], cells[stride], strict=True)]
    moved = [dim for dim, step in enumerate(steps) if step]
    if len(moved) > 1 or min(steps, default=0) < 0:
        return None
    extent = 1
    while extent * stride < len(cells):
        expected = tuple(at + extent * step for at, step in zip(cells[0], steps, strict=True))
        if cells[extent * stride] != expected:
            break
        extent += 1
    if len(cells) % (stride * extent):
        return None
    return extent, moved[0] if moved else None, steps[moved[0]] if moved else 0


def _any_mesh(numbers: Sequence[int], cuts: Shape) -> tuple[Layout, list[int]]:
    """A mesh for devices in any order: replicas outermost, then the grid; and the positions that it lists.

    Where slices have different numbers of holders, as many of each are listed as the rarest has: the loader needs one.
    """
    positions: dict[int, list[int]] = {}
    for position, number in enumerate(numbers):
        positions.setdefault(number, []).append(position)
    replicas = min(map(len, positions.values()))
    order = [positions[number][replica] for replica in range(replicas) for number in range(prod(cuts))]
    split = [dim for dim, cut in enumerate(cuts) if cut > 1]
    matrix = ((replicas,) if replicas > 1 or not split else ()) + tuple(cuts[dim] for dim in split)
    tensor_map = tuple((len(split) - 1 - split.index(dim),) if dim in split else () for dim in range(len(cuts)))
    return Layout(matrix, tensor_map), order
