"""Configuration files: every job that MindFormers ships is understood, ours are, and have a strategy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from strategy.generate import generate
from strategy.generate_config import read_config
from strategy.generate_yaml import read_yaml
from transform_ckpt.auto.settings import check_world, read_settings
from transform_ckpt.auto.settings_keys import SECTIONS
from transform_ckpt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted((ROOT / "configs").rglob("*.yaml"))


def shipped() -> list[Path]:
    """The YAMLs of the installed MindFormers: its wheel puts them beside the package."""
    spec = find_spec("mindformers")
    places = list(spec.submodule_search_locations or []) if spec else []
    return sorted(path for place in places for path in (Path(place).parent / "configs").rglob("*.yaml"))


def name(path: Path) -> str:
    """The last directory and the file."""
    return "/".join(path.parts[-2:])


SHIPPED = shipped()
CONVERT = [path for path in SHIPPED if path.parent.name == "convert_config"]
JOBS = [path for path in SHIPPED if path not in CONVERT]
needs_mindformers = pytest.mark.skipif(not SHIPPED, reason="mindformers is not installed, or without its configs")


@needs_mindformers
def test_all_shipped_files_are_tested() -> None:
    assert (len(JOBS), len(CONVERT)) == (24, 2)


@pytest.mark.parametrize("path", JOBS, ids=name)
def test_shipped_job_is_understood(path: Path) -> None:
    found = read_settings(["--config", str(path), "--load_checkpoint", "somewhere"], {})
    written = read_yaml(str(path))
    assert found.load_checkpoint == "somewhere"
    assert (found.run_mode, found.use_parallel) == (written["run_mode"], written["use_parallel"])
    assert found.auto_trans_ckpt == written.get("auto_trans_ckpt", False)
    assert found.load_ckpt_format == written.get("load_ckpt_format")
    assert not [note for note in found.notes if "nothing is known to read" in note]
    check_world(found, found.world)


@pytest.mark.parametrize("path", JOBS, ids=name)
def test_shipped_job_without_a_checkpoint(path: Path) -> None:
    written = read_yaml(str(path))
    if written.get("auto_trans_ckpt") and not written["load_checkpoint"]:  # a blank to be filled in; MindFormers raises
        with pytest.raises(InputError, match="auto_trans_ckpt: True and load_checkpoint: '' disagree"):
            read_settings(["--config", str(path)], {})
    else:
        assert read_settings(["--config", str(path)], {}).load_checkpoint == (written["load_checkpoint"] or None)


@pytest.mark.parametrize("path", CONVERT, ids=name)
def test_shipped_file_that_is_no_job(path: Path) -> None:
    with pytest.raises(InputError, match="is not a job's configuration"):
        read_settings(["--config", str(path)], {})


# ------------------------------------------------------------------------------------------------ ours


def test_every_model_has_its_files() -> None:
    assert {name(path) for path in OURS} == {
        "deepseek3/pretrain_deepseek3_671b.yaml",
        "llama/finetune_llama2_7b.yaml",
        "llama/predict_llama2_7b.yaml",
        "llama/run_llama_7b.yaml",
        "llama/tiny_llama_cpu.yaml",
        "qwen2/finetune_qwen2_7b.yaml",
        "qwen3/finetune_qwen3_8b.yaml",
    }


@pytest.mark.parametrize("path", OURS, ids=name)
def test_our_job_is_understood(path: Path) -> None:
    found = read_settings(["--config", str(path), "--auto_trans_ckpt", "True", "--load_checkpoint", "x"], {})
    assert not [note for note in found.notes if "nothing is known to read" in note]
    assert found.src_strategy is None
    check_world(found, found.world)
    assert read_settings(["--config", str(path)], {}).auto_trans_ckpt is False


@pytest.mark.parametrize("path", OURS, ids=name)
def test_our_job_has_a_strategy(path: Path) -> None:
    found = read_settings(["--config", str(path)], {})
    command = [sys.executable, "-m", "transform_ckpt", "layout", "--config", str(path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["world"] == found.world
    assert len(shown["stages"]) == found.factors["pipeline_stage"]
    states = [name for stage in shown["stages"] for name in stage["params"] if name.startswith("adam_m.")]
    assert bool(states) == found.is_training
    cut = [row for stage in shown["stages"] for row in stage["params"].values() if max(row["parts"]) > 1]
    assert bool(cut) == found.use_parallel


SIZES = {
    "run_llama_7b": 6.738e9,
    "finetune_llama2_7b": 6.738e9,
    "predict_llama2_7b": 6.738e9,
    "finetune_qwen2_7b": 7.616e9,
    "finetune_qwen3_8b": 8.191e9,
    "pretrain_deepseek3_671b": 671e9 + 13.6e9,  # with the MTP layer, whose embedding and head are the model's own
    "tiny_llama_cpu": 0.140e6,
}
"""Parameters as the models' makers publish them (tiny: counted by hand)."""


@pytest.mark.parametrize("path", OURS, ids=name)
def test_our_job_has_its_model_s_size(path: Path) -> None:
    generated = generate(read_config(str(path)))
    layouts = {key for stage in generated.strategy.stages for key in stage.layouts}
    states = ("adam_", "accu_grads.")
    count = 0
    for key in layouts:
        if not key.startswith(states):
            elements = 1
            for length in generated.shapes[key]:
                elements *= length
            count += elements
    assert count == pytest.approx(SIZES[path.stem], rel=0.005)


# ------------------------------------------------------------------------------------------------ real MindFormers

READ = """
import json, sys
from mindformers.tools.register import MindFormerConfig
from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS
from mindformers.core.parallel_config import build_parallel_config
from transform_ckpt.auto.settings import settings_from_document
out = {"keys": {name: kind.keys() for name, kind in CONFIG_NAME_TO_CLASS.items() if hasattr(kind, "keys")}, "jobs": {}}
for path in sys.argv[2:]:
    config = MindFormerConfig(path)
    config.load_checkpoint = "somewhere"
    rows = []
    for step in (lambda: None, lambda: build_parallel_config(config)):
        step()
        found = settings_from_document(config, path, {})
        row = {name: getattr(found, name) for name in found.__slots__ if name not in ("document", "extra", "notes")}
        rows.append({**row, "factors": found.factors})
    out["jobs"][path] = rows
with open(sys.argv[1], "w") as file:
    json.dump(out, file)
"""


@pytest.mark.slow
@needs_mindformers
def test_mindformers_reads_the_same(tmp_path: Path) -> None:
    """Its MindFormerConfig, template applied, and again with parallel_config as an object, gives the same settings."""
    paths = [str(path) for path in (*JOBS, *OURS)]
    command = [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path / "out.json"), *paths]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "out.json").read_text())
    for section, keys in theirs["keys"].items():
        known = SECTIONS.get(() if section == "general_config" else (section,))
        assert known is None or set(keys) <= set(known.keys), section
    for path in paths:
        ours = read_settings(["--config", path, "--load_checkpoint", "somewhere"], {})
        for row in theirs["jobs"][path]:
            assert _differences(ours, row) == {}, path


def _differences(ours: Any, theirs: dict[str, Any]) -> dict[str, Any]:
    """Fields that differ; what MindFormers fills in where the YAML is silent is no difference."""
    filled = {"load_ckpt_format": "ckpt"}
    mine = {key: getattr(ours, key) for key in theirs}
    mine |= {key: value for key, value in filled.items() if mine[key] is None}
    mine["predict_data"] = list(mine["predict_data"])
    return {key: (mine[key], value) for key, value in theirs.items() if mine[key] != value}
