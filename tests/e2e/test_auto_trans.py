"""Jobs as a user starts them, on the CPU: run_distribute.sh with a rank table, run_mindformer.py, real training.

Two ranks train from random weights; their checkpoint is predicted from and evaluated on one, through disk and in
memory; a checkpoint that lacks a tensor ends a job, or not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests import support

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "llama" / "tiny_llama_cpu.yaml"
STEPS = ("--options", "runner_config.max_steps=2")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ms")]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # launchers of others, and what mindformers exports when another test imports it into this process
    dropped = ("RANK", "MS_", "SLURM", "OMPI", "PMI", "WORLD", "LOCAL_", "LOG_", "REMOTE_", "RUN_MODE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {**kept, "PATH": path, "PYTHON": sys.executable, "GLOG_v": "3"}


def run(folder: Path, *words: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def job(folder: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, ROOT / "run_mindformer.py", "--config", CONFIG, *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have trained: output/checkpoint, output/strategy, output/log."""
    folder = tmp_path_factory.mktemp("job")
    table = run(folder, sys.executable, ROOT / "tools" / "hccl_tools.py", "--device_num", "[0,2)")
    assert table.returncode == 0, table.stderr
    (path,) = folder.glob("hccl_2p_01_*.json")
    done = run(folder, "bash", ROOT / "scripts" / "run_distribute.sh", path, CONFIG, "[0,2]", "train", *STEPS)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def whole(ms: ModuleType, folder: Path) -> Mapping[str, support.Array]:
    """The trained weights, joined by hand: axis 0 of columns, axis 1 of rows."""
    ranks = [support.load_file(ms, max((folder / f"rank_{r}").glob("*.safetensors"))) for r in range(2)]
    found = {}
    for name, part in ranks[0].items():
        other = ranks[1][name]
        axis = 1 if re.search(r"\.(wo|w2)\.weight$", name) else 0
        split = name.endswith("weight") and part.ndim == 2
        found[name] = np.concatenate([part, other], axis) if split else part
    return found


def test_two_ranks_trained(trained: Path) -> None:
    logs = [(trained / "output" / "log" / f"rank_{r}" / "mindformer.log").read_text() for r in range(2)]
    losses = [re.findall(r"^step \d/2 loss ([\d.]+)", log, re.MULTILINE) for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    strategies = {path.name for path in (trained / "output" / "strategy").iterdir()}
    assert strategies == {"ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt"}


def test_to_one_rank(trained: Path, ms: ModuleType) -> None:
    done = job(
        trained, "--run_mode", "predict", "--use_parallel", "False", "--auto_trans_ckpt", "True", "--load_checkpoint",
        "output/checkpoint", "--src_strategy_path_or_dir", "output/strategy", "--predict_data", "abc",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prompt 1/1: " in done.stdout
    result = trained / "output" / "transformed_checkpoint" / "checkpoint" / "rank_0" / "checkpoint_0.safetensors"
    expected = whole(ms, trained / "output" / "checkpoint")
    weights = {name: array for name, array in expected.items() if "." in name and not name.startswith("adam_")}
    found = support.load_file(ms, result)
    support.assert_same({name: found[name] for name in weights}, weights)
    assert not [name for name in found if name.startswith("adam_")]  # prediction has no use for them


def test_in_memory_nothing_is_written(trained: Path, tmp_path: Path) -> None:
    done = job(
        tmp_path, "--run_mode", "eval", "--use_parallel", "False", "--auto_trans_ckpt", "True", "--load_checkpoint",
        trained / "output" / "checkpoint", "--transform_in_memory", "True",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean loss" in done.stdout
    assert "strategy is taken" in done.stdout  # src_strategy_path_or_dir was left out: the one beside is used, and said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_that_lacks_a_tensor(trained: Path, ms: ModuleType, tmp_path: Path, *, strict: bool) -> None:
    weights = dict(whole(ms, trained / "output" / "checkpoint"))
    weights = {name: array for name, array in weights.items() if "." in name and not name.startswith("adam_")}
    del weights["model.layers.1.feed_forward.w1.weight"]
    weights["model.layers.9.stray.weight"] = np.ones((2, 2), np.float32)
    file = support.save_file(ms, weights, tmp_path / "weights.safetensors")
    done = job(
        tmp_path, "--run_mode", "eval", "--use_parallel", "False", "--load_checkpoint", file, "--load_strict", strict
    )
    said = done.stdout + done.stderr
    assert "model.layers.1.feed_forward.w1.weight" in said
    assert "model.layers.9.stray.weight" in said
    assert done.returncode == (3 if strict else 0), said
    assert ("mean loss" in done.stdout) is not strict
