"""The parameter names of the Transformer Engine spec, over megatron-core's own parallel layers.

Transformer Engine needs a GPU to be built.  What its layers add to a checkpoint: the norm inside the linear layer
behind it (registered before the weight: transformer_engine/pytorch/module/layernorm_linear.py), one weight an expert in
grouped experts, and down projections of latent attention that every tensor parallel rank holds whole.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityOp

from tests.megatron_real.case import Case


class NormedColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """TELayerNormColumnParallelLinear's parameters."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        own = dict(self._parameters)
        self._parameters.clear()
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size))
        self._parameters.update(own)


class DuplicatedLinear(torch.nn.Module):  # type: ignore[misc]
    """TELinear(parallel_mode="duplicated")'s parameter."""

    def __init__(self, input_size: int, output_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(output_size, input_size))


class GroupedExperts(torch.nn.Module):  # type: ignore[misc]
    """TEGroupedMLP's parameters: linear_fc1.weight{n}, linear_fc2.weight{n}, n from 0 on every rank."""

    def __init__(self, num_local_experts: int, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        parts = getattr(parallel_state, "get_expert_tensor_parallel_world_size", None)
        width = config.ffn_hidden_size // (parts or parallel_state.get_tensor_model_parallel_world_size)()
        rows = width * (2 if config.gated_linear_unit else 1)
        parallel = config.expert_model_parallel_size > 1
        self.linear_fc1 = _grouped(num_local_experts, (rows, config.hidden_size), axis=0, parallel=parallel)
        self.linear_fc2 = _grouped(num_local_experts, (config.hidden_size, width), axis=1, parallel=parallel)


def _grouped(count: int, shape: tuple[int, int], *, axis: int, parallel: bool) -> torch.nn.Module:
    group = torch.nn.Module()
    for number in range(count):
        weight: Any = torch.nn.Parameter(torch.zeros(shape))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)
        weight.allreduce = not parallel
        group.register_parameter(f"weight{number}", weight)
    return group


def rename(case: Case, layer: Any) -> None:
    """Turns a layer of the local spec into one with Transformer Engine's names."""
    parts = layer.submodules
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    if case.mla:
        from megatron.core.transformer import multi_latent_attention  # not in every version

        multi_latent_attention.TELinear = DuplicatedLinear
        multi_latent_attention.TEColumnParallelLinear = NormedColumnParallelLinear
        attention.linear_q_down_proj = attention.linear_kv_down_proj = DuplicatedLinear
        attention.linear_q_up_proj = attention.linear_kv_up_proj = NormedColumnParallelLinear
        attention.q_layernorm = attention.kv_layernorm = IdentityOp
    else:
        attention.linear_qkv = NormedColumnParallelLinear
        parts.input_layernorm = IdentityOp
    if hasattr(mlp, "linear_fc1"):
        mlp.linear_fc1 = NormedColumnParallelLinear
        parts.pre_mlp_layernorm = IdentityOp
    elif case.grouped:
        mlp.experts = GroupedExperts
