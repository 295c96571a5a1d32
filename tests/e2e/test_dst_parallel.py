"""--dst-parallel: the destination's strategy is generated, used, and written beside the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import transform_ckpt
from strategy.mindspore_file import read_strategy
from transform_ckpt.cli import run
from transform_ckpt.errors import UsageError

LAYOUTS = ("dp=2,mp=2,pp=2", "dp=2,mp=2,pp=2,opt=1,threshold=0", "mp=4", "dp=3,mp=2,opt=1,opt_size=3", "pp=4")


@pytest.mark.parametrize("parallel", LAYOUTS)
@pytest.mark.parametrize("format_", ["ckpt", "safetensors"])
def test_there_and_back(golden: Path, tmp_path: Path, parallel: str, format_: str) -> None:
    whole = golden / "mindspore" / f"src_{format_}" / "C"
    words = ["convert", str(whole), str(tmp_path / "dst"), "--to", "mindspore", "--dst-parallel", parallel, "--verify"]
    assert run(words) == 0
    written = read_strategy(str(tmp_path / "dst" / "strategy"))
    assert sorted(p.name for p in (tmp_path / "dst").glob("rank_*")) == sorted(
        f"rank_{i}" for i in range(written.world)
    )
    again = [tmp_path / "dst", tmp_path / "back"]
    transform_ckpt.convert(again[0], again[1], src_strategy=tmp_path / "dst" / "strategy")
    assert run(["diff", str(whole), str(again[1])]) == 0
    assert run(["verify", str(again[0]), "--strategy", str(tmp_path / "dst" / "strategy")]) == 0


def test_problems(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = str(golden / "mindspore" / "src_ckpt" / "C")
    words = ["convert", whole, str(tmp_path / "dst"), "--to", "mindspore", "--json"]
    assert run([*words, "--dst-parallel", "mp=5"]) == 3
    assert "does not divide into 5 parts" in json.loads(capsys.readouterr().out)["error"]
    assert run([*words, "--dst-parallel", "mq=5"]) == 3
    assert "mq" in json.loads(capsys.readouterr().out)["error"]
    strategy = str(golden / "mindspore" / "strategy" / "B")
    with pytest.raises(UsageError, match="--dst-strategy and --dst-parallel"):
        transform_ckpt.plan(whole, dst_strategy=strategy, dst_parallel="mp=2")
    assert not (tmp_path / "dst").exists()
