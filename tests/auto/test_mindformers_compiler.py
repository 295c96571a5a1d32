"""Whether strategies can be compiled here: what is missing is said in words, and nothing is imported to find out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transform_ckpt.auto import compiler

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """A machine with some of what the compiler needs; everything, unless taken away."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.package: Path | None = folder / "mindspore"
        (self.package / "lib" / "plugin" / "ascend").mkdir(parents=True)
        self.cann = folder / "cann"
        self.cann.mkdir()
        (folder / "davinci0").touch()
        self.environ = {"ASCEND_HOME_PATH": str(self.cann)}
        monkeypatch.setattr(compiler, "NPUS", str(folder / "davinci[0-9]*"))
        monkeypatch.setattr(compiler.importlib.util, "find_spec", self.find_spec)

    def find_spec(self, name: str) -> Any:
        """As importlib.util has it."""
        assert name == "mindspore"
        return SimpleNamespace(submodule_search_locations=[str(self.package)]) if self.package else None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One that can compile."""
    return Machine(tmp_path, monkeypatch)


def test_everything_is_there(machine: Machine) -> None:
    assert compiler.available(machine.environ) == (True, "mindspore with its Ascend plugin, CANN and devices are there")


@pytest.mark.parametrize("name", ["plugin/libmindspore_ascend.so.2", "libmindspore_ascend.so"])
def test_the_plugin_may_be_a_library(machine: Machine, name: str) -> None:
    assert machine.package is not None
    (machine.package / "lib" / "plugin" / "ascend").rmdir()
    assert not compiler.available(machine.environ)[0]
    (machine.package / "lib" / name).touch()
    assert compiler.available(machine.environ)[0]


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("package", "mindspore is not installed"),
        ("plugin", "this mindspore has no Ascend plugin: it is the CPU package"),
        (
            "variable",
            "CANN is not set up: none of ASCEND_HOME_PATH, ASCEND_TOOLKIT_HOME, ASCEND_OPP_PATH is a directory",
        ),
        ("cann", "CANN is not set up"),
        ("device", "no Ascend device: there is no "),
    ],
)
def test_what_is_missing_is_said(machine: Machine, tmp_path: Path, missing: str, text: str) -> None:
    {
        "package": lambda: setattr(machine, "package", None),
        "plugin": (tmp_path / "mindspore" / "lib" / "plugin" / "ascend").rmdir,
        "variable": machine.environ.clear,
        "cann": machine.cann.rmdir,
        "device": (tmp_path / "davinci0").unlink,
    }[missing]()
    found, reason = compiler.available(machine.environ)
    assert not found
    assert reason.startswith(text)


def test_asking_imports_no_mindspore() -> None:
    text = (
        "import sys; from transform_ckpt.auto.compiler import available; print(available()); "
        "assert not {'mindspore', 'mindformers', 'numpy'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("(False, ") or found.stdout.startswith("(True, ")
