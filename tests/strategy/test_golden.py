"""Golden strategy files, made by hand and by MindSpore's compiler: every form of one strategy reads the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strategy.layout import Strategy
from strategy.mindspore_file import read_strategy
from strategy.mindspore_proto import decode, encode


@pytest.mark.parametrize("name", "ABCDEFGH")
def test_golden_hand_made_strategies_agree(name: str, golden: Path) -> None:
    root = golden / "mindspore" / "strategy"
    expected = json.loads((golden / "mindspore" / "layouts.json").read_text())[name]
    strategy = read_strategy(str(root / name))
    assert (strategy.world, len(strategy.stages)) == (expected["world"], expected["pp"])
    others = sorted(root.glob(f"{name}_*"))
    assert others
    assert all(read_strategy(str(other)).stages == strategy.stages for other in others)


def dump(strategy: Strategy, shapes: dict[str, Any]) -> list[str]:
    return [
        f"{number} {name} dev={list(layout.dev_matrix)} map={[list(dim) or [-1] for dim in layout.tensor_map]} "
        f"step={layout.opt_step} size={layout.opt_size} shape={shapes[name]['shape']}"
        for number, stage in enumerate(strategy.stages)
        for name, layout in sorted(stage.layouts.items())
    ]


def test_golden_compiler_written_strategies_agree(golden: Path) -> None:
    cases = sorted((golden / "strategies").iterdir())
    assert len(cases) >= 16
    for case in cases:
        strategy = read_strategy(str(case / "strategy"))
        shapes = json.loads((case / "params.json").read_text())
        assert dump(strategy, shapes) == (case / "layouts.txt").read_text().splitlines()
    merged = [*(golden / "strategies").glob("*/strategy/merged*"), *golden.glob("mindspore/real_strategy/*/*/merged*")]
    assert len(merged) >= 8
    assert all(read_strategy(str(file)).stages == read_strategy(str(file.parent)).stages for file in merged)


def test_golden_files_are_written_byte_by_byte_as_they_were(golden: Path) -> None:
    files = sorted(golden.glob("*/*/**/ckpt_strategy_rank_*.ckpt"))
    assert len(files) > 100
    for file in files:
        data = file.read_bytes()
        assert encode(decode(data, str(file)))[2:] == data[2:]  # but for current_stage, which counts saves
