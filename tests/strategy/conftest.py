"""Fixtures of the strategy tests, and what hypothesis draws for `st.from_type(Layout)` and `st.from_type(Strategy)`."""

from __future__ import annotations

import warnings
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from strategy.layout import Layout, Stage, Strategy

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The directory of golden checkpoints, which lies beside a development checkout only."""
    if not GOLDEN.is_dir():
        pytest.skip("no golden checkpoints beside this checkout")
    return GOLDEN


@pytest.fixture(scope="session")
def mindspore() -> Any:
    """The real MindSpore; importing it takes seconds, so only the tests that compare with it pay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("mindspore")


def replica_step(matrix: tuple[int, ...], tensor_map: list[list[int]]) -> int:
    """`opt_weight_shard_step` as MindSpore's compiler writes it: mean distance within the first group of replicas."""
    used = {len(matrix) - 1 - axis for dim in tensor_map for axis in dim}
    mesh = np.arange(prod(matrix)).reshape(matrix)
    group = mesh[tuple(0 if axis in used else slice(None) for axis in range(len(matrix)))].ravel().tolist()
    return (group[-1] - group[0]) // (len(group) - 1) if len(group) > 1 else 1


@st.composite
def dev_matrices(draw: st.DrawFn, devices: int) -> tuple[int, ...]:
    """A mesh of that many devices, with axes of size 1 anywhere."""
    matrix: list[int] = []
    while devices > 1:
        axis = draw(st.sampled_from([n for n in range(2, devices + 1) if devices % n == 0]))
        matrix.append(axis)
        devices //= axis
    for _ in range(draw(st.integers(0, 2))):
        matrix.insert(draw(st.integers(0, len(matrix))), 1)
    return tuple(matrix)


@st.composite
def layouts(draw: st.DrawFn, devices: int | None = None) -> Layout:
    """Any valid layout: several axes on a dimension, repeat axes anywhere, optimizer shards of every legal size."""
    if devices is None:
        devices = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 8, 12, 16, 24]))
    matrix = draw(dev_matrices(devices))
    ndim = draw(st.integers(0, 3))
    dims: list[list[int]] = [[] for _ in range(ndim)]
    for axis in draw(st.permutations(range(len(matrix)))):
        where = draw(st.sampled_from([-1, -1, *range(ndim)]))
        if where >= 0:
            dims[where].append(axis)
    plain = Layout(matrix, tuple(map(tuple, dims)))
    if not ndim or draw(st.integers(0, 2)) == 0:
        return plain
    sizes = [-1, *(n for n in range(1, plain.replicas + 1) if plain.replicas % n == 0)]
    return Layout(matrix, plain.tensor_map, replica_step(matrix, dims), draw(st.sampled_from(sizes)))


names = st.one_of(
    st.from_regex(r"(adam_m\.)?layers\.[0-9]\.w[0-9qkv]", fullmatch=True),
    st.sampled_from(["shared.embedding", "0-block.weight", "a-b-c", "7-x", "层.weight", "with space", "-"]),
)


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    """A stage with one name at least that cannot be taken for one of a merged file."""
    devices = draw(st.sampled_from([1, 2, 4, 6, 8]))
    found = draw(st.dictionaries(names, layouts(devices), max_size=5))
    found["weight"] = draw(layouts(devices))
    return Stage(devices, found)


st.register_type_strategy(Layout, layouts())
st.register_type_strategy(Strategy, st.lists(stages(), min_size=1, max_size=4).map(lambda s: Strategy(tuple(s))))


def full_shape(layout: Layout, multiples: tuple[int, ...]) -> tuple[int, ...]:
    """A whole tensor's shape that the layout divides."""
    ndim = len(layout.tensor_map) or len(multiples)
    return tuple(cut * n for cut, n in zip(layout.cuts(ndim), multiples, strict=False))


@pytest.fixture(scope="session")
def shape_of() -> Any:
    """`full_shape`, for test modules (conftest itself cannot be imported under every import mode)."""
    return full_shape
