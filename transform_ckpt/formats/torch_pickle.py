"""Reads a pickle of torch.save without running any of it: bytes in, inert values out."""

from __future__ import annotations

import struct
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats.torch_machine import HINT, Machine, Persistent, RefusedError, Rules, TruncatedError
from transform_ckpt.formats.torch_opcodes import STOP, TABLE
from transform_ckpt.formats.torch_rules import RULES

MAX_NBYTES = 1 << 28
MAX_OPCODES = 20_000_000


def loads(
    data: bytes, where: str, *, persistent: Persistent | None = None, pos: int = 0, rules: Rules = RULES
) -> tuple[Any, int]:
    """The value of the pickle that starts at `pos`, and where it ends.

    TruncatedError where it goes on behind the data, InputError for everything else that is wrong; both begin with
    `where`.  `persistent` turns a persistent id into a value.
    """
    if len(data) - pos > MAX_NBYTES:
        raise InputError(f"{where}: its pickle has {len(data) - pos:,} bytes, more than {MAX_NBYTES:,}: not read")
    machine = Machine(data, pos, where, rules, persistent)
    try:
        for _ in range(MAX_OPCODES):
            at = machine.pos
            machine.pos = at + 1
            code = data[at]
            if code == STOP:
                (value,) = machine.stack
                if machine.marks:
                    raise ValueError("a mark is left")
                return value, machine.pos
            TABLE[code](machine)
        raise RefusedError(f"has more than {MAX_OPCODES:,} opcodes in its pickle")
    except RefusedError as error:
        raise InputError(f"{where}: {error}") from None
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error) as error:
        if machine.pos >= len(data):
            raise TruncatedError(f"{where}: the pickle ends without its last opcode: {HINT}") from None
        raise InputError(f"{where}: the pickle is wrong at byte {at - pos:,} ({error!s:.200}): {HINT}") from None
