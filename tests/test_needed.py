"""Opening only the files that some target ranks need gives the same tensors as opening all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transform_ckpt
from tests import support
from tests.hostile import driver
from transform_ckpt.api import Purpose, open_checkpoint, read_strategy
from transform_ckpt.errors import PlanError

LAYOUTS = [
    (1, 1, 1, 0),
    (2, 1, 4, 2),
    (1, 2, 2, 0),
    (4, 2, 1, 2),
    (2, 2, 2, 0),
    (1, 4, 1, 0),
    (8, 1, 1, 8),
    (4, 1, 2, -1),
]


def opened(case: driver.Case, ranks: list[int]) -> set[int]:
    """Source ranks whose files are opened for some target ranks."""
    source = open_checkpoint(str(case.src), str(case.strategy), purpose=Purpose(read_strategy(str(case.other)), ranks))
    return {int(Path(header.path).parent.name.removeprefix("rank_")) for header in source.headers}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=st.sampled_from(LAYOUTS[1:]), other=st.sampled_from(LAYOUTS[1:]), data=st.data())
def test_equal_to_the_slicer(
    tmp_path_factory: pytest.TempPathFactory, layout: tuple[int, ...], other: tuple[int, ...], data: st.DataObject
) -> None:
    case = driver.make_case(tmp_path_factory.mktemp("case"), "safetensors", layout, other)
    stages = case.model.stages(*other)
    rank = data.draw(st.integers(0, support.world_size(stages) - 1))
    held = transform_ckpt.load(str(case.src), rank=rank, src_strategy=str(case.strategy), dst_strategy=str(case.other))
    found = {name: np.asarray(value) for name, value in held}
    support.assert_same(found, support.slice_rank(case.model.whole(), stages, rank), f"{layout} {other} {rank}")


def test_only_what_is_needed_is_opened(tmp_path: Path) -> None:
    """A pipeline of 4 stages with an optimizer shard of 2, to 2 stages of 2 ranks: half of the stages each."""
    case = driver.make_case(tmp_path)
    assert opened(case, [0]) == {0, 1, 2, 3}
    assert opened(case, [3]) == {4, 5, 6, 7}
    assert opened(case, [1, 2]) == set(range(8))


def test_one_of_equal_replicas_is_opened(tmp_path: Path) -> None:
    case = driver.make_case(tmp_path, layout=(4, 2, 1, 0), other=(1, 2, 1, 0))
    assert opened(case, [0]) == {0}  # and not ranks 2, 4, 6, which hold the same
    assert opened(case, [1]) == {0, 1}  # rank 0's file said the shapes, and holds what is whole on every rank


def test_everything_is_opened_when_something_is_odd(tmp_path: Path) -> None:
    """A parameter that the first file of a stage lacks: all files are looked at, and it is said."""
    case = driver.make_case(tmp_path)
    held = support.slice_rank(case.model.whole(), case.model.stages(2, 1, 4, 2), 0)
    held.pop("model.layers.0.wq.weight")
    driver.write_file(case.file(0), held)
    with pytest.raises(PlanError, match=r"model\.layers\.0\.wq\.weight"):
        list(transform_ckpt.load(str(case.src), rank=0, src_strategy=str(case.strategy), dst_strategy=str(case.other)))


def test_a_cut_file_that_is_needed_is_named(tmp_path: Path) -> None:
    """Rank 3 lacks a tensor of which its sister holds the other half: a hole, whoever needs it."""
    case = driver.make_case(tmp_path)
    held = support.slice_rank(case.model.whole(), case.model.stages(2, 1, 4, 2), 3)
    held.pop("adam_m.model.layers.1.w2.weight")
    driver.write_file(case.file(3), held)
    for rank in (0, 1):
        with pytest.raises(PlanError, match=r"layers\.1\.w2\.weight"):
            list(
                transform_ckpt.load(
                    str(case.src), rank=rank, src_strategy=str(case.strategy), dst_strategy=str(case.other)
                )
            )
