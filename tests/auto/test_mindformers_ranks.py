"""Our step in two real processes of one job of MindFormers, each with a network of its own slices.

Importing MindFormers twice is most of the time, so the processes run all jobs one after the other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests import support
from tests.auto import mindformers_driver as driver
from tests.auto.mindformers_driver import write_yaml
from tests.support import Layout, assert_same

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
RULED = driver.layouts()
COMPILED = RULED | {"lm_head.weight": Layout((2,), (-1, -1))}
"""The compiler of the tests leaves lm_head whole, against the rules."""

JOBS: dict[str, dict[str, Any]] = {
    "by rule": {"cut": True},
    "compiled": {"cut": True, "compiler": True, "dataset": [1, 2]},
    "compiled, in memory": {"cut": True, "compiler": True, "yaml": {"transform_in_memory": True}},
    "in Python": {"cut": False, "yaml": {"parallel": {"parallel_mode": "STAND_ALONE"}}},
    "strategy only, by rule": {"cut": True, "yaml": {"only_save_strategy": True}},
    "strategy only, in Python": {
        "cut": True,
        "yaml": {"only_save_strategy": True, "parallel": {"parallel_mode": "STAND_ALONE"}},
    },
    "strategy only, compiled": {"cut": True, "compiler": True, "yaml": {"only_save_strategy": True}},
    "pipeline": {
        "cut": False,
        "yaml": {"parallel_config": {"model_parallel": 1, "pipeline_stage": 2, "micro_batch_num": 2}},
    },
    "one process for both": {"cut": True, "yaml": {"transform_process_num": 1}},
}


@dataclass(frozen=True)
class Pair:
    """What both ranks did in every job."""

    folder: Path
    whole: dict[str, support.Array]
    found: list[dict[str, dict[str, Any]]]

    def output(self, job: str) -> Path:
        """The job's output_dir."""
        return self.folder / job / "output"

    def held(self, job: str, rank: int) -> dict[str, support.Array]:
        """What the rank's network holds after the job."""
        return driver.load_npz(self.folder / job / f"held_{rank}.npz")

    def expected(self, layouts: dict[str, Layout], rank: int) -> dict[str, support.Array]:
        """What it must hold, by the independent slicer."""
        return support.slice_rank(self.whole, [layouts], rank)

    def said(self, job: str, rank: int, *words: str) -> bool:
        """Does one line of the log have all the words?"""
        return any(all(word in line for word in words) for line in self.found[rank][job]["lines"])


@pytest.fixture(scope="module")
def pair(ms: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """All jobs, from a checkpoint of 4 ranks in two stages."""
    if importlib.util.find_spec("mindformers") is None:
        pytest.skip("mindformers is not installed: make venv")
    folder = tmp_path_factory.mktemp("pair")
    whole, stages = driver.weights(), driver.two_stages()
    support.write_strategy(ms, stages, folder / "source" / "strategy")
    source = support.save_ranks(ms, whole, stages, folder / "source" / "checkpoint", "safetensors")
    always = {"use_parallel": True, "load_checkpoint": str(source), "load_ckpt_format": "safetensors"}
    jobs = {
        name: {**job, "yaml": str(write_yaml(folder / name, **always, transform_timeout=100.0, **job.get("yaml", {})))}
        for name, job in JOBS.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", "-m", "tests.auto.mindformers_driver", str(folder / "jobs.json")]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "RANK_ID": str(rank), "RANK_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, process in enumerate(started):
        assert process.returncode == 0, texts[rank][-3000:]
    return Pair(folder, whole, [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2)])


@pytest.mark.parametrize(
    ("job", "layouts"),
    [
        ("by rule", RULED),
        ("one process for both", RULED),
        ("compiled", COMPILED),
        ("compiled, in memory", COMPILED),
        ("in Python", {}),
    ],
)
def test_the_networks_hold_their_slices(pair: Pair, job: str, layouts: dict[str, Layout]) -> None:
    for rank in range(2):
        expected = pair.expected(layouts, rank) if layouts else pair.whole
        assert_same(pair.held(job, rank), expected, f"rank {rank}")
        assert pair.said(job, rank, f"rank {rank}: 21 parameters loaded")


def test_a_stage_holds_its_own_parameters(pair: Pair) -> None:
    """The network of a rank lists the other stage's, too: they are not missing, and not loaded."""
    for rank, stage in enumerate(driver.two_stages()):
        found = pair.held("pipeline", rank)
        same = {name for name, array in found.items() if np.array_equal(array, pair.whole[name])}
        assert same == set(stage)
        assert pair.said("pipeline", rank, f"rank {rank}: {len(stage)} parameters loaded")


@pytest.mark.parametrize(("job", "layouts"), [("by rule", RULED), ("compiled", COMPILED)])
def test_files_and_strategies_are_left(ms: ModuleType, pair: Pair, job: str, layouts: dict[str, Layout]) -> None:
    known = pair.output(job) / "transformed_checkpoint"
    (result,) = known.iterdir()
    for rank, found in support.load_ranks(ms, result).items():
        assert_same(found, pair.expected(layouts, rank), f"rank {rank}")
    assert (pair.output(job) / "strategy" / "ckpt_strategy_rank_1.ckpt").is_file()
    assert [found[job]["path"] for found in pair.found] == [str(known.resolve())] * 2


def test_why_strategies_come_by_rule_is_said(pair: Pair) -> None:
    assert pair.said("by rule", 0, "strategies come by rule: ", "parallel mode stand_alone")


def test_the_compiler_is_asked_as_mindformers_asks_it(pair: Pair) -> None:
    asked = {"dataset": [1, 2], "mode": 0, "sink": [True, 1], "epoch": 1, "for": [False, True]}
    assert [found["compiled"]["seen"] for found in pair.found] == [[asked], [asked]]


def test_where_the_rules_disagree_with_the_compiler_is_said(pair: Pair) -> None:
    """The rules cut lm_head; they list optimizer states, too, which this compiler did not see."""
    assert pair.said("compiled", 0, "the compiler's strategy is used, the rules disagree: lm_head.weight (stage 0)")
    assert not pair.said("compiled", 0, "rules disagree: model.norm_out.weight")
    assert not pair.said("compiled", 1, "rules disagree")


def test_in_memory_only_strategies_are_written(pair: Pair) -> None:
    job = "compiled, in memory"
    assert not (pair.output(job) / "transformed_checkpoint").exists()
    assert not (pair.output(job) / "auto_trans").exists()
    assert sorted(path.name for path in (pair.output(job) / "strategy").glob("*.ckpt")) == [
        "ckpt_strategy_rank_0.ckpt",
        "ckpt_strategy_rank_1.ckpt",
    ]


@pytest.mark.parametrize("job", ["strategy only, by rule", "strategy only, in Python", "strategy only, compiled"])
def test_only_save_strategy_ends_with_files_of_all_ranks(pair: Pair, job: str) -> None:
    assert [found[job]["ended"] for found in pair.found] == [0, 0]
    assert (pair.output(job) / "strategy").is_symlink()
    assert (pair.output(job) / "strategy" / "ckpt_strategy_rank_1.ckpt").is_file()
    assert not (pair.output(job) / "transformed_checkpoint").exists()
    assert not any(array.any() for array in pair.held(job, 0).values())
