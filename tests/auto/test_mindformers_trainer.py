"""Whole jobs of the real MindFormers Trainer with our step, up to the first forward pass, which needs Ascend."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests import support
from tests.auto import mindformers_driver as driver
from tests.auto.mindformers_driver import NAMES, held, two_stages, weights, write_yaml
from tests.support import assert_same
from transform_ckpt.auto.mindformers import install, uninstall
from transform_ckpt.auto.mindformers.config import Call
from transform_ckpt.auto.strategies import by_rule

STATES = {"epoch_num": 2, "step_num": 40, "global_batch_size": 2, "loss_scale": 1.0}


PARALLEL: list[dict[str, Any]] = [
    {"parallel_config": {"model_parallel": 2, "data_parallel": 2}},
    {"parallel_config": {"model_parallel": 1, "pipeline_stage": 2, "micro_batch_num": 2}},
    {"parallel": {"enable_parallel_optimizer": True}, "parallel_config": {"model_parallel": 1, "data_parallel": 2}},
]


class ReachedError(Exception):
    """Raised where the job would compute; holds what was there."""


@pytest.fixture(scope="module")
def base_trainer(ms: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module of the real MindFormers that calls the step."""
    if importlib.util.find_spec("mindformers") is None:
        pytest.skip("mindformers is not installed: make venv")
    driver.import_mindformers(tmp_path_factory.mktemp("log"))
    return importlib.import_module("mindformers.trainer.base_trainer")


@pytest.fixture(autouse=True)
def _installed(base_trainer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ours in MindFormers' place, for one test, and an end before anything is computed."""

    def reached(*arguments: Any, **options: Any) -> None:
        raise ReachedError(options.get("model") or arguments[0])

    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "output"))
    monkeypatch.setattr(base_trainer, "pipeline", reached)
    monkeypatch.setattr(base_trainer.Model, "train", reached)
    install()
    yield
    uninstall()


def trainer(folder: Path, **changes: Any) -> Any:
    """A Trainer of a YAML, as run_mindformer.py makes it."""
    from mindformers.core.context import build_context
    from mindformers.tools.register import MindFormerConfig
    from mindformers.trainer import Trainer

    train_dataset = changes.pop("dataset", None)
    config = MindFormerConfig(str(write_yaml(folder, **changes)))
    build_context(config)
    return Trainer(args=config, train_dataset=train_dataset)


def predict(folder: Path, path: Path, **changes: Any) -> dict[str, support.Array]:
    """What the network of a prediction holds when the pipeline is built."""
    job = trainer(folder, load_checkpoint=str(path), **changes)
    with pytest.raises(ReachedError) as found:
        job.predict(predict_checkpoint=str(path), input_data="a")
    return held(found.value.args[0])


def test_predict_from_rank_directories_twice(ms: ModuleType, tmp_path: Path) -> None:
    """The second job finds the first's result where MindFormers would delete it, and may begin with it."""
    whole, stages = weights(), two_stages()
    support.write_strategy(ms, stages, tmp_path / "source" / "strategy")
    source = support.save_ranks(ms, whole, stages, tmp_path / "source" / "checkpoint", "safetensors")
    assert_same(predict(tmp_path, source, load_ckpt_format="safetensors"), whole)
    (result,) = (tmp_path / "output" / "transformed_checkpoint").iterdir()
    assert_same(predict(tmp_path, result, load_ckpt_format="safetensors"), whole)
    assert len(list(tmp_path.glob("output/auto_trans/2*"))) == 2


def save_training(ms: ModuleType, folder: Path, fmt: str, step: int, whole: support.Arrays) -> None:
    """What a training of 4 ranks leaves at a step, with the record that MindFormers finds it by."""
    for rank in range(4):
        name = f"llama_rank_{rank}-2_{step}.{fmt}"
        content = {**support.slice_rank(whole, two_stages(*NAMES), rank), "global_step": np.array([step], np.int32)}
        support.save_file(ms, content, folder / f"rank_{rank}" / name, append={**STATES, "step_num": step})


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
def test_training_resumes_at_the_recorded_step(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    """From 4 ranks on 1, at half the global batch size.  The newest file is of a step that is not in the record."""
    source, whole = tmp_path / "source" / "checkpoint", weights(*NAMES)
    support.write_strategy(ms, two_stages(*NAMES), tmp_path / "source" / "strategy")
    save_training(ms, source, fmt, 40, whole)
    save_training(ms, source, fmt, 50, weights(*NAMES, seed=1))
    for rank in range(4):
        record = {"last_epoch": 2, "last_step": 40, "last_ckpt_file": f"llama_rank_{rank}-2_40.{fmt}"}
        (source / f"rank_{rank}" / "meta.json").write_text(json.dumps(record))
    import mindspore.dataset

    job = trainer(
        tmp_path,
        dataset=mindspore.dataset.GeneratorDataset([np.zeros(9, np.int32)] * 4, ["input_ids"]).batch(1),
        load_checkpoint=str(source),
        load_ckpt_format=fmt,
        run_mode="train",
        resume_training=True,
        runner_wrapper={"type": "MFTrainOneStepCell", "scale_sense": 1.0},
        train_dataset={"batch_size": 1, "data_loader": {"type": "MindDataset"}},
        train_dataset_task={"type": "CausalLanguageModelDataset"},
    )
    with pytest.raises(ReachedError) as found:
        job.train(train_checkpoint=str(source), resume_training=True, auto_trans_ckpt=True)
    state = held(found.value.args[0]._train_network)
    assert_same({name: state[name] for name in whole}, whole)
    assert state["global_step"].tolist() == [80]
    assert job.config.runner_config.initial_step == 80


@pytest.mark.parametrize("changes", PARALLEL)
def test_the_configuration_that_a_trainer_has_rebuilt_means_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    """parallel_config is no mapping any more when the step is called."""
    from mindformers.core.parallel_config import build_parallel_config

    path = write_yaml(tmp_path, use_parallel=True, load_checkpoint="there", run_mode="train", **changes)
    configs = [driver.read_config(path) for _ in range(2)]
    build_parallel_config(configs[1])
    assert type(configs[1].parallel_config) is not type(configs[0].parallel_config)
    first, second = (by_rule(Call(config, None, None, None).settings.document, "") for config in configs)
    assert (first.shapes, first.strategy.stages) == (second.shapes, second.strategy.stages)
