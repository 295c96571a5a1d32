"""MindSpore's unified safetensors: part files, param_name_map.json, hyper_param.safetensors.  Lays them out.

As `mindspore.unified_safetensors` writes them (2.9.0 parallel/checkpoint_transform.py): ceil(GiB / 3) parts filled one
after the other, {"metadata": {"total_size": N}, "weight_map": {name: file}}, and the tensors that no strategy lays out
in hyper_param.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from transform_ckpt import dtypes
from transform_ckpt.formats import safetensors
from transform_ckpt.formats.mindspore_dir import HYPER_PARAM, PARAM_NAME_MAP
from transform_ckpt.states import is_state
from transform_ckpt.tensors import Logical, SmallFile, TargetFile, TensorSpec
from transform_ckpt.views import whole

PART_NBYTES = 3 * 1024**3


def lay_out_parts(
    params: Sequence[Logical], states: Sequence[Logical]
) -> tuple[tuple[TargetFile, ...], tuple[SmallFile, ...]]:
    """Part files of at most about `PART_NBYTES` each, the file of states where there are any, and the name map."""
    weights = [p for p in params if not is_state(p.name, p.dtype, p.shape)]
    rest = [*states, *(p for p in params if is_state(p.name, p.dtype, p.shape))]
    total = sum(_spec(p).nbytes for p in weights)
    files: list[TargetFile] = []
    weight_map: dict[str, str] = {}
    for number, members in enumerate(_split(weights, total)):
        name = f"part{number}.safetensors"
        weight_map |= {member.name: name for member in members}
        files.append(_file(name, members))
    if rest:
        files.append(_file(HYPER_PARAM, rest))
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return tuple(files), (SmallFile(PARAM_NAME_MAP, json.dumps(content, indent=4).encode()),)


def _split(weights: Sequence[Logical], total: int) -> list[list[Logical]]:
    count = max(1, -(-total // PART_NBYTES))
    parts: list[list[Logical]] = [[]]
    filled = 0
    for weight in weights:
        nbytes = _spec(weight).nbytes
        if parts[-1] and filled + nbytes > -(-total // count) and len(parts) < count:
            parts.append([])
            filled = 0
        parts[-1].append(weight)
        filled += nbytes
    return parts


def _spec(logical: Logical) -> TensorSpec:
    return TensorSpec(logical.name, logical.dtype, logical.shape)


def _file(name: str, members: Sequence[Logical]) -> TargetFile:
    texts = {m.name: m.pieces[0].tensor for m in members if m.dtype == dtypes.STRING}
    strings = {key: tensor.inline.decode("utf-32-le") for key, tensor in texts.items() if tensor.inline is not None}
    specs = tuple(_spec(m) for m in members if m.name not in texts)
    boxes = {spec.name: whole(spec.shape) for spec in specs}
    return TargetFile(name, safetensors.FORMAT, safetensors.skeleton(specs, {"format": "ms"}, strings), specs, boxes)
