"""The opcodes of torch_machine, one function each, as a table by their byte."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from transform_ckpt.formats.torch_machine import MAX_DEPTH, MAX_INT_NBYTES, Machine, RefusedError
from transform_ckpt.formats.torch_values import Global

Opcode = Callable[[Machine], None]
STOP = ord(".")
MAX_PROTOCOL = 5
_DOUBLE = struct.Struct(">d")


def _constant(value: Any) -> Opcode:
    return lambda m: m.stack.append(value)


def _unsigned(nbytes: int) -> Opcode:
    def opcode(m: Machine) -> None:
        m.stack.append(m.number(nbytes))

    return opcode


def _binint1(m: Machine) -> None:
    m.stack.append(m.data[m.pos])
    m.pos += 1


def _binint(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.take(4), "little", signed=True))


def _long(length_nbytes: int) -> Opcode:
    def opcode(m: Machine) -> None:
        nbytes = m.number(length_nbytes)
        if nbytes > MAX_INT_NBYTES:
            raise RefusedError(f"holds an integer of {nbytes:,} bytes")
        m.stack.append(int.from_bytes(m.take(nbytes), "little", signed=True))

    return opcode


def _text_int(m: Machine) -> None:
    text = m.line().decode().removesuffix("L")
    m.stack.append({"00": False, "01": True}.get(text) if text in {"00", "01"} else int(text))


def _text_float(m: Machine) -> None:
    m.stack.append(float(m.line()))


def _binfloat(m: Machine) -> None:
    m.stack.append(_DOUBLE.unpack(m.take(8))[0])


def _unicode(length_nbytes: int) -> Opcode:
    def opcode(m: Machine) -> None:
        m.stack.append(m.take(m.number(length_nbytes)).decode("utf-8", "surrogatepass"))

    return opcode


def _binunicode(m: Machine) -> None:
    start = m.pos + 4
    end = start + int.from_bytes(m.data[m.pos : start], "little")
    if end > len(m.data):
        m.take(end - m.pos)
    m.pos = end
    m.stack.append(m.data[start:end].decode("utf-8", "surrogatepass"))


def _text_unicode(m: Machine) -> None:
    m.stack.append(m.line(len(m.data)).decode("raw-unicode-escape"))


def _bytes(length_nbytes: int) -> Opcode:
    def opcode(m: Machine) -> None:
        m.stack.append(m.take(m.number(length_nbytes)))

    return opcode


def _bytearray8(m: Machine) -> None:
    m.stack.append(bytearray(m.take(m.number(8))))


def _mark(m: Machine) -> None:
    if len(m.marks) >= MAX_DEPTH:
        raise RefusedError(f"nests values more than {MAX_DEPTH:,} deep")
    m.marks.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.since_mark()


def _pop_mark(m: Machine) -> None:
    m.since_mark()


def _dup(m: Machine) -> None:
    m.stack.append(m.stack[-1])


def _get(length_nbytes: int) -> Opcode:
    def opcode(m: Machine) -> None:
        m.stack.append(m.memo[m.number(length_nbytes)])

    return opcode


def _binget(m: Machine) -> None:
    m.stack.append(m.memo[m.data[m.pos]])
    m.pos += 1


def _text_get(m: Machine) -> None:
    m.stack.append(m.memo[int(m.line())])


def _put(length_nbytes: int) -> Opcode:
    def opcode(m: Machine) -> None:
        m.memo[m.number(length_nbytes)] = m.stack[-1]

    return opcode


def _binput(m: Machine) -> None:
    m.memo[m.data[m.pos]] = m.stack[-1]
    m.pos += 1


def _text_put(m: Machine) -> None:
    m.memo[int(m.line())] = m.stack[-1]


def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _tuple_of(items: int) -> Opcode:
    def opcode(m: Machine) -> None:
        if len(m.stack) < items:
            raise ValueError("too few values for a tuple")
        m.stack[-items:] = [tuple(m.stack[-items:])]

    return opcode


def _tuple(m: Machine) -> None:
    items = m.since_mark()
    m.stack.append(tuple(items))


def _list(m: Machine) -> None:
    items = m.since_mark()
    m.stack.append(items)


def _dict(m: Machine) -> None:
    items = m.since_mark()
    found: dict[Any, Any] = {}
    m.set_items(found, items)
    m.stack.append(found)


def _frozenset(m: Machine) -> None:
    items = m.since_mark()
    m.stack.append(frozenset(map(m.key, items)))


def _extend(m: Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is not list:
        raise RefusedError(f"appends to a {type(target).__name__}")
    target.extend(items)


def _append(m: Machine) -> None:
    item = m.stack.pop()
    _extend(m, [item])


def _appends(m: Machine) -> None:
    _extend(m, m.since_mark())


def _setitem(m: Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def _setitems(m: Machine) -> None:
    items = m.since_mark()
    m.set_items(m.stack[-1], items)


def _additems(m: Machine) -> None:
    items = m.since_mark()
    target = m.stack[-1]
    if type(target) is not set:
        raise RefusedError(f"adds members to a {type(target).__name__}")
    target.update(map(m.key, items))


def _global(m: Machine) -> None:
    module = m.line().decode()
    m.stack.append(m.name(module, m.line().decode()))


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    module = m.stack.pop()
    m.stack.append(m.name(module, name))


def _reduce(m: Machine) -> None:
    m.call(m.rules.reduce)


def _newobj(m: Machine) -> None:
    m.call(m.rules.new)


def _newobj_ex(m: Machine) -> None:
    if m.stack.pop():
        raise RefusedError("makes an object with keyword arguments")
    m.call(m.rules.new)


def _inst(m: Machine) -> None:
    name = m.name(m.line().decode(), m.line().decode())
    args = tuple(m.since_mark())
    m.stack.append(m.rules.reduce(m, name, args))


def _obj(m: Machine) -> None:
    name, *args = m.since_mark()
    if type(name) is not Global:
        raise RefusedError(f"calls a value of type {type(name).__name__}")
    m.stack.append(m.rules.reduce(m, name, tuple(args)))


def _proto(m: Machine) -> None:
    found = m.number(1)
    if found > MAX_PROTOCOL:
        raise RefusedError(f"is of pickle protocol {found}, and {MAX_PROTOCOL} is the last one known")


def _frame(m: Machine) -> None:
    if m.number(8) > len(m.data) - m.pos:
        m.take(len(m.data))


def _refuse(what: str) -> Opcode:
    def opcode(_: Machine) -> None:
        raise RefusedError(f"uses {what} in its pickle, which is not read here")

    return opcode


def _unknown(m: Machine) -> None:
    raise ValueError(f"opcode {m.data[m.pos - 1]:#04x} is unknown")


_OPCODES: dict[bytes, Opcode] = {
    b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False), b")": _constant(()),
    b"]": lambda m: m.stack.append([]), b"}": lambda m: m.stack.append({}), b"\x8f": lambda m: m.stack.append(set()),
    b"K": _binint1, b"M": _unsigned(2), b"J": _binint, b"\x8a": _long(1), b"\x8b": _long(4),
    b"I": _text_int, b"L": _text_int, b"F": _text_float, b"G": _binfloat,
    b"X": _binunicode, b"\x8c": _unicode(1), b"\x8d": _unicode(8), b"V": _text_unicode,
    b"T": _unicode(4), b"U": _unicode(1),
    b"B": _bytes(4), b"C": _bytes(1), b"\x8e": _bytes(8), b"\x96": _bytearray8,
    b"(": _mark, b"0": _pop, b"1": _pop_mark, b"2": _dup,
    b"h": _binget, b"j": _get(4), b"g": _text_get, b"q": _binput, b"r": _put(4), b"p": _text_put, b"\x94": _memoize,
    b"\x85": _tuple_of(1), b"\x86": _tuple_of(2), b"\x87": _tuple_of(3), b"t": _tuple, b"l": _list, b"d": _dict,
    b"\x91": _frozenset, b"a": _append, b"e": _appends, b"s": _setitem, b"u": _setitems, b"\x90": _additems,
    b"c": _global, b"\x93": _stack_global, b"R": _reduce, b"\x81": _newobj, b"\x92": _newobj_ex, b"i": _inst,
    b"o": _obj, b"b": Machine.build, b"Q": Machine.load_persistent, b"\x80": _proto, b"\x95": _frame,
    b"P": _refuse("a text persistent id"), b"S": _refuse("a quoted Python 2 string"),
    b"\x82": _refuse("an extension code"), b"\x83": _refuse("an extension code"), b"\x84": _refuse("an extension code"),
    b"\x97": _refuse("an out-of-band buffer"), b"\x98": _refuse("an out-of-band buffer"),
}  # fmt: skip

TABLE: tuple[Opcode, ...] = tuple(_OPCODES.get(bytes([code]), _unknown) for code in range(256))
