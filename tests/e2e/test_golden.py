"""Golden checkpoints of the real MindSpore: every pair of layouts A-H, both formats, every tensor."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType

import pytest

import transform_ckpt
from tests.support import (
    Array,
    Arrays,
    assert_same,
    load_file,
    load_ranks,
    rank_files,
    slice_rank,
    stage_devices,
    world_size,
)
from tests.test_support import golden_stages

CASES = "ABCDEFGH"
SAVED = "ABCD"
"""Layouts that MindSpore itself saved; we make the others from C."""

FORMATS = ["ckpt", "safetensors"]
GOLDEN_PAIRS = ["A_to_B", "A_to_C", "C_to_A"]
FORMS = ["merged", "directory", "merged json", "json directory"]
STATES = {"global_step", "scale_sense", "learning_rate", "epoch_num", "step_num", "global_batch_size", "loss_scale"}

PAIRS = list(permutations(CASES, 2))
RING = [*zip(CASES, CASES[1:] + CASES[0], strict=True)]

Ranks = dict[int, dict[str, Array]]
Header = dict[str, tuple[str, tuple[int, ...]]]


class Golden:
    """The golden layouts: strategy files, checkpoints, and what each rank must hold by the independent slicer."""

    def __init__(self, ms: ModuleType, root: Path, made_in: Path) -> None:
        self.ms, self.root, self._made_in = ms, root, made_in
        self.table = json.loads((root / "layouts.json").read_text())
        self.stages = {case: golden_stages(ms, self.strategy(case)) for case in CASES}
        (self._whole,) = self.load(root / "src_safetensors" / "C").values()
        self._expected: dict[str, dict[int, Arrays]] = {}

    def load(self, directory: Path) -> Ranks:
        return load_ranks(self.ms, directory)

    def strategy(self, case: str, form: str = "merged") -> Path:
        name = {"merged": f"{case}_merged.ckpt", "directory": case}
        name |= {"merged json": f"{case}_merged.json", "json directory": f"{case}_json"}
        path = self.root / "strategy" / name[form]
        assert path.exists()
        return path

    def strategies(self, src: str, dst: str, form: str = "merged") -> dict[str, Path]:
        return {"src_strategy": self.strategy(src, form), "dst_strategy": self.strategy(dst, form)}

    def source(self, case: str, fmt: str) -> Path:
        """The checkpoint of a layout: as MindSpore saved it, or made by us from the complete one."""
        if case in SAVED:
            return self.root / f"src_{fmt}" / case
        made = self._made_in / f"{case}_{fmt}"
        if not made.exists():
            transform_ckpt.convert(self.source("C", fmt), made, dst_strategy=self.strategy(case))
        return made

    def expected(self, case: str) -> dict[int, Arrays]:
        if case not in self._expected:
            stages = self.stages[case]
            self._expected[case] = {r: slice_rank(self._whole, stages, r) for r in range(world_size(stages))}
        return self._expected[case]


@pytest.fixture(scope="session")
def cases(ms: ModuleType, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(ms, golden / "mindspore", tmp_path_factory.mktemp("made"))


def assert_ranks(actual: Ranks, expected: dict[int, Arrays]) -> None:
    assert sorted(actual) == sorted(expected)
    for rank, held in expected.items():
        assert_same(actual[rank], held, f"rank {rank}")


def read_header(ms: ModuleType, path: Path) -> Header:
    """Type and shape of everything in a file, by MindSpore's message class or from the JSON: no reader of ours."""
    if path.suffix == ".ckpt":
        message = ms.train.checkpoint_pb2.Checkpoint()
        message.ParseFromString(path.read_bytes())
        return {value.tag: (value.tensor.tensor_type, tuple(value.tensor.dims)) for value in message.value}
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def run_cli(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transform_ckpt", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("pair", GOLDEN_PAIRS)
def test_api_gives_the_golden_tensors(cases: Golden, tmp_path: Path, pair: str, fmt: str) -> None:
    src, dst = pair.split("_to_")
    result = transform_ckpt.convert(
        cases.root / f"src_{fmt}" / src,
        tmp_path / "out",
        src_strategy=cases.strategy(src) if src != "C" else None,
        dst_strategy=cases.strategy(dst) if dst != "C" else None,
    )
    golden_ranks = cases.load(cases.root / f"golden_{fmt}" / pair)
    assert result.files == len(golden_ranks) == cases.table[dst]["world"]
    assert_ranks(cases.load(tmp_path / "out"), golden_ranks)
    names = {rank: path.name for rank, path in rank_files(tmp_path / "out").items()}
    assert names == {rank: f"checkpoint_{rank}.{fmt}" for rank in golden_ranks}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("pair", GOLDEN_PAIRS)
def test_command_line_gives_the_golden_tensors(cases: Golden, tmp_path: Path, pair: str, fmt: str, form: str) -> None:
    src, dst = pair.split("_to_")
    strategies = cases.strategies(src, dst, form)
    found = run_cli(
        *("convert", cases.root / f"src_{fmt}" / src, tmp_path / "out", "--to", "mindspore", "--json"),
        *("--src-strategy", strategies["src_strategy"], "--dst-strategy", strategies["dst_strategy"]),
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["ok"] is True
    assert_ranks(cases.load(tmp_path / "out"), cases.load(cases.root / f"golden_{fmt}" / pair))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_every_pair(cases: Golden, tmp_path: Path, src: str, dst: str, fmt: str) -> None:
    transform_ckpt.convert(cases.source(src, fmt), tmp_path / "out", **cases.strategies(src, dst))
    assert_ranks(cases.load(tmp_path / "out"), cases.expected(dst))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_sources_are_what_the_slicer_says(cases: Golden, case: str, fmt: str) -> None:
    assert_ranks(cases.load(cases.source(case, fmt)), cases.expected(case))


@pytest.mark.parametrize(("src", "dst"), RING)
def test_other_format_and_back(cases: Golden, tmp_path: Path, src: str, dst: str) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    transform_ckpt.convert(cases.source(src, "ckpt"), there, container="safetensors", **cases.strategies(src, dst))
    assert {path.suffix for path in rank_files(there).values()} == {".safetensors"}
    assert_ranks(cases.load(there), cases.expected(dst))
    transform_ckpt.convert(there, back, container="ckpt", prefix="net_", **cases.strategies(dst, src))
    names = {rank: path.name for rank, path in rank_files(back).items()}
    assert names == {rank: f"net_{rank}.ckpt" for rank in cases.expected(src)}
    assert_ranks(cases.load(back), cases.expected(src))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("src", "dst"), [("A", "B"), ("A", "C"), ("C", "A"), ("D", "E")])
def test_names_in_no_strategy_are_in_every_file(cases: Golden, tmp_path: Path, src: str, dst: str, fmt: str) -> None:
    transform_ckpt.convert(cases.source(src, fmt), tmp_path / "out", **cases.strategies(src, dst))
    first = rank_files(cases.source(src, fmt))[0]
    wanted_header, wanted = read_header(cases.ms, first), load_file(cases.ms, first)
    files = rank_files(tmp_path / "out")
    assert len(files) == cases.table[dst]["world"]
    for path in files.values():
        header, held = read_header(cases.ms, path), load_file(cases.ms, path)
        assert {name: header.get(name) for name in STATES} == {name: wanted_header[name] for name in STATES}
        assert_same({name: held[name] for name in STATES}, {name: wanted[name] for name in STATES}, str(path))


@pytest.mark.parametrize("case", CASES)
def test_strategies_have_the_world_of_the_table(cases: Golden, case: str) -> None:
    stages, table = cases.stages[case], cases.table[case]
    assert (len(stages), len(stages) * stage_devices(stages)) == (table["pp"], table["world"])
