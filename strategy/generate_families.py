"""The model families that strategies can be generated for: one row each, and what each key may be called.

Defaults are those of MindFormers 1.9.0's configuration classes (models/*/configuration_*.py with
`register_mf_model_parameter`, models/llama/llama_config.py), which hold where neither YAML nor config.json says
otherwise; structure is that of models/*/modeling_*_train.py.  Qwen2, GLM4 and GLM4-MoE have no training network there:
their rows follow the same rules and are said to be unconfirmed.  May import nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embed"),
    "heads": ("num_attention_heads", "num_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "num_query_groups", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "ffn": ("intermediate_size", "ffn_hidden_size"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "sequence": ("seq_length",),
    "positions": ("max_position_embeddings",),
    "position_type": ("position_embedding_type", "extend_method"),
    "tied": ("tie_word_embeddings",),
    "gated": ("gated_linear_unit",),
    "norm": ("normalization",),
    "sandwich_norm": ("sandwich_norm",),
    "qk_norm": ("qk_layernorm", "use_qk_norm"),
    "qkv_bias": ("attention_bias", "add_qkv_bias", "qkv_has_bias"),
    "linear_bias": ("add_bias_linear",),
    "track_logits": ("track_max_attention_logit",),
    "mla_concat": ("mla_qkv_concat",),
    "q_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
    "nope": ("qk_nope_head_dim", "qk_head_dim"),
    "rope": ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    "value": ("v_head_dim",),
    "experts": ("n_routed_experts", "num_experts", "num_moe_experts", "expert_num", "num_local_experts"),
    "expert_ffn": ("moe_intermediate_size", "moe_ffn_hidden_size"),
    "shared_experts": ("n_shared_experts", "shared_expert_num"),
    "shared_ffn": ("moe_shared_expert_intermediate_size",),
    "shared_gate": ("use_shared_expert_gating",),
    "dense_layers": ("first_k_dense_replace",),
    "expert_layers": ("moe_layer_freq",),
    "expert_bias": ("moe_router_enable_expert_bias", "balance_via_topk_bias"),
    "balance": ("moe_router_load_balancing_type",),
    "router_dtype": ("router_dense_type", "moe_router_dtype"),
    "mtp": ("num_nextn_predict_layers", "mtp_num_layers", "mtp_depth"),
    "dtype": ("params_dtype", "param_init_type"),
    "norm_dtype": ("layernorm_compute_type",),
    "embedding_dtype": ("embedding_init_type",),
    "qkv_concat": ("qkv_concat",),
    "proj_bias": ("attn_proj_has_bias",),
    "mlp_concat": ("mlp_concat",),
    "grouped": ("multi_query_attention",),
    "rms_norm": ("rmsnorm",),
    "post_attention_norm": ("post_self_attn_layernorm",),
    "post_mlp_norm": ("post_mlp_layernorm",),
    "multiple_of": ("multiple_of",),
    "ffn_multiplier": ("ffn_dim_multiplier",),
    "offset": ("offset",),
    "interleave": ("pp_interleave_num", "virtual_pipeline_model_parallel_size"),
    "embedding_opt": ("parallel_optimizer",),
    "flat_norm": ("rmsnorm_compute_2d",),
}
"""What this package calls a key -> its spellings, the one to name in messages first."""

CANONICAL: Mapping[str, str] = {spelling: key for key, spellings in SPELLINGS.items() for spelling in spellings}


@dataclass(frozen=True, slots=True)
class Family:
    """One family.  `needs` are sizes that must be given: a class's default would be some other model's."""

    naming: str
    needs: tuple[str, ...] = ("layers", "hidden", "vocab")
    defaults: Mapping[str, Any] = field(default_factory=dict)
    mla: bool = False
    block: bool = False
    """Built layer by layer, dense ones and ones with experts; else all layers are alike."""
    mtp: tuple[str, ...] = ()
    """Keys that MTP layers are asked for with; config_converter_*.py passes no others on."""
    has_experts: bool = False
    qk_norm: bool | None = None
    """Whether q and k are always normalized; None = as configured."""
    ties: bool = False
    """Whether tie_word_embeddings shares the output layer's weight."""
    note: str = ""
    """What is not confirmed about it."""


