"""The protobuf form of a strategy file: package mindspore.straspb, as MindSpore 2.9.0 train/node_strategy_pb2.py.

May import only strategy.{document,layout,wire} and transform_ckpt.{errors,views}; not google.protobuf, see
strategy.wire.
"""

from __future__ import annotations

from math import prod
from typing import Any

from strategy import wire
from strategy.document import Document, LayoutReader, Node, written_tensor_map
from strategy.layout import Layout
from transform_ckpt.errors import InputError
from transform_ckpt.views import Shape

SCHEMA = wire.parse_schema(
    {
        "ParallelStrategy": ("repeated uint32 dim=1",),
        "ParallelStrategys": ("required uint32 stage=1", "repeated ParallelStrategy parallel_strategy=2"),
        # The two items hold messages; they are kept as bytes because most items of a file have equal ones.
        "ParallelStrategyItem": ("required string node_name=1", "required bytes parallel_strategys=2"),
        "ParallelLayoutItem": ("required string param_name=1", "required bytes parallel_layouts=2"),
        "DevMatrix": ("repeated uint32 dim=1",),
        "TensorMap": ("repeated int32 dim=1",),
        "ParamSplitShape": ("repeated int64 dim=1",),
        "IndicesOffset": ("repeated int64 dim=1",),
        "ParallelLayouts": (
            "repeated DevMatrix dev_matrix=1",
            "repeated TensorMap tensor_map=2",
            "repeated ParamSplitShape param_split_shape=3",
            "repeated IndicesOffset indices_offset=4",
            "required int32 field=5",
            "required int32 opt_weight_shard_step=6",
            "required int32 opt_weight_shard_size=7",
        ),
        "ParallelStrategyMap": (
            "required uint32 current_stage=1",
            "repeated ParallelStrategyItem parallel_strategy_item=2",
            "repeated ParallelLayoutItem parallel_layout_item=3",
        ),
    }
)
_CURRENT_STAGE = 1
"""What mindspore.merge_pipeline_strategys writes; it has no meaning."""

_Stored = tuple[Shape, tuple[Shape, ...], tuple[int, int]]
"""dev_matrix, tensor_map with -1 for "not split", (opt_weight_shard_step, opt_weight_shard_size)."""


def decode(data: bytes, path: str) -> Document:
    """Parse a protobuf strategy file; InputError names `path` and what does not fit the schema."""
    reader = LayoutReader(path)
    try:
        content = wire.decode(SCHEMA, "ParallelStrategyMap", data)
        nodes = _read_nodes(content["parallel_strategy_item"])
    except wire.WireError as error:
        raise InputError(
            f"{path}: not a strategy file, or a damaged one: {error}; expected mindspore.straspb.ParallelStrategyMap "
            "or its JSON form: copy the file again or give another"
        ) from error
    known: dict[bytes, _Stored] = {}
    for item in content["parallel_layout_item"]:
        name, stored = item["param_name"], item["parallel_layouts"]
        try:
            if stored not in known:
                known[stored] = _read_layout(wire.decode(SCHEMA, "ParallelLayouts", stored))
            reader.add(name, *known[stored])
        except wire.WireError as error:
            reader.problem(name, str(error))
    return reader.document(nodes)


def _read_nodes(items: list[dict[str, Any]]) -> list[Node]:
    known: dict[bytes, tuple[int, tuple[Shape, ...]]] = {}
    for item in items:
        stored = item["parallel_strategys"]
        if stored not in known:
            content = wire.decode(SCHEMA, "ParallelStrategys", stored)
            known[stored] = (content["stage"], tuple(tuple(one["dim"]) for one in content["parallel_strategy"]))
    return [Node(item["node_name"], *known[item["parallel_strategys"]]) for item in items]


def _read_layout(stored: dict[str, Any]) -> _Stored:
    dev_matrix, tensor_map = stored["dev_matrix"], stored["tensor_map"]
    if len(dev_matrix) != 1 or not tensor_map:
        found = f"{len(dev_matrix)} dev_matrix and {len(tensor_map)} tensor_map"
        raise wire.WireError(f"has {found}; expected one dev_matrix and a tensor_map")
    mesh, axes = tuple(dev_matrix[0]["dim"]), _read_tensor_map([tuple(one["dim"]) for one in tensor_map])
    sizes = [tuple(one["dim"]) for one in stored["param_split_shape"] if one["dim"]]
    uneven = stored["field"] or any(one["dim"] for one in stored["indices_offset"])
    if uneven or not all(_is_shape(size, mesh, axes) for size in sizes):
        raise wire.WireError("is split unevenly (field, param_split_shape or indices_offset), which is not supported")
    return mesh, axes, (stored["opt_weight_shard_step"], stored["opt_weight_shard_size"])


def _is_shape(sizes: Shape, mesh: Shape, axes: tuple[Shape, ...]) -> bool:
    """MindFormers 1.9.0 parallel_core/inference/utils.py `save_strategy_file` writes the tensor's shape there."""
    parts = [prod(mesh[-1 - axis] for axis in dim if 0 <= axis < len(mesh)) for dim in axes]
    return len(sizes) == len(parts) and all(part and size % part == 0 for size, part in zip(sizes, parts, strict=True))


def _read_tensor_map(lists: list[Shape]) -> tuple[Shape, ...]:
    """Several lists: one a tensor dimension, of which MindSpore ignores empty ones; one list: an axis a dimension."""
    if len(lists) > 1:
        return tuple(axes for axes in lists if axes)
    return tuple((axis,) for axis in lists[0])


def encode(document: Document) -> bytes:
    """The file's bytes; equal documents give equal bytes."""
    nodes = [
        {"node_name": node.name, "parallel_strategys": _encode_strategys(node.stage, node.dims)}
        for node in document.nodes
    ]
    known = {layout: _encode_layout(layout) for layout in set(document.layouts.values())}
    layouts = [{"param_name": name, "parallel_layouts": known[layout]} for name, layout in document.layouts.items()]
    content = {"current_stage": _CURRENT_STAGE, "parallel_strategy_item": nodes, "parallel_layout_item": layouts}
    return wire.encode(SCHEMA, "ParallelStrategyMap", content)


def _encode_strategys(stage: int, dims: tuple[Shape, ...]) -> bytes:
    content = {"stage": stage, "parallel_strategy": [{"dim": dim} for dim in dims]}
    return wire.encode(SCHEMA, "ParallelStrategys", content)


def _encode_layout(layout: Layout) -> bytes:
    tensor_map = written_tensor_map(layout)
    lists: list[Any] = tensor_map if tensor_map and isinstance(tensor_map[0], list) else [tensor_map]
    if len(layout.tensor_map) == 1 and lists is tensor_map:
        lists = [*lists, []]  # alone, the one dimension's list would be read as a flat map
    content = {
        "dev_matrix": [{"dim": layout.dev_matrix}],
        "tensor_map": [{"dim": axes} for axes in lists],
        "param_split_shape": [{}],  # MindSpore's reader takes the first of each without looking whether there is one
        "indices_offset": [{}],
        "field": 0,
        "opt_weight_shard_step": layout.opt_step,
        "opt_weight_shard_size": layout.opt_size,
    }
    return wire.encode(SCHEMA, "ParallelLayouts", content)
