"""Writes the pickle of a torch.save file, byte for byte as torch.save(pickle_protocol=2) does for the same objects.

What is followed: torch 2.13.0 torch/serialization.py `persistent_id`, torch/_tensor.py `_reduce_ex_internal`,
torch/nn/parameter.py `__reduce_ex__`; numpy `array_reduce`; argparse, enum, io by CPython 3.11 `object.__reduce_ex__`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from transform_ckpt.errors import PlanError
from transform_ckpt.formats.torch_pickle_plain import PLAIN, STORAGE, PlainPickler
from transform_ckpt.formats.torch_values import (
    BY_CODE,
    UNTYPED,
    Buffer,
    Call,
    EnumValue,
    Global,
    Namespace,
    NumpyArray,
    NumpyDType,
    NumpyScalar,
    Storage,
    TensorRef,
)


class Pickler(PlainPickler):
    """Writes one tree of torch_values; `storages` are those met, in the order in which torch numbers them."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[int, str] = {}
        self.storages: list[Storage] = []

    def namespace(self, value: Namespace) -> None:
        """argparse.Namespace by NEWOBJ, types.SimpleNamespace by REDUCE, each with its attributes."""
        if self.got(id(value)):
            return
        if value.kind.name == "SimpleNamespace":
            self.reduce(id(value), value.kind.module, value.kind.name)
            self.nested(value, lambda: self.state(value.fields or None))
        else:
            self.nested(value, lambda: self.new(id(value), value.kind, value.fields or None))

    def call(self, value: Call) -> None:
        """A value of a plain class."""
        if not self.got(id(value)):
            self.reduce(id(value), value.target.module, value.target.name, *value.args)

    def enum(self, value: EnumValue) -> None:
        """A member of an enum, one object wherever it appears."""
        key = ("enum", value.module, value.name, value.value)
        if not self.got(key):
            self.reduce(key, value.module, value.name, value.value)

    def buffer(self, value: Buffer) -> None:
        """io.BytesIO."""
        if not self.got(id(value)):
            self.new(id(value), Global("io", "BytesIO"), self.keep((value.data, value.position, None)))

    # ------------------------------------------------------------------------------------------------------- numpy

    def numpy_dtype(self, value: NumpyDType) -> None:
        """numpy.dtype and its state."""
        if not self.got(id(value)):
            self.reduce(id(value), "numpy", "dtype", *value.args)
            self.state(value.state)

    def numpy_array(self, value: NumpyArray) -> None:
        """_reconstruct(ndarray, (0,), b"b") and the state that makes it."""
        if not self.got(id(value)):
            shape = self.keep(tuple(range(1)))  # numpy makes one each time, so none refers to another
            self.reduce(id(value), value.module, "_reconstruct", Global("numpy", "ndarray"), shape, b"b")
            self.state(self.keep((1, value.shape, value.dtype, value.fortran, value.data)))

    def numpy_scalar(self, value: NumpyScalar) -> None:
        """scalar(dtype, bytes)."""
        if not self.got(id(value)):
            self.reduce(id(value), value.module, "scalar", value.dtype, value.data)

    # ----------------------------------------------------------------------------------------------------- tensors

    def storage(self, value: Storage) -> None:
        """A storage's persistent id: ("storage", class, number, device, elements)."""
        key = self.keys.get(id(value))
        if key is None:
            key = self.keys[id(value)] = str(len(self.storages))
            self.storages.append(value)
        kind = BY_CODE.get(value.dtype)
        cls = Global("torch", kind.storage) if kind else Global("torch.storage", UNTYPED)
        self.values(STORAGE, cls, key, value.location, value.nbytes // (kind.itemsize if kind else 1))
        self.out += b"Q"

    def tensor(self, value: TensorRef) -> None:
        """_rebuild_tensor_v2 of a typed storage, _v3 of an untyped one; around it _rebuild_parameter."""
        if self.got(id(value)):
            return
        if value.state is not None:
            raise PlanError("a torch file to be written holds a tensor with Python attributes, which are never written")
        if value.parameter:
            self.name("torch._utils", "_rebuild_parameter")
            self._tensor(value, None, grad=False)
            self.save(value.requires_grad)
            self.save(self.keep(OrderedDict()))
            self.out += b"\x87"
            self.put()
            self.out += b"R"
            self.put(id(value))
        else:
            self._tensor(value, id(value), grad=value.requires_grad)

    def _tensor(self, value: TensorRef, key: Any, *, grad: bool) -> None:
        kind = BY_CODE[value.dtype]
        if value.storage.dtype != (value.dtype if kind.storage else ""):
            raise PlanError(f"a torch file to be written holds a tensor of {kind.name} in a storage of another type")
        dtype = () if kind.storage else (Global("torch", kind.name),)
        name = "_rebuild_tensor_v2" if kind.storage else "_rebuild_tensor_v3"
        args = (value.storage, value.offset, value.shape, value.strides, grad, self.keep(OrderedDict()), *dtype)
        self.reduce(key, "torch._utils", name, *args)


Pickler.writers = {
    **PLAIN,
    EnumValue: Pickler.enum,
    Namespace: Pickler.namespace,
    Call: Pickler.call,
    Buffer: Pickler.buffer,
    NumpyDType: Pickler.numpy_dtype,
    NumpyArray: Pickler.numpy_array,
    NumpyScalar: Pickler.numpy_scalar,
    Storage: Pickler.storage,
    TensorRef: Pickler.tensor,
}
