"""One worker: files, resuming, loading, decoding, evaluation, and what is refused."""

from __future__ import annotations

import json
import stat

import ml_dtypes
import numpy as np
import pytest

from tests.embedded.documents import document
from tests.support import load_file
from transform_ckpt.embedded.config import read_embedded
from transform_ckpt.embedded.layout import parameter_shapes
from transform_ckpt.errors import InputError, StorageError

MONITOR = {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 2}


def config_of(**changes):
    return read_embedded(document(**changes), "job.yaml")


def weights(config, seed=0):
    generator = np.random.default_rng(seed)
    shapes = parameter_shapes(config, 0, 1, optimizer=False)
    return {name: generator.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=["ckpt", "safetensors"])
def six_steps(request, job, ms, tmp_path_factory):
    """(how to configure it, losses, directory of rank 0, a function that reads one file)."""
    changes = {"steps": 6, "callbacks": [{**MONITOR, "save_checkpoint_steps": 3, "checkpoint_format": request.param}]}
    output = tmp_path_factory.mktemp("whole")
    losses = job.train(config_of(**changes), 0, 1, str(output), None, resume=False)
    directory = output / "checkpoint" / "rank_0"
    return changes, losses, directory, lambda name: load_file(ms, directory / f"{name}.{request.param}")


def test_resuming_goes_on_bit_by_bit(job, tmp_path, six_steps):
    changes, losses, directory, read = six_steps
    said = []
    again = job.train(
        config_of(**changes), 0, 1, str(tmp_path / "again"), lambda _: read("tiny_rank_0-1_3"),
        resume=True, report=said.append,
    )  # fmt: skip
    assert losses[3:] == again
    assert len(set(losses)) == 6
    whole = {path.name: path.read_bytes() for path in directory.glob("*1_6*")}
    resumed = {path.name: path.read_bytes() for path in (tmp_path / "again/checkpoint/rank_0").glob("*1_6*")}
    assert whole == resumed
    assert len(whole) == 1
    assert any(line.startswith("step 4/6 loss ") for line in said)


def test_files_are_those_of_the_checkpoint_monitor(six_steps):
    _, _, directory, read = six_steps
    names = sorted(path.name.rpartition(".")[0] for path in directory.iterdir())
    assert names == ["meta", "tiny_rank_0-1_3", "tiny_rank_0-1_6"]
    meta = json.loads((directory / "meta.json").read_text())
    assert (meta["last_epoch"], meta["last_step"]) == (1, 6)
    assert (directory / meta["last_ckpt_file"]).exists()
    found = read("tiny_rank_0-1_3")
    counters = {"epoch_num": 1, "step_num": 3, "loss_scale": 1, "global_batch_size": 4}
    assert {name: int(found.pop(name)) for name in counters} == counters
    assert (found["global_step"].dtype, found["global_step"].tolist()) == (np.int32, [3])
    shapes = parameter_shapes(config_of(), 0, 1, optimizer=True)
    assert {name: value.shape for name, value in found.items()} == shapes
    assert {value.dtype for name, value in found.items() if name != "global_step"} == {np.dtype(np.float32)}


def test_file_mode_is_that_of_mindspore(six_steps):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in six_steps[2].glob("tiny*")}
    assert modes == {0o400}


def test_the_oldest_files_go(job, tmp_path):
    config = config_of(steps=4, callbacks=[{**MONITOR, "save_checkpoint_steps": 1, "keep_checkpoint_max": 2}])
    other = tmp_path / "checkpoint" / "rank_0" / "other_rank_0-1_1.ckpt"
    other.parent.mkdir(parents=True)
    other.touch()
    job.train(config, 0, 1, str(tmp_path), None, resume=False)
    names = sorted(path.name for path in other.parent.glob("*.ckpt"))
    assert names == ["other_rank_0-1_1.ckpt", "tiny_rank_0-1_3.ckpt", "tiny_rank_0-1_4.ckpt"]


def test_epochs_are_counted_and_the_end_is_saved(job, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(65) % 64)
    data = {"data_loader": {"dataset_dir": str(tmp_path / "tokens.npy")}}
    runner = {"batch_size": 4, "epochs": 2}
    config = config_of(runner_config=runner, train_dataset=data, callbacks=[{**MONITOR, "save_checkpoint_steps": 3}])
    assert len(job.train(config, 0, 1, str(tmp_path), None, resume=False)) == 4
    names = sorted(path.name for path in (tmp_path / "checkpoint" / "rank_0").glob("*.ckpt"))
    assert names == ["tiny_rank_0-2_1.ckpt", "tiny_rank_0-2_2.ckpt"]


