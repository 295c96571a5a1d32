"""Builders of tensors: each call that torch.save writes for one becomes a TensorRef.

Sources: torch 2.13.0 torch/_utils.py and torch/_tensor.py (`_rebuild_*`); torch_npu utils/storage.py
(`_rebuild_npu_tensor`: the storage holds the plain layout, the last argument is the layout on the device).
"""

from __future__ import annotations

from typing import Any

from transform_ckpt.formats.torch_machine import Args, Machine, RefusedError, want
from transform_ckpt.formats.torch_values import BY_NAME, Call, Global, Storage, TensorRef


def _flags(name: Global, metadata: object) -> None:
    """Pending conjugation or negation: the stored bytes are not the values (torch._C._set_tensor_metadata)."""
    if isinstance(metadata, dict) and any(metadata.get(flag) for flag in ("conj", "neg")):
        raise RefusedError(f"holds a tensor ({name}) with a pending conjugation or negation: resolve it and save again")


def _ref(name: Global, args: Args, dtype: str) -> TensorRef:
    storage, offset, shape, strides = args[:4]
    want(type(storage) is Storage, name)
    grad = args[4] if len(args) > 4 else False
    want(type(grad) is bool, name)
    return TensorRef(storage, dtype, _shape(name, shape), _shape(name, strides), offset, grad)


def _shape(name: Global, value: Any) -> tuple[int, ...]:
    if type(value) is Call and str(value.target) == "torch.Size":
        (value,) = value.args
    want(type(value) is tuple, name)
    found: tuple[int, ...] = value
    return found


def tensor(_: Machine, name: Global, args: Args) -> TensorRef:
    """_rebuild_tensor (offset, size, stride), _v2 (requires_grad, hooks, metadata)."""
    want(4 <= len(args) <= 7, name)
    _flags(name, args[6] if len(args) > 6 else None)
    want(type(args[0]) is Storage and args[0].dtype, name)
    return _ref(name, args, args[0].dtype)


def tensor_v3(_: Machine, name: Global, args: Args) -> TensorRef:
    """As v2 with an untyped storage and the dtype as the seventh argument."""
    want(7 <= len(args) <= 8 and type(args[6]) is Global and args[6].module == "torch", name)
    _flags(name, args[7] if len(args) > 7 else None)
    kind = BY_NAME.get(args[6].name)
    if kind is None:
        raise RefusedError(f"holds a tensor of {args[6]}, whose elements are not known here")
    return _ref(name, args, kind.code)


def npu_tensor(_: Machine, name: Global, args: Args) -> TensorRef:
    """As v2, with the layout on the device behind."""
    want(len(args) in {6, 7} and type(args[0]) is Storage and args[0].dtype, name)
    return _ref(name, args, args[0].dtype)


def _with(ref: TensorRef, *, grad: bool, parameter: bool, state: object) -> TensorRef:
    return TensorRef(ref.storage, ref.dtype, ref.shape, ref.strides, ref.offset, grad, parameter, state)


def parameter(_: Machine, name: Global, args: Args) -> TensorRef:
    """_rebuild_parameter (data, requires_grad, hooks), _with_state (state)."""
    want(3 <= len(args) <= 4 and type(args[0]) is TensorRef and type(args[1]) is bool, name)
    return _with(args[0], grad=args[1], parameter=True, state=args[3] if len(args) > 3 else None)


def from_type(machine: Machine, name: Global, args: Args) -> TensorRef:
    """_rebuild_from_type_v2 (function, type, its arguments, attributes): a tensor that carries attributes."""
    want(len(args) == 4 and type(args[0]) is Global and type(args[1]) is Global and type(args[2]) is tuple, name)
    if str(args[1]) not in {"torch.Tensor", "torch.nn.parameter.Parameter"}:
        raise RefusedError(f"holds a tensor of class {args[1]}, which is not plain")
    ref = machine.rules.reduce(machine, args[0], args[2])
    want(type(ref) is TensorRef, name)
    return _with(ref, grad=ref.requires_grad, parameter=args[1].name == "parameter.Parameter", state=args[3] or None)
