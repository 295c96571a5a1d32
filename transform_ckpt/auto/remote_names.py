"""Names of objects and of the local files they come from or become.

May import errors and formats.files.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from transform_ckpt.errors import InputError
from transform_ckpt.formats.files import storage_error

SCHEMES = ("obs://", "s3://")
"""How a bucket's URL begins (MindFormers 1.9.0 tools/utils.py, check_obs_url)."""


def check_name(name: str) -> None:
    """InputError unless `name` stays inside the directory it is joined to, here and on a local disk."""
    if not name or "\0" in name or any(part in {"", ".", ".."} for part in name.split("/")):
        raise InputError(
            f"{name!r}: is no name inside a directory: it must not be empty, begin or end with '/', or hold '.', '..' "
            "or an empty part"
        )


def local_files(root: str) -> list[str]:
    """Sorted names of the files below a local directory; InputError for links to directories."""

    def fail(error: OSError) -> None:
        raise storage_error(root, error, "listing the directory")

    found = []
    for folder, folders, files in os.walk(root, onerror=fail):
        for link in (os.path.join(folder, name) for name in folders):
            if os.path.islink(link):
                raise InputError(
                    f"{link}: is a link to a directory, which is not uploaded: replace it by the directory"
                )
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files]
    return sorted(found)


def discard(path: str) -> None:
    """Remove what an unfinished download left."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
