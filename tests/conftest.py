"""Fixtures that all tests share."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore logs errors only; it reads this at import, in child processes too

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The project's root directory."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoints written by the real systems; too large for this repository, so they lie beside it."""
    path = ROOT.parent / "shared" / "golden"
    if not path.is_dir():
        pytest.skip("golden checkpoints absent: expected in ../shared/golden beside this checkout")
    return path


@pytest.fixture(scope="session")
def ms() -> ModuleType:
    """The real mindspore on the CPU, imported once in a session."""
    if importlib.util.find_spec("mindspore") is None:
        pytest.skip("mindspore is not installed: make venv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mindspore = importlib.import_module("mindspore")
        mindspore.set_device("CPU")
    return mindspore
