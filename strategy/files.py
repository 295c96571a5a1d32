"""Bytes of strategy files in and out, with errors that name the file.

Apart from the formats because what can go wrong with a path is the same for all of them: missing, unreadable, a tensor
checkpoint of many gigabytes given by mistake.  May import only transform_ckpt.errors and the standard library.
"""

from __future__ import annotations

import os
from contextlib import suppress

from transform_ckpt.errors import InputError, StorageError

_HEAD_NBYTES = 64 * 1024
_MAX_NBYTES = 1 << 30
"""About 100 bytes a parameter and stage: a strategy file of a gigabyte is something else."""


def read_bytes(path: str) -> bytes:
    """The whole file; InputError where there is none, it is empty, or its first bytes are another format's."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path}: is not a regular file but a device or FIFO; give the strategy file itself")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_NBYTES)
            check_kind(path, head)
            rest = file.read(_MAX_NBYTES)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file or directory; expected a strategy file or a directory of them"
        ) from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory; expected one strategy file") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(rest) == _MAX_NBYTES:
        raise InputError(f"{path}: larger than 1 GiB, so it is not a strategy file; give the strategy, not the weights")
    return head + rest


def check_kind(path: str, head: bytes) -> None:
    """InputError when the first bytes say that the file is empty or no strategy at all."""
    if not head:
        raise InputError(f"{path}: the file is empty; expected a MindSpore strategy file: write or copy it again")
    kind = _known_kind(head)
    if kind:
        raise InputError(
            f"{path}: this is {kind}, not a strategy file; give the file that the training run saved as its strategy"
        )


def _known_kind(head: bytes) -> str:
    """What other format the bytes are, or "" when they may be a strategy."""
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (a Torch checkpoint?)"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle (a Torch checkpoint?)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        return "a safetensors checkpoint"
    return "a MindSpore tensor checkpoint" if _is_tensor_ckpt(head) else ""


def _is_tensor_ckpt(head: bytes) -> bool:
    """True for `Checkpoint{ value{ tag: text, tensor|maptensor } }`; a strategy's field 1 is never length-delimited."""
    value, at = _length_after(head, 0)
    name, at = _length_after(head, at)
    if not 0 < name < value or at + name >= len(head):
        return False
    try:
        head[at : at + name].decode()
    except UnicodeDecodeError:
        return False
    return head[at + name] in (0x12, 0x1A)


def _length_after(head: bytes, at: int) -> tuple[int, int]:
    """Length of the length-delimited field 1 at `at` and where its content starts; (-1, at) where there is none."""
    if head[at : at + 1] != b"\x0a":
        return -1, at
    length = 0
    for digit in range(10):
        byte = head[at + 1 + digit : at + 2 + digit]
        if not byte:
            break
        length |= (byte[0] & 0x7F) << 7 * digit
        if byte[0] < 0x80:
            return length, at + 2 + digit
    return -1, at


def write_atomically(path: str, data: bytes) -> None:
    """Write the file so that no one ever sees a part of it, with the user's umask; replaces a read-only one.

    StorageError (its cause is the OSError) leaves what was there before.
    """
    directory, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(directory, f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        os.makedirs(directory, exist_ok=True)
        try:
            _write_new(temporary, data)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_directory(directory)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}; nothing was changed") from error


def _write_new(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: str) -> None:
    """Make the rename durable where the file system can; the file is complete either way."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
