"""For the tests of generated strategies: golden cases, an independent slicer's view of a layout, drawn jobs."""

from __future__ import annotations

import copy
import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from strategy.generate import Generated
from strategy.generate_config import parse_config
from strategy.generate_types import ModelParallelConfig
from strategy.layout import Layout, Strategy
from tests.support import Layout as PlainLayout
from tests.support import device_slices

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "strategies"
CASES = sorted(path.name for path in GOLDEN.iterdir()) if GOLDEN.is_dir() else []
TIED = "model.tok_embeddings.embedding_weight"


def params(case: Path) -> dict[str, tuple[int, ...]]:
    """Full shapes that the network had."""
    found = json.loads((case / "params.json").read_text())
    return {name: tuple(entry["shape"]) for name, entry in found.items() if entry.get("in_strategy", True)}


def is_unconfirmed(case: str, stage: int, name: str) -> bool:
    """l08: stage 1 lists the states of the tied embedding, without the embedding."""
    return case.startswith("l08") and stage == 1 and name.endswith("." + TIED)


def held(layout: Layout, shape: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """(start, stop) of every dimension on every device, by the NumPy slicer of tests.support."""
    tensor_map = tuple(dim if len(dim) > 1 else (dim[0] if dim else -1) for dim in layout.tensor_map)
    plain = PlainLayout(layout.dev_matrix, tensor_map, layout.opt_step, layout.opt_size)
    return [[(s.start, s.stop) for s in index] for index in device_slices(shape, plain)]


def copies(layout: Layout, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """How often each element of a parameter is held on its stage."""
    count = np.zeros(shape, dtype=np.int64)
    for index in held(layout, shape):
        count[tuple(slice(start, stop) for start, stop in index)] += 1
    return count


def at(generated: Generated | Strategy, name: str, stage: int = 0) -> Layout:
    """Layout of one parameter."""
    strategy = generated.strategy if isinstance(generated, Generated) else generated
    return strategy.stages[stage].layouts[name]


# ------------------------------------------------------------------------------------------------ jobs


LEGACY: dict[str, Any] = {
    "use_parallel": True,
    "parallel": {"parallel_mode": 1},
    "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 1},
    "model": {
        "model_config": {
            "type": "LlamaConfig", "hidden_size": 256, "num_layers": 4, "num_heads": 8, "n_kv_heads": 4,
            "vocab_size": 512, "intermediate_size": 512, "param_init_type": "float32", "offset": 0,
        },
        "arch": {"type": "LlamaForCausalLM"},
    },
    "optimizer": {"type": "AdamW"},
}  # fmt: skip

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 512, "intermediate_size": 512,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "vocab_size": 512, "intermediate_size": 512, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_layernorm": True, "mla_qkv_concat": False, "n_routed_experts": 8,
    "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip


def legacy(**changes: Any) -> dict[str, Any]:
    """A legacy Llama's YAML; `changes` by section: parallel_config={...}, model={...} (its model_config)."""
    return _changed(LEGACY, changes)


def mcore(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An mcore model's YAML."""
    base = {**copy.deepcopy(LEGACY), "use_legacy": False, "model": {"model_config": dict(config)}}
    base["parallel"]["strategy_ckpt_config"] = {"only_trainable_params": False}
    return _changed(base, changes)


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(base)
    for section, values in changes.items():
        if section == "model":
            document["model"]["model_config"].update(values)
        elif isinstance(values, dict):
            document.setdefault(section, {}).update(values)
        else:
            document[section] = values
    return document


def sharded(threshold: int = 64, size: int = -1) -> dict[str, Any]:
    """The `parallel` section with an optimizer shard."""
    config = {"parallel_optimizer_threshold": threshold, "optimizer_weight_shard_size": size}
    return {"enable_parallel_optimizer": True, "parallel_optimizer_config": config}


@st.composite
def jobs(draw: st.DrawFn) -> tuple[ModelParallelConfig, str]:
    """A job that fits, of any naming, and the line of `for_parameters` that says the same mesh."""
    tp, cp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    dp, pp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3]))
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if dp * tp % n == 0]))
    interleave = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    layers = pp * interleave * draw(st.integers(1, 2)) + draw(st.integers(0, pp * interleave - 1))
    offset = [[0] * pp for _ in range(interleave)]
    for odd in range(layers % (pp * interleave)):
        offset[odd % interleave][draw(st.integers(0, pp - 1))] += 1
    tied, vocab_dp = draw(st.booleans()), draw(st.booleans())
    parallel = sharded(draw(st.sampled_from([0, 1, 4])), draw(st.sampled_from([-1, 2, 3, dp * cp * tp])))
    parallel["enable_parallel_optimizer"] = shard = draw(st.booleans())
    size = min(parallel["parallel_optimizer_config"]["optimizer_weight_shard_size"], dp * cp * tp * pp)
    parallel["parallel_optimizer_config"]["optimizer_weight_shard_size"] = size
    parallel["pipeline_config"] = {"pipeline_interleave": interleave > 1}
    config = {
        "data_parallel": dp, "model_parallel": tp, "context_parallel": cp, "pipeline_stage": pp,
        "vocab_emb_dp": vocab_dp,
    }  # fmt: skip
    common = {
        "vocab_size": draw(st.sampled_from([16, 24, 30])), "hidden_size": 16, "intermediate_size": 24,
        "offset": offset, "pp_interleave_num": interleave, "tie_word_embeddings": tied,
    }  # fmt: skip
    kind = draw(st.sampled_from(["legacy", "qwen3", "deepseek"]))
    if kind == "legacy":
        model = {
            **common, "num_layers": layers, "num_heads": 4, "n_kv_heads": 4, "qkv_concat": draw(st.booleans()),
            "qkv_has_bias": draw(st.booleans()),
        }  # fmt: skip
        document = legacy(parallel=parallel, parallel_config=config, model=model)
    else:
        common["vocab_size"] = draw(st.sampled_from([16, 24]))
        model = {**common, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4}
        if kind == "deepseek":
            config["expert_parallel"] = ep
            concat = draw(st.booleans())
            model |= {
                "mla_qkv_concat": concat, "q_lora_rank": draw(st.sampled_from([8, None])), "kv_lora_rank": 8,
                "n_routed_experts": 4, "moe_intermediate_size": 8,
                "first_k_dense_replace": draw(st.integers(0, min(1, layers - 1))),
            }  # fmt: skip
        document = mcore({"qwen3": QWEN3, "deepseek": DEEPSEEK}[kind], parallel=parallel, parallel_config=config)
        document["model"]["model_config"].update(model)
    text = f"dp={dp},mp={tp},cp={cp},pp={pp},offset={json.dumps(offset)},interleave={interleave}"
    text += f",ep={config.get('expert_parallel', 1)},opt={int(shard)}"
    if pp == 1:
        text += f",vocab_emb_dp={int(vocab_dp)}"
    if shard:
        text += f",opt_size={size},threshold={parallel['parallel_optimizer_config']['parallel_optimizer_threshold']}"
    return parse_config(document, None, "drawn"), text


def numel(shape: tuple[int, ...]) -> int:
    """Elements."""
    return prod(shape)