def test_nothing_is_saved_without_a_monitor(job, tmp_path):
    job.train(config_of(steps=1, callbacks=[]), 0, 1, str(tmp_path), None, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_training_learns(job, tmp_path):
    losses = job.train(config_of(steps=10, callbacks=[]), 0, 1, str(tmp_path), None, resume=False)
    assert losses[-1] < losses[0] - 0.5


# ------------------------------------------------------------------------------------------------ loading


def test_halves_are_cast_and_said_so(job):
    config = config_of()
    full = weights(config)
    halved = {name: value.astype(ml_dtypes.bfloat16) for name, value in full.items()}
    said: list[str] = []
    found = job.predict(config, 0, 1, [[1, 2, 3]], lambda _: halved, max_new_tokens=0, report=said.append)
    widened = {name: value.astype(np.float32) for name, value in halved.items()}
    wanted = job.predict(config, 0, 1, [[1, 2, 3]], lambda _: widened, max_new_tokens=0)
    np.testing.assert_array_equal(found.logits[0], wanted.logits[0])
    assert any("bfloat16 to float32" in line for line in said)


def test_the_loader_is_asked_for_what_is_needed(job, tmp_path):
    config = config_of(steps=1, callbacks=[])
    asked: list[dict[str, tuple[int, ...]]] = []

    def load(shapes):
        asked.append(dict(shapes))
        return {
            name: np.ones(shape, np.int32 if name == "global_step" else np.float32) for name, shape in shapes.items()
        }

    job.train(config, 0, 1, str(tmp_path), load, resume=False)
    assert job.train(config, 0, 1, str(tmp_path), load, resume=True) == []
    assert asked == [parameter_shapes(config, 0, 1, optimizer=resumed) for resumed in (False, True)]


def test_a_weight_of_another_network_is_named(job):
    config = config_of()
    given = {**weights(config), "model.layers.9.ffn_norm.weight": np.ones(3, np.float32), "step_num": np.array(3)}
    said: list[str] = []
    job.predict(config, 0, 1, [[1]], lambda _: given, max_new_tokens=0, report=said.append)
    assert [line for line in said if "left out" in line] == [
        "not in this network, left out: model.layers.9.ffn_norm.weight"
    ]


def test_everything_that_does_not_fit_is_said_at_once(job):
    config = config_of()
    given = dict(weights(config))
    del given["model.norm_out.weight"]
    given["lm_head.weight"] = np.zeros((3, 4), np.float32)
    with pytest.raises(InputError) as caught:
        job.predict(config, 0, 1, [[1]], lambda _: given)
    assert "lacks 1 parameters: model.norm_out.weight" in str(caught.value)
    assert "lm_head.weight: expected shape [64, 32] on this rank, found shape [3, 4]" in str(caught.value)


def test_resuming_needs_states(job, tmp_path):
    config = config_of()
    with pytest.raises(InputError, match="lacks 43 parameters: adam_m"):
        job.train(config, 0, 1, str(tmp_path), lambda _: weights(config), resume=True)
    with pytest.raises(InputError, match="nothing to resume from"):
        job.train(config, 0, 1, str(tmp_path), None, resume=True)


def test_an_output_that_cannot_be_written(job, tmp_path):
    (tmp_path / "checkpoint").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        job.train(config_of(steps=1), 0, 1, str(tmp_path), None, resume=False)


# ------------------------------------------------------------------------------------------------ without training


def test_decoding_stops_at_its_bounds(job):
    config = config_of()
    given = weights(config)
    free = job.predict(config, 0, 1, [[1, 2]], lambda _: given, max_new_tokens=20)
    assert len(free.ids[0]) == config.seq_length
    end = free.ids[0][3]
    position = free.ids[0].index(end, 2)
    stopped = job.predict(config_of(eos_token_id=end), 0, 1, [[1, 2]], lambda _: given, max_new_tokens=20)
    assert stopped.ids[0] == free.ids[0][: position + 1]


def test_text_in_and_out(job):
    config = config_of(vocab_size=256, seq_length=12)
    found = job.predict(config, 0, 1, ["abc"], None, max_new_tokens=2)
    assert found.ids[0][:3] == tuple(b"abc")
    assert found.logits[0].shape == (3, 256)
    assert found.texts[0] == bytes(found.ids[0][3:]).decode(errors="replace")


@pytest.mark.parametrize(("prompt", "message"), [([], "0 tokens"), ([1] * 9, "9 tokens"), ([64], "token 64")])
def test_prompts_that_do_not_fit(job, prompt, message):
    with pytest.raises(InputError, match=message):
        job.predict(config_of(), 0, 1, [prompt], None)


def test_evaluation_is_the_loss_of_training(job, tmp_path):
    config = config_of(steps=1, callbacks=[])
    said: list[str] = []
    loss = job.evaluate(config, 0, 1, None, report=said.append)
    assert loss == job.train(config, 0, 1, str(tmp_path), None, resume=False)[0]
    assert said == [f"evaluated 1 steps, loss {loss:.4f}"]


def test_more_workers_than_there_are(job, tmp_path):
    with pytest.raises(InputError, match="need 2 workers, found 1"):
        job.train(config_of(dp=2), 0, 1, str(tmp_path), None, resume=False)
