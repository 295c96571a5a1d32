"""What may be replaced, how much room there is, and how a finished directory gets its name.

May import errors and formats.files.
"""

from __future__ import annotations

import errno
import os

from transform_ckpt.errors import UsageError
from transform_ckpt.formats.files import storage_error


def check_destination(dst: str, *, overwrite: bool) -> None:
    """UsageError when DST holds something that may not be replaced."""
    if not dst:
        raise UsageError("the destination is empty: name a directory")
    if not os.path.lexists(dst):
        above = os.path.dirname(os.path.abspath(dst))
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above):
            raise UsageError(f"{dst}: cannot be made, {above} is not a directory: choose another destination")
        return
    if not os.path.isdir(dst):
        kind = "a symbolic link to nothing" if os.path.islink(dst) and not os.path.exists(dst) else "a file"
        raise UsageError(f"{dst}: is {kind}; the destination must be a directory: choose another")
    if os.path.ismount(os.path.realpath(dst)):
        raise UsageError(f"{dst}: is a mount point, which cannot be replaced by the output: name a directory below it")
    try:
        occupied = os.listdir(dst)
    except OSError as error:
        raise storage_error(dst, error, "looking into the destination") from None
    if occupied and overwrite and (precious := _precious(os.path.realpath(dst), occupied)):
        raise UsageError(
            f"{dst}: is {precious}, which --overwrite does not replace: name the checkpoint's own directory"
        )
    if occupied and not overwrite:
        raise UsageError(
            f"{dst}: is not empty ({len(occupied)} entries): choose another destination, or add --overwrite to replace "
            "it once the new output is complete"
        )


def _precious(dst: str, occupied: list[str]) -> str | None:
    """What nobody means to lose to a typing error."""
    if dst == os.path.realpath(os.path.expanduser("~")):
        return "a home directory"
    if os.path.realpath(os.getcwd()).startswith(dst.rstrip(os.sep) + os.sep):
        return "a directory above the current one"
    return "a git checkout" if ".git" in occupied else None


def free_nbytes(dst: str) -> int:
    """Free space where DST is to be, in bytes."""
    folder = os.path.dirname(os.path.abspath(dst))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def give_name(path: str, dst: str) -> str | None:
    """Rename a directory over `dst`, in one step where the kernel can; returns where a full old `dst` is now."""
    if not os.path.isdir(dst) or not os.listdir(dst):
        os.rename(path, dst)
        return None
    old = unused_name(dst + ".replaced")
    if _exchange(path, dst):
        os.rename(path, old)
        return old
    os.rename(dst, old)
    try:
        os.rename(path, dst)
    except OSError:
        os.rename(old, dst)
        raise
    return old


def unused_name(path: str) -> str:
    """`path`, or with a number where something is there already."""
    found, number = path, 1
    while os.path.lexists(found):
        number += 1
        found = f"{path}.{number}"
    return found


def _exchange(one: str, other: str) -> bool:
    """Swap two names by renameat2(2): there is no moment without a `dst`.  False where that is not possible."""
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(function(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def check_not_inside(src: str, dst: str) -> None:
    """UsageError when writing to `dst` would write into the source, or replace it."""
    source, target = os.path.realpath(src), os.path.realpath(dst)
    if os.path.isdir(source) and (source == target or target.startswith(source + os.sep)):
        raise UsageError(f"{dst}: lies inside the source {src}: choose another destination")
    if source.startswith(target + os.sep):
        raise UsageError(f"{src}: lies inside the destination {dst}: choose another destination")


def write_small(path: str, data: bytes) -> None:
    """A small file, its directory made."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(data)
    except OSError as error:
        raise storage_error(path, error, "writing") from None


def fsync_tree(root: str) -> None:
    """Make every file and directory below `root` durable."""
    for folder, _, names in os.walk(root):
        for path in (*(os.path.join(folder, n) for n in names), folder):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise storage_error(path, error, "making it durable") from None
            finally:
                os.close(fd)
