"""Protobuf's wire format for small messages with integers, strings and messages, by a table.  Imports nothing.

Own code instead of google.protobuf, because MindSpore's generated modules (2.9.0: checkpoint_pb2, node_strategy_pb2)
need that library's slow pure-Python mode, which MindSpore sets while it is imported: in a process that has loaded
google.protobuf before, `import mindspore` fails.  Being own it can also be strict: a field that the table does not
have, a missing one and one given twice are errors here.

A table is {message: (field, ...)}, a field reads like a line of a .proto file: "repeated int32 dim=1".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_VARINT, _LENGTH_DELIMITED = 0, 2
_LOW_BITS, _MORE = 0x7F, 0x80
_MAX_SHIFT = 63
_INTEGERS = {"int32": 32, "uint32": 32, "int64": 64}


class WireError(ValueError):
    """Bytes that are not a message of the table."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field: kind is an integer type, "string", "bytes" or the name of a message."""

    repeated: bool
    kind: str
    name: str
    number: int


Schema = Mapping[str, Mapping[int, Field]]


def parse_schema(table: Mapping[str, tuple[str, ...]]) -> Schema:
    """The table as `decode` and `encode` take it; each field is required or repeated."""
    schema: dict[str, dict[int, Field]] = {}
    for message, lines in table.items():
        for line in lines:
            label, kind, name, number = line.replace("=", " ").split()
            schema.setdefault(message, {})[int(number)] = Field(label == "repeated", kind, name, int(number))
    return schema


def decode(schema: Schema, message: str, data: bytes) -> dict[str, Any]:
    """Field name -> value (a list where repeated); packed and unpacked integers are read alike.  WireError."""
    fields = schema[message]
    found: dict[str, Any] = {field.name: [] for field in fields.values() if field.repeated}
    for number, value in _fields(data):
        field = fields.get(number)
        if field is None:
            raise WireError(f"{message} has no field {number}")
        where = f"{message}.{field.name}"
        if not field.repeated:
            if field.name in found:
                raise WireError(f"{where} is there twice")
            found[field.name] = _value(schema, field, value, where)
        elif field.kind in _INTEGERS and isinstance(value, bytes):
            found[field.name] += [_integer(field, item, where) for item in _varints(value)]
        else:
            found[field.name].append(_value(schema, field, value, where))
    for field in fields.values():
        if field.name not in found:
            raise WireError(f"{message}.{field.name} is missing")
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind not in (_VARINT, _LENGTH_DELIMITED):
            raise WireError(f"byte {at}: wire type {kind} of field {key >> 3} is not used in this format")
        value, at = _varint(data, at)
        if kind == _VARINT:
            yield key >> 3, value
            continue
        if at + value > len(data):
            raise WireError(f"field {key >> 3} has {value:,} bytes, only {len(data) - at:,} follow (truncated?)")
        yield key >> 3, data[at : at + value]
        at += value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, offset behind it); at most 64 bits."""
    value = shift = 0
    while at < len(data) and shift <= _MAX_SHIFT:
        byte = data[at]
        at += 1
        value |= (byte & _LOW_BITS) << shift
        if byte < _MORE:
            return value & (1 << 64) - 1, at
        shift += 7
    raise WireError("a number is cut off or longer than 64 bits")


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _value(schema: Schema, field: Field, value: int | bytes, where: str) -> Any:
    if isinstance(value, int):
        return _integer(field, value, where)
    if field.kind in schema:
        return decode(schema, field.kind, value)
    if field.kind == "bytes":
        return value
    if field.kind != "string":
        raise WireError(f"{where} is {len(value)} bytes; expected an integer")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise WireError(f"{where} is not UTF-8") from error


def _integer(field: Field, value: int, where: str) -> int:
    """Signed types are two's complement of 64 bits, also where they are narrower."""
    bits = _INTEGERS.get(field.kind)
    if bits is None:
        raise WireError(f"{where} is the integer {value}; expected {field.kind}")
    if field.kind.startswith("u"):
        low, high = 0, 1 << bits
    else:
        value -= (value >> 63) << 64
        low, high = -(1 << bits - 1), 1 << bits - 1
    if not low <= value < high:
        raise WireError(f"{where} is {value}, which is no {field.kind}")
    return value


def encode(schema: Schema, message: str, values: Mapping[str, Any]) -> bytes:
    """The message with its fields in the order of their numbers; repeated integers unpacked, as proto2 does.

    A message value is a mapping, or bytes where it is encoded already.  Fields that `values` lacks are left out.
    """
    out = bytearray()
    for field in sorted(schema[message].values(), key=lambda field: field.number):
        if field.name in values:
            value = values[field.name]
            for item in value if field.repeated else (value,):
                out += _encoded(schema, field, item)
    return bytes(out)


def _encoded(schema: Schema, field: Field, value: Any) -> bytes:
    if field.kind in _INTEGERS:
        return _encoded_varint(field.number << 3 | _VARINT) + _encoded_varint(value & (1 << 64) - 1)
    if isinstance(value, str):
        data = value.encode()
    else:
        data = value if isinstance(value, bytes) else encode(schema, field.kind, value)
    return _encoded_varint(field.number << 3 | _LENGTH_DELIMITED) + _encoded_varint(len(data)) + data


def _encoded_varint(value: int) -> bytes:
    out = bytearray()
    while value >= _MORE:
        out.append(value & _LOW_BITS | _MORE)
        value >>= 7
    out.append(value)
    return bytes(out)
