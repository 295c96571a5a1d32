"""The embedded Llama against Hugging Face's in torch: logits, gradients and AdamW steps, under plain renaming."""

from __future__ import annotations

import importlib
import re
import warnings

import numpy as np
import pytest

from tests.embedded.documents import document
from transform_ckpt.embedded.config import read_embedded
from transform_ckpt.embedded.data import read_samples

RENAMED = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_LAYER = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
EPS = 1e-3
"""Not far below a gradient, so that a step is well conditioned: its place in the formula shows, rounding does not."""

SHAPES = {
    "grouped": {},
    "grouped, tied": {"tie_word_embeddings": True},
    "a head each": {"n_kv_heads": 4, "theta": 500000.0, "rms_norm_eps": 1e-6},
    "one key, three layers": {"n_kv_heads": 1, "num_layers": 3},
}


def renamed(name):
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"model.layers.{match[1]}.{IN_LAYER[match[2]]}.weight" if match else RENAMED[name]


@pytest.fixture(scope="module")
def torch(ms):
    """After MindSpore, which does not bear protobuf before it."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def reference(torch):
    """Hugging Face's model of a configuration, with weights that are not near anything regular."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")

    def make(config, *, tied):
        model = config.model
        torch.manual_seed(1)
        settings = transformers.LlamaConfig(
            vocab_size=model.vocab, hidden_size=model.hidden, intermediate_size=model.ffn,
            num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
            rms_norm_eps=config.norm_eps, rope_theta=config.theta, tie_word_embeddings=tied,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(settings).float()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        return made

    return make


def weights_of(model):
    return {renamed(name): parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(job, torch, reference, shape):
    config = read_embedded(document(**SHAPES[shape]), "job.yaml")
    model = reference(config, tied="tied" in shape)
    prompts = [[3, 1, 4, 1, 5, 9], [2, 6]]
    found = job.predict(config, 0, 1, prompts, lambda _: weights_of(model), max_new_tokens=2)
    for prompt, logits, ids in zip(prompts, found.logits, found.ids, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).logits[0].numpy()
            best = model.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False, pad_token_id=0)[0].tolist()
        np.testing.assert_allclose(logits, wanted, atol=1e-5, rtol=1e-5)
        assert logits.std() > 0.1
        assert list(ids) == best


@pytest.mark.parametrize("kind", ["AdamW", "AdamW, clipped", "AdamW, tied"])
def test_two_steps_of_adamw(job, ms, torch, reference, tmp_path, kind):
    """Weights after two steps, and the first moments, which show the gradients themselves."""
    tied, clip = "tied" in kind, "clipped" in kind
    wrapper = {"use_clip_grad": clip, "max_grad_norm": 0.1}
    optimizer = {"type": "AdamW", "betas": [0.9, 0.95], "eps": EPS, "weight_decay": 0.1}
    yaml = document(steps=2, tie_word_embeddings=tied, runner_wrapper=wrapper, optimizer=optimizer)
    config = read_embedded(yaml, "job.yaml")
    model = reference(config, tied=tied)
    losses = job.train(config, 0, 1, str(tmp_path), lambda _: weights_of(model), resume=False)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1)
    wanted_losses = []
    for step in range(2):
        inputs, labels = (torch.tensor(part.astype(np.int64)) for part in read_samples(config).batch(step, 0))
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
        adamw.zero_grad()
        loss.backward()
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.2
        adamw.step()
        wanted_losses.append(loss.item())
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)

    path = tmp_path / "checkpoint" / "rank_0" / "tiny_rank_0-1_2.safetensors"
    saved = {k: np.asarray(v.asnumpy()) for k, v in ms.load_checkpoint(str(path), format="safetensors").items()}
    states = {renamed(name): adamw.state[parameter] for name, parameter in model.named_parameters()}
    for name, value in weights_of(model).items():
        np.testing.assert_allclose(saved[name], value, atol=2e-6, err_msg=name)
        for prefix, key in (("adam_m.", "exp_avg"), ("adam_v.", "exp_avg_sq")):
            wanted = states[name][key].numpy()
            np.testing.assert_allclose(
                saved[prefix + name], wanted, rtol=2e-4, atol=2e-5 * np.abs(wanted).max(), err_msg=prefix + name
            )


def test_adam_weight_decay_of_mindspore(job, ms, tmp_path):
    """optimizer.type AdamWeightDecay is MindSpore's, without bias correction: the same update by its own formula."""
    yaml = document(steps=1, optimizer={"type": "AdamWeightDecay", "betas": [0.9, 0.95], "eps": 1e-3})
    config = read_embedded(yaml, "job.yaml")
    job.train(config, 0, 1, str(tmp_path), None, resume=False)
    path = tmp_path / "checkpoint" / "rank_0" / "tiny_rank_0-1_1.safetensors"
    saved = {k: np.asarray(v.asnumpy()) for k, v in ms.load_checkpoint(str(path), format="safetensors").items()}
    state = importlib.import_module("transform_ckpt.embedded.state")
    layout = importlib.import_module("transform_ckpt.embedded.layout")
    for name, found in layout.slices(config, 0).items():
        before = state.first_values(config)(found)
        update = saved["adam_m." + name] / (np.sqrt(saved["adam_v." + name]) + 1e-3)
        np.testing.assert_allclose(saved[name], before - 1e-2 * update, atol=1e-7, err_msg=name)
