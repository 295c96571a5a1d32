"""One file per on-disk format.  `CONTAINERS` are single files that hold tensors; directories have modules of their own.

A container module has FORMAT, SUFFIX, read_header(path) -> FileHeader and skeleton(specs, ...) -> Skeleton.
"""

from __future__ import annotations

from transform_ckpt.errors import InputError
from transform_ckpt.formats import ckpt, safetensors
from transform_ckpt.tensors import FileHeader

SUFFIXES = {ckpt.SUFFIX: ckpt.FORMAT, safetensors.SUFFIX: safetensors.FORMAT}
"""Of what MindSpore reads as a checkpoint."""
TORCH_SUFFIX, TORCH = ".pt", "torch"
FORMATS = frozenset((*SUFFIXES.values(), TORCH))


def container_of(path: str) -> str | None:
    """MindSpore container by file name suffix, or None."""
    return next((code for suffix, code in SUFFIXES.items() if path.endswith(suffix)), None)


def format_of(path: str) -> str | None:
    """Format of a file that holds tensors, of whatever framework, by its name; or None."""
    return TORCH if path.endswith(TORCH_SUFFIX) else container_of(path)


def read_header(path: str) -> FileHeader:
    """Header of one tensor file, whatever its container."""
    code = format_of(path)
    if code == ckpt.FORMAT:
        return ckpt.read_header(path)
    if code == safetensors.FORMAT:
        return safetensors.read_header(path)
    if code == TORCH:
        from transform_ckpt.formats import torch_zip  # not needed, and not loaded, where there is none

        return torch_zip.read_header(path)
    raise InputError(f"{path}: the name ends neither in {' nor in '.join(SUFFIXES)}: cannot tell its format")
