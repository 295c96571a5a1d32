"""Writes Python's own values as a pickle of protocol 2, byte for byte as CPython does for the same objects.

What is followed: CPython 3.11 Modules/_pickle.c: order and memo of every opcode, batches of 1,000; an exact dict of a
multiple of 1,000 items ends in an empty batch.  Strings are shared where they are the same object, as there; which
single characters CPython shares depends on how they came to be, so their memo entries may differ.  Members of a set
are written in a fixed order, not in that of a hash table.  torch_pickler adds what is torch's.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transform_ckpt.errors import PlanError
from transform_ckpt.formats.torch_values import DefaultDict, Global

MAX_DEPTH = 100
BATCH = 1_000
_RENAMED = {"builtins": "__builtin__", "copyreg": "copy_reg", "io": "_io"}
_RENAMED_NAMES = {("builtins", "range"): "xrange", ("builtins", "int"): "long", ("builtins", "str"): "unicode"}
"""Names of Python 2, which protocol 2 uses (CPython Lib/_compat_pickle.py)."""
STORAGE, CPU, LATIN1 = "storage", "cpu", "latin1"
_INTERNED = frozenset({STORAGE, CPU, LATIN1})
"""Constants of torch and CPython: one object wherever they appear, so one memo entry."""
Made = TypeVar("Made")
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


class PlainPickler:
    """Writes one tree of the types in `writers`."""

    writers: Mapping[type, Callable[[Any, Any], None]]
    """How each exact type is written."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[Any, int] = {}
        self.count = 0
        self.depth = 0
        self.open: set[int] = set()
        self.kept: list[Any] = []

    def dump(self, tree: Any) -> bytes:
        """The pickle of a tree; PlanError where it holds what is never written."""
        self.save(tree)
        self.out += b"."
        return bytes(self.out)

    # -------------------------------------------------------------------------------------------------- foundation

    def save(self, value: Any) -> None:
        """One value of any type that is known here."""
        write = self.writers.get(type(value))
        if write is None:
            kind = str(value.kind) if hasattr(value, "kind") else type(value).__name__
            raise PlanError(f"a torch file to be written holds a {kind}, and values of that class are never written")
        write(self, value)

    def put(self, key: Any = None) -> None:
        """Memoize the value just written; without a key nothing refers to it again."""
        if key is not None:
            self.memo[key] = self.count
        self.out += b"q%c" % self.count if self.count < 256 else b"r" + self.count.to_bytes(4, "little")
        self.count += 1

    def keep(self, value: Made) -> Made:
        """A value made here: kept, or the next one may have its id and be taken for it."""
        self.kept.append(value)
        return value

    def got(self, key: Any) -> bool:
        """Write a reference, if the value was memoized."""
        at = self.memo.get(key)
        if at is not None:
            self.out += b"h%c" % at if at < 256 else b"j" + at.to_bytes(4, "little")
        return at is not None

    def nested(self, value: Any, write: Callable[[], None]) -> None:
        """Write the content of a container; a tuple that contains itself is not written, nor what nests too deep."""
        if id(value) in self.open or self.depth >= MAX_DEPTH:
            raise PlanError(f"a torch file to be written holds a value that contains itself or nests {MAX_DEPTH} deep")
        self.open.add(id(value))
        self.depth += 1
        write()
        self.depth -= 1
        self.open.remove(id(value))

    def name(self, module: str, name: str) -> None:
        """GLOBAL; a nested class is getattr(outer, inner) in protocol 2."""
        if self.got((module, name)):
            return
        outer, dot, inner = name.rpartition(".")
        if dot:
            self.name("builtins", "getattr")
            self.name(module, outer)
            self.save(inner)
            self.out += b"\x86"
            self.put()
            self.out += b"R"
            return
        real = _RENAMED_NAMES.get((module, name), name)
        self.out += b"c" + _RENAMED.get(module, module).encode() + b"\n" + real.encode() + b"\n"
        self.put((module, name))

    def values(self, *items: Any) -> None:
        """A tuple that nothing else refers to."""
        self._tuple_of(items)
        if items:
            self.put()

    def _tuple_of(self, items: tuple[Any, ...]) -> None:
        if len(items) > 3:
            self.out += b"("
        for item in items:
            self.save(item)
        self.out += _TUPLES.get(len(items), b"t") if items else b")"

    def reduce(self, key: Any, module: str, name: str, *args: Any) -> None:
        """name(*args), memoized under the key."""
        self.name(module, name)
        self.values(*args)
        self.out += b"R"
        self.put(key)

    # ----------------------------------------------------------------------------------------------- plain values

    def integer(self, value: int) -> None:
        """The shortest of BININT1, BININT2, BININT, LONG1 and LONG4."""
        if 0 <= value < 1 << 8:
            self.out += b"K%c" % value
        elif 0 <= value < 1 << 16:
            self.out += b"M" + value.to_bytes(2, "little")
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + value.to_bytes(4, "little", signed=True)
        else:
            raw = value.to_bytes((value.bit_length() >> 3) + 1, "little", signed=True)
            if value < 0 and raw[-1] == 0xFF and raw[-2] & 0x80:
                raw = raw[:-1]
            length = b"\x8a%c" % len(raw) if len(raw) < 256 else b"\x8b" + len(raw).to_bytes(4, "little")
            self.out += length + raw

    def text(self, value: str) -> None:
        """BINUNICODE."""
        key = value if value in _INTERNED else id(value)
        if not self.got(key):
            raw = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + len(raw).to_bytes(4, "little") + raw
            self.put(key)

    def raw(self, value: bytes) -> None:
        """Bytes, which protocol 2 writes as _codecs.encode(text, "latin1")."""
        if self.got(id(value)):
            return
        if value:
            self.name("_codecs", "encode")
            text = value.decode("latin-1")
            self.save(text) if len(text) == 1 else self._fresh_text(text)
            self.save(LATIN1)
            self.out += b"\x86"
            self.put()
            self.out += b"R"
            self.put(id(value))
        else:
            self.reduce(id(value), "builtins", "bytes")

    def _fresh_text(self, text: str) -> None:
        raw = text.encode()
        self.out += b"X" + len(raw).to_bytes(4, "little") + raw
        self.put()

    # -------------------------------------------------------------------------------------------------- containers

    def write_tuple(self, value: tuple[Any, ...]) -> None:
        """EMPTY_TUPLE, TUPLE1 to TUPLE3, TUPLE."""
        if not value:
            self.out += b")"
        elif not self.got(id(value)):
            self.nested(value, lambda: self._tuple_of(value))
            self.put(id(value))

    def write_list(self, value: list[Any]) -> None:
        """EMPTY_LIST, then APPEND or batches of APPENDS."""
        if self.got(id(value)):
            return
        self.out += b"]"
        self.put(id(value))
        self.nested(value, lambda: self._append(value))

    def _append(self, items: list[Any]) -> None:
        if len(items) == 1:
            self.save(items[0])
            self.out += b"a"
            return
        for start in range(0, len(items), BATCH):
            self.out += b"("
            for item in items[start : start + BATCH]:
                self.save(item)
            self.out += b"e"

    def write_dict(self, value: dict[Any, Any]) -> None:
        """EMPTY_DICT, then SETITEM or batches of SETITEMS."""
        if self.got(id(value)):
            return
        self.out += b"}"
        self.put(id(value))
        self.nested(value, lambda: self._set(value))
        if value and len(value) % BATCH == 0:
            self.out += b"(u"

    def _set(self, items: dict[Any, Any]) -> None:
        pairs = list(items.items())
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            many = len(batch) > 1 or (type(items) is dict and start > 0)
            self.out += b"(" * many
            for key, item in batch:
                self.save(key)
                self.save(item)
            self.out += b"u" if many else b"s"

    def ordered(self, value: OrderedDict[Any, Any]) -> None:
        """OrderedDict(), its items, its attributes (`_metadata` of a state_dict)."""
        if not self.got(id(value)):
            self.reduce(id(value), "collections", "OrderedDict")
            self.nested(value, lambda: self._set(value))
            self.state(value.__dict__ or None)

    def default(self, value: DefaultDict) -> None:
        """defaultdict(factory) and its items."""
        if not self.got(id(value)):
            factory = () if value.factory is None else (value.factory,)
            self.reduce(id(value), "collections", "defaultdict", *factory)
            self.nested(value, lambda: self._set(value))

    def members(self, value: set[Any] | frozenset[Any]) -> None:
        """set([...]) or frozenset([...])."""
        if not self.got(id(value)):
            items = sorted(value, key=lambda item: (type(item).__name__, item if type(item) is int else 0, repr(item)))
            self.reduce(id(value), "builtins", type(value).__name__, self.keep(items))

    def state(self, state: Any) -> None:
        """BUILD, unless there is no state."""
        if state is not None:
            self.save(state)
            self.out += b"b"

    def new(self, key: Any, kind: Global, state: Any) -> None:
        """cls.__new__(cls) and its state."""
        self.save(kind)
        self.out += b")\x81"
        self.put(key)
        self.state(state)


