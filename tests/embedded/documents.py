"""A small job as MindFormers' YAML has it."""

from __future__ import annotations

from typing import Any


def document(
    *,
    dp: int = 1,
    mp: int = 1,
    batch: int = 4,
    steps: int = 4,
    parallel: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """`changes` are keys of model_config, or whole top-level sections by their names."""
    found: dict[str, Any] = {
        "seed": 7,
        "use_parallel": dp * mp > 1,
        "parallel": {},
        "parallel_config": {"data_parallel": dp, "model_parallel": mp, "vocab_emb_dp": False, **(parallel or {})},
        "runner_config": {"batch_size": batch, "epochs": 1, "max_steps": steps},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-2},
        "callbacks": [
            {"type": "MFLossMonitor"},
            {
                "type": "CheckpointMonitor",
                "prefix": "tiny",
                "save_checkpoint_steps": 2,
                "checkpoint_format": "safetensors",
            },
        ],
        "model": {
            "arch": {"type": "LlamaForCausalLM"},
            "model_config": {
                "type": "LlamaConfig",
                "num_layers": 2,
                "hidden_size": 32,
                "num_heads": 4,
                "n_kv_heads": 2,
                "vocab_size": 64,
                "intermediate_size": 48,
                "seq_length": 8,
                "param_init_type": "float32",
            },
        },
    }
    for key, value in changes.items():
        if key in found or key.endswith(("_dataset", "_wrapper")) or key == "processor":
            found[key] = value
        else:
            found["model"]["model_config"][key] = value
    return found


def sharded() -> dict[str, Any]:
    """The `parallel` section of an optimizer shard that cuts everything it can."""
    return {"enable_parallel_optimizer": True, "parallel_optimizer_config": {"parallel_optimizer_threshold": 0}}
