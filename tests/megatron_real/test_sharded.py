"""The harness's logical model is Megatron's: same global tensors as in its sharded_state_dict of 0.16.1."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.megatron_real import logical
from tests.megatron_real.case import Case
from tests.megatron_real.environments import Unavailable, environment
from tests.megatron_real.logical import Array
from tests.megatron_real.oracle import generate, stored_truth

MOE = Case(experts=4, ep=2, dp=2)
CASES = {
    "dense": Case(tp=2, pp=2, vpp=2, layers=8, bias=True, qkv_bias=True, norm="LayerNorm"),
    "plain_mlp": Case(tp=2, gated=False, kv_groups=2),
    "tied": Case(tp=2, pp=2, tied=True),
    "uneven": Case(pp=3, layers=5, first_stage_layers=1, last_stage_layers=2),
    "moe": replace(MOE, tp=2, pp=2, dense_first=1, shared_ffn=8),
    "moe_etp1": replace(MOE, tp=2, etp=1, dp=4),
    "grouped": replace(MOE, tp=2, grouped=True),
    "latent": Case(mla=True, tp=2, pp=2, qk_layernorm=True, mtp=1),
}
# In homogeneous local models the norms are saved by Transformer Engine's names.
RENAMED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


def assemble(case: Case) -> dict[str, Array]:
    """Whole tensors by Megatron's keys, from what each rank says of its own."""
    wholes: dict[str, Array] = {}
    ranks = environment(case.version).call({"job": "global_pieces", "case": case.to_json(), "directory": "/"})
    for key, whole, offset, shape, values in (piece for rank in ranks for piece in rank):
        view = wholes.setdefault(key, np.full(whole, np.nan, np.float32))[
            tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        ]
        piece = np.array(values, np.float32).reshape(view.shape)
        assert np.isnan(view).all() or np.array_equal(view, piece), f"{key}: replicas differ"
        view[...] = piece
    return wholes


def look_up(wholes: dict[str, Array], name: str) -> Array:
    """Megatron's tensor for a logical name: layer and expert numbers may be leading axes instead."""
    for key in (name, _rename(name)):
        for found, index in _spellings(key):
            if found in wholes:
                return np.asarray(wholes[found][index])
    raise KeyError(f"{name}: not among {sorted(wholes)}")


def _rename(name: str) -> str:
    for local, fused in RENAMED:
        name = name.replace(local, fused)
    return name


def _spellings(name: str) -> list[tuple[str, tuple[int, ...]]]:
    index: tuple[int, ...] = ()
    if found := re.search(r"\.local_experts\.(\d+)\.", name):
        name, index = name.replace(found[0], ".experts."), (int(found[1]),)
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return [(name, index)]
    return [(name, index), (name.replace(layer[0], "decoder.layers."), (int(layer[1]), *index))]


def as_saved(name: str, whole: Array) -> tuple[str, Array]:
    """Grouped experts, by expert and in memory order, as the ordinary expert weights they are saved as."""
    if name.endswith("experts.weight1"):
        experts, hidden = whole.shape[:2]
        return name.replace("weight1", "experts.linear_fc1.weight"), whole.reshape(experts, hidden, -1).swapaxes(1, 2)
    if name.endswith("experts.weight2"):
        return name.replace("weight2", "experts.linear_fc2.weight"), whole.swapaxes(1, 2)
    return name, whole


@pytest.mark.megatron
@pytest.mark.parametrize("name", CASES)
def test_logical_parameters_are_megatrons_global_tensors(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    try:
        wholes = assemble(case)
    except Unavailable as reason:
        pytest.skip(str(reason))
    shapes = {cut.logical: cut.shape for _, cut, _ in stored_truth(generate(case, tmp_path))}
    for parameter, shape in shapes.items():
        key, expected = as_saved(parameter, logical.initial(parameter, shape))
        assert look_up(wholes, key).tobytes() == expected.tobytes(), parameter
    assert sum(whole.size for whole in wholes.values()) == sum(int(np.prod(shape)) for shape in shapes.values())
