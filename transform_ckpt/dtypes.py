"""Element types: one table, keyed by the safetensors code, which every dialect maps onto.  Imports nothing.

Sources: safetensors 0.7.0 `Dtype`; MindSpore 2.9.0 mindspore/train/serialization.py `tensor_to_ms_type`,
`np_type_convert`; Torch's names as in torch 2.13.0 `torch.dtype`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.  `itemsize` in bytes; `mindspore` is the tensor_type of a .ckpt; empty = not representable."""

    code: str
    itemsize: int
    mindspore: str
    numpy: str


STRING = "STR"
"""A MindSpore `append_dict` string: UTF-32LE bytes in a .ckpt, no element count of its own."""

_TABLE = (
    DType("BOOL", 1, "Bool", "bool"),
    DType("U8", 1, "UInt8", "uint8"),
    DType("I8", 1, "Int8", "int8"),
    DType("U16", 2, "UInt16", "uint16"),
    DType("I16", 2, "Int16", "int16"),
    DType("U32", 4, "UInt32", "uint32"),
    DType("I32", 4, "Int32", "int32"),
    DType("U64", 8, "UInt64", "uint64"),
    DType("I64", 8, "Int64", "int64"),
    DType("F16", 2, "Float16", "float16"),
    DType("F32", 4, "Float32", "float32"),
    DType("F64", 8, "Float64", "float64"),
    DType("C64", 8, "Complex64", "complex64"),
    DType("BF16", 2, "BFloat16", "bfloat16"),
    DType("F8_E4M3", 1, "Float8E4M3FN", "float8_e4m3fn"),
    DType("F8_E5M2", 1, "Float8E5M2", "float8_e5m2"),
    DType("I4X2", 1, "Int4", "int8"),
    DType(STRING, 1, "str", "uint8"),
)

BY_CODE = {dtype.code: dtype for dtype in _TABLE}
BY_MINDSPORE = {dtype.mindspore: dtype for dtype in _TABLE}


def itemsize(code: str) -> int:
    """Bytes per element of a neutral dtype code."""
    return BY_CODE[code].itemsize


_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))


def castable(source: str, target: str) -> bool:
    """May values of one dtype be written as the other?"""
    return source == target or (source in _FLOATS and target in _FLOATS)


_STRUCT_CODES = {
    "BOOL": "?", "U8": "B", "I8": "b", "U16": "H", "I16": "h", "U32": "I", "I32": "i", "U64": "Q", "I64": "q",
    "F16": "e", "F32": "f", "F64": "d",
}  # fmt: skip


def decode(code: str, value: bytes) -> int | float | bool | str | bytes:
    """A single value as Python has it; the bytes where it is several, or of a type without a Python twin."""
    if code == STRING:
        return value.decode("utf-32-le", "replace")
    if code == "BF16" and len(value) == BY_CODE[code].itemsize:
        return float(struct.unpack("<f", b"\0\0" + value)[0])
    if code in _STRUCT_CODES and len(value) == itemsize(code):
        found: int | float | bool = struct.unpack("<" + _STRUCT_CODES[code], value)[0]
        return found
    return value
