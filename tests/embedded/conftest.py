"""The embedded run needs MindSpore, which the fixture `ms` imports without its warnings."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def job(ms) -> ModuleType:
    """transform_ckpt.embedded.job."""
    return importlib.import_module("transform_ckpt.embedded.job")
