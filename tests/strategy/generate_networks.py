"""Run by test_generate in a process of its own: builds real MindFormers networks and compares their parameters.

Writes {network: differences} as JSON.  MindFormers 1.9.0 wants its context set and prints its configurations; nothing
is compiled, so that a CPU suffices.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
os.environ |= {"GLOG_v": "3", "RUN_MODE": "train"}

import mindspore  # noqa: E402

mindspore.set_device("CPU")
mindspore.set_context(mode=mindspore.GRAPH_MODE)
layer_setting: Any = importlib.import_module("mindformers.parallel_core.training_graph.transformer.utils")

from strategy.generate_config import parse_config  # noqa: E402
from strategy.generate_models import naming_of, parameters  # noqa: E402
from strategy.generate_rules import NAMINGS  # noqa: E402

BASE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 3, "seq_length": 32, "max_position_embeddings": 64, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "params_dtype": "float32", "compute_dtype": "float32", "use_flash_attention": True,
    "layernorm_compute_dtype": "float32", "softmax_compute_dtype": "float32", "rotary_dtype": "float32",
    "position_embedding_type": "rope",
}  # fmt: skip
MOE = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "moe_grouped_gemm": True, "routed_scaling_factor": 1.0,
    "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "gbs_aux_loss",
}  # fmt: skip
MLA = {
    **MOE, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
LAYERNORM = {"attention_bias": True, "add_bias_linear": True, "normalization": "LayerNorm", "tie_word_embeddings": True}

LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_heads": 8, "n_kv_heads": 4, "num_layers": 2, "vocab_size": 512,
    "seq_length": 32, "param_init_type": "float32", "compute_dtype": "float32", "qkv_has_bias": True,
}  # fmt: skip
GLM = {
    "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "multi_query_group_num": 2, "num_layers": 2,
    "padded_vocab_size": 512, "kv_channels": 8, "seq_length": 32, "param_init_type": "float32",
    "compute_dtype": "float32", "post_mlp_layernorm": True,
}  # fmt: skip

MODELS = {
    "LlamaConfig": ("llama.llama_config.LlamaConfig", "llama.llama.LlamaForCausalLM"),
    "ChatGLM2Config": ("glm2.glm2_config.ChatGLM2Config", "glm2.glm2.ChatGLM2ForConditionalGeneration"),
    "qwen3": ("qwen3.configuration_qwen3.Qwen3Config", "qwen3.modeling_qwen3_train.TrainingQwen3ForCausalLM"),
    "qwen3_moe": (
        "qwen3_moe.configuration_qwen3_moe.Qwen3MoeConfig",
        "qwen3_moe.modeling_qwen3_moe_train.TrainingQwen3MoeForCausalLM",
    ),
    "deepseek_v3": (
        "deepseek3.configuration_deepseek_v3.DeepseekV3Config",
        "deepseek3.modeling_deepseek_v3_train.TrainingDeepseekV3ForCausalLM",
    ),
    "telechat3": (
        "telechat3.configuration_telechat3.TeleChat3Config",
        "telechat3.modeling_telechat3_train.TrainingTeleChat3ForCausalLM",
    ),
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "legacy": ("LlamaConfig", {**LLAMA, "attn_proj_has_bias": True}),
    "legacy concat": ("LlamaConfig", {**LLAMA, "qkv_concat": True, "intermediate_size": None, "multiple_of": 32}),
    "legacy tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "legacy glm": ("ChatGLM2Config", GLM),
    "legacy glm, biases": ("ChatGLM2Config", {**GLM, "add_bias_linear": True, "mlp_concat": False}),
    "mla concat": ("deepseek_v3", {**MLA, "mla_qkv_concat": True, "qk_layernorm": True, "n_shared_experts": 1}),
    "mla concat, no q rank, bias": (
        "deepseek_v3",
        {**MLA, "mla_qkv_concat": True, "qk_layernorm": True, "q_lora_rank": None, "attention_bias": True,
         "n_shared_experts": 0, "first_k_dense_replace": 0, "moe_layer_freq": [1, 0, 1], "num_nextn_predict_layers": 0},
    ),
    "mla, no q rank, gate": (
        "deepseek_v3",
        {**MLA, "mla_qkv_concat": False, "qk_layernorm": True, "q_lora_rank": None, "n_shared_experts": 2,
         "use_shared_expert_gating": True},
    ),
    "mla, no norms, logits": (
        "deepseek_v3", {**MLA, "mla_qkv_concat": False, "qk_layernorm": False, "track_max_attention_logit": True},
    ),
    "qwen3 with all biases": ("qwen3", {**LAYERNORM, "head_dim": 16}),
    "qwen3 with learned positions": ("qwen3", {"head_dim": 16, "position_embedding_type": "learned_absolute"}),
    "qwen3 moe": ("qwen3_moe", {**MOE, "num_experts": 4}),
    "telechat3": ("telechat3", {"head_dim": 16, "qk_layernorm": True, "num_nextn_predict_layers": 1}),
}  # fmt: skip


def load(path: str) -> Any:
    """A class of mindformers.models."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"mindformers.models.{module}"), name)


def differences(family: str, changes: dict[str, Any]) -> list[str]:
    """Names, shapes and flags that differ."""
    legacy = family.endswith("Config")
    layer_setting.is_legacy_model = lambda: legacy  # what use_legacy of a YAML sets
    config = changes if legacy else {**BASE, **changes}
    config_class, network_class = (load(path) for path in MODELS[family])
    network = network_class(config_class(**config))
    prefix = "" if legacy else "model."
    real = {name.removeprefix(prefix): value for name, value in network.parameters_and_names()}
    kind = {"type": family} if legacy else {"model_type": family}
    model = parse_config({"use_legacy": legacy, "model": {"model_config": config | kind}}, None, family).model
    rules = NAMINGS[naming_of(model)]
    ours = {parameter.name: parameter for parameter in parameters(model)}
    caches = {name for name in real if name.endswith(("key_cache", "value_cache"))}  # no training graph uses them
    found = [f"only one has {name}" for name in sorted((set(real) ^ set(ours)) - caches)]
    for name in sorted(set(real) & set(ours)):
        rule = rules.find(name)
        expected = (tuple(real[name].shape), real[name].requires_grad, real[name].parallel_optimizer)
        if rule is None or (ours[name].shape, rule[0].trainable, rule[0].opt) != expected:
            found.append(f"{name}: {ours[name].shape} {rule}, expected {expected}")
    return found


if __name__ == "__main__":
    result = {name: differences(*network) for name, network in NETWORKS.items()}
    Path(sys.argv[1]).write_text(json.dumps(result))
