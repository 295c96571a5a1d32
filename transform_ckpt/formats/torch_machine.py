"""A pickle machine that cannot run anything: opcodes in, inert values out (torch_values).

`pickle.Unpickler` resolves names and calls what they give; this machine only looks them up in a table of builders
(torch_rules), so that nothing outside the table can be reached, whatever the opcodes say.  What it costs is bounded:
opcodes, bytes, integers, dictionary keys, memo, and what builders may copy (`Machine.charge`).

Opcodes: CPython 3.13 Lib/pickletools.py.  Refused: extension codes, out-of-band buffers, text persistent ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats.torch_values import EnumValue, Global

MAX_DEPTH = 1_000
"""Marks open at a time."""
MAX_INT_NBYTES = 1_024
MAX_INT_KEY = 1 << 60
"""Larger dictionary keys can be chosen so that all hash alike."""
MAX_KEY_ITEMS = 64

HINT = "the file is damaged or was cut off: fetch or save it again"
FAMILY = "*"
"""Key of a builder for every class of `Rules.families`."""
Builder = Callable[["Machine", Global, tuple[Any, ...]], Any]
State = Callable[["Machine", Any, Any], None]
Args = tuple[Any, ...]
Persistent = Callable[[Any], Any]


class TruncatedError(InputError):
    """The pickle goes on behind the bytes that were given."""


class RefusedError(Exception):
    """The pickle asks for something that is not built here; the message says what, without the path."""


@dataclass(frozen=True)
class Rules:
    """What a pickle may name and build, by "module.name"; torch_rules has the one for torch.save.

    `reduces` build func(*args), `news` build cls.__new__(cls, *args), `names` may appear as values only, `families`
    are top-level modules whose classes are taken as enums or as objects that keep their state; `states` take what
    BUILD gives to a value, by its type; `hints` say why something is refused.
    """

    reduces: Mapping[str, Builder]
    news: Mapping[str, Builder]
    names: frozenset[str]
    families: frozenset[str]
    states: Mapping[type, State]
    hints: Mapping[str, str]

    def admit(self, name: Global) -> None:
        """RefusedError where this name may not appear at all."""
        text = str(name)
        if text in self.reduces or text in self.news or text in self.names or self.is_family(name):
            return
        hint = self.hints.get(text, "nothing of it was run; a file of a source you trust can be loaded and saved again")
        raise RefusedError(f"refuses to build {text:.200} ({hint})")

    def is_family(self, name: Global) -> bool:
        """Whether this is a name of a training framework."""
        return name.module.partition(".")[0] in self.families

    def reduce(self, machine: Machine, name: Global, args: tuple[Any, ...]) -> Any:
        """The value of name(*args)."""
        return self._build(self.reduces, machine, name, args)

    def new(self, machine: Machine, name: Global, args: tuple[Any, ...]) -> Any:
        """The value of an object made without its constructor."""
        return self._build(self.news, machine, name, args)

    def _build(self, table: Mapping[str, Builder], machine: Machine, name: Global, args: tuple[Any, ...]) -> Any:
        build = table.get(str(name))
        if build is None and self.is_family(name):
            build = table.get(FAMILY)
        if build is None:
            raise RefusedError(f"refuses to call {name!s:.200}")
        return build(machine, name, args)


_ATOMS = frozenset({str, float, bool, bytes, type(None), Global, EnumValue, complex})
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "_io": "io"}
"""Modules that protocol 2 names as Python 2 did (CPython Lib/_compat_pickle.py), and an alias."""
_RENAMED_NAMES = {("builtins", "xrange"): "range", ("builtins", "long"): "int", ("builtins", "unicode"): "str"}


class Machine:
    """One pickle being read: stack, marks, memo, position."""

    __slots__ = ("budget", "data", "globals", "marks", "memo", "persistent", "pos", "rules", "stack", "where")

    def __init__(self, data: bytes, pos: int, where: str, rules: Rules, persistent: Persistent | None) -> None:
        self.data = data
        self.pos = pos
        self.where = where
        self.rules = rules
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.budget = len(data) - pos

    # ----------------------------------------------------------------------------------------------- reading bytes

    def take(self, nbytes: int) -> bytes:
        """The next bytes of the pickle."""
        start = self.pos
        self.pos = start + nbytes
        if self.pos > len(self.data):
            raise TruncatedError(f"{self.where}: the pickle ends within a value: {HINT}")
        return self.data[start : self.pos]

    def number(self, nbytes: int) -> int:
        """The next little-endian unsigned integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def line(self, limit: int = 1_024) -> bytes:
        """Bytes up to the next line feed, of which there are at most `limit`."""
        end = self.data.find(b"\n", self.pos, self.pos + limit)
        if end < 0:
            if self.pos + limit > len(self.data):
                raise TruncatedError(f"{self.where}: the pickle ends within a name: {HINT}")
            raise RefusedError(f"holds a line of more than {limit:,} bytes in its pickle")
        found = self.data[self.pos : end]
        self.pos = end + 1
        return found

    # -------------------------------------------------------------------------------------------- parts of opcodes

    def charge(self, items: int) -> None:
        """Count what a builder copies: all copies together may not exceed the pickle, or a short one fills memory."""
        self.budget -= items
        if self.budget < 0:
            raise RefusedError("copies the same values over and over: its pickle is made to fill memory")

    def since_mark(self) -> list[Any]:
        """The values since the last MARK, taken off the stack."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def key(self, value: Any) -> Any:
        """The value, if it may be a dictionary key: cheap to hash and to compare."""
        kind = type(value)
        if kind in _ATOMS or (kind is int and -MAX_INT_KEY < value < MAX_INT_KEY):
            return value
        if kind is tuple and _plain(value, MAX_KEY_ITEMS) >= 0:
            return value
        raise RefusedError(f"has a dictionary key or set member of type {kind.__name__}, or a very large one")

    def name(self, module: Any, name: Any) -> Global:
        """The one Global of this name, if it is admitted."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no text")
        found = self.globals.get((module, name))
        if found is None:
            real = _RENAMED.get(module, module)
            found = Global(real, _RENAMED_NAMES.get((real, name), name))
            self.rules.admit(found)
            self.globals[module, name] = found
        return found

    def call(self, build: Builder) -> None:
        """Replace a name and its arguments by what the builder makes of them."""
        args = self.stack.pop()
        name = self.stack[-1]
        if type(name) is not Global or type(args) is not tuple:
            raise RefusedError(f"calls a value of type {type(name).__name__} with a {type(args).__name__}")
        self.stack[-1] = build(self, name, args)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """SETITEMS: key, value, key, value ..."""
        if not isinstance(target, dict) or len(items) % 2:
            raise RefusedError(f"sets items of a {type(target).__name__}")
        for at in range(0, len(items), 2):
            key = items[at]
            target[key if type(key) is str else self.key(key)] = items[at + 1]

    def build(self) -> None:
        """BUILD: give the state on top to the value below."""
        state = self.stack.pop()
        target = self.stack[-1]
        take = self.rules.states.get(type(target))
        if take is None:
            raise RefusedError(f"sets the state of a {type(target).__name__}")
        take(self, target, state)

    def load_persistent(self) -> None:
        """BINPERSID: a storage."""
        if self.persistent is None:
            raise RefusedError("holds a persistent id where none belongs")
        self.stack[-1] = self.persistent(self.stack[-1])


def _plain(value: tuple[Any, ...], left: int) -> int:
    """Items left of the allowance after this tuple of atoms, negative where it has too many or others."""
    for item in value:
        left -= 1
        if type(item) is tuple and left > 0:
            left = _plain(item, left)
        elif type(item) not in _ATOMS and type(item) is not int:
            return -1
        if left < 0:
            return -1
    return left


def want(ok: object, name: Global) -> None:
    """RefusedError where a call has not the arguments that its writers give it."""
    if not ok:
        raise RefusedError(f"calls {name} with arguments that it never has")
