"""A tiny Llama of the real MindFormers, its configurations and checkpoints, for the tests of our step in its jobs.

`python -m tests.auto.mindformers_driver SPEC.json` is one rank of a job: it installs, calls the step as base_trainer
does, and writes what its network holds.  Imports mindspore and mindformers in functions only.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from tests import support
from tests.support import Layout

HIDDEN, FFN, VOCAB, LAYERS = 16, 24, 32, 2
NAMES = "adam_m. adam_v.".split()

COLUMN, ROW, WHOLE = Layout((2,), (0, -1)), Layout((2,), (-1, 0)), Layout((2,), (-1,))

MODEL: dict[str, Any] = {
    "type": "LlamaConfig",
    "batch_size": 1,
    "seq_length": 8,
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": 2,
    "n_kv_heads": 2,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "compute_dtype": "float32",
    "layernorm_compute_type": "float32",
    "softmax_compute_type": "float32",
    "rotary_dtype": "float32",
    "param_init_type": "float32",
    "embedding_init_type": "float32",
    "use_flash_attention": False,
    "fused_rms_norm": False,
    "use_past": False,
}

JOB: dict[str, Any] = {
    "run_mode": "predict",
    "seed": 1,
    "use_parallel": False,
    "auto_trans_ckpt": True,
    "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "tiny_llama"},
    "runner_config": {"epochs": 1, "batch_size": 1, "sink_mode": True, "sink_size": 1},
    "optimizer": {"type": "AdamW"},
    "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-3, "warmup_steps": 0, "total_steps": 4},
    "context": {"mode": 0, "device_target": "CPU"},
    "parallel": {"parallel_mode": 1},
    "parallel_config": {"data_parallel": 1, "model_parallel": 2, "vocab_emb_dp": False},
    "callbacks": [],
    "model": {"model_config": MODEL, "arch": {"type": "LlamaForCausalLM"}},
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The network's parameters, written down by hand."""
    found: dict[str, tuple[int, ...]] = {"model.tok_embeddings.embedding_weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{norm}.weight": (HIDDEN,) for norm in ("ffn_norm", "attention_norm")}
        found |= {f"{prefix}.attention.{name}.weight": (HIDDEN, HIDDEN) for name in ("wq", "wk", "wv", "wo")}
        found |= {f"{prefix}.feed_forward.{name}.weight": (FFN, HIDDEN) for name in ("w1", "w3")}
        found[f"{prefix}.feed_forward.w2.weight"] = (HIDDEN, FFN)
    return found | {"model.norm_out.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def weights(*prefixes: str, seed: int = 0) -> dict[str, support.Array]:
    """Values for every parameter, and for its optimizer states."""
    rng = np.random.default_rng(seed)
    names = [(f"{prefix}{name}", shape) for prefix in ("", *prefixes) for name, shape in shapes().items()]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names}


def layouts(*prefixes: str) -> dict[str, Layout]:
    """Tensor parallel over two devices."""
    found = {}
    for name, shape in shapes().items():
        row = name.endswith((".wo.weight", ".w2.weight"))
        found[name] = WHOLE if len(shape) == 1 else ROW if row else COLUMN
    return {f"{prefix}{name}": layout for prefix in ("", *prefixes) for name, layout in found.items()}


def two_stages(*prefixes: str) -> list[dict[str, Layout]]:
    """4 ranks: two stages of one layer each, two devices a stage."""
    first = ("tok_embeddings", "layers.0.")
    found: list[dict[str, Layout]] = [{}, {}]
    for name, layout in layouts(*prefixes).items():
        found[0 if any(part in name for part in first) else 1][name] = layout
    return found


def write_yaml(folder: Path, **changes: Any) -> Path:
    """A job's YAML; a dict among the changes is merged into the section of its name."""
    document = {"output_dir": str(folder / "output"), **JOB}
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) and key in document else value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def import_mindformers(log: Path) -> ModuleType:
    """The real MindFormers; it writes a log as it is imported."""
    os.environ["LOCAL_DEFAULT_PATH"] = os.environ["LOG_MF_PATH"] = str(log)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mindspore = importlib.import_module("mindspore")
        mindspore.set_device("CPU")
        found = importlib.import_module("mindformers")
        importlib.import_module("mindformers.trainer.base_trainer")
    return found


