"""Gives a file its full size before it is filled: fallocate(2), so that a full disk shows before the first byte.

Python's os.posix_fallocate emulates by writing where the file system cannot; the plain system call does not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cache

from transform_ckpt.formats.files import storage_error

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@cache
def _fallocate() -> Callable[[int, int], int] | None:
    """(fd, nbytes) -> errno, or None where the C library has no fallocate."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def call(fd: int, nbytes: int) -> int:
        return ctypes.get_errno() if function(fd, 0, 0, nbytes) != 0 else 0

    return call


def preallocate(fd: int, path: str, nbytes: int) -> None:
    """Reserve `nbytes`; where the file system cannot, only set the size."""
    if nbytes == 0:
        return
    call = _fallocate()
    code = call(fd, nbytes) if call is not None else errno.ENOSYS
    while code == errno.EINTR and call is not None:
        code = call(fd, nbytes)
    try:
        if code in _UNSUPPORTED:
            os.ftruncate(fd, nbytes)
        elif code:
            raise OSError(code, os.strerror(code))
    except OSError as error:
        raise storage_error(path, error, f"reserving {nbytes:,} bytes") from None
