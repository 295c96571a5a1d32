"""How each parameter of MindFormers lies on a stage's devices: one table a naming, one row a parameter.

Sources: MindFormers 1.9.0 models/llama/{llama,llama_layer,llama_transformer}.py, modules/layers.py (legacy) and
parallel_core/training_graph: device_matrix.py, tensor_parallel/layers.py, transformer/, transformer/moe/ (mcore); seen
in strategy files that MindSpore 2.9.0's compiler wrote.  use_seq_parallel and gradient_accumulation_shard change no
layout; context parallelism only widens the replicas, but for the legacy embedding.

A new naming is one more entry of `NAMINGS`.  May import only strategy.{generate_types,generate_optimizer,layout},
transform_ckpt.views.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from strategy.generate_optimizer import NOT_SHARDED, optimizer_shard
from strategy.generate_types import Parallel, Parameter
from strategy.layout import Layout, LayoutError
from transform_ckpt.views import Shape

Place = Literal["first", "layer", "norm", "head", "mtp"]
"""Where in the pipeline: with the embedding, with its layer, with the last layer or stage, with the output layer."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Devices of a stage, row-major; `cut` is the tensor dimension that the LAST axis cuts, None = replicated."""

    axes: Shape
    cut: int | None = None


CutRule = Callable[[Parallel, Shape], Mesh]


@dataclass(frozen=True, slots=True)
class Rule:
    """One parameter: how it is cut, where it lies, and its two flags as MindFormers creates it."""

    cut: CutRule
    place: Place = "layer"
    opt: bool = True
    """`Parameter.parallel_optimizer`."""
    trainable: bool = True


@dataclass(frozen=True)
class NamingRules:
    """The rows of one naming: `outer` by whole name, `inner` by what follows the layer's number."""

    layer: str
    outer: Mapping[str, Rule]
    inner: Mapping[str, Rule]
    mtp: str | None = None
    norm_with_last_layer: bool = False
    """Whether the final norm follows the last layer's stage; else it is on the last stage."""

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        return re.compile(self.layer)

    @cached_property
    def _mtp(self) -> re.Pattern[str]:
        return re.compile(self.mtp or r"(?!)")

    def find(self, name: str) -> tuple[Rule, int] | None:
        """The row of a parameter and its layer's number (-1 outside the decoder), or None."""
        if name in self.outer:
            return self.outer[name], -1
        match = self._layer.fullmatch(name)
        if match and match[2] in self.inner:
            return self.inner[match[2]], int(match[1])
        match = self._mtp.fullmatch(name)
        if match and match[2] in self.inner:
            return replace(self.inner[match[2]], place="mtp"), -1
        return None


# ------------------------------------------------------------------------------------------------ how to cut


def _legacy_axes(parallel: Parallel) -> Shape:
    """Operators with strategies of numbers: axes of one device are dropped."""
    return tuple(n for n in (parallel.dp * parallel.cp, parallel.tp) if n > 1) or (1,)


def _legacy_whole(parallel: Parallel, _shape: Shape) -> Mesh:
    return Mesh(_legacy_axes(parallel))


def _legacy_cut(dimension: int) -> CutRule:
    return lambda parallel, _shape: Mesh(_legacy_axes(parallel), dimension if parallel.tp > 1 else None)


def _legacy_embedding(parallel: Parallel, shape: Shape) -> Mesh:
    """llama_layer.py `LlamaEmbedding.shard`: rows by mp*cp unless vocab_emb_dp or they do not divide."""
    parts = parallel.cp * parallel.tp
    if parts == 1 or parallel.vocab_emb_dp or parallel.embedding_whole or shape[0] % parts:
        return _legacy_whole(parallel, shape)
    return Mesh((parallel.dp, parts), 0)


def _legacy_head(parallel: Parallel, shape: Shape) -> Mesh:
    """llama.py `LlamaForCausalLM.__init__`: rows by mp unless vocab_emb_dp or they do not divide."""
    whole = parallel.vocab_emb_dp or shape[0] % parallel.tp
    return _legacy_whole(parallel, shape) if whole else _legacy_cut(0)(parallel, shape)


def _glm_head(parallel: Parallel, shape: Shape) -> Mesh:
    """glm2.py `shard_head_tail`: rows over the whole stage, unless vocab_emb_dp or they do not divide."""
    if not parallel.vocab_emb_dp and shape[0] % parallel.devices == 0:
        return Mesh((parallel.devices,), 0 if parallel.devices > 1 else None)
    rows = parallel.seq_parallel and not parallel.long_sequence
    return _legacy_cut(0)(parallel, shape) if rows else _legacy_whole(parallel, shape)


def _mcore_axes(parallel: Parallel) -> Shape:
    """device_matrix.py `init_dp_cp_tp_layout`: axes of one device are kept."""
    return (parallel.dp, parallel.cp, parallel.tp)


