"""Hugging Face weights that transformers itself has saved, under MindFormers' legacy names."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import support
from tests.hostile.driver import write_file
from transform_ckpt import api
from transform_ckpt.auto import hf_names
from transform_ckpt.errors import InputError

_SAVE = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
root = sys.argv[1]
torch.manual_seed(3)
sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=32)
made = {
    "llama": (LlamaForCausalLM(LlamaConfig(**sizes)), "5GB"),
    "sharded": (LlamaForCausalLM(LlamaConfig(**sizes)), "4KB"),
    "biases": (LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)), "5GB"),
    "tied": (LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)), "5GB"),
    "qwen2": (Qwen2ForCausalLM(Qwen2Config(**sizes)), "5GB"),
    "bfloat16": (Qwen2ForCausalLM(Qwen2Config(**sizes)).to(torch.bfloat16), "4KB"),
}
for name, (model, size) in made.items():
    with torch.no_grad():  # biases and norms begin as constants
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(f"{root}/{name}", max_shard_size=size)
    kept = {n: p.float().numpy() for n, p in model.state_dict().items()}
    np.savez(f"{root}/{name}.npz", **kept)
"""
MODELS = ("llama", "sharded", "biases", "tied", "qwen2", "bfloat16")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a process of its own: torch and mindspore need not meet here."""
    root = tmp_path_factory.mktemp("hf")
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("torch and transformers are not installed: make venv")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _SAVE, str(root)], capture_output=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()
    return root


def expected(saved: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """MindFormers' names by a few replacements of parts, each written down from its own networks."""
    import ml_dtypes

    parts = {
        "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight", "model.norm.": "model.norm_out.",
        ".input_layernorm.": ".attention_norm.", ".post_attention_layernorm.": ".ffn_norm.",
        ".self_attn.": ".attention.", ".mlp.": ".feed_forward.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
    }  # fmt: skip
    found = {}
    with np.load(saved / f"{name}.npz") as arrays:
        for key in arrays.files:
            renamed = key
            for old, new in parts.items():
                renamed = renamed.replace(old, new)
            found[renamed] = arrays[key].astype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)
    if name == "tied":
        found.pop("lm_head.weight", None)
    return found


def loaded(source: Any) -> dict[str, Any]:
    """A source's whole tensors."""
    from transform_ckpt import planner
    from transform_ckpt.target import TargetOptions, lay_out

    return dict(api.load_planned(planner.build(source, lay_out(source, None, TargetOptions("safetensors")))))


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_transformers_saved(saved: Path, name: str) -> None:
    source = api.open_checkpoint(saved / name)
    assert hf_names.is_hugging_face(source)
    found = hf_names.renamed(source)
    support.assert_same(loaded(found), expected(saved, name), name)
    assert not hf_names.is_hugging_face(found)
    assert any("Hugging Face names" in note for note in found.notes)


def test_shards_are_several_files(saved: Path) -> None:
    assert len(list((saved / "sharded").glob("*.safetensors"))) > 3
    assert (saved / "sharded" / "model.safetensors.index.json").is_file()


def test_all_names_are_those_of_mindformers_networks(saved: Path) -> None:
    """The rules for generated strategies know the same names."""
    from strategy.generate_rules import NAMINGS

    for name in MODELS:
        for key in hf_names.renamed(api.open_checkpoint(saved / name)).params:
            assert NAMINGS["legacy"].find(key) is not None, key


def linked(saved: Path, name: str, to: Path) -> Path:
    """A copy that may be damaged."""
    to.mkdir()
    for path in (saved / name).iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_missing_shard_is_named(saved: Path, tmp_path: Path) -> None:
    folder = linked(saved, "sharded", tmp_path / "model")
    lost = sorted(folder.glob("model-*.safetensors"))[-2]
    lost.unlink()
    with pytest.raises(InputError) as error:
        hf_names.renamed(api.open_checkpoint(folder))
    assert lost.name in str(error.value)
    assert "fetch the missing files" in str(error.value)


def test_a_tensor_that_the_index_names_and_no_shard_holds(saved: Path, tmp_path: Path) -> None:
    folder = linked(saved, "sharded", tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.2.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1 tensors it names are not there \(model\.layers\.2\.mlp"):
        hf_names.renamed(api.open_checkpoint(folder))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": [1]}', '{"weight_map": "ab"}']
)
def test_an_index_that_is_none(saved: Path, tmp_path: Path, text: str) -> None:
    folder = linked(saved, "sharded", tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="cannot be read as an index"):
        hf_names.renamed(api.open_checkpoint(folder))


MARK = {"model.embed_tokens.weight": np.zeros((4, 2), np.float32)}


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.experts.0.up_proj.weight", "score.weight"]
)
def test_a_tensor_without_a_name_is_refused(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / "model.safetensors", {**MARK, name: np.zeros(2, np.float32)})
    with pytest.raises(InputError, match="have no name in MindFormers' legacy naming") as error:
        hf_names.renamed(api.open_checkpoint(tmp_path))
    assert name in str(error.value)


def test_constants_of_old_transformers_are_left_out_and_said(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_file(tmp_path / "model.safetensors", {**MARK, name: np.zeros(2, np.float32)})
    found = hf_names.renamed(api.open_checkpoint(tmp_path))
    assert list(found.params) == ["model.tok_embeddings.embedding_weight"]
    assert any(name in note for note in found.notes)


@pytest.mark.parametrize("name", ["model.tok_embeddings.embedding_weight", "embedding.word_embeddings.weight", "w"])
def test_other_names_are_left_alone(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / "model.safetensors", {name: np.zeros(2, np.float32)})
    assert not hf_names.is_hugging_face(api.open_checkpoint(tmp_path))


def test_ranks_get_slices_of_hugging_face_weights(saved: Path, tmp_path: Path) -> None:
    """From the saved directory to two ranks of a generated strategy, through disk."""
    from strategy.generate import for_parameters
    from strategy.generate_files import write_rank_files
    from tests.auto import driver

    whole = expected(saved, "sharded")
    made = for_parameters({n: a.shape for n, a in whole.items()}, dict.fromkeys(whole, "F32"), "mp=2")
    write_rank_files(made, str(tmp_path / "strategy"))
    request = {"load_checkpoint": str(saved / "sharded"), "output_dir": str(tmp_path / "out"), "timeout": 20.0}
    specs = driver.job_of(2, request, strategy=str(tmp_path / "strategy" / "merged_ckpt_strategy.ckpt"))
    found = driver.all_done(driver.run(tmp_path / "job", specs))
    for rank in range(2):
        cut = {}
        for name, array in whole.items():
            box = made.stages[0].layouts[name].boxes(array.shape)[rank]
            cut[name] = array[tuple(slice(s, s + n) for s, n in zip(box.start, box.size, strict=True))]
        assert found[f"r{rank}"].tensors == driver.digests(cut)
    assert cut["model.layers.0.attention.wq.weight"].size < whole["model.layers.0.attention.wq.weight"].size
