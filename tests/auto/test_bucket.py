"""Nodes that share a bucket and no disk, as on ModelArts: each rank has an output directory of its own.

Real processes, s3fs over HTTP, moto as the server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import support
from tests.auto import driver
from tests.hostile.driver import Case, make_case
from transform_ckpt.auto.board import LocalBoard, RemoteBoard
from transform_ckpt.auto.remote import Remote

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'transform_ckpt[remote]'")
server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'transform_ckpt[test]'")

URL = "s3://bucket/my job"
WORLD = 4


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    found = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    found.start()
    endpoint = f"http://127.0.0.1:{found.get_host_and_port()[1]}"
    for name, value in {
        "S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    from moto.backends import get_backend

    store = get_backend("s3")["123456789012"]["aws"]
    store.reset()
    store.create_bucket("bucket", "us-east-1")
    yield replace(Remote.open(URL), delays=(0.0,))
    found.stop()


def nodes(case: Case, folder: Path, **more: object) -> list[driver.Spec]:
    """One rank on each node: its own output directory and host name."""
    request = {
        "load_checkpoint": str(case.src), "src_strategy": str(case.strategy), "remote_url": URL, "timeout": 60, **more,
    }  # fmt: skip
    return [
        {
            "name": f"r{rank}", "rank": rank, "world": WORLD, "host": f"node-{rank}", "strategy": str(case.other),
            "request": {**request, "output_dir": str(folder / f"node_{rank}")},
        }
        for rank in range(WORLD)
    ]  # fmt: skip


@pytest.mark.parametrize("processes", [None, 2, 1])
def test_four_nodes(tmp_path: Path, bucket: Remote, processes: int | None) -> None:
    case = make_case(tmp_path / "case", "safetensors")
    found = driver.all_done(driver.run(tmp_path / "job", nodes(case, tmp_path, processes=processes), timeout=120))
    stages = case.model.stages(1, 2, 2)
    for rank in range(WORLD):
        assert found[f"r{rank}"].tensors == driver.digests(support.slice_rank(case.model.whole(), stages, rank))
    known = set(bucket.list())
    assert {f"strategy/ckpt_strategy_rank_{rank}.ckpt" for rank in range(WORLD)} <= known
    assert {f"transformed_checkpoint/src/rank_{r}/checkpoint_{r}.safetensors" for r in range(WORLD)} <= known
    here = {path.name for node in range(WORLD) for path in (tmp_path / f"node_{node}").rglob("checkpoint_*")}
    assert len(here) == WORLD
    own = list((tmp_path / "node_3").rglob("checkpoint_*.safetensors"))
    assert [path.name for path in own] == ["checkpoint_3.safetensors"]  # a node fetches what it lacks, and no more


def test_compiled_strategies_travel(tmp_path: Path, bucket: Remote) -> None:
    """Each node's compiler writes its own file; a pipeline needs one of each stage."""
    case = make_case(tmp_path / "case")
    compiled = support_files(case, tmp_path / "compiled")
    specs = [{**spec, "compiled": str(compiled), "stages": 2} for spec in nodes(case, tmp_path)]
    found = driver.all_done(driver.run(tmp_path / "job", specs, timeout=120))
    stages = case.model.stages(1, 2, 2)
    for rank in range(WORLD):
        assert found[f"r{rank}"].tensors == driver.digests(support.slice_rank(case.model.whole(), stages, rank))


def support_files(case: Case, folder: Path) -> Path:
    from strategy.mindspore_file import read_strategy, write_stage

    folder.mkdir()
    strategy = read_strategy(str(case.other))
    for number in range(len(strategy.stages)):
        for rank in strategy.ranks(number):
            write_stage(strategy, number, str(folder / f"ckpt_strategy_rank_{rank}.ckpt"))
    return folder


def test_a_node_that_fails_ends_the_others(tmp_path: Path, bucket: Remote) -> None:
    case = make_case(tmp_path / "case")
    specs = nodes(case, tmp_path, processes=1)
    specs[0]["before"] = {"transform": {"raise": "no more disk on node-0"}}
    ended = driver.run(tmp_path / "job", specs, timeout=120)
    assert all(ended[f"r{rank}"].code != 0 for rank in range(WORLD)), ended
    said = [ended[f"r{rank}"].err for rank in range(1, WORLD)]
    assert all("rank 0 has failed" in text and "no more disk on node-0" in text for text in said), said


def test_boards_agree(tmp_path: Path, bucket: Remote) -> None:
    """Both kinds of board do the same, whatever is asked of them."""
    for board in (LocalBoard(str(tmp_path / "board")), RemoteBoard(bucket, "board")):
        assert (board.read("a/b.json"), board.names("a")) == ({}, [])
        board.delete("a/b.json")
        board.write("a/b.json", {"x": 1})
        board.write("a/b.json", {"x": "ü"})
        board.write("a/c.json", {})
        assert board.read("a/b.json") == {"x": "ü"}
        assert sorted(board.names("a")) == ["b.json", "c.json"]
        board.delete("a/b.json")
        assert (board.read("a/b.json"), board.names("a")) == ({}, ["c.json"])
