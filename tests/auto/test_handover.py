"""The job where MindFormers and an accelerator are: up to the calls that need the accelerator."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from transform_ckpt.auto import handover, job, mindformers
from transform_ckpt.auto.settings import read_settings

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "llama" / "tiny_llama_cpu.yaml"


class Config(dict[str, Any]):
    """As much of MindFormerConfig as is touched."""

    def __init__(self, path: str) -> None:
        import yaml

        super().__init__(yaml.safe_load(Path(path).read_text(encoding="utf-8")))

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Trainer:
    """Remembers what it is asked for."""

    calls: list[tuple[Any, ...]]

    def __init__(self, config: Config) -> None:
        self.calls.append(("Trainer", config))

    def __getattr__(self, name: str) -> Any:
        return lambda **options: self.calls.append((name, options))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for mindformers, and an accelerator."""
    found: list[tuple[Any, ...]] = []
    module = ModuleType("mindformers")
    Trainer.calls = found
    module.MindFormerConfig = Config  # type: ignore[attr-defined]
    module.Trainer = Trainer  # type: ignore[attr-defined]
    module.build_context = lambda config: found.append(("build_context", config))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mindformers", module)
    monkeypatch.setattr(mindformers, "install", lambda: found.append(("install",)))
    monkeypatch.setattr(handover, "possible", lambda: True)
    return found


@pytest.mark.parametrize(
    ("mode", "method", "options"),
    [
        ("train", "train", {}),
        ("finetune", "finetune", {"finetune_checkpoint": "weights"}),
        ("eval", "evaluate", {"eval_checkpoint": "weights"}),
        ("predict", "predict", {"predict_checkpoint": "weights", "input_data": "hello", "batch_size": None}),
    ],
)
def test_the_trainer_is_asked(
    calls: list[tuple[Any, ...]], tmp_path: Path, mode: str, method: str, options: dict[str, Any]
) -> None:
    words = ["--config", str(CONFIG), "--run_mode", mode, "--load_checkpoint", "weights", "--auto_trans_ckpt", "True"]
    words += ["--output_dir", str(tmp_path), "--rank_id", "1", "--world_size", "2"]
    job.main([*words, *(["--predict_data", "hello"] if mode == "predict" else [])], "", lambda _line: None)
    assert [call[0] for call in calls] == ["install", "build_context", "Trainer", method]
    config = calls[1][1]
    assert (config["run_mode"], config["load_checkpoint"], config["auto_trans_ckpt"]) == (mode, "weights", True)
    assert config["output_dir"] == str(tmp_path)
    assert calls[3][1] == options


def test_the_real_configuration_takes_it(tmp_path: Path) -> None:
    """MindFormerConfig of the real wheel, by the file that is written for it."""
    real = pytest.importorskip("mindformers", reason="mindformers is not installed: make venv")
    settings = read_settings(["--config", str(CONFIG), "--output_dir", str(tmp_path), "--auto_trans_ckpt", "False"])
    config = handover._config(real, settings)  # what build_context would get
    assert (config.run_mode, config.output_dir, config.model.model_config.num_layers) == ("train", str(tmp_path), 2)


def test_not_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert not handover.possible()
