"""What a pickle of torch.save may name, and what each becomes: one table.  Everything else is refused by its name.

Source: CPython 3.11 `object.__reduce_ex__`, Lib/enum.py, Lib/pathlib.py; tensors and numpy in torch_build_*.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from transform_ckpt.formats.torch_build_numpy import (
    array_state,
    dtype_state,
    numpy_array,
    numpy_dtype,
    numpy_frombuffer,
    numpy_scalar,
)
from transform_ckpt.formats.torch_build_tensors import from_type, npu_tensor, parameter, tensor, tensor_v3
from transform_ckpt.formats.torch_machine import FAMILY, Args, Builder, Machine, RefusedError, Rules, State, want
from transform_ckpt.formats.torch_values import (
    BY_NAME,
    BY_STORAGE,
    UNTYPED,
    Buffer,
    Call,
    DefaultDict,
    EnumValue,
    Global,
    Instance,
    Namespace,
    NumpyArray,
    NumpyDType,
)

FAMILIES = frozenset(
    "megatron mindspeed mindspeed_llm mindspeed_mm mindspeed_rl mindspeed_ms transformer_engine torch_npu apex".split()
)


# --------------------------------------------------------------------------------------------------------- builtins


def _items(machine: Machine, name: Global, args: Args) -> list[Any]:
    """The only argument, a list or tuple, or none; copied, and counted."""
    want(len(args) <= 1 and all(type(a) in {list, tuple} for a in args), name)
    machine.charge(len(args[0]) if args else 0)
    return list(args[0]) if args else []


def _set(machine: Machine, name: Global, args: Args) -> set[Any]:
    return set(map(machine.key, _items(machine, name, args)))


def _frozenset(machine: Machine, name: Global, args: Args) -> frozenset[Any]:
    return frozenset(map(machine.key, _items(machine, name, args)))


def _list(machine: Machine, name: Global, args: Args) -> list[Any]:
    return _items(machine, name, args)


def _tuple(machine: Machine, name: Global, args: Args) -> Args:
    return tuple(_items(machine, name, args))


def _dict(_: Machine, name: Global, args: Args) -> dict[Any, Any]:
    want(not args, name)
    return {}


def _ordered(machine: Machine, name: Global, args: Args) -> OrderedDict[Any, Any]:
    """Empty, or (protocol 0 and 1) from a list of pairs."""
    found: OrderedDict[Any, Any] = OrderedDict()
    for pair in _items(machine, name, args):
        want(type(pair) in {list, tuple} and len(pair) == 2, name)
        found[machine.key(pair[0])] = pair[1]
    return found


def _defaultdict(_: Machine, name: Global, args: Args) -> DefaultDict:
    want(len(args) <= 1 and all(a is None or type(a) is Global for a in args), name)
    return DefaultDict(*args)


def _encode(machine: Machine, name: Global, args: Args) -> bytes:
    """How protocol 2 writes bytes: _codecs.encode(text, "latin1")."""
    want(len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"), name)
    machine.charge(len(args[0]))
    found: bytes = args[0].encode("latin-1")
    return found


def _bytes(_: Machine, name: Global, args: Args) -> bytes:
    want(not args, name)
    return b""


def _bytearray(machine: Machine, name: Global, args: Args) -> bytearray:
    if len(args) == 2:
        args = (_encode(machine, name, args),)
    want(len(args) <= 1 and all(type(a) is bytes for a in args), name)
    machine.charge(sum(map(len, args)))
    return bytearray(*args)


def _numbers(args: Args, *kinds: type) -> bool:
    return len(args) <= 3 and all(type(a) in kinds for a in args)


def _range(_: Machine, name: Global, args: Args) -> range:
    want(_numbers(args, int) and args, name)
    return range(*args)


def _slice(_: Machine, name: Global, args: Args) -> slice:
    want(_numbers(args, int, type(None)) and args, name)
    return slice(*args)


def _complex(_: Machine, name: Global, args: Args) -> complex:
    want(_numbers(args, float) and len(args) == 2, name)
    return complex(*args)


def _getattr(_: Machine, name: Global, args: Args) -> Global:
    """Of a class of a family only: how protocol 2 names a nested class, and Python 3.11.0 an enum's member."""
    want(len(args) == 2 and type(args[0]) is Global and type(args[1]) is str, name)
    if args[0].module.partition(".")[0] not in FAMILIES:
        raise RefusedError(f"refuses to build getattr({args[0]!s:.100}, {args[1]!r:.100})")
    return Global(args[0].module, f"{args[0].name}.{args[1]}")


def _call(_: Machine, name: Global, args: Args) -> Call:
    plain = {int, str, bytes, bool, type(None), tuple, Call}
    want(len(args) <= 64 and all(type(a) in plain for a in args), name)
    return Call(name, args)


# --------------------------------------------------------------------------------------- namespaces, enums, objects


def _namespace(_: Machine, name: Global, args: Args) -> Namespace:
    want(not args, name)
    return Namespace({}, name)


def _buffer(_: Machine, name: Global, args: Args) -> Buffer:
    want(len(args) <= 1 and all(type(a) is bytes for a in args), name)
    return Buffer(*args)


def _enum(_: Machine, name: Global, args: Args) -> EnumValue:
    if len(args) != 1 or type(args[0]) not in {int, str, float, bool, type(None)}:
        raise RefusedError(f"refuses to call {name!s:.200}: it is no enum, and only its members are read")
    return EnumValue(name.module, name.name, args[0])