def read_config(path: Path) -> Any:
    """A real MindFormerConfig as a Trainer has it when it calls the step."""
    from mindformers.tools.register import MindFormerConfig
    from mindformers.trainer.utils import convert_checkpoint_config

    config = MindFormerConfig(str(path))
    convert_checkpoint_config(config)
    return config


def build_network(config: Any, **changes: Any) -> Any:
    """The real LlamaForCausalLM."""
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

    options = {**config.model.model_config, **changes}
    options.pop("type")
    return LlamaForCausalLM(LlamaConfig(**options))


def held(cell: Any) -> dict[str, support.Array]:
    """What a network holds."""
    return {param.name: np.array(param.asnumpy()) for _, param in cell.parameters_and_names()}


def load_npz(path: Path) -> dict[str, support.Array]:
    """What a rank has written of its network."""
    with np.load(path) as found:
        return dict(found)


def cut(network: Any, stage: Mapping[str, Layout], device: int) -> None:
    """Give parameters the shapes of one device's slices, as the compiler does."""
    import mindspore as ms

    for _, param in network.parameters_and_names():
        index = support.device_slices(param.shape, stage[param.name])[device]
        param.set_data(ms.Tensor(np.zeros(param.shape, np.float32)[index]), slice_shape=True)


def step(*arguments: Any, **options: Any) -> None:
    """The step, as base_trainer calls it."""
    base_trainer: Any = importlib.import_module("mindformers.trainer.base_trainer")
    base_trainer.transform_and_load_checkpoint(*arguments, **options)


def fake_compiler(stages: Sequence[Mapping[str, Layout]], seen: list[dict[str, Any]]) -> Any:
    """What MindSpore's compiler does on Ascend, as far as files go: this rank's strategy, where the context says."""

    def compile_model(
        model: Any,
        dataset: Any,
        mode: int,
        sink_mode: bool,  # noqa: FBT001
        epoch: int = 1,
        sink_size: int = 1,
        do_eval: bool = False,  # noqa: FBT001, FBT002
        do_predict: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        import mindspore as ms

        seen.append({"dataset": dataset, "mode": mode, "sink": [sink_mode, sink_size], "epoch": epoch,
                     "for": [do_eval, do_predict]})  # fmt: skip
        path = Path(ms.get_auto_parallel_context("strategy_ckpt_save_file"))
        support.write_strategy(ms, stages, path.parent.with_suffix(f".{path.stem}"))
        (path.parent.with_suffix(f".{path.stem}") / path.name).rename(path)

    return compile_model


def run(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """One job of one rank: what its network holds, and what it said."""
    import mindspore as ms
    from mindformers.checkpoint import utils as checkpoint_utils
    from mindformers.parallel_core.inference import utils as inference_utils
    from mindformers.tools.logger import logger

    from transform_ckpt.auto.mindformers import strategies

    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        seen: list[dict[str, Any]] = []
        for level in ("info", "warning"):
            patch.setattr(logger, level, lambda text, *_: lines.append(str(text)))
        compiled = layouts() | {"lm_head.weight": Layout((2,), (-1, -1))}
        if job.get("compiler"):
            patch.setattr(strategies, "not_compiled", lambda _call: "")
            patch.setattr(checkpoint_utils, "compile_model", fake_compiler([compiled], seen))
        patch.setattr(inference_utils, "get_group_size", lambda: 2)
        config = read_config(Path(job["yaml"]))
        network = build_network(config)
        if job["cut"]:
            cut(network, compiled if job.get("compiler") else layouts(), rank)
        ended: object = None
        try:
            step(config, ms.Model(network), network, job.get("dataset"), do_predict=True)
        except SystemExit as end:
            ended = end.code
        np.savez(Path(job["yaml"]).parent / f"held_{rank}.npz", **dict(held(network)))
        return {"lines": lines, "seen": seen, "path": config.checkpoint.load_path, "ended": ended}


def main(argv: Sequence[str]) -> None:
    """One rank of several jobs, one after the other: RANK_ID and RANK_SIZE are in the environment."""
    folder, rank = Path(argv[0]).parent, int(os.environ["RANK_ID"])
    jobs = json.loads(Path(argv[0]).read_text())
    import_mindformers(folder / f"log_{rank}")
    from transform_ckpt.auto.mindformers import install

    install()
    found = {name: run(job, rank) for name, job in jobs.items()}
    (folder / f"found_{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
