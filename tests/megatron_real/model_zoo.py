"""Builds the model chunks of one rank: real GPTModels, or modules with the names Megatron-LM used before them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import transformer_config
from megatron.core.transformer.module import Float16Module

from tests.megatron_real import te_tree
from tests.megatron_real.case import Case
from tests.megatron_real.legacy_tree import LegacyModel
from tests.megatron_real.standins import NoAttention

_MLA = {"qk_head_dim": 4, "qk_pos_emb_head_dim": 4, "v_head_dim": 4, "kv_lora_rank": 8}


def known(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options a function or dataclass has; one that it lacks may only be off (None, 0 or False)."""
    if isinstance(function, type):
        names = {field.name for field in fields(function)}
    else:
        names = set(inspect.signature(function).parameters)
    lacking = sorted(name for name, value in options.items() if name not in names and value)
    if lacking:
        raise NotImplementedError(f"this megatron-core's {function.__name__} has no {', '.join(lacking)}")
    return {name: value for name, value in options.items() if name in names}


def _set(value: int | None) -> int | None:
    """1 as the None by which Megatron says "not"."""
    return None if value == 1 else value


def config(case: Case) -> Any:
    """TransformerConfig (or that of multi-latent attention) of a case."""
    options: dict[str, Any] = {
        "num_layers": case.layers,
        "hidden_size": case.hidden,
        "num_attention_heads": case.heads,
        "num_query_groups": case.kv_groups or case.heads,
        "ffn_hidden_size": case.ffn,
        "gated_linear_unit": case.gated,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": case.bias,
        "add_qkv_bias": case.qkv_bias,
        "normalization": case.norm,
        "qk_layernorm": case.qk_layernorm,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": _set(case.vpp),
        "context_parallel_size": case.cp,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.etp,
        "sequence_parallel": bool(case.experts) and case.tp > 1,
        "num_moe_experts": case.experts,
        "moe_shared_expert_intermediate_size": case.shared_ffn,
        "moe_grouped_gemm": case.grouped,
        "mtp_num_layers": case.mtp or None,
        "num_layers_in_first_pipeline_stage": case.first_stage_layers,
        "num_layers_in_last_pipeline_stage": case.last_stage_layers,
        "softmax_type": "learnable" if case.learned_softmax else None,
    }
    if case.dense_first:
        options["moe_layer_freq"] = [0] * case.dense_first + [1] * (case.layers - case.dense_first)
    if options["softmax_type"] is None:
        del options["softmax_type"]
    if not case.mla:
        return _construct(transformer_config.TransformerConfig, options)
    if not hasattr(transformer_config, "MLATransformerConfig"):
        raise NotImplementedError("this megatron-core has no multi-latent attention")
    options |= {**_MLA, "q_lora_rank": case.q_lora, "multi_latent_attention": True, "rope_type": "rope"}
    return _construct(transformer_config.MLATransformerConfig, options)


def _construct(kind: Any, options: dict[str, Any]) -> Any:
    return kind(**known(kind, options))


def build(case: Case) -> list[torch.nn.Module]:
    """This rank's chunks in bfloat16, wrapped as Megatron-LM's get_model does before the data-parallel wrapper."""
    settings = config(case)
    chunks = []
    for stage in range(case.vpp):
        if case.vpp > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunk = LegacyModel(case, settings, stage) if case.tree == "legacy" else _gpt(case, settings, stage)
        chunks.append(Float16Module(settings, chunk))
    if case.vpp > 1:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    return chunks


def ends(case: Case, stage: int) -> tuple[bool, bool]:
    """Whether a chunk of this rank is the model's first and its last."""
    pp = parallel_state.get_pipeline_model_parallel_rank()
    return (pp, stage) == (0, 0), (pp, stage) == (case.pp - 1, case.vpp - 1)


def _gpt(case: Case, settings: Any, stage: int) -> torch.nn.Module:
    first, last = ends(case, stage)
    vp_stage = stage if case.vpp > 1 else None
    spec = _spec(case, settings, vp_stage)
    options: dict[str, Any] = {
        "pre_process": first,
        "post_process": last,
        "share_embeddings_and_output_weights": case.tied,
        "position_embedding_type": "rope",
    }
    if "vp_stage" in inspect.signature(GPTModel).parameters:
        options["vp_stage"] = vp_stage
    if case.mtp:
        make = gpt_layer_specs.get_gpt_mtp_block_spec
        options["mtp_block_spec"] = make(settings, spec, use_transformer_engine=False, vp_stage=vp_stage)
    return GPTModel(settings, spec, vocab_size=case.vocab, max_sequence_length=8, **options)


def _spec(case: Case, settings: Any, vp_stage: int | None) -> Any:
    """The layers' specification: one for all, or one a layer where dense and expert layers are mixed."""
    if case.dense_first:
        options = {"use_transformer_engine": False, "normalization": case.norm, "vp_stage": vp_stage}
        block = gpt_layer_specs.get_gpt_decoder_block_spec
        spec = block(settings, **known(block, {k: v for k, v in options.items() if v is not None}))
        layers = spec.layer_specs
    else:
        options = {
            "num_experts": case.experts,
            "moe_grouped_gemm": case.grouped,
            "moe_use_legacy_grouped_gemm": case.grouped,
            "qk_layernorm": case.qk_layernorm,
            "multi_latent_attention": case.mla,
            "normalization": case.norm,
        }
        local = gpt_layer_specs.get_gpt_layer_local_spec
        optional = {"normalization", "moe_use_legacy_grouped_gemm"} - set(inspect.signature(local).parameters)
        spec = local(**known(local, {k: v for k, v in options.items() if k not in optional}))
        layers = [spec]
    for layer in layers:
        if case.tree == "te":
            te_tree.rename(case, layer)
        if case.mla or case.cp > 1:
            layer.submodules.self_attention.submodules.core_attention = NoAttention
    return spec
