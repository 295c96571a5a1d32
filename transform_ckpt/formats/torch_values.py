"""What a torch.save file's pickle is read into, and laid out from: inert values that remember names and run nothing.

Containers stay Python's own (dict, OrderedDict, list, tuple, set), everything with a class of its own becomes one of
the values below.  A `TensorRef` is a strided window of a `Storage`; both serve reading and writing.

Sources: torch 2.13.0 torch/_utils.py (`_rebuild_*`), torch/_tensor.py (`_reduce_ex_internal`), torch/storage.py
(`_new_dtypes`, `_dtype_to_storage_type_map`), torch/serialization.py (`persistent_id`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from transform_ckpt.tensors import Extent
from transform_ckpt.views import Shape, View, contiguous, row_major

MAX_NDIM = 64


@dataclass(frozen=True, slots=True)
class TorchType:
    """One torch dtype: its name, our code (the name where we have none), its size, its typed storage class.

    An empty `storage` means `torch.storage.UntypedStorage` and `_rebuild_tensor_v3`.
    """

    name: str
    code: str
    itemsize: int
    storage: str


_TYPES = (
    TorchType("float64", "F64", 8, "DoubleStorage"),
    TorchType("float32", "F32", 4, "FloatStorage"),
    TorchType("float16", "F16", 2, "HalfStorage"),
    TorchType("bfloat16", "BF16", 2, "BFloat16Storage"),
    TorchType("int64", "I64", 8, "LongStorage"),
    TorchType("int32", "I32", 4, "IntStorage"),
    TorchType("int16", "I16", 2, "ShortStorage"),
    TorchType("int8", "I8", 1, "CharStorage"),
    TorchType("uint8", "U8", 1, "ByteStorage"),
    TorchType("bool", "BOOL", 1, "BoolStorage"),
    TorchType("complex64", "C64", 8, "ComplexFloatStorage"),
    TorchType("complex128", "complex128", 16, "ComplexDoubleStorage"),
    TorchType("uint16", "U16", 2, ""),
    TorchType("uint32", "U32", 4, ""),
    TorchType("uint64", "U64", 8, ""),
    TorchType("float8_e4m3fn", "F8_E4M3", 1, ""),
    TorchType("float8_e5m2", "F8_E5M2", 1, ""),
    TorchType("float8_e4m3fnuz", "float8_e4m3fnuz", 1, ""),
    TorchType("float8_e5m2fnuz", "float8_e5m2fnuz", 1, ""),
    TorchType("float8_e8m0fnu", "float8_e8m0fnu", 1, ""),
)
BY_CODE = {kind.code: kind for kind in _TYPES}
BY_NAME = {kind.name: kind for kind in _TYPES}
BY_STORAGE = {kind.storage: kind for kind in _TYPES if kind.storage}
UNTYPED = "UntypedStorage"


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or dtype by its name; never looked up.  A dotted name is a nested class or an enum member."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class EnumValue:
    """A member of an enum class that is not imported: `module.name(value)`."""

    module: str
    name: str
    value: int | str | float | bool | None


@dataclass(frozen=True, slots=True)
class Call:
    """A value of a plain class (torch.device, torch.Size, datetime, pathlib): the class and its arguments."""

    target: Global
    args: tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Namespace:
    """An argparse.Namespace or types.SimpleNamespace: attribute name -> value."""

    fields: dict[str, Any] = field(default_factory=dict)
    kind: Global = Global("argparse", "Namespace")


@dataclass(slots=True, eq=False)
class Instance:
    """An object of a training framework's class, read for its state and never written again."""

    kind: Global
    args: tuple[Any, ...]
    state: Any = None


@dataclass(slots=True, eq=False)
class Buffer:
    """An io.BytesIO (Transformer Engine's `_extra_state`): content and position."""

    data: bytes = b""
    position: int = 0