def _double(pickler: PlainPickler, value: float) -> None:
    pickler.out += b"G" + struct.pack(">d", value)


def _bool(pickler: PlainPickler, value: Any) -> None:
    pickler.out += b"\x88" if value else b"\x89"


def _none(pickler: PlainPickler, _: None) -> None:
    pickler.out += b"N"


PLAIN: dict[type, Callable[[Any, Any], None]] = {
    type(None): _none,
    bool: _bool,
    int: PlainPickler.integer,
    float: _double,
    str: PlainPickler.text,
    bytes: PlainPickler.raw,
    complex: lambda p, v: p.reduce(id(v), "builtins", "complex", v.real, v.imag),
    range: lambda p, v: p.reduce(id(v), "builtins", "range", v.start, v.stop, v.step),
    slice: lambda p, v: p.reduce(id(v), "builtins", "slice", v.start, v.stop, v.step),
    bytearray: lambda p, v: p.reduce(id(v), "builtins", "bytearray", *([p.keep(bytes(v))] if v else [])),
    tuple: PlainPickler.write_tuple,
    list: PlainPickler.write_list,
    dict: PlainPickler.write_dict,
    OrderedDict: PlainPickler.ordered,
    DefaultDict: PlainPickler.default,
    set: PlainPickler.members,
    frozenset: PlainPickler.members,
    Global: lambda p, v: p.name(v.module, v.name),
}
PlainPickler.writers = PLAIN
