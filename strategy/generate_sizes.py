"""The sizes of a model, from the values of its configuration.

Sources: MindFormers 1.9.0 models/llama/llama_{config,layer,transformer}.py; parallel_core/config_converter.py,
transformer_config.py `__post_init__`, training_graph/base_models/gpt/gpt_layer_specs.py, transformer/attention.py.
Pure; may import only strategy.generate_{families,models,reading,types,values}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from strategy.generate_families import Family
from strategy.generate_models import NORMS
from strategy.generate_reading import Reading
from strategy.generate_types import GlmModel, LegacyModel, McoreModel, Mla, Model, Moe, Parallel
from strategy.generate_values import Values

_MAX_LAYERS = 1 << 14

# ------------------------------------------------------------------------------------------------ legacy Llama


def _legacy(_reading: Reading, _family: Family, values: Values, parallel: Parallel) -> LegacyModel:
    hidden, heads = values.positive("hidden"), values.positive("heads")
    dtype = values.dtype("dtype", "float16")
    model = LegacyModel(
        layers=values.positive("layers", most=_MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=values.positive("kv_heads", heads),
        ffn=_llama_ffn(values, hidden),
        vocab=values.positive("vocab"),
        qkv_concat=values.flag("qkv_concat"),
        qkv_bias=values.flag("qkv_bias"),
        proj_bias=values.flag("proj_bias"),
        tied=values.flag("tied"),
        dtype=dtype,
        norm_dtype=values.dtype("norm_dtype", "float32"),
        embedding_dtype=values.dtype("embedding_dtype", "") if values.get("embedding_dtype") else dtype,
    )
    if not values.missing:
        _divides(values, "hidden", model.hidden, {"heads": heads})
        _divides(values, "heads", heads, {"model_parallel": parallel.tp})
        _divides(values, "kv_heads", model.kv_heads, {"model_parallel": parallel.tp})
        _divides(values, "ffn", model.ffn, {"model_parallel": parallel.tp})
    return model


def _llama_ffn(values: Values, hidden: int) -> int:
    """llama_layer.py `LlamaFeedForward.__init__`."""
    if values.get("ffn") is not None:
        return values.positive("ffn")
    size, multiple = 4 * hidden, values.positive("multiple_of", 256)
    factor = values.get("ffn_multiplier")
    if isinstance(factor, int | float) and not isinstance(factor, bool):
        size = int((factor + 0.01) * size)
    size = int(2 * size / 3)
    return multiple * ((size + multiple - 1) // multiple)


def _divides(values: Values, key: str, number: int, by: Mapping[str, int]) -> None:
    (other, divisor), *_ = by.items()
    if divisor and number % divisor:
        values.problems.add(
            f"{values.where}.{values.name(key)}: {number} does not divide by {values.name(other)} = {divisor}"
        )


def _glm(_reading: Reading, _family: Family, values: Values, parallel: Parallel) -> GlmModel:
    """models/glm2/glm2_config.py; separate q, k and v are cut by other numbers when the groups are few."""
    heads = values.positive("heads")
    for key in ("qkv_concat", "rms_norm"):
        if not values.flag(key):
            values.problem(key, "True: there are no rules for the other form", values.get(key))
    optional = {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_mlp_norm"}
    model = GlmModel(
        layers=values.positive("layers", most=_MAX_LAYERS),
        hidden=values.positive("hidden"),
        heads=heads,
        groups=values.positive("kv_heads", heads) if values.flag("grouped") else heads,
        head_dim=values.positive("head_dim"),
        ffn=values.positive("ffn"),
        vocab=values.positive("vocab"),
        mlp_concat=values.flag("mlp_concat"),
        qkv_bias=values.flag("qkv_bias"),
        linear_bias=values.flag("linear_bias"),
        norms=tuple(name for name, key in optional.items() if values.flag(key)),
        dtype=values.dtype("dtype", "float16"),
        norm_dtype=values.dtype("norm_dtype", "float32"),
    )
    if not values.missing:
        _divides(values, "heads", heads, {"model_parallel": parallel.tp})
    return model


# ------------------------------------------------------------------------------------------------ mcore


def _mcore(reading: Reading, family: Family, values: Values, parallel: Parallel) -> McoreModel:
    layers = values.positive("layers", most=_MAX_LAYERS)
    hidden, heads = values.positive("hidden"), values.positive("heads")
    groups = min(values.positive("kv_heads", heads), heads)
    learned = values.get("position_type") == "learned_absolute"
    moe = _moe(values, family, layers)
    model = McoreModel(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_dim=values.positive("head_dim", max(1, hidden // heads)),
        ffn=values.positive("ffn", 4 * hidden),
        vocab=values.positive("vocab"),
        positions=values.positive("positions", 4096) if learned else 0,
        tied=family.ties and values.flag("tied"),
        gated=values.flag("gated"),
        norm=_norm(values),
        sandwich_norm=values.flag("sandwich_norm"),
        qk_norm=values.flag("qk_norm") if family.qk_norm is None else family.qk_norm,
        qkv_bias=values.flag("qkv_bias"),
        linear_bias=values.flag("linear_bias"),
        track_logits=values.flag("track_logits"),
        mla=_mla(values) if family.mla else None,
        moe=moe,
        mtp=values.number("mtp", 0, most=_MAX_LAYERS) if values.name("mtp") in family.mtp else 0,
        dtype=values.dtype("dtype", "float32"),
    )
    if not values.missing:
        _check_mcore(reading, values, model, parallel)
    return model


def _norm(values: Values) -> str:
    norm = values.get("norm") or "LayerNorm"
    if norm not in NORMS:
        values.problem("norm", " or ".join(NORMS), norm)
        return NORMS[0]
    return str(norm)


def _mla(values: Values) -> Mla:
    """A null q_lora_rank, unlike a missing one, means queries without compression."""
    uncompressed = "q_rank" in values.given and values.given["q_rank"] is None
    return Mla(
        q_rank=None if uncompressed else values.positive("q_rank"),
        kv_rank=values.positive("kv_rank"),
        nope=values.positive("nope"),
        rope=values.positive("rope"),
        value=values.positive("value"),
        concat=values.flag("mla_concat", default=True),
    )


def _moe(values: Values, family: Family, layers: int) -> Moe | None:
    experts = values.number("experts", 0) if family.has_experts else 0
    if not experts:
        return None
    ffn = values.positive("expert_ffn", values.get("ffn"))
    shared = values.number("shared_experts", 0) if values.get("shared_experts") is not None else 0
    shared_ffn = values.positive("shared_ffn") if values.get("shared_ffn") is not None else ffn * shared
    return Moe(
        experts=experts,
        ffn=ffn,
        pattern=_pattern(values, layers) if family.block else (True,) * layers,
        shared_ffn=shared_ffn or None,
        shared_gate=values.flag("shared_gate"),
        expert_bias=values.flag("expert_bias"),
        batch_loss=values.get("balance") == "gbs_aux_loss",
        router_dtype=values.dtype("router_dtype", "float32"),
    )


def _pattern(values: Values, layers: int) -> tuple[bool, ...]:
    """gpt_layer_specs.py `get_gpt_decoder_block_spec`: which layers have experts."""
    dense = values.number("dense_layers", 0)
    if dense:
        if dense > layers:
            values.problem("dense_layers", f"at most {values.name('layers')} = {layers}", dense)
        return tuple(layer >= dense for layer in range(layers))
    every = values.get("expert_layers")
    if isinstance(every, list):
        if len(every) != layers or any(value not in (0, 1) for value in every):
            values.problem("expert_layers", f"{layers} numbers 0 or 1", every)
            return (True,) * layers
        return tuple(map(bool, every))
    step = values.positive("expert_layers", 1)
    return tuple(layer % step == 0 for layer in range(layers))


def _check_mcore(reading: Reading, values: Values, model: McoreModel, parallel: Parallel) -> None:
    """What the network refuses before it is compiled; other divisions are found when parameters are cut."""
    tp = {"model_parallel": parallel.tp}
    _divides(values, "heads", model.heads, tp)
    if model.mla is None:
        _divides(values, "hidden", model.hidden, {"heads": model.heads})
        _divides(values, "kv_heads", model.groups, tp)
    _divides(values, "ffn", model.ffn, tp)
    if model.moe is not None:
        _divides(values, "experts", model.moe.experts, {"expert_parallel": parallel.ep})
        if parallel.tp > 1 and not reading.values("parallel_config").flag("use_seq_parallel"):
            reading.notes.append("experts with model_parallel > 1 need use_seq_parallel: True; layouts are the same")
    elif parallel.ep > 1:
        reading.problems.add(f"{reading.where}: expert_parallel is {parallel.ep}, but the model has no experts")


BUILDERS: Mapping[str, Callable[[Reading, Family, Values, Parallel], Model]] = {
    "legacy": _legacy,
    "legacy GLM": _glm,
    "mcore": _mcore,
}
"""By naming of the family."""
