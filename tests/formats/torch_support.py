"""What the tests of torch files share: trees of real torch objects, what they must be read as, and files filled."""

from __future__ import annotations

import argparse
import enum
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from transform_ckpt.formats.torch_values import (
    BY_NAME,
    Buffer,
    Call,
    DefaultDict,
    EnumValue,
    Global,
    Namespace,
    NumpyArray,
    NumpyScalar,
    Storage,
    TensorRef,
)
from transform_ckpt.formats.torch_zip_write import TorchSkeleton
from transform_ckpt.tensors import Extent


def filled(made: TorchSkeleton, values: Mapping[str, bytes]) -> bytes:
    """The sealed file of a skeleton, with its storages' bytes."""
    data = bytearray(made.skeleton.nbytes)
    for offset, chunk in made.skeleton.chunks:
        data[offset : offset + len(chunk)] = chunk
    for key, (extent,) in made.skeleton.places.items():
        assert len(values[key]) == extent.nbytes
        data[extent.offset_bytes : extent.offset_bytes + extent.nbytes] = values[key]
    for offset, patch in made.seal({key: zlib.crc32(values[key]) for key in made.skeleton.places}):
        data[offset : offset + len(patch)] = patch
    return bytes(data)


def storage_bytes(tensor: Any) -> bytes:
    """All bytes of a real tensor's storage."""
    return bytes(tensor.untyped_storage().tolist())


def element_bytes(torch: ModuleType, tensor: Any) -> bytes:
    """The elements of a real tensor in C order."""
    if not tensor.numel():
        return b""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype)
    flat.copy_(tensor.detach())
    return flat.reshape(-1).view(torch.uint8).numpy().tobytes()


def read_elements(data: bytes, ref: TensorRef, extent: Extent) -> bytes:
    """The elements of a tensor that was read, in C order, out of its file."""
    stored = np.frombuffer(data, f"V{ref.itemsize}", extent.nbytes // ref.itemsize, extent.offset_bytes)
    if 0 in ref.shape:
        return b""
    strides = [s * ref.itemsize for s in ref.strides]
    return np.lib.stride_tricks.as_strided(stored[ref.offset :], ref.shape, strides).tobytes()


def assert_read(torch: ModuleType, real: Any, found: Any, data: bytes, extents: Mapping[str, Extent]) -> None:
    """What was read says the same as what torch.load gives."""
    match real:
        case torch.Tensor():
            assert type(found) is TensorRef
            assert found.dtype == BY_NAME[str(real.dtype).removeprefix("torch.")].code
            assert (found.shape, found.strides, found.offset) == (
                tuple(real.shape),
                real.stride(),
                real.storage_offset(),
            )
            assert found.requires_grad == real.requires_grad
            assert found.parameter == isinstance(real, torch.nn.Parameter)
            assert read_elements(data, found, extents[found.storage.key]) == element_bytes(torch, real)
            assert found.storage.nbytes == real.untyped_storage().nbytes()
        case torch.dtype():
            assert found == Global("torch", str(real).removeprefix("torch."))
        case enum.Enum():
            assert found == EnumValue(type(real).__module__, type(real).__qualname__, real.value)
        case argparse.Namespace():
            assert type(found) is Namespace
            assert_read(torch, vars(real), found.fields, data, extents)
        case dict():
            assert type(found) is {OrderedDict: OrderedDict, dict: dict, defaultdict: DefaultDict}[type(real)]
            assert len(real) == len(found)
            for (key, value), (found_key, found_value) in zip(real.items(), found.items(), strict=True):
                assert_read(torch, key, found_key, data, extents)
                assert_read(torch, value, found_value, data, extents)
        case torch.Size():
            assert found == Call(Global("torch", "Size"), (tuple(real),))
        case list() | tuple():
            assert type(found) is type(real)
            assert len(real) == len(found)
            for value, found_value in zip(real, found, strict=True):
                assert_read(torch, value, found_value, data, extents)
        case np.ndarray():
            assert type(found) is NumpyArray
            assert found.dtype is not None
            dtype = np.dtype(found.dtype.args[0])
            again = np.frombuffer(found.data, dtype).reshape(found.shape, order="F" if found.fortran else "C")
            assert again.dtype == real.dtype
            assert again.tobytes() == real.tobytes()
        case np.generic():
            assert type(found) is NumpyScalar
            assert np.frombuffer(found.data, found.dtype.args[0])[0].tobytes() == real.tobytes()
        case _:
            assert type(found) is type(real)
            assert found == real or (real != real and found != found)  # noqa: PLR0124 - NaN


class Inert:
    """Turns a tree of real objects into torch_values without writing it: what a converter would build."""

    def __init__(self, torch: ModuleType) -> None:
        self.torch = torch
        self.made: dict[int, Any] = {}
        self.storages: dict[int, Storage] = {}
        self.values: dict[str, bytes] = {}

    def __call__(self, real: Any) -> Any:
        """The inert twin; the same object gives the same twin."""
        if id(real) not in self.made:
            self.made[id(real)] = self._make(real)
        return self.made[id(real)]

    def _make(self, real: Any) -> Any:
        torch = self.torch
        match real:
            case torch.Tensor():
                return self._tensor(real)
            case torch.dtype():
                return Global("torch", str(real).removeprefix("torch."))
            case enum.Enum():
                return EnumValue(type(real).__module__, type(real).__qualname__, real.value)
            case argparse.Namespace():
                return Namespace(self(vars(real)))
            case defaultdict():
                found = DefaultDict(Global("builtins", real.default_factory.__name__))
                found.update({self(key): self(value) for key, value in real.items()})
                return found
            case OrderedDict():
                return OrderedDict((self(key), self(value)) for key, value in real.items())
            case dict():
                return {self(key): self(value) for key, value in real.items()}
            case torch.Size():
                return Call(Global("torch", "Size"), (tuple(real),))
            case list() | tuple():
                return type(real)(map(self, real))
        import io

        return Buffer(real.getvalue(), real.tell()) if isinstance(real, io.BytesIO) else real

    def _tensor(self, real: Any) -> TensorRef:
        kind = BY_NAME[str(real.dtype).removeprefix("torch.")]
        memory = real.untyped_storage()
        storage = self.storages.get(memory._cdata)
        if storage is None:
            key = f"storage of {len(self.storages)}"
            storage = Storage(key, kind.code if kind.storage else "", memory.nbytes())
            self.storages[memory._cdata] = storage
            self.values[key] = storage_bytes(real)
        window = (tuple(real.shape), real.stride(), real.storage_offset())
        return TensorRef(storage, kind.code, *window, real.requires_grad, isinstance(real, self.torch.nn.Parameter))