_COMMON = {"norm": "RMSNorm", "linear_bias": False, "gated": True, "dtype": "float32"}
_QWEN3 = {**_COMMON, "heads": 32, "kv_heads": 32, "head_dim": 128, "ffn": 22016}
_QWEN3_MOE = {**_COMMON, "heads": 32, "kv_heads": 4, "ffn": 6144, "experts": 128, "expert_ffn": 768}
_MLA_SIZES = {"q_rank": 1536, "kv_rank": 512, "nope": 128, "rope": 64, "value": 128}
_DEEPSEEK = {
    **_COMMON, **_MLA_SIZES, "heads": 128, "kv_heads": 128, "ffn": 18432, "experts": 256, "expert_ffn": 2048,
    "shared_experts": 1, "dense_layers": 3, "mtp": 1, "expert_bias": True,
}  # fmt: skip
_TELECHAT3_MOE = {
    **_COMMON, **_MLA_SIZES, "heads": 32, "kv_heads": 32, "ffn": 7680, "experts": 192, "expert_ffn": 1536,
    "shared_experts": 1, "dense_layers": 3, "mtp": 1, "expert_bias": True,
}  # fmt: skip
_GLM4 = {**_COMMON, "heads": 32, "kv_heads": 2, "head_dim": 128, "ffn": 13696, "qkv_bias": True, "sandwich_norm": True}
_GLM4_MOE = {
    **_COMMON, "heads": 96, "kv_heads": 8, "ffn": 10944, "experts": 128, "expert_ffn": 1408, "shared_experts": 1,
    "dense_layers": 1, "expert_bias": True,
}  # fmt: skip
_MTP = ("num_nextn_predict_layers", "mtp_num_layers")
_NO_TRAINING = "MindFormers 1.9.0 has no training network of this family: its layouts are unconfirmed"
_UNSEEN = "no strategy file of this family has been compared: its layouts are unconfirmed"
_GLM2 = {
    "kv_heads": 2, "head_dim": 128, "ffn": 13696, "dtype": "float16", "norm_dtype": "float32", "qkv_concat": True,
    "mlp_concat": True, "qkv_bias": True, "linear_bias": False, "grouped": True, "rms_norm": True,
}  # fmt: skip
_LLAMA = {"dtype": "float16", "norm_dtype": "float32", "multiple_of": 256}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("legacy", ("layers", "hidden", "heads", "vocab"), _LLAMA, ties=True),
    "chatglm2": Family("legacy GLM", ("layers", "hidden", "heads", "vocab"), _GLM2, note=_UNSEEN),
    "qwen3": Family("mcore", defaults=_QWEN3, qk_norm=True, ties=True),
    "qwen3_moe": Family("mcore", defaults=_QWEN3_MOE, has_experts=True, qk_norm=True, ties=True),
    "deepseek_v3": Family("mcore", defaults=_DEEPSEEK, mla=True, block=True, mtp=_MTP, has_experts=True),
    "telechat3": Family("mcore", defaults=_QWEN3, block=True, mtp=_MTP[1:], has_experts=True),
    "telechat3_moe": Family("mcore", defaults=_TELECHAT3_MOE, mla=True, block=True, mtp=_MTP, has_experts=True),
    "qwen2": Family("mcore", defaults={**_QWEN3, "head_dim": None, "qkv_bias": True}, ties=True, note=_NO_TRAINING),
    "glm4": Family("mcore", defaults=_GLM4, ties=True, note=_NO_TRAINING),
    "glm4_moe": Family("mcore", defaults=_GLM4_MOE, block=True, has_experts=True, ties=True, note=_NO_TRAINING),
}

MCORE_NAMES: Mapping[str, str] = {
    **{name: name for name, family in FAMILIES.items() if family.naming == "mcore"},
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "TeleChat3ForCausalLM": "telechat3",
    "TeleChat3MoeForCausalLM": "telechat3_moe",
    "Qwen2ForCausalLM": "qwen2",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
}
"""model_type or an entry of architectures -> family (use_legacy: False)."""

LEGACY_NAMES: Mapping[str, str] = {
    "LlamaConfig": "llama",
    "LlamaForCausalLM": "llama",
    "ChatGLM2Config": "chatglm2",
    "ChatGLM2ForConditionalGeneration": "chatglm2",
}
"""model.model_config.type or model.arch.type -> family (use_legacy: True)."""

OPTIMIZER_STATES: Mapping[str, tuple[str, ...]] = {
    "AdamW": ("adam_m.", "adam_v."),
    "AdamWeightDecay": ("adam_m.", "adam_v."),
    "FusedAdamW": ("exp_avg.", "exp_avg_sq."),
    "Adam": ("moment1.", "moment2."),
}
"""Optimizer -> prefixes of its states (MindFormers 1.9.0 core/optim, MindSpore 2.9.0 nn/optim)."""
