"""The JSON form of a strategy file, as MindSpore 2.9.0 writes it and parallel/_parallel_serialization.py reads it.

    {"current_stage": int, "parallel_strategy_item": {node: {"stage": int, "parallel_strategy": [[int]]}},
     "parallel_layout_item": {param: {dev_matrix, field, opt_weight_shard_size, opt_weight_shard_step, tensor_map,
                                      tensor_shape?, param_split_shape?, indices_offset?}}}

May import only strategy.document and transform_ckpt.{errors,views}.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from strategy.document import Document, LayoutReader, Node, written_tensor_map
from transform_ckpt.errors import InputError, first_twice
from transform_ckpt.views import Shape

_NODES, _LAYOUTS = "parallel_strategy_item", "parallel_layout_item"
_TOP = {"current_stage", _NODES, _LAYOUTS}
_NODE = {"stage", "parallel_strategy"}
_REQUIRED = {"dev_matrix", "field", "opt_weight_shard_size", "opt_weight_shard_step", "tensor_map"}
_UNEVEN = ("param_split_shape", "indices_offset")
_LAYOUT = _REQUIRED | {"tensor_shape", *_UNEVEN}
_CURRENT_STAGE = 1
"""What mindspore.merge_pipeline_strategys writes; it has no meaning."""


class _BadItemError(ValueError):
    """A value of the wrong form; the caller knows whose it is."""


def decode(data: bytes, path: str) -> Document:
    """Parse a JSON strategy file; InputError names `path` and the key that does not fit."""
    reader = LayoutReader(path)
    shapes: dict[str, Shape] = {}
    try:
        content = _parse(data)
        _check_keys(content, "the top level", required={_LAYOUTS}, known=_TOP)
        _number(content.get("current_stage", 0), "current_stage", minimum=0)
        items = _mapping(content[_LAYOUTS], _LAYOUTS)
        nodes = [_read_node(*pair) for pair in _mapping(content.get(_NODES, {}), _NODES).items()]
    except _BadItemError as error:
        raise InputError(f"{path}: {error}; expected a MindSpore strategy file in JSON: give that file") from error
    for name, item in items.items():
        try:
            _read_layout(reader, name, item)
            if "tensor_shape" in item:
                shapes[name] = _numbers(item["tensor_shape"], "tensor_shape", minimum=0)
        except _BadItemError as error:
            reader.problem(name, str(error))
    return reader.document(nodes, shapes)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _BadItemError:
        raise
    except (ValueError, RecursionError) as error:
        raise _BadItemError(f"it begins like JSON but does not parse: {error}") from error
    return _mapping(content, "the top level")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _BadItemError(f"key {first_twice(key for key, _ in pairs)!r} is there twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise _BadItemError(f"{text} is not a number of a strategy")


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadItemError(f"{where} is {_shown(value)}; expected an object")
    return value


def _check_keys(item: dict[str, Any], where: str, *, required: set[str], known: set[str]) -> None:
    missing, unknown = required - item.keys(), item.keys() - known
    if missing:
        raise _BadItemError(f"{where} has no key {', '.join(sorted(missing))}")
    if unknown:
        raise _BadItemError(f"{where} has the unknown key {', '.join(sorted(unknown))}")


def _number(value: object, where: str, *, minimum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 1 << 31:
        raise _BadItemError(f"{where} is {_shown(value)}; expected an integer of at least {minimum}")
    return value


def _numbers(value: object, where: str, *, minimum: int) -> Shape:
    if not isinstance(value, list):
        raise _BadItemError(f"{where} is {_shown(value)}; expected a list")
    return tuple(_number(n, f"{where}[{at}]", minimum=minimum) for at, n in enumerate(value))


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_node(name: str, value: object) -> Node:
    where = f"strategy item {name!r}"
    item = _mapping(value, where)
    _check_keys(item, where, required={"stage"}, known=_NODE)
    inputs = item.get("parallel_strategy", [])
    if not isinstance(inputs, list):
        raise _BadItemError(f"{where}: parallel_strategy is {_shown(inputs)}; expected a list")
    dims = tuple(_numbers(dim, f"{where}: parallel_strategy", minimum=0) for dim in inputs)
    return Node(name, _number(item["stage"], f"{where}: stage", minimum=0), dims)


def _read_layout(reader: LayoutReader, name: str, value: object) -> None:
    item = _mapping(value, "the item")
    _check_keys(item, "the item", required=_REQUIRED, known=_LAYOUT)
    if _number(item["field"], "field", minimum=0) or any(item.get(key) for key in _UNEVEN):
        raise _BadItemError("is split unevenly (field, param_split_shape or indices_offset), which is not supported")
    step = _number(item["opt_weight_shard_step"], "opt_weight_shard_step", minimum=0)
    size = _number(item["opt_weight_shard_size"], "opt_weight_shard_size", minimum=-1)
    reader.add(
        name, _numbers(item["dev_matrix"], "dev_matrix", minimum=1), _tensor_map(item["tensor_map"]), (step, size)
    )


def _tensor_map(value: object) -> tuple[Shape, ...]:
    """A number or a list a dimension; both in one map are read too, as MindSpore's Python layouts have them."""
    if not isinstance(value, list):
        raise _BadItemError(f"tensor_map is {_shown(value)}; expected a list")
    return tuple(
        _numbers(dim if isinstance(dim, list) else [dim], f"tensor_map[{at}]", minimum=-1)
        for at, dim in enumerate(value)
    )


def encode(document: Document) -> bytes:
    """The file's bytes; equal documents give equal bytes."""
    items = {}
    for name, layout in document.layouts.items():
        item: dict[str, object] = {
            "dev_matrix": layout.dev_matrix,
            "field": 0,
            "opt_weight_shard_size": layout.opt_size,
            "opt_weight_shard_step": layout.opt_step,
            "tensor_map": written_tensor_map(layout),
        }
        if name in document.tensor_shapes:
            item["tensor_shape"] = document.tensor_shapes[name]
        items[name] = item
    content = {"current_stage": _CURRENT_STAGE, _NODES: _nodes(document), _LAYOUTS: items}
    return json.dumps(content).encode()


def _nodes(document: Document) -> dict[str, object]:
    """Node names are keys here, so an operator of several stages (a tied embedding) gets its stage before its name."""
    found: dict[str, object] = {}
    for node in document.nodes:
        name = node.name
        while name in found:
            name = f"{node.stage}-{name}"
        found[name] = {"stage": node.stage, "parallel_strategy": node.dims}
    return found