class DefaultDict(dict[Any, Any]):
    """A collections.defaultdict whose factory is only a name: a missing key is a KeyError."""

    __slots__ = ("factory",)

    def __init__(self, factory: Global | None = None) -> None:
        super().__init__()
        self.factory = factory


@dataclass(slots=True, eq=False)
class NumpyDType:
    """numpy.dtype(*args) with the state that numpy restores afterwards: (3, '<', None, None, None, -1, -1, 0)."""

    args: tuple[Any, ...]
    state: tuple[Any, ...] | None = None


@dataclass(slots=True, eq=False)
class NumpyArray:
    """A small numpy.ndarray: dtype, shape, whether column-major, bytes.  `module` is where `_reconstruct` was."""

    module: str
    dtype: NumpyDType | None = None
    shape: Shape = ()
    fortran: bool = False
    data: bytes = b""


@dataclass(slots=True, eq=False)
class NumpyScalar:
    """A numpy scalar: dtype and bytes.  `module` is where `scalar` was."""

    module: str
    dtype: NumpyDType
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A flat run of bytes that tensors are windows of.

    `dtype` is the code of a typed storage, "" for an untyped one.  `key` is unique in its file; a written file
    numbers its storages anew and answers with these keys.
    """

    key: str
    dtype: str
    nbytes: int
    location: str = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor as a strided window of a storage; `offset` and `strides` in elements of `dtype` (a code of BY_CODE).

    Two references to one `Storage` are tied, or parts of one buffer.  `state` are Python attributes that the tensor
    carried, None for none.
    """

    storage: Storage
    dtype: str
    shape: Shape
    strides: Shape
    offset: int = 0
    requires_grad: bool = False
    parameter: bool = False
    state: Any = None

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or len(self.shape) > MAX_NDIM:
            raise ValueError(f"a tensor of {len(self.shape)} dimensions has {len(self.strides)} strides")
        if any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            raise ValueError("a tensor's offset, shape or strides are no natural numbers of 63 bits")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and (last + 1) * self.itemsize > self.storage.nbytes:
            raise ValueError(
                f"a tensor's last element is number {last:,} of a storage of {self.storage.nbytes:,} bytes "
                f"with {self.itemsize} bytes each"
            )

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return BY_CODE[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; those that a stride of 0 repeats count each time."""
        return prod(self.shape) * self.itemsize

    @property
    def view(self) -> View:
        """The elements as a window of the storage, in elements of `dtype`."""
        return View(self.offset, self.shape, self.strides)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order one behind the other."""
        return 0 in self.shape or self.view.normal() == contiguous(self.shape, self.offset).normal()


def new_tensor(key: str, dtype: str, shape: Shape) -> TensorRef:
    """A C-ordered tensor to be written, with a storage of its own; `dtype` is a code of BY_CODE."""
    kind = BY_CODE[dtype]
    storage = Storage(key, kind.code if kind.storage else "", prod(shape) * kind.itemsize)
    # torch gives an axis before an empty one a stride that counts the empty axis as 1 (c10 `contiguous_strides`)
    return TensorRef(storage, dtype, shape, row_major(tuple(max(n, 1) for n in shape)))


Key = str | int | float | bool | tuple[Any, ...] | Global | EnumValue | bytes | None
"""What a dictionary of a checkpoint is keyed by; a list's or tuple's key is its index."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor found in a tree: where (`keys` from the root), what (`ref`) and where its storage's bytes lie."""

    keys: tuple[Key, ...]
    ref: TensorRef
    extent: Extent

    @property
    def name(self) -> str:
        """`model.embedding.weight`, `optimizer[0]`, `x[(1, 2)]`: for messages; `keys` are unambiguous."""
        parts = [f".{key}" if isinstance(key, str) else f"[{key_text(key)}]" for key in self.keys]
        return "".join(parts).removeprefix(".")


def key_text(key: Any) -> str:
    """A dictionary key as a message shows it."""
    if isinstance(key, tuple):
        return f"({', '.join(map(key_text, key))})"
    return str(key) if isinstance(key, Global) else repr(key)
