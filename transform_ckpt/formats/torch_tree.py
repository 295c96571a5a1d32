"""The tensors of a tree that a torch file was read into, with the way to each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats.torch_values import Instance, Key, Namespace, StoredTensor, TensorRef
from transform_ckpt.tensors import Extent

MAX_DEPTH = 100
MAX_NODES = 20_000_000
"""A pickle of some hundred bytes can refer to one list so often that walking it never ends."""

_LEAVES = frozenset({str, int, float, bool, type(None), bytes})


def tensors_of(tree: Any, extents: Mapping[str, Extent], where: str) -> Iterator[StoredTensor]:
    """Every tensor below dicts, lists, tuples, namespaces and objects, in the tree's order, with its keys.

    A tensor that several keys lead to comes once for each.  InputError (beginning with `where`) where the tree contains
    itself, is deeper than MAX_DEPTH or larger than MAX_NODES.
    """
    keys: list[Key] = []
    if type(tree) is TensorRef:
        yield StoredTensor((), tree, extents[tree.storage.key])
    walks: list[Iterator[tuple[Key, Any]]] = [_children(tree)]
    nodes = 0
    while walks:
        for key, value in walks[-1]:
            nodes += 1
            if nodes > MAX_NODES:
                raise InputError(f"{where}: holds more than {MAX_NODES:,} values: not read")
            if type(value) in _LEAVES:
                continue
            if type(value) is TensorRef:
                yield StoredTensor((*keys, key), value, extents[value.storage.key])
                continue
            if len(walks) >= MAX_DEPTH:
                raise InputError(f"{where}: holds a value that contains itself or nests {MAX_DEPTH} deep: not read")
            keys.append(key)
            walks.append(_children(value))
            break
        else:
            walks.pop()
            if keys:
                keys.pop()


def _children(value: Any) -> Iterator[tuple[Key, Any]]:
    found: Iterable[tuple[Key, Any]] = ()
    if isinstance(value, dict):
        found = value.items()
    elif isinstance(value, (list, tuple)):
        found = enumerate(value)
    elif isinstance(value, Namespace):
        found = value.fields.items()
    elif isinstance(value, Instance):
        found = (("args", value.args), ("state", value.state))
    return iter(found)
