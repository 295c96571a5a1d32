"""What is read from a YAML, what is refused, and that no MindSpore is needed for it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from tests.embedded.documents import document, sharded
from transform_ckpt.embedded.config import Optimizer, Saving, read_embedded
from transform_ckpt.embedded.schedule import Schedule
from transform_ckpt.errors import InputError


def read(**changes):
    return read_embedded(document(**changes), "job.yaml")


def test_values_of_a_whole_yaml():
    config = read(
        dp=2,
        mp=2,
        batch=3,
        steps=9,
        theta=500000.0,
        rms_norm_eps="1e-6",  # YAML 1.1 reads this as text
        eos_token_id=2,
        train_dataset={"data_loader": {"type": "MindDataset", "dataset_dir": "corpus.txt"}},
        processor={"tokenizer": {"vocab_file": "tok/tokenizer.json"}},
        runner_wrapper={"type": "MFTrainOneStepCell", "use_clip_grad": True, "max_grad_norm": 0.5},
        lr_schedule={"type": "CosineWithWarmUpLR", "learning_rate": 1e-3, "warmup_ratio": 0.5, "total_steps": -1},
    )
    assert (config.dp, config.mp, config.vocab_emb_dp, config.global_batch_size) == (2, 2, False, 6)
    assert (config.theta, config.norm_eps, config.seq_length, config.eos) == (500000.0, 1e-6, 8, 2)
    assert (config.max_steps, config.seed, config.dataset, config.tokenizer) == (
        9,
        7,
        "corpus.txt",
        "tok/tokenizer.json",
    )
    schedule = Schedule("CosineWithWarmUpLR", 1e-3, warmup_ratio=0.5)
    assert config.optimizer == Optimizer(schedule, (0.9, 0.95), 1e-8, 0.1, clip_norm=0.5)
    assert config.saving == Saving("tiny", 2, 5, "safetensors")


def test_defaults_are_those_of_mindformers():
    small = document()
    for section in ("runner_config", "optimizer", "lr_schedule", "callbacks", "seed"):
        del small[section]
    del small["model"]["model_config"]["seq_length"]
    config = read_embedded(small, "job.yaml")
    assert (config.batch_size, config.epochs, config.max_steps) == (1, 1, None)
    assert (config.theta, config.norm_eps, config.seq_length) == (10000.0, 1e-5, 2048)
    assert config.optimizer == Optimizer()
    assert config.saving is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dp": 2, "parallel": {"context_parallel": 2}}, "context_parallel"),
        ({"dp": 2, "parallel": {"pipeline_stage": 2}}, "pipeline_stage"),
        ({"qkv_concat": True}, "qkv_concat"),
        ({"qkv_has_bias": True}, "qkv_has_bias"),
        ({"extend_method": "LLAMA3"}, "extend_method"),
        ({"runner_config": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type"),
        ({"optimizer": {"type": "AdamW", "use_fused": True}}, "use_fused"),
        ({"optimizer": {"type": "AdamW", "betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"type": "AdamW", "betas": [0.9, 1.0]}}, "betas[1]"),
        ({"optimizer": {"type": "AdamW", "eps": "small"}}, "optimizer.eps"),
        ({"lr_schedule": {"type": "PolynomialWithWarmUpLR"}}, "lr_schedule.type"),
        ({"lr_schedule": {"type": "ConstantWarmUpLR", "decay_steps": 3}}, "decay_steps"),
        ({"runner_config": {"max_steps": 0}}, "max_steps"),
        ({"callbacks": [{"type": "CheckpointMonitor", "checkpoint_format": "pt"}]}, "checkpoint_format"),
        ({"callbacks": [{"type": "CheckpointMonitor", "prefix": "a/b"}]}, "prefix"),
    ],
)
def test_refused_by_name(changes, named):
    with pytest.raises(InputError, match=named.replace("[", r"\[")):
        read(**changes)


def test_all_problems_at_once():
    with pytest.raises(InputError) as caught:
        read(qkv_concat=True, optimizer={"type": "Muon"}, runner_config={"batch_size": 0})
    assert all(name in str(caught.value) for name in ("qkv_concat", "Muon", "batch_size"))


def test_another_family_is_refused():
    mcore = document()
    mcore["use_legacy"] = False
    mcore["model"]["model_config"].update(model_type="qwen3", num_hidden_layers=2)
    with pytest.raises(InputError, match="legacy LlamaForCausalLM only"):
        read_embedded(mcore, "job.yaml")


def test_the_optimizer_shard_is_taken():
    assert read(dp=2).job.parallel.optimizer is None
    wide = document(dp=2)
    wide["parallel"] = sharded()
    assert read_embedded(wide, "job.yaml").job.parallel.optimizer is not None


def test_no_framework_is_imported():
    code = (
        "import sys, transform_ckpt.embedded.config, transform_ckpt.embedded.layout; "
        "print([m for m in ('mindspore', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ learning rates


def test_constant_with_warmup():
    schedule = Schedule("ConstantWarmUpLR", 0.4, warmup_steps=4, warmup_lr_init=0.2)
    assert [schedule.rate(step, 100) for step in (0, 2, 4, 99)] == pytest.approx([0.2, 0.3, 0.4, 0.4])


def test_cosine_ends_at_its_end():
    schedule = Schedule("CosineWithWarmUpLR", 1.0, warmup_steps=2, lr_end=0.1)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert [schedule.rate(step, 10) for step in (0, 1, 2, 4, 6, 10)] == pytest.approx(
        [0.0, 0.5, 1.0, quarter, 0.55, 0.1]
    )


def test_linear_and_its_own_total():
    schedule = Schedule("LinearWithWarmUpLR", 1.0, total_steps=4)
    assert [schedule.rate(step, 1000) for step in (0, 1, 4, 5)] == pytest.approx([1.0, 0.75, 0.0, 0.0])