def _mcore_whole(parallel: Parallel, _shape: Shape) -> Mesh:
    return Mesh(_mcore_axes(parallel))


def _mcore_cut(dimension: int) -> CutRule:
    return lambda parallel, _shape: Mesh(_mcore_axes(parallel), dimension if parallel.tp > 1 else None)


def _mcore_embedding(parallel: Parallel, shape: Shape) -> Mesh:
    """tensor_parallel/layers.py `VocabParallelEmbedding`: rows by tp where they divide; vocab_emb_dp has no effect."""
    return _mcore_whole(parallel, shape) if shape[0] % parallel.tp else _mcore_cut(0)(parallel, shape)


def _moe_axes(parallel: Parallel) -> Shape:
    """device_matrix.py `init_dp_cp_tp_ep_layout`: tp is part of the experts' data parallelism."""
    return (parallel.devices // parallel.ep, parallel.ep)


def _moe_whole(parallel: Parallel, _shape: Shape) -> Mesh:
    return Mesh(_moe_axes(parallel))


def _moe_experts(parallel: Parallel, _shape: Shape) -> Mesh:
    return Mesh(_moe_axes(parallel), 0 if parallel.ep > 1 else None)


# ------------------------------------------------------------------------------------------------ the tables


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


def _norms(whole: CutRule, names: str, place: Place = "layer") -> dict[str, Rule]:
    """norm.py: the weight of an RMSNorm takes part in the optimizer shard, gamma and beta of a LayerNorm do not."""
    found: dict[str, Rule] = {}
    for name in names.split():
        found[f"{name}.weight"] = Rule(whole, place)
        found[f"{name}.gamma"] = found[f"{name}.beta"] = Rule(whole, place, opt=False)
    return found


def _linears(weight: CutRule, bias: CutRule, names: str) -> dict[str, Rule]:
    rules = {f"{name}.weight": Rule(weight) for name in names.split()}
    return rules | {f"{name}.bias": Rule(bias) for name in names.split()}


_LEGACY = NamingRules(
    layer=r"model\.layers\.([0-9]+)\.(.+)",
    outer={
        "model.tok_embeddings.embedding_weight": Rule(_legacy_embedding, "first", opt=False),
        "model.norm_out.weight": Rule(_legacy_whole, "norm", opt=False),
        "lm_head.weight": Rule(_legacy_head, "head"),
    },
    inner={
        **_rows(Rule(_legacy_cut(0)), "attention.wq.weight attention.wk.weight attention.wv.weight"),
        **_rows(Rule(_legacy_cut(0)), "attention.w_qkv.weight feed_forward.w1.weight feed_forward.w3.weight"),
        **_rows(Rule(_legacy_cut(0)), "feed_forward.w_gate_hidden.weight"),
        **_rows(Rule(_legacy_cut(0), opt=False), "attention.wq.bias attention.wk.bias attention.wv.bias"),
        **_rows(Rule(_legacy_cut(0), opt=False), "attention.w_qkv.bias"),
        **_rows(Rule(_legacy_cut(1)), "attention.wo.weight feed_forward.w2.weight"),
        **_rows(Rule(_legacy_whole, opt=False), "attention.wo.bias attention_norm.weight ffn_norm.weight"),
    },
)

_GLM_ROWS = "self_attention.query_key_value mlp.dense_h_to_4h mlp.dense_left mlp.dense_right".split()
_GLM_COLUMNS = "self_attention.dense mlp.dense_4h_to_h".split()
_GLM_NORMS = "input_layernorm post_attention_layernorm post_self_attn_layernorm post_mlp_layernorm".split()
_GLM = NamingRules(
    layer=r"transformer\.encoder\.layers\.([0-9]+)\.(.+)",
    outer={
        "transformer.embedding.embedding_weight": Rule(_legacy_embedding, "first"),
        "transformer.encoder.final_layernorm.weight": Rule(_legacy_whole, "norm"),
        "transformer.output_layer.weight": Rule(_glm_head, "head"),
    },
    inner={
        **{f"{name}.weight": Rule(_legacy_whole) for name in _GLM_NORMS},
        **{f"{name}.weight": Rule(_legacy_cut(0)) for name in _GLM_ROWS},
        **{f"{name}.bias": Rule(_legacy_cut(0), opt=False) for name in _GLM_ROWS},
        **{f"{name}.weight": Rule(_legacy_cut(1)) for name in _GLM_COLUMNS},
        **{f"{name}.bias": Rule(_legacy_whole, opt=False) for name in _GLM_COLUMNS},
    },
)
"""models/glm2/{glm2,glm2_modules,glm2_transformer}.py, read only: no compiler-written file confirms it."""

_BUFFER = Rule(_moe_whole, opt=False, trainable=False)
_MCORE_INNER = {
    **_norms(_mcore_whole, "input_layernorm pre_mlp_layernorm post_self_attn_layernorm post_mlp_layernorm"),
    **_norms(_mcore_whole, "self_attention.q_layernorm self_attention.k_layernorm self_attention.kv_layernorm"),
    **_linears(_mcore_cut(0), _mcore_cut(0), "self_attention.linear_qkv self_attention.linear_q_proj"),
    **_linears(_mcore_cut(0), _mcore_cut(0), "self_attention.linear_q_up_proj self_attention.linear_kv_up_proj"),
    **_linears(_mcore_cut(0), _mcore_cut(0), "self_attention.linear_qb self_attention.linear_kvb mlp.linear_fc1"),
    **_linears(_mcore_cut(1), _mcore_whole, "self_attention.linear_proj mlp.linear_fc2"),
    **_linears(_mcore_whole, _mcore_whole, "self_attention.linear_q_down_proj self_attention.linear_kv_down_proj"),
    **_linears(_mcore_whole, _mcore_whole, "mlp.shared_experts.linear_fc1 mlp.shared_experts.linear_fc2"),
    "mlp.shared_experts.shared_experts_gate.weight": Rule(_mcore_whole),
    "self_attention.core_attention.max_logits_val": Rule(_mcore_cut(0), opt=False, trainable=False),
    **_rows(Rule(_moe_experts), "mlp.experts.weight1 mlp.experts.weight2"),
    "mlp.router.weight": Rule(_moe_whole),
    **_rows(_BUFFER, "mlp.router.expert_bias mlp.router.expert_load mlp.router.fi_accu"),
    **_norms(_mcore_whole, "enorm hnorm final_layernorm"),
    **_linears(_mcore_whole, _mcore_whole, "eh_proj"),
}
_MCORE = NamingRules(
    layer=r"decoder\.layers\.([0-9]+)\.(.+)",
    mtp=r"mtp\.layers\.([0-9]+)\.(?:transformer_layer\.)?(.+)",
    outer={
        "embedding.word_embeddings.weight": Rule(_mcore_embedding, "first"),
        "embedding.position_embeddings.weight": Rule(_mcore_embedding, "first"),
        **_norms(_mcore_whole, "decoder.final_layernorm", "norm"),
        "output_layer.weight": Rule(_mcore_cut(0), "head"),
    },
    inner=_MCORE_INNER,
    norm_with_last_layer=True,
)
_MLA_CONCAT = _linears(_mcore_whole, _mcore_whole, "self_attention.linear_qkv")
"""multi_latent_attention.py `MLASelfAttentionConcatenated`: its linear_qkv is the down projection, never cut."""

NAMINGS: Mapping[str, NamingRules] = {
    "legacy": _LEGACY,
    "legacy GLM": _GLM,
    "mcore": _MCORE,
    "mcore with mla_qkv_concat": replace(_MCORE, inner=_MCORE_INNER | _MLA_CONCAT),
}


def detect_naming(names: Iterable[str]) -> str:
    """The first naming that knows most of the names; "" when none knows any."""
    known = set(names)
    if any(name.endswith(".self_attention.linear_kvb.weight") for name in known):
        return "mcore with mla_qkv_concat"
    counts = {naming: sum(rules.find(name) is not None for name in known) for naming, rules in NAMINGS.items()}
    best = max(counts, key=lambda naming: counts[naming])
    return best if counts[best] else ""


# ------------------------------------------------------------------------------------------------ name -> layout


def layout_of(parameter: Parameter, rule: Rule, parallel: Parallel, *, stage_shared: bool) -> Layout:
    """Layout on its stage; LayoutError names the dimension that does not divide."""
    mesh = rule.cut(parallel, parameter.shape)
    if mesh.cut is not None and mesh.cut >= len(parameter.shape):
        raise LayoutError(f"shape {list(parameter.shape)} has no dimension {mesh.cut}, which is cut")
    splits = 1 if mesh.cut is None else mesh.axes[-1]
    tensor_map = tuple((0,) if dim == mesh.cut else () for dim in range(len(parameter.shape)))
    plain = Layout(mesh.axes, tensor_map)
    plain.local_shape(parameter.shape)
    takes_part = rule.opt or (rule.place == "first" and parallel.embedding_opt)
    if stage_shared or not takes_part:
        return plain
    step, size = optimizer_shard(
        parallel.optimizer,
        parameter.shape,
        parameter.dtype,
        devices=parallel.devices,
        rows=splits if mesh.cut == 0 else 1,
        splits=splits,
    )
    return plain if (step, size) == NOT_SHARDED else Layout(mesh.axes, tensor_map, step, size)
