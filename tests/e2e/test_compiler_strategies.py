"""Strategies that MindSpore's own compiler wrote: read, merged, and checkpoints resharded between them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import transform_ckpt
from strategy import mindspore_file
from strategy.merge import merge_directory
from tests import support
from tests.support import Array, Arrays, Layout, assert_same, load_ranks, slice_rank

RINGS = [
    "l01_dp2mp2pp2_opt l02_dp4mp2_opt_oss2 l03_mp4pp2_vocabmp l15_dp2mp2_pp1_vocabdp_opt",
    "m09_qwen3_dp2tp2 m10_qwen3_dp2tp2_opt m12_qwen3_dp4_opt_oss2 m18_qwen3_dp2pp2_interleave2_opt",
    "m13_qwen3moe_dp2ep2 m13c_qwen3moe_dp4ep2_opt",
    "l05_mp2pp2_qkvconcat None",
    "l06_dp2pp4_offset_opt None",
    "l08_mp2pp2_tied None",
    "m11_qwen3_dp2tp2pp2 None",
    "m14_dsv3_dp2ep2 None",
    "m17_qwen3_dp2tp2_tied_opt None",
]
"""Cases with the same parameters, each to the next, the last to the first; None is complete weights."""

WIDER = ["l08_mp2pp2_tied l03_mp4pp2_vocabmp", "l02_dp4mp2_opt_oss2 l06_dp2pp4_offset_opt"]
WIDER += ["m17_qwen3_dp2tp2_tied_opt m12_qwen3_dp4_opt_oss2", "m18_qwen3_dp2pp2_interleave2_opt m11_qwen3_dp2tp2pp2"]
"""Pairs where the destination lists more layers, or an output layer: entries without a tensor are normal."""

PAIRS = [(a, b) for names in map(str.split, RINGS) for a, b in zip(names, names[1:] + names[:1], strict=True)]
PAIRS += [(a, b) for a, b in map(str.split, WIDER)]
NAMES = sorted({name for names in RINGS for name in names.split()} - {"None"})

STATE = "adam_m."
"""The one kind of optimizer state in the checkpoints: the others have the same layouts."""

Stages = list[dict[str, Layout]]


class Case:
    """One compiled network: its parameters, and its strategy as layouts.txt shows it (not read by us)."""

    def __init__(self, directory: Path) -> None:
        self.strategy = directory / "strategy"
        table = json.loads((directory / "params.json").read_text())
        self.params: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in table.items()}
        self.unlisted = {name for name, entry in table.items() if entry.get("in_strategy") is False}
        found: dict[int, dict[str, Layout]] = {}
        for line in (directory / "layouts.txt").read_text().splitlines():
            stage, name, rest = line.split(" ", 2)
            found.setdefault(int(stage), {})[name] = parse_layout(rest)
        self.stages: Stages = [found[stage] for stage in range(len(found))]

    def held(self) -> Arrays:
        """The whole state: every element says which tensor it is of, and where in it."""
        numbers = count(1)
        chosen = [name for name in self.params if not name.startswith(("adam_v.", "accu_grads."))]
        return {name: numbered(self.params[name], next(numbers)) for name in sorted(chosen)}


def parse_layout(text: str) -> Layout:
    """`dev=[2, 2] map=[[0], [-1]] step=2 size=-1 shape=[128, 256]`."""
    words = dict(word.split("=") for word in text.replace(", ", ",").split())
    entries = [tuple(axes) for axes in json.loads(words["map"])]
    tensor_map = tuple(e[0] if len(e) == 1 else e for e in entries)
    return Layout(tuple(json.loads(words["dev"])), tensor_map, int(words["step"]), int(words["size"]))


def numbered(shape: tuple[int, ...], number: int) -> Array:
    size = int(np.prod(shape))
    assert size <= 1 << 20
    assert number < 1 << 10
    return (np.arange(size, dtype=np.uint32) + np.uint32(number << 20)).view(np.float32).reshape(shape)


@pytest.fixture(scope="session")
def cases(golden: Path) -> Mapping[str, Case]:
    return {name: Case(golden / "strategies" / name) for name in NAMES}


def test_all_cases_are_here(golden: Path) -> None:
    assert {path.name for path in (golden / "strategies").iterdir()} == set(NAMES)
    for side in (0, 1):
        assert {pair[side] for pair in PAIRS} >= set(NAMES)


def as_product_layout(layout: Layout) -> tuple[object, ...]:
    return (
        layout.dev_matrix,
        tuple(layout.axes(d) for d in range(len(layout.tensor_map))),
        layout.opt_step,
        layout.opt_size,
    )


@pytest.mark.parametrize("name", NAMES)
def test_read_as_the_dump_shows(cases: Mapping[str, Case], name: str) -> None:
    found = mindspore_file.read_strategy(str(cases[name].strategy))
    assert len(found.stages) == len(cases[name].stages)
    for stage, wanted in zip(found.stages, cases[name].stages, strict=True):
        read = {n: (x.dev_matrix, x.tensor_map, x.opt_step, x.opt_size) for n, x in stage.layouts.items()}
        assert read == {n: as_product_layout(x) for n, x in wanted.items()}
        assert stage.devices == support.stage_devices(cases[name].stages)


@pytest.mark.parametrize("name", NAMES)
def test_merged_as_mindspore_merges(ms: ModuleType, cases: Mapping[str, Case], name: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for path in cases[name].strategy.glob("ckpt_strategy_rank_*.ckpt"):
        (files / path.name).write_bytes(path.read_bytes())
    ours, theirs = tmp_path / "ours.ckpt", tmp_path / "theirs.ckpt"
    merge_directory(str(files), str(ours))
    ms.merge_pipeline_strategys(str(files), str(theirs))
    read, expected = (ms.build_searched_strategy(str(path)) for path in (ours, theirs))
    assert {n: x.SerializeToString() for n, x in read.items()} == {
        n: x.SerializeToString() for n, x in expected.items()
    }
    listed = sum(len(layouts) for layouts in cases[name].stages)
    assert len(read) == listed


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_resharded(*, ms: ModuleType, cases: Mapping[str, Case], src: str, dst: str, fmt: str, tmp_path: Path) -> None:
    whole = cases[src if src != "None" else dst].held()
    strategies = {case: merged(cases, case, tmp_path) for case in (src, dst)}
    save(ms, cases, src, whole, tmp_path / "src", fmt)
    # the directory of per-rank files for ours, where the real one needs the merged file
    ours = {case: cases[case].strategy if case != "None" else None for case in (src, dst)}
    transform_ckpt.convert(tmp_path / "src", tmp_path / "ours", src_strategy=ours[src], dst_strategy=ours[dst])
    found = load_ranks(ms, tmp_path / "ours")
    expected = ranks_of(cases, dst, whole)
    assert list(found) == list(expected)
    for rank, held in expected.items():
        assert_same(found[rank], held, f"rank {rank}")
    if PAIRS.index((src, dst)) % 2 == (fmt == "ckpt"):  # the real one is slow: each pair in one of the formats
        theirs = support.transform(ms, tmp_path / "src", tmp_path / "theirs", strategies[src], strategies[dst])
        for rank, held in load_ranks(ms, theirs).items():
            assert_same(found[rank], held, f"mindspore's rank {rank}")


def merged(cases: Mapping[str, Case], name: str, directory: Path) -> Path | None:
    if name == "None":
        return None
    path = directory / f"{name}.ckpt"
    merge_directory(str(cases[name].strategy), str(path))
    return path


def save(ms: ModuleType, cases: Mapping[str, Case], name: str, whole: Arrays, directory: Path, fmt: str) -> None:
    for rank, held in ranks_of(cases, name, whole).items():
        support.save_file(ms, held, directory / f"rank_{rank}" / f"net_{rank}.{fmt}")


def ranks_of(cases: Mapping[str, Case], name: str, whole: Arrays) -> dict[int, dict[str, Array]]:
    """Every rank's tensors by the independent slicer; what no strategy lists is on every rank."""
    if name == "None":
        return {0: dict(whole)}
    stages = cases[name].stages
    return {rank: slice_rank(whole, stages, rank) for rank in range(support.world_size(stages))}


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
def test_tensors_in_no_strategy_are_carried(
    ms: ModuleType, cases: Mapping[str, Case], tmp_path: Path, fmt: str
) -> None:
    """m14 leaves the routers' counters out: there is one in every rank's file, and in every one that is made."""
    case = cases["m14_dsv3_dp2ep2"]
    whole = case.held()
    assert len(case.unlisted) == 3
    assert case.unlisted <= set(whole)
    save(ms, cases, "m14_dsv3_dp2ep2", whole, tmp_path / "src", fmt)
    wider = [{name: Layout((4,), (-1,) * len(case.params[name])) for name in case.stages[0]}]
    transform_ckpt.convert(
        tmp_path / "src",
        tmp_path / "out",
        src_strategy=case.strategy,
        dst_strategy=support.write_strategy(ms, wider, tmp_path / "wider"),
    )
    found = load_ranks(ms, tmp_path / "out")
    assert len(found) == 4
    for rank, held in found.items():
        assert_same(held, whole, f"rank {rank}")


@pytest.mark.parametrize("name", ["l08_mp2pp2_tied"])
def test_states_of_a_tied_embedding_that_only_one_stage_saved(
    ms: ModuleType, cases: Mapping[str, Case], name: str, tmp_path: Path
) -> None:
    """Stage 1 lists the states of the embedding without the embedding: its files may hold them or not."""
    whole, case = cases[name].held(), cases[name]
    ghosts = set(case.stages[1]) & set(case.stages[0])
    assert {ghost.rpartition("embedding")[2] for ghost in ghosts} == {"_weight"}
    for rank, held in ranks_of(cases, name, whole).items():
        kept = {n: array for n, array in held.items() if rank < 2 or n not in ghosts}
        support.save_file(ms, kept, tmp_path / "src" / f"rank_{rank}" / f"net_{rank}.safetensors")
    transform_ckpt.convert(tmp_path / "src", tmp_path / "out", src_strategy=case.strategy)
    assert_same(load_ranks(ms, tmp_path / "out")[0], whole)
