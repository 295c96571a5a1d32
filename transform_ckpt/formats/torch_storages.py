"""Persistent ids of torch.save's pickles: each is a storage, by its key."""

from __future__ import annotations

from typing import Any

from transform_ckpt.formats.torch_machine import RefusedError
from transform_ckpt.formats.torch_values import BY_STORAGE, UNTYPED, Global, Storage

_UNTYPED_NAMES = {UNTYPED, f"_{UNTYPED}"}
MAX_STORAGE_NBYTES = 1 << 62


class Storages:
    """The storages that a pickle names; `load` is the machine's persistent_load.

    torch 2.13.0 torch/serialization.py `persistent_id`: ("storage", class, key, device, elements), and in the format
    before zip a sixth item, None, or a view into another storage (torch < 0.4).
    """

    def __init__(self, path: str, *, items: int = 5) -> None:
        self.path = path
        self.items = items
        self.found: dict[str, Storage] = {}

    def load(self, pid: Any) -> Storage:
        """The one storage of this persistent id."""
        if type(pid) is not tuple or len(pid) != self.items or pid[0] != "storage":
            raise RefusedError("holds a persistent id that is no storage")
        _, cls, key, location, numel = pid[:5]
        if [*map(type, pid[1:5])] != [Global, str, str, int] or not 0 <= numel < MAX_STORAGE_NBYTES:
            raise RefusedError("holds a persistent id that is no storage")
        if any(item is not None for item in pid[5:]):
            raise RefusedError("holds views of storages, as torch before 0.4 wrote them: load it and save it again")
        dtype, itemsize = _kind(cls)
        known = self.found.get(key)
        if known is None:
            known = self.found[key] = Storage(key, dtype, numel * itemsize, location)
        elif (known.dtype, known.nbytes) != (dtype, numel * itemsize):
            raise RefusedError(
                f"names storage {key:.80} as {known.nbytes:,} bytes of {known.dtype or 'any type'} and as others"
            )
        return known


def _kind(cls: Global) -> tuple[str, int]:
    """Dtype code and bytes per element of a storage class."""
    kind = BY_STORAGE.get(cls.name)
    if kind is not None and cls.module in {"torch", "torch.cuda"}:
        return kind.code, kind.itemsize
    if cls.name in _UNTYPED_NAMES and cls.module in {"torch", "torch.cuda", "torch.storage"}:
        return "", 1
    raise RefusedError(f"holds a storage of class {cls!s:.200}, which is not read here")
