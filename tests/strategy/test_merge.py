"""Directories of per-rank files: what is merged, what is refused, and when a merged file is kept."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from strategy.codec import decode, encode
from strategy.layout import Layout, Stage, Strategy
from strategy.merge import merge_directory, merged_strategy_file, up_to_date
from strategy.mindspore_file import read_strategy, write_stage, write_strategy
from transform_ckpt.errors import InputError, StorageError

ROW, COLUMN, WHOLE = Layout((2,), ((), (0,))), Layout((2,), ((0,), ())), Layout((2,), ((), ()))
PIPELINE = Strategy(
    (Stage(2, {"embedding": COLUMN, "a-b": ROW}), Stage(2, {"embedding": WHOLE}), Stage(2, {"head": COLUMN}))
)
NAME = "merged_ckpt_strategy.ckpt"
Ranks = dict[int, int]
"""Rank number in the file name -> stage that the file is of."""
ALL_RANKS = {rank: rank // 2 for rank in range(6)}


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., Path]:
    def fill(ranks: Ranks, strategy: Strategy = PIPELINE, suffix: str = "ckpt") -> Path:
        directory = tmp_path / "strategy"
        directory.mkdir(exist_ok=True)
        for rank, stage in ranks.items():
            path = directory / f"ckpt_strategy_rank_{rank}.{suffix}"
            path.unlink(missing_ok=True)
            write_stage(strategy, stage, str(path), "json" if suffix == "json" else "protobuf")
            path.chmod(0o400)
        return directory

    return fill


Fill = Callable[..., Path]


@pytest.mark.parametrize("suffix", ["ckpt", "json"])
@pytest.mark.parametrize("ranks", [ALL_RANKS, {0: 0, 2: 1, 4: 2}, {4: 2, 0: 0, 3: 1}])
def test_merge_reads_back(fill: Fill, tmp_path: Path, ranks: Ranks, suffix: str) -> None:
    target = tmp_path / "out" / f"merged.{suffix}"
    found = merge_directory(str(fill(ranks, suffix=suffix)), str(target))
    assert (found.stages, found.origin) == (PIPELINE.stages, str(target))
    assert read_strategy(str(target)).stages == PIPELINE.stages
    assert target.read_bytes()[:1] == (b"{" if suffix == "json" else b"\x08")


def test_merge_is_what_mindspore_merges(fill: Fill, tmp_path: Path, mindspore: Any) -> None:
    directory = fill(ALL_RANKS)
    mindspore.merge_pipeline_strategys(str(directory), str(tmp_path / "theirs.ckpt"))
    merge_directory(str(directory), str(tmp_path / "ours.ckpt"))
    read = mindspore.parallel._parallel_serialization._load_protobuf_strategy
    ours, theirs = read(str(tmp_path / "ours.ckpt")), read(str(tmp_path / "theirs.ckpt"))
    assert ours.current_stage == theirs.current_stage
    for items in ("parallel_strategy_item", "parallel_layout_item"):
        assert sorted(map(str, getattr(ours, items))) == sorted(map(str, getattr(theirs, items)))


def test_golden_merge_carries_the_compilers_strategy_items(golden: Path, tmp_path: Path) -> None:
    source = golden / "strategies" / "l01_dp2mp2pp2_opt" / "strategy"
    merge_directory(str(source), str(tmp_path / "merged.ckpt"))
    parts = [decode((source / f"ckpt_strategy_rank_{rank}.ckpt").read_bytes(), "") for rank in (0, 4)]
    merged = decode((tmp_path / "merged.ckpt").read_bytes(), "")
    assert merged.nodes == parts[0].nodes + parts[1].nodes
    assert up_to_date(str(source), str(source / NAME))  # MindSpore's own merge, whatever its order


def test_merging_json_keeps_shapes_and_equal_operator_names(fill: Fill, tmp_path: Path) -> None:
    directory = fill({0: 0, 2: 1, 4: 2}, suffix="json")
    path = directory / "ckpt_strategy_rank_4.json"
    text = path.read_text().replace('"tensor_map"', '"tensor_shape": [8, 4], "tensor_map"')
    path.chmod(0o600)
    path.write_text(text)
    merge_directory(str(directory), str(tmp_path / "merged.json"))
    merged = decode((tmp_path / "merged.json").read_bytes(), "")
    assert merged.tensor_shapes == {"2-head": (8, 4)}
    names = [(node.name, node.stage) for node in merged.nodes]
    assert names == [("MatMul_embedding", 0), ("MatMul_a-b", 0), ("1-MatMul_embedding", 1), ("MatMul_head", 2)]
    assert up_to_date(str(directory), str(tmp_path / "merged.json"))


def test_ranks_are_taken_in_number_order_and_equal_layouts_count_once(tmp_path: Path) -> None:
    whole = Layout((16,), ((),))
    for rank, names in ((10, "ba"), (9, "ab"), (11, "ba")):
        strategy = Strategy((Stage(16, dict.fromkeys(names, whole)),))
        write_stage(strategy, 0, str(tmp_path / f"ckpt_strategy_rank_{rank}.ckpt"))
    found = read_strategy(str(tmp_path))
    assert list(found.names) == ["a", "b"]
    assert found.world == 16


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({0: 0, 1: 0, 4: 2, 5: 2}, "stage 1 is missing, only stage 0, 2 is here"),
        ({2: 1, 4: 2}, "stage 0 is missing"),
        ({4: 2}, "stage 0-1 is missing"),
        ({0: 0, 1: 0, 4: 1, 5: 1}, "rank_4.ckpt is of rank 4; a stage is missing"),
    ],
)
def test_a_missing_stage_is_refused(fill: Fill, tmp_path: Path, ranks: Ranks, message: str) -> None:
    directory = fill(ranks)
    with pytest.raises(InputError, match=message):
        merge_directory(str(directory), str(tmp_path / "m.ckpt"))
    with pytest.raises(InputError, match=message):
        read_strategy(str(directory))
    assert not (tmp_path / "m.ckpt").exists()


def test_two_different_files_of_a_stage_are_refused(fill: Fill) -> None:
    other = Strategy((*PIPELINE.stages[:2], Stage(2, {"head": ROW})))
    directory = fill(ALL_RANKS)
    fill({5: 2}, other)
    with pytest.raises(InputError, match=r"stage 2 is there twice .*rank_4.ckpt and .*rank_5.ckpt"):
        read_strategy(str(directory))


def test_both_suffixes_are_refused(fill: Fill) -> None:
    fill({0: 0, 2: 1, 4: 2})
    directory = fill({1: 0}, suffix="json")
    with pytest.raises(InputError, match=r"both .ckpt and .json files \(ckpt_strategy_rank_0.ckpt and .*rank_1.json\)"):
        read_strategy(str(directory))


def test_without_strategy_items_one_content_is_stage_0_and_two_are_refused(fill: Fill) -> None:
    directory = fill({0: 0, 1: 0})
    for rank in (0, 1):
        path = directory / f"ckpt_strategy_rank_{rank}.ckpt"
        document = decode(path.read_bytes(), "")
        path.unlink()
        path.write_bytes(encode(type(document)((), document.layouts), "protobuf"))
    assert read_strategy(str(directory)).stages == PIPELINE.stages[:1]
    fill({2: 1})
    with pytest.raises(InputError, match="no strategy items"):
        read_strategy(str(directory))


@pytest.mark.parametrize("name", [NAME, "all.ckpt"])
def test_an_older_merged_file_is_ignored_or_all_there_is(fill: Fill, tmp_path: Path, name: str) -> None:
    old = Strategy((Stage(4, {"old": Layout((4,), ((0,),))}),))
    directory = fill(ALL_RANKS)
    write_strategy(old, str(directory / name))
    assert merge_directory(str(directory), str(directory / name)).stages == PIPELINE.stages
    alone = tmp_path / "alone"
    write_strategy(old, str(alone / name))
    assert read_strategy(str(alone)).stages == old.stages
    assert merge_directory(str(alone), str(tmp_path / "copy.ckpt")).stages == old.stages
    write_strategy(PIPELINE, str(alone / "other.ckpt"))
    if name != NAME:
        with pytest.raises(InputError, match="several different merged strategies"):
            read_strategy(str(alone))


def test_merged_file_is_kept_until_its_content_changes(fill: Fill) -> None:
    directory = fill(ALL_RANKS)
    path = merged_strategy_file(str(directory))
    assert path == str(directory / NAME)
    os.chmod(path, 0o400)
    made = os.stat(path)
    os.utime(path, ns=(0, 0))
    assert merged_strategy_file(str(directory)) == path
    assert os.stat(path).st_ino == made.st_ino
    changed = Strategy((*PIPELINE.stages[:2], Stage(2, {"head": ROW})))
    fill({4: 2, 5: 2}, changed)
    os.utime(path, ns=(2**62, 2**62))
    assert not up_to_date(str(directory), path)
    assert read_strategy(merged_strategy_file(str(directory))).stages == changed.stages
    assert up_to_date(str(directory), path)
    assert sorted(os.listdir(directory)) == [f"ckpt_strategy_rank_{rank}.ckpt" for rank in ALL_RANKS] + [NAME]


@pytest.mark.parametrize("change", [{"nodes": ()}, {"tensor_shapes": {"2-head": (8, 4)}}])
def test_a_merged_file_that_lacks_something_is_not_up_to_date(fill: Fill, tmp_path: Path, change: Any) -> None:
    directory, target = str(fill({0: 0, 2: 1, 4: 2}, suffix="json")), tmp_path / "merged.json"
    merge_directory(directory, str(target))
    assert up_to_date(directory, str(target))
    target.write_bytes(encode(dataclasses.replace(decode(target.read_bytes(), ""), **change), "json"))
    assert not up_to_date(directory, str(target))


@pytest.mark.parametrize("damage", [b"", b"\x08", b'{"parallel_layout_item": {}}'])
def test_a_damaged_merged_file_is_made_anew(fill: Fill, damage: bytes) -> None:
    directory = fill(ALL_RANKS)
    (directory / NAME).write_bytes(damage)
    assert read_strategy(merged_strategy_file(str(directory))).stages == PIPELINE.stages


def test_json_under_the_name_of_a_protobuf_file_is_made_anew(fill: Fill) -> None:
    """MindSpore goes by the suffix, so MindFormers' merge of JSON files makes one that MindSpore cannot read."""
    strategy = Strategy(PIPELINE.stages[:1])
    directory = fill({0: 0, 1: 0}, strategy, suffix="json")
    write_strategy(strategy, str(directory / NAME), form="json")
    assert not up_to_date(str(directory), str(directory / NAME))
    assert Path(merged_strategy_file(str(directory))).read_bytes()[:1] == b"\x08"


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory outside of pytest's private one, with the rights of a user whom permissions bind."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        directory.chmod(0o755)
        shutil.rmtree(directory)


def test_in_a_read_only_directory_it_is_made_in_a_temporary_place(unprivileged: Path) -> None:
    for stage in range(3):
        part = unprivileged / f"rank_{2 * stage}.ckpt"
        write_stage(PIPELINE, stage, str(part))
        part.chmod(0o444)
    unprivileged.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    before = sorted(os.listdir(unprivileged))
    path = merged_strategy_file(str(unprivileged))
    assert os.path.dirname(path) != str(unprivileged)
    assert read_strategy(path).stages == PIPELINE.stages
    assert sorted(os.listdir(unprivileged)) == before
    with pytest.raises(StorageError, match="cannot be written"):
        merge_directory(str(unprivileged), str(unprivileged / "merged.ckpt"))


def test_a_failed_write_leaves_nothing(fill: Fill, tmp_path: Path) -> None:
    directory = fill(ALL_RANKS)
    target = tmp_path / "target"
    (target / "occupied").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be written"):
        merge_directory(str(directory), str(target))
    assert sorted(os.listdir(tmp_path)) == ["strategy", "target"]
    assert os.listdir(target) == ["occupied"]
