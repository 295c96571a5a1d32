"""Builders of numpy values, which random states and arguments hold.

Sources: numpy 1.26 and 2.x, numpy/core/src/multiarray/methods.c (`array_reduce`, `array_setstate`), descriptor.c
(`arraydescr_reduce`), numpy/core/numeric.py (`_frombuffer`).
"""

from __future__ import annotations

from typing import Any

from transform_ckpt.formats.torch_machine import Args, Machine, RefusedError, want
from transform_ckpt.formats.torch_values import Global, NumpyArray, NumpyDType, NumpyScalar


def numpy_array(_: Machine, name: Global, args: Args) -> NumpyArray:
    """_reconstruct(ndarray, (0,), b"b"): empty until its state is set."""
    want(args == (Global("numpy", "ndarray"), (0,), b"b"), name)
    return NumpyArray(name.module)


def numpy_dtype(_: Machine, name: Global, args: Args) -> NumpyDType:
    """numpy.dtype(text, align, copy)."""
    want(1 <= len(args) <= 3 and type(args[0]) is str and len(args[0]) <= 32, name)
    if "O" in args[0]:
        raise RefusedError("holds a numpy array of Python objects")
    return NumpyDType(args)


def numpy_scalar(_: Machine, name: Global, args: Args) -> NumpyScalar:
    """scalar(dtype, bytes)."""
    want(len(args) == 2 and type(args[0]) is NumpyDType and type(args[1]) is bytes, name)
    return NumpyScalar(name.module, *args)


def numpy_frombuffer(_: Machine, name: Global, args: Args) -> NumpyArray:
    """_frombuffer(bytes, dtype, shape, order): an array of protocol 5."""
    want(len(args) == 4 and type(args[0]) in {bytes, bytearray} and type(args[1]) is NumpyDType, name)
    data, dtype, shape, order = args
    want(order in ("C", "F") and type(shape) is tuple, name)
    module = name.module.replace("numeric", "multiarray")
    return NumpyArray(module, dtype, shape, order == "F", bytes(data))


def dtype_state(_: Machine, target: NumpyDType, state: Any) -> None:
    """Byte order and what only records have; (3, "<", None, None, None, -1, -1, 0)."""
    if (
        type(state) is not tuple
        or len(state) not in {8, 9}
        or state[1] not in ("<", "|", "=")
        or state[2:5] != (None,) * 3
    ):
        raise RefusedError("gives a numpy dtype a byte order or fields that are not read here")
    target.state = state


def array_state(_: Machine, target: NumpyArray, state: Any) -> None:
    """(version, shape, dtype, column-major, bytes)."""
    kinds = [int, tuple, NumpyDType, bool, bytes]
    if type(state) is not tuple or [*map(type, state)] != kinds or any(type(n) is not int for n in state[1]):
        raise RefusedError("gives a numpy array a state that it never has")
    _, target.shape, target.dtype, target.fortran, target.data = state