def _instance(_: Machine, name: Global, args: Args) -> Instance:
    return Instance(name, args)


def _reconstructor(machine: Machine, name: Global, args: Args) -> Any:
    """copyreg._reconstructor(class, object, None): an object without its constructor, protocols 0 and 1."""
    want(len(args) == 3 and type(args[0]) is Global and args[1] == Global("builtins", "object"), name)
    want(args[2] is None, name)
    return machine.rules.new(machine, args[0], ())


# ------------------------------------------------------------------------------------------------- states of BUILD


def _attributes(state: object, what: str) -> dict[str, Any]:
    if type(state) is not dict or any(type(key) is not str for key in state):
        raise RefusedError(f"gives {what} attributes that are none")
    found: dict[str, Any] = state
    return found


def _ordered_state(machine: Machine, target: OrderedDict[Any, Any], state: object) -> None:
    """torch.nn.Module.state_dict gives its OrderedDict an attribute `_metadata`."""
    found = _attributes(state, "an OrderedDict")
    if any(hasattr(OrderedDict, key) for key in found):
        raise RefusedError("overwrites methods of an OrderedDict")
    machine.charge(len(found))
    target.__dict__.update(found)


def _namespace_state(machine: Machine, target: Namespace, state: object) -> None:
    found = _attributes(state, str(target.kind))
    machine.charge(len(found))
    target.fields.update(found)


def _instance_state(_: Machine, target: Instance, state: object) -> None:
    target.state = state


def _buffer_state(_: Machine, target: Buffer, state: Any) -> None:
    if type(state) is not tuple or [*map(type, state[:2])] != [bytes, int] or state[2:] not in ((None,), ()):
        raise RefusedError("gives an io.BytesIO a state that it never has")
    target.data, target.position = state[:2]


# ---------------------------------------------------------------------------------------------------------- tables

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_PLAIN_CLASSES = (
    "torch.Size torch.device datetime.date datetime.time datetime.datetime datetime.timedelta datetime.timezone "
    "pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath pathlib.Path pathlib.PurePath "
    "pathlib._local.PosixPath pathlib._local.PurePosixPath"
).split()

_REDUCES: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": tensor_v3,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "torch._tensor._rebuild_from_type_v2": from_type,
    "torch_npu.utils.storage._rebuild_npu_tensor": npu_tensor,
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.list": _list,
    "builtins.tuple": _tuple,
    "builtins.dict": _dict,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.range": _range,
    "builtins.slice": _slice,
    "builtins.complex": _complex,
    "builtins.getattr": _getattr,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _defaultdict,
    "_codecs.encode": _encode,
    "types.SimpleNamespace": _namespace,
    "argparse.Namespace": _namespace,
    "io.BytesIO": _buffer,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": numpy_dtype,
    **{f"{module}._reconstruct": numpy_array for module in _MULTIARRAY},
    **{f"{module}.scalar": numpy_scalar for module in _MULTIARRAY},
    **{f"{module}._frombuffer": numpy_frombuffer for module in _NUMERIC},
    **dict.fromkeys(_PLAIN_CLASSES, _call),
    FAMILY: _enum,
}
_NEWS: dict[str, Builder] = {
    "argparse.Namespace": _namespace,
    "types.SimpleNamespace": _namespace,
    "io.BytesIO": _buffer,
    "collections.OrderedDict": _ordered,
    FAMILY: _instance,
}
_OTHER_DTYPES = (
    "complex32 quint8 qint8 qint32 quint4x2 quint2x4 float4_e2m1fn_x2 bits8 bits16 bits1x8 bits2x4 bits4x2 "
    "uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7 half float double long int short "
    "cfloat cdouble chalf strided sparse_coo sparse_csr sparse_csc sparse_bsr sparse_bsc jagged contiguous_format "
    "channels_last channels_last_3d preserve_format"
).split()
_STORAGES = (*BY_STORAGE, UNTYPED)
_NAMES = (
    *(f"torch.{name}" for name in (*BY_NAME, *_OTHER_DTYPES, *_STORAGES)),
    *(f"torch.cuda.{name}" for name in _STORAGES),
    *("torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.storage._UntypedStorage"),
    *("torch.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray"),
    *(f"builtins.{name}" for name in ("object", "int", "float", "bool", "str")),
)
_NOT_PLAIN = "{} tensors are not read here: turn them into plain ones and save again"
_HINTS = {
    f"torch._utils.{name}": _NOT_PLAIN.format(kind)
    for name, kind in (
        ("_rebuild_qtensor", "quantized"),
        ("_rebuild_sparse_tensor", "sparse"),
        ("_rebuild_sparse_csr_tensor", "sparse"),
        ("_rebuild_nested_tensor", "nested"),
        ("_rebuild_wrapper_subclass", "wrapper subclass"),
        ("_rebuild_meta_tensor_no_storage", "meta"),
        ("_rebuild_device_tensor_from_numpy", "foreign device"),
        ("_rebuild_device_tensor_from_cpu_tensor", "foreign device"),
    )
}
_STATES: dict[type, State] = {
    OrderedDict: _ordered_state,
    Namespace: _namespace_state,
    Instance: _instance_state,
    Buffer: _buffer_state,
    NumpyDType: dtype_state,
    NumpyArray: array_state,
}

RULES = Rules(_REDUCES, _NEWS, frozenset(_NAMES), FAMILIES, _STATES, _HINTS)
