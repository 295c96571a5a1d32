"""Older versions of megatron-core are fetched with pip and take minutes: their tests run only when asked for by -m."""

from __future__ import annotations

from pathlib import Path

import pytest

OLD = "megatron_old"
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips rather than deselects: workers of pytest-xdist report no deselected tests, so nobody would see how many."""
    if OLD in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="an older megatron-core, fetched with pip: make test-megatron runs it")
    for item in items:
        if _HERE in item.path.parents and item.get_closest_marker(OLD) is not None:
            item.add_marker(skip)
