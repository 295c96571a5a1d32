"""One file per on-disk format.  `CONTAINERS` are single files that hold tensors; directories have modules of their own.

A container module has FORMAT, SUFFIX, read_header(path) -> FileHeader and skeleton(specs, ...) -> Skeleton.
"""

from __future__ import annotations

from transform_ckpt.formats import ckpt, safetensors
from transform_ckpt.tensors import FileHeader

SUFFIXES = {ckpt.SUFFIX: ckpt.FORMAT, safetensors.SUFFIX: safetensors.FORMAT}
READERS = {ckpt.FORMAT: ckpt.read_header, safetensors.FORMAT: safetensors.read_header}


def container_of(path: str) -> str | None:
    """Container format by file name suffix, or None."""
    return next((code for suffix, code in SUFFIXES.items() if path.endswith(suffix)), None)


def read_header(path: str) -> FileHeader:
    """Header of one tensor file, whatever its container."""
    code = container_of(path)
    if code is None:
        from transform_ckpt.errors import InputError

        raise InputError(f"{path}: the name ends neither in {' nor in '.join(SUFFIXES)}: cannot tell its format")
    return READERS[code](path)
