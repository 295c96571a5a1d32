"""What every format reader needs of the file system: open, size, digest, small JSON, and errors said in one way.

May import transform_ckpt.errors and the standard library only (xxhash inside the function).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transform_ckpt.errors import InputError, StorageError, TransformError


def storage_error(path: str, error: OSError, doing: str) -> TransformError:
    """An OSError as a message a user can act on: a missing file is bad input, everything else is storage."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return InputError(f"{path}: not found while {doing}: check the path")
    hints = {
        errno.EACCES: "give this user permission",
        errno.EPERM: "give this user permission",
        errno.ENOSPC: "free some space or choose another destination; the same command then continues",
        errno.EDQUOT: "the quota is used up: free some space; the same command then continues",
        errno.EROFS: "the file system is read-only: choose another destination",
        errno.EIO: "the device failed: check the disk or fetch the file again",
    }
    hint = hints.get(error.errno or 0, "")
    return StorageError(f"{path}: {reason} while {doing}" + (f": {hint}" if hint else ""))


@contextmanager
def open_binary(path: str, doing: str = "reading the header") -> Iterator[tuple[int, int]]:
    """File descriptor and size in bytes of a regular file, closed afterwards; errors name the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for its writer
    except OSError as error:
        raise storage_error(path, error, doing) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: is not a regular file but a device, FIFO or directory: give the file itself")
        yield fd, found.st_size
    except OSError as error:
        raise storage_error(path, error, doing) from None
    finally:
        os.close(fd)


def listing(path: str) -> list[str]:
    """Sorted names in a directory; StorageError or InputError where it cannot be listed."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise storage_error(path, error, "listing the directory") from None


def xxh3(*chunks: bytes) -> str:
    """XXH3-128 of the chunks in order, as 32 hexadecimal digits."""
    import xxhash

    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def write_json(path: str, content: Mapping[str, Any], indent: int | None = None) -> None:
    """A small file that readers see whole or not at all, even when several processes write it.  Raises OSError."""
    part = f"{path}.{os.urandom(4).hex()}.tmp"
    with open(part, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=indent) + "\n")
    os.replace(part, path)


def read_json(path: str) -> dict[str, Any]:
    """What `write_json` wrote; {} when it is not there, or no such thing."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
