"""Tokens in, batches out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.embedded.documents import document
from transform_ckpt.embedded.config import read_embedded
from transform_ckpt.embedded.data import Tokenizer, read_samples
from transform_ckpt.errors import InputError


def config_of(path=None, **changes):
    if path is not None:
        changes["train_dataset"] = {"data_loader": {"dataset_dir": str(path)}}
    return read_embedded(document(**changes), "job.yaml")


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_stored_tokens(tmp_path, suffix):
    path = tmp_path / f"tokens.{suffix}"
    ids = np.arange(41) % 64
    np.save(path, ids) if suffix == "npy" else ids.astype("<i4").tofile(path)
    samples = read_samples(config_of(path, batch=2))
    assert (samples.count, samples.steps_per_epoch) == (5, 2)
    inputs, labels = samples.batch(1, 0)
    assert inputs.tolist() == [list(range(16, 24)), list(range(24, 32))]
    assert (labels == inputs + 1).all()
    assert samples.batch(2, 0)[0].tolist() == samples.batch(0, 0)[0].tolist()


def test_text_is_bytes_without_a_tokenizer(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("ab" * 20)
    inputs, _ = read_samples(config_of(path, batch=1, vocab_size=256)).batch(0, 0)
    assert inputs.tolist() == [list(b"abababab")]


@pytest.mark.parametrize("dp", [2, 4])
def test_ranks_share_the_samples_of_one_worker(dp):
    alone = read_samples(config_of(batch=4))
    shared = read_samples(config_of(batch=4 // dp, dp=dp))
    for step in (0, 3, 100):
        together = np.concatenate([shared.batch(step, rank)[0] for rank in range(dp)])
        np.testing.assert_array_equal(together, alone.batch(step, 0)[0])


def test_drawn_tokens_depend_on_the_seed():
    first, again, other = (read_samples(config_of(seed=seed)).tokens for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_steps_are_bounded(tmp_path):
    assert read_samples(config_of(steps=3)).steps == 3
    unbounded = config_of(runner_config={"batch_size": 4, "epochs": 2})
    assert read_samples(unbounded).steps == 2 * 256 // 4


def test_evaluation_has_its_own_data(tmp_path):
    np.save(tmp_path / "eval.npy", np.full(33, 5))
    config = config_of(eval_dataset={"data_loader": {"dataset_dir": str(tmp_path / "eval.npy")}})
    assert set(read_samples(config, evaluation=True).tokens.tolist()) == {5}
    assert set(read_samples(config).tokens.tolist()) != {5}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("short.txt", b"a" * 32, "3 samples of seq_length 8, a step of all ranks needs 4"),
        ("empty.bin", b"", "0 samples"),
        ("high.txt", b"~" * 99, "token 126 is not one of vocab_size 64"),
        ("odd.bin", b"a" * 33, "no multiple of 4"),
        ("bad.npy", b"no array", "not an .npy file"),
        ("empty.npy", b"", "not an .npy file"),
        ("data.mindrecord", b"x", "MindRecord is not read here"),
    ],
)
def test_bad_data_is_refused(tmp_path, name, data, message):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_samples(config_of(path))


def test_numbers_that_are_no_tokens_are_refused(tmp_path):
    np.save(tmp_path / "real.npy", np.ones(99))
    np.save(tmp_path / "large.npy", np.full(99, 1 << 40))
    with pytest.raises(InputError, match="whole numbers"):
        read_samples(config_of(tmp_path / "real.npy"))
    with pytest.raises(InputError, match="larger than any vocabulary"):
        read_samples(config_of(tmp_path / "large.npy"))


def test_bytes_both_ways():
    tokenizer = Tokenizer(config_of())
    assert tokenizer.decode(tokenizer.encode("Grüße")) == "Grüße"
    assert tokenizer.decode([65, 300]) == "A\ufffd"


def test_a_hugging_face_tokenizer(ms, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "alpha": 1, "beta": 2}, unk_token="[UNK]")  # noqa: S106
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    config = config_of(processor={"tokenizer": {"pretrained_model_dir": str(tmp_path)}})
    tokenizer = Tokenizer(config)
    assert tokenizer.encode("beta alpha gamma") == [2, 1, 0]
    assert tokenizer.decode([1, 2]) == "alpha beta"
    (tmp_path / "corpus.txt").write_text("alpha beta " * 30)
    trained = config_of(tmp_path / "corpus.txt", processor={"tokenizer": {"pretrained_model_dir": str(tmp_path)}})
    assert read_samples(trained).tokens[:4].tolist() == [1, 2, 1, 2]


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="names no Hugging Face tokenizer"):
        Tokenizer(config_of(processor={"tokenizer": {"vocab_file": str(tmp_path / "tokenizer.model")}}))
