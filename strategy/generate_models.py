"""Every parameter of a model: name, full shape and dtype, in the order of the network.

Sources: MindFormers 1.9.0 models/llama/llama_{layer,transformer}.py (legacy) and parallel_core/training_graph:
base_models/gpt/{gpt_model,gpt_layer_specs}.py, transformer/{attention,multi_latent_attention,mlp,norm}.py,
transformer/moe/{router,ffn,shared_experts}.py, transformer/multi_token_prediction.py (mcore).
Parameters that the graph does not use (router.fi_accu without gbs_aux_loss) are left out, as the compiler does.
May import only strategy.generate_types and transform_ckpt.views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from strategy.generate_types import GlmModel, LegacyModel, McoreModel, Mla, Model, Moe, Parameter
from transform_ckpt.views import Shape

Entry = tuple[str, Shape]

_NORM_PARTS = {"RMSNorm": ("weight",), "LayerNorm": ("gamma", "beta")}
"""transformer/norm.py: what each normalization calls its parameters."""

NORMS = tuple(_NORM_PARTS)


def parameters(model: Model) -> Iterator[Parameter]:
    """All parameters, layer numbers global."""
    match model:
        case LegacyModel():
            yield from _legacy(model)
        case GlmModel():
            yield from _glm(model)
        case McoreModel():
            yield from _mcore(model)


def naming_of(model: Model) -> str:
    """Key of generate_rules.NAMINGS."""
    match model:
        case LegacyModel():
            return "legacy"
        case GlmModel():
            return "legacy GLM"
        case McoreModel():
            return "mcore with mla_qkv_concat" if model.mla and model.mla.concat else "mcore"


# ------------------------------------------------------------------------------------------------ legacy


def _legacy(model: LegacyModel) -> Iterator[Parameter]:
    vocabulary = (model.vocab, model.hidden)
    yield Parameter("model.tok_embeddings.embedding_weight", vocabulary, model.embedding_dtype)
    for layer in range(model.layers):
        for name, shape in _legacy_layer(model):
            dtype = model.norm_dtype if name.endswith("_norm.weight") else model.dtype
            yield Parameter(f"model.layers.{layer}.{name}", shape, dtype)
    yield Parameter("model.norm_out.weight", (model.hidden,), model.norm_dtype)
    if not model.tied:
        yield Parameter("lm_head.weight", vocabulary, model.dtype)


def _legacy_layer(model: LegacyModel) -> Iterator[Entry]:
    hidden, ffn = model.hidden, model.ffn
    kv = hidden // model.heads * model.kv_heads
    separate = {"attention.wq": hidden, "attention.wk": kv, "attention.wv": kv}
    projections = {"attention.w_qkv": hidden + 2 * kv} if model.qkv_concat else separate
    gates = {"w_gate_hidden": 2 * ffn} if model.qkv_concat else {"w1": ffn, "w3": ffn}
    yield "attention_norm.weight", (hidden,)
    for name, rows in projections.items():
        yield from _linear(name, rows, hidden, bias=model.qkv_bias)
    yield from _linear("attention.wo", hidden, hidden, bias=model.proj_bias)
    yield "ffn_norm.weight", (hidden,)
    for name, rows in gates.items():
        yield f"feed_forward.{name}.weight", (rows, hidden)
    yield "feed_forward.w2.weight", (hidden, ffn)


def _glm(model: GlmModel) -> Iterator[Parameter]:
    vocabulary = (model.vocab, model.hidden)
    yield Parameter("transformer.embedding.embedding_weight", vocabulary, model.dtype)
    for layer in range(model.layers):
        for name, shape in _glm_layer(model):
            dtype = model.norm_dtype if name.endswith("norm.weight") else model.dtype
            yield Parameter(f"transformer.encoder.layers.{layer}.{name}", shape, dtype)
    yield Parameter("transformer.encoder.final_layernorm.weight", (model.hidden,), model.norm_dtype)
    yield Parameter("transformer.output_layer.weight", vocabulary, model.dtype)


def _glm_layer(model: GlmModel) -> Iterator[Entry]:
    queries = model.heads * model.head_dim
    for name in ("input_layernorm", "post_attention_layernorm", *model.norms):
        yield f"{name}.weight", (model.hidden,)
    rows = queries + 2 * model.groups * model.head_dim
    yield from _linear("self_attention.query_key_value", rows, model.hidden, bias=model.qkv_bias or model.linear_bias)
    yield from _linear("self_attention.dense", model.hidden, queries, bias=model.linear_bias)
    separate = {"mlp.dense_left": model.ffn, "mlp.dense_right": model.ffn}
    for name, rows in ({"mlp.dense_h_to_4h": 2 * model.ffn} if model.mlp_concat else separate).items():
        yield from _linear(name, rows, model.hidden, bias=model.linear_bias)
    yield from _linear("mlp.dense_4h_to_h", model.hidden, model.ffn, bias=model.linear_bias)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[Entry]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


# ------------------------------------------------------------------------------------------------ mcore


def _mcore(model: McoreModel) -> Iterator[Parameter]:
    vocabulary = (model.vocab, model.hidden)
    yield Parameter("embedding.word_embeddings.weight", vocabulary, model.dtype)
    if model.positions:
        yield Parameter("embedding.position_embeddings.weight", (model.positions, model.hidden), model.dtype)
    pattern = model.moe.pattern if model.moe else (False,) * model.layers
    for layer in range(model.layers):
        yield from _typed(model, f"decoder.layers.{layer}", _mcore_layer(model, experts=pattern[layer]))
    yield from _typed(model, "decoder", _norm(model, "final_layernorm", model.hidden))
    for depth in range(model.mtp):
        yield from _typed(model, f"mtp.layers.{depth}", _mtp_layer(model, experts=pattern[-1]))
    if not model.tied:
        yield Parameter("output_layer.weight", vocabulary, model.dtype)


_FLOAT32_ENDS = (".expert_bias", ".expert_load", ".fi_accu", ".max_logits_val")


def _typed(model: McoreModel, prefix: str, entries: Iterator[Entry]) -> Iterator[Parameter]:
    for name, shape in entries:
        dtype = "F32" if name.endswith(_FLOAT32_ENDS) else model.dtype
        if model.moe and name.endswith(".shared_experts_gate.weight"):
            dtype = model.moe.router_dtype
        yield Parameter(f"{prefix}.{name}", shape, dtype)


def _norm(model: McoreModel, name: str, size: int) -> Iterator[Entry]:
    for part in _NORM_PARTS[model.norm]:
        yield f"{name}.{part}", (size,)


def _mcore_layer(model: McoreModel, *, experts: bool) -> Iterator[Entry]:
    yield from _norm(model, "input_layernorm", model.hidden)
    attention = _self_attention(model) if model.mla is None else _MLA_FORMS[model.mla.concat](model, model.mla)
    for name, shape in attention:
        yield f"self_attention.{name}", shape
    if model.track_logits:
        yield "self_attention.core_attention.max_logits_val", (model.heads,)
    if model.sandwich_norm:
        yield from _norm(model, "post_self_attn_layernorm", model.hidden)
    yield from _norm(model, "pre_mlp_layernorm", model.hidden)
    mlp = _experts(model, model.moe) if experts and model.moe else _mlp(model, "", model.ffn)
    for name, shape in mlp:
        yield f"mlp.{name}", shape
    if model.sandwich_norm:
        yield from _norm(model, "post_mlp_layernorm", model.hidden)


def _self_attention(model: McoreModel) -> Iterator[Entry]:
    queries = model.heads * model.head_dim
    keys = model.groups * model.head_dim
    bias = model.linear_bias or model.qkv_bias
    yield from _linear("linear_proj", model.hidden, queries, bias=model.linear_bias)
    yield from _linear("linear_qkv", queries + 2 * keys, model.hidden, bias=bias)
    if model.qk_norm:
        yield from _norm(model, "q_layernorm", model.head_dim)
        yield from _norm(model, "k_layernorm", model.head_dim)


def _mla_separate(model: McoreModel, mla: Mla) -> Iterator[Entry]:
    queries = model.heads * (mla.nope + mla.rope)
    yield from _linear("linear_proj", model.hidden, model.heads * mla.value, bias=model.linear_bias)
    if mla.q_rank is None:
        yield "linear_q_proj.weight", (queries, model.hidden)
    else:
        yield "linear_q_down_proj.weight", (mla.q_rank, model.hidden)
        yield "linear_q_up_proj.weight", (queries, mla.q_rank)
    yield "linear_kv_down_proj.weight", (mla.kv_rank + mla.rope, model.hidden)
    yield "linear_kv_up_proj.weight", (model.heads * (mla.nope + mla.value), mla.kv_rank)
    if model.qk_norm and mla.q_rank is not None:
        yield from _norm(model, "q_layernorm", mla.q_rank)
    if model.qk_norm:
        yield from _norm(model, "kv_layernorm", mla.kv_rank)


def _mla_concat(model: McoreModel, mla: Mla) -> Iterator[Entry]:
    queries = model.heads * (mla.nope + mla.rope)
    bias = model.linear_bias or model.qkv_bias
    yield from _linear("linear_proj", model.hidden, model.heads * mla.value, bias=model.linear_bias)
    if mla.q_rank is not None and model.qk_norm:
        yield from _norm(model, "q_layernorm", mla.q_rank)
    if mla.q_rank is not None:
        yield from _linear("linear_qb", queries, mla.q_rank, bias=bias)
    down = (queries if mla.q_rank is None else mla.q_rank) + mla.kv_rank + mla.rope
    yield from _linear("linear_qkv", down, model.hidden, bias=bias)
    if model.qk_norm:
        yield from _norm(model, "k_layernorm", mla.kv_rank)
    yield from _linear("linear_kvb", model.heads * (mla.nope + mla.value), mla.kv_rank, bias=bias)


_MLA_FORMS: Mapping[bool, Callable[[McoreModel, Mla], Iterator[Entry]]] = {False: _mla_separate, True: _mla_concat}
"""By mla_qkv_concat."""


def _mlp(model: McoreModel, prefix: str, ffn: int) -> Iterator[Entry]:
    rows = 2 * ffn if model.gated else ffn
    yield from _linear(f"{prefix}linear_fc1", rows, model.hidden, bias=model.linear_bias)
    yield from _linear(f"{prefix}linear_fc2", model.hidden, ffn, bias=model.linear_bias)


def _experts(model: McoreModel, moe: Moe) -> Iterator[Entry]:
    """The experts' weights are matrices: rows of all experts below one another; always gated."""
    yield "router.weight", (moe.experts, model.hidden)
    buffers = ("expert_bias", "expert_load") * moe.expert_bias + ("fi_accu",) * moe.batch_loss
    for buffer in buffers:
        yield f"router.{buffer}", (moe.experts,)
    yield "experts.weight1", (moe.experts * model.hidden, 2 * moe.ffn)
    yield "experts.weight2", (moe.experts * moe.ffn, model.hidden)
    if moe.shared_ffn is not None:
        yield from _mlp(model, "shared_experts.", moe.shared_ffn)
    if moe.shared_ffn is not None and moe.shared_gate:
        yield "shared_experts.shared_experts_gate.weight", (1, model.hidden)


def _mtp_layer(model: McoreModel, *, experts: bool) -> Iterator[Entry]:
    for name in ("enorm", "hnorm"):
        yield from _norm(model, name, model.hidden)
    yield "eh_proj.weight", (model.hidden, 2 * model.hidden)
    for name, shape in _mcore_layer(model, experts=experts):
        yield f"transformer_layer.{name}", shape
    yield from _norm(model, "final_layernorm", model.hidden)
