"""Which boxes of which logical parameter a live parameter holds: read from what Megatron's own modules say.

Layer numbers come from `layer_number`, cuts over tensor parallel ranks from `partition_dim`; only what no attribute
says (gated halves, grouped experts, softmax offsets of heads, the tied head's name) goes by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from tests.megatron_real.case import Case
from tests.megatron_real.logical import Box, Cut

_LAYER = re.compile(r"^(?:module\.)?((?:decoder|language_model\.encoder)\.layers)\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")
_TIED_HEADS = {
    "output_layer.weight": "embedding.word_embeddings.weight",
    "word_embeddings.weight": "language_model.embedding.word_embeddings.weight",
}
_OF_HEADS = ".softmax_offset"
"""One element a head; megatron-core says so only where it saves it (DotProductAttention.sharded_state_dict)."""
_GATED = re.compile(r"\.(?:linear_fc1|dense_h_to_4h)\.(?:weight\d*|bias)$")


def named_cuts(case: Case, chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, Cut]]:
    """Every parameter of a chunk (a Float16Module) by its stored name, which begins with "module."."""
    for name, parameter in chunk.named_parameters():
        yield name, parameter, _cut(case, chunk, name, parameter)


def _cut(case: Case, chunk: torch.nn.Module, name: str, parameter: Any) -> Cut:
    logical = _logical_name(case, chunk, name)
    if name.endswith(("experts.weight1", "experts.weight2")):
        return _grouped(case, logical, second=name.endswith("2"))
    shape = tuple(parameter.shape)
    parts, rank = _split(case, name)
    of_heads = name.endswith(_OF_HEADS)
    if parts == 1 or not (of_heads or getattr(parameter, "tensor_model_parallel", False)):
        return Cut(logical, shape, (tuple((0, length) for length in shape),))
    axis: int = 0 if of_heads else parameter.partition_dim
    whole = tuple(length * parts if dim == axis else length for dim, length in enumerate(shape))
    bands = 2 if case.gated and _GATED.search(name) else 1
    return Cut(logical, whole, tuple(_band(whole, axis, bands, band, parts, rank) for band in range(bands)))


def _band(whole: tuple[int, ...], axis: int, bands: int, band: int, parts: int, rank: int) -> Box:
    """Part `rank` of one of the equal bands of an axis."""
    length = whole[axis] // bands // parts
    start = band * (whole[axis] // bands) + rank * length
    return tuple((start, start + length) if dim == axis else (0, size) for dim, size in enumerate(whole))


def _split(case: Case, name: str) -> tuple[int, int]:
    """Over how many ranks a parameter may be cut, and this rank among them."""
    if ".experts." not in name:
        return case.tp, parallel_state.get_tensor_model_parallel_rank()
    get = getattr(parallel_state, "get_expert_tensor_parallel_rank", parallel_state.get_tensor_model_parallel_rank)
    return case.expert_tp, get()


def _logical_name(case: Case, chunk: torch.nn.Module, name: str) -> str:
    logical = name.removeprefix("module.")
    if case.tied and logical in _TIED_HEADS:
        return _TIED_HEADS[logical]
    if found := _LAYER.match(name):
        layer = chunk.get_submodule(f"module.{found[1]}.{found[2]}")
        logical = logical.replace(f"{found[1]}.{found[2]}.", f"{found[1]}.{layer.layer_number - 1}.", 1)
    if found := _EXPERT.search(logical):
        number = int(found[0]) + _first_expert(case)
        logical = f"{logical[: found.start()]}{number}{logical[found.end() :]}"
    return logical


def _first_expert(case: Case) -> int:
    """The global number of this rank's expert 0."""
    return int(parallel_state.get_expert_model_parallel_rank()) * ((case.experts or 0) // case.ep)


def _grouped(case: Case, logical: str, *, second: bool) -> Cut:
    """GroupedMLP: memory is expert by expert, [n, H, (2,) F/etp] or [n, F/etp, H], whatever the stored shape says."""
    experts = case.experts or 0
    first = _first_expert(case)
    parts, rank = _split(case, logical)
    part = case.ffn // parts
    held, width = (first, first + experts // case.ep), (rank * part, (rank + 1) * part)
    hidden = (0, case.hidden)
    if second:
        return Cut(logical, (experts, case.ffn, case.hidden), ((held, width, hidden),))
    if not case.gated:
        return Cut(logical, (experts, case.hidden, case.ffn), ((held, hidden, width),))
    return Cut(logical, (experts, case.hidden, 2, case.ffn), ((held, hidden, (0, 2), width),))
