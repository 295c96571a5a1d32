"""Lays out one .pt file of a destination: its tree, and which bytes of its storages are which box of which tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transform_ckpt import dtypes
from transform_ckpt.formats import TORCH
from transform_ckpt.formats.torch_values import TensorRef, new_tensor
from transform_ckpt.formats.torch_zip_write import root_of, skeleton
from transform_ckpt.tensors import Skeleton, TargetFile, TensorSpec, part_name, part_of
from transform_ckpt.views import Box, Shape


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a storage: a box of a logical tensor, from element `first` on."""

    logical: str
    box: Box
    first: int = 0


@dataclass(slots=True)
class TorchBuilder:
    """Gathers tensors of a file while its tree is built."""

    _parts: dict[str, tuple[str, Sequence[Part]]] = field(default_factory=dict)

    def tensor(self, dtype: str, shape: Shape, parts: Sequence[Part]) -> TensorRef:
        """A new tensor whose elements come from `parts`; what no part fills is zero."""
        key = f"t{len(self._parts)}"
        self._parts[key] = (dtype, parts)
        return new_tensor(key, dtype, shape)

    def file(self, relpath: str, tree: Any) -> TargetFile:
        """The file with this tree, which holds every tensor that was made."""
        made = skeleton(tree, root=root_of(relpath.rpartition("/")[2]))
        names = {record.key: record.name for record in made.records if record.key}
        specs: list[TensorSpec] = []
        boxes: dict[str, Box] = {}
        logical: dict[str, str] = {}
        places = {}
        for key, (dtype, parts) in self._parts.items():
            width = dtypes.itemsize(dtype)
            extents = made.skeleton.places[key]
            for part in parts:
                start, nbytes = part.first * width, part.box.numel * width
                if not nbytes:
                    continue
                whole = start == 0 and nbytes == extents[0].nbytes
                name = names[key] if whole else part_name(names[key], start, start + nbytes)
                specs.append(TensorSpec(name, dtype, part.box.size))
                boxes[name], logical[name] = part.box, part.logical
                places[name] = extents if whole else part_of(extents, start, nbytes)
        found = Skeleton(made.skeleton.nbytes, made.skeleton.chunks, places)
        storages = {key: made.skeleton.places[key][0] for key in names}
        return TargetFile(relpath, TORCH, found, tuple(specs), boxes, logical, storages, made.seal)
