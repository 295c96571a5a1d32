"""The Megatron command lines as a user types them: convert_pt2ckpt.py, convert_ckpt2pt.py, transform-ckpt.

What comes out is read by the real mindspore, torch and megatron-core and compared with what the training held.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.e2e import megatron_support as support
from tests.e2e.megatron_support import (
    CASES,
    CKPT2PT,
    PREFIXES,
    PT2CKPT,
    TRACKER,
    Checkpoints,
    Tools,
    answer,
    arrays,
    assert_holds,
    cli,
    directories,
    groups,
    process,
    rank_file,
    refused,
    script,
    shards,
    slow_tool,
    tensor_files,
    wholes,
)
from tests.hostile import driver
from tests.hostile.driver import ROOT, assert_done, assert_refused, end, start, tree, units_done, wait_for
from tests.megatron.support import Small, load, save
from tests.megatron.support import torch as the_torch
from tests.megatron_real.case import Case
from tests.megatron_real.environments import Unavailable
from tests.megatron_real.oracle import load_back
from transform_ckpt import execute, planner

DENSE_RANKS = {"00_000": 0, "01_000": 1, "00_001": 4, "01_001": 5}
"""Of tp2 pp2 dp2: R = pp * dp * tp + tp, so that 2, 3, 6 and 7 are no files."""
MANIFEST = "transform_ckpt.json"
BATCH = 8
"""global_batch_size of the cases."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    pytest.importorskip("torch", reason="torch is not installed: make venv")
    found = Checkpoints(tmp_path_factory.mktemp("megatron"))
    try:
        found["plain"]
    except Unavailable as reason:
        pytest.skip(str(reason))
    return found


@pytest.fixture(scope="session")
def dense(made: Checkpoints) -> Path:
    """tp2 pp2 dp2, megatron-core 0.16.1."""
    return made["dense"]


@pytest.fixture(scope="session")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tp2, iteration 7, a list of buckets as megatron-core 0.6 writes it, with its param_map/."""
    small = Small()
    return save(small.trees(), tmp_path_factory.mktemp("listed"), small.maps())


@pytest.fixture(scope="session")
def shards_dir(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense checkpoint as convert_pt2ckpt.py writes it, by a whole process."""
    path = tmp_path_factory.mktemp("shards") / "MS"
    assert_done(process([script(PT2CKPT), "--megatron-path", dense, "--ms-path", path]))
    return path


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tools:
    return Tools(monkeypatch, capfd)


@pytest.fixture
def ms_dir(shards_dir: Path, tmp_path: Path) -> Path:
    """A copy of the converted checkpoint, to be changed."""
    return Path(shutil.copytree(shards_dir, tmp_path / "MS"))


def sources_of(src: Path) -> set[str]:
    return {str(p) for p in src.glob("*/mp_rank_*")}


# ============================================================================================ convert_pt2ckpt.py


@pytest.mark.parametrize(
    ("container", "elsewhere"), [("ckpt", False), ("safetensors", True)], ids=["from the project", "from elsewhere"]
)
def test_every_rank_holds_its_shards(
    dense: Path, tmp_path: Path, ms: ModuleType, container: str, *, elsewhere: bool
) -> None:
    """Every flag that says what is so anyway; the parent in one case, the iteration itself in the other."""
    cwd = tmp_path if elsewhere else ROOT
    given = ["--tp-size", 2, "--pp-size", 2, "--dp-size", 2, "--cp-size", 1, "--ep-size", 1, "--vpp-size", 1]
    given += ["--num-layers", 4, "--stage-list", 2, 2, "--parallel-init-order", "tp-cp-ep-dp-pp"]
    given += ["--param-map-path", dense / "param_map", "--process-limit", 2, "--process_timeout", 60]
    dst = Path("MS") if elsewhere else tmp_path / "MS"
    words = [script(PT2CKPT, cwd), "--megatron-path", dense / "iter_0000002", "--ms-path", dst, "--format", container]
    found = process([*words, *(given if elsewhere else [])], cwd=cwd)
    assert_done(found)
    dst = tmp_path / "MS"
    pairs = [support.DONE.fullmatch(line) for line in found.out.splitlines()]
    assert None not in pairs
    assert {m["src"]: m["dst"] for m in pairs if m} == {
        str(dense / "iter_0000002" / f"mp_rank_{place}"): str(dst / f"rank_{rank}" / f"network.{container}")
        for place, rank in DENSE_RANKS.items()
    }
    assert len(pairs) == len(DENSE_RANKS)
    assert sorted(p.name for p in dst.iterdir()) == sorted(
        ["pt_meta", "strategy", MANIFEST, *(f"rank_{r}" for r in DENSE_RANKS.values())]
    )
    expected = shards(dense)
    for place, rank in DENSE_RANKS.items():
        loaded = arrays(ms, dst / f"rank_{rank}" / f"network.{container}")
        assert_holds(loaded, expected[place])
        assert [loaded[n].item() for n in ("step_num", "epoch_num", "state_step")] == [2, 0, 2]
        assert [loaded[n].item() for n in ("num_steps", "lr_decay_style")] == [16, 3]
        assert loaded["learning_rate_group_0"] == np.float32(0.01)
    meta = {p.name for p in (dst / "pt_meta").iterdir()}
    maps = {f"param_map_buffer0_dp0tp{t}pp{p}vpp0.json" for t in (0, 1) for p in (0, 1)}
    assert meta == {f"args_tp0{t}_pp00{p}.pt" for t in (0, 1) for p in (0, 1)} | maps | {"layout.json"}
    for name in maps:
        assert json.loads((dst / "pt_meta" / name).read_text()) == json.loads((dense / "param_map" / name).read_text())


def test_files_of_every_data_parallel_rank(made: Checkpoints, tools: Tools, tmp_path: Path, ms: ModuleType) -> None:
    """dp x cp copies with equal bytes; without the flag the first alone."""
    src = made["replicas"]
    one = tensor_files(tools.to_ms(src, tmp_path / "one"))
    every = tensor_files(tools.to_ms(src, tmp_path / "all", "--generate-all-dp-cp"))
    assert sorted(one) == ["rank_0/network.ckpt", "rank_1/network.ckpt"]
    assert sorted(every) == sorted(f"rank_{r}/network.ckpt" for r in range(8))
    assert all(every[f"rank_{r}/network.ckpt"] == one[f"rank_{r % 2}/network.ckpt"] for r in range(8))
    assert_holds(arrays(ms, tmp_path / "all" / "rank_7" / "network.ckpt"), shards(src)["01"])


@pytest.mark.parametrize("every", [False, True])
def test_expert_ranks(made: Checkpoints, tools: Tools, tmp_path: Path, ms: ModuleType, *, every: bool) -> None:
    """Ranks of dp = 0 .. ep-1, each with the dense states and its experts, numbered globally."""
    src = made["experts"]
    tools.to_ms(src, tmp_path / "MS", "--ep-size", 2, *(["--generate-all-dp-cp"] if every else []))
    assert sorted(p.name for p in (tmp_path / "MS").glob("rank_*")) == [f"rank_{r}" for r in range(4 if every else 2)]
    dense = {k: v for k, v in shards(src)["00_000"].items() if "experts." not in k}
    for rank in range(4 if every else 2):
        own = {k: v for k, v in shards(src)[f"00_00{rank % 2}"].items() if "experts." in k}
        assert {int(n) for n in re.findall(r"local_experts\.(\d+)", " ".join(own))} == {rank % 2 * 2, rank % 2 * 2 + 1}
        assert_holds(arrays(ms, tmp_path / "MS" / f"rank_{rank}" / "network.ckpt"), {**dense, **own})


@pytest.mark.parametrize("container", ["ckpt", "safetensors"])
def test_weights_alone(dense: Path, tools: Tools, tmp_path: Path, ms: ModuleType, container: str) -> None:
    """The model's own bfloat16 weights as fp32, also where no optimizer was saved."""
    src = Path(shutil.copytree(dense, tmp_path / "src"))
    for path in src.glob("*/*/distrib_optim.pt"):
        path.unlink()
    refused(tools(PT2CKPT, "--megatron-path", src, "--ms-path", tmp_path / "no"), 3, tmp_path / "no", "param-only")
    dst = tools.to_ms(src, tmp_path / "MS", "--convert-param-only", "--format", container, "--file-prefix", "net")
    for place, rank in DENSE_RANKS.items():
        model = rank_file(src, place)["model"]
        expected = {}
        for name, value in model.items():
            if value is not None:
                expected[support.mindspore_name(name, 2 * int(place[-1]))] = value.float().numpy()
        assert_holds(arrays(ms, dst / f"rank_{rank}" / f"net.{container}"), expected)
        names = load(dst / "pt_meta" / f"args_tp{place[:2]}_pp{place[3:]}.pt")["param_name_list"]
        assert names == [[f"model.{n}" for n, v in reversed(model.items()) if v is not None]]


@pytest.mark.parametrize("content", [["param"], ["exp_avg_sq"], ["exp_avg", "param"]])
def test_chosen_states(dense: Path, tools: Tools, tmp_path: Path, ms: ModuleType, content: list[str]) -> None:
    dst = tools.to_ms(dense, tmp_path / "MS", "--dist-opt-content", *content)
    expected = {
        name: array
        for name, array in shards(dense)["01_001"].items()
        if next((s for s in ("exp_avg_sq", "exp_avg") if name.startswith(PREFIXES[s])), "param") in content
    }
    assert_holds(arrays(ms, dst / "rank_5" / "network.ckpt"), expected)


def test_adam_names(dense: Path, tools: Tools, tmp_path: Path, ms: ModuleType) -> None:
    dst = tools.to_ms(dense, tmp_path / "MS", "--optimizer-names", "adam")
    expected = {
        n.replace("exp_avg_sq.", "adam_v.").replace("exp_avg.", "adam_m."): a
        for n, a in shards(dense)["01_001"].items()
    }
    assert_holds(arrays(ms, dst / "rank_5" / "network.ckpt"), expected)


def test_processes_and_debug(dense: Path, shards_dir: Path, tools: Tools, tmp_path: Path) -> None:
    """However many processes: the same bytes.  --debug names every tensor on stderr, and changes nothing."""
    whole = tree(shards_dir)
    for number, flags in enumerate(("--multiprocess-off", "--process-limit 1", "--memory 16M", "--debug")):
        found = tools(PT2CKPT, "--megatron-path", dense, "--ms-path", tmp_path / str(number), *flags.split())
        assert_done(found)
        assert tree(tmp_path / str(number)) == whole
        named = [f"rank_{DENSE_RANKS[p]}/network.ckpt: {n}" for p, names in shards(dense).items() for n in names]
        assert all((line in found.err) is ("--debug" in flags) for line in named)


def test_json_and_an_occupied_destination(dense: Path, shards_dir: Path, tools: Tools, tmp_path: Path) -> None:
    dst = tmp_path / "MS"
    old = driver.old_output(dst)
    words = ["--megatron-path", dense, "--ms-path", dst, "--json"]
    found = tools(PT2CKPT, *words)
    assert_refused(found, 2, dst, "is not empty", "--overwrite")
    assert answer(found)["exit_code"] == 2
    assert tree(dst) == old
    found = tools(PT2CKPT, *words, "--overwrite")
    assert_done(found)
    assert {src for src, _ in answer(found)["converted"]} == sources_of(dense)
    assert all(Path(file).is_file() for _, file in answer(found)["converted"])
    assert tree(dst) == tree(shards_dir)
    assert [p.name for p in tmp_path.iterdir()] == ["MS"]


REFUSED: dict[str, tuple[list[object], int, list[str]]] = {
    "another order": (["--parallel-init-order", "tp-pp-dp"], 2, ["tp-pp-dp", "tp-cp-ep-dp-pp"]),
    "unknown flag": (["--convert-everything"], 2, ["--convert-everything"]),
    "no number": (["--tp-size", "two"], 2, ["--tp-size", "two"]),
    "zero": (["--tp-size", 0], 2, ["--tp-size 0"]),
    "unknown format": (["--format", "pt"], 2, ["--format", "pt"]),
    "unknown state": (["--dist-opt-content", "param", "momentum"], 2, ["momentum", "exp_avg_sq"]),
    "a path as prefix": (["--file-prefix", "a/b"], 2, ["a/b"]),
    "no process": (["--process-limit", 0], 2, ["--process-limit"]),
    "no time": (["--process_timeout", 0], 2, ["--process_timeout"]),
    "memory": (["--memory", "much"], 2, ["much"]),
    "no version": (["--megatron-core-version", "newest"], 2, ["newest"]),
    "all sizes at once": (
        ["--tp-size", 4, "--pp-size", 8, "--dp-size", 16, "--cp-size", 32, "--num-layers", 64],
        3,
        ["tp 2, and 4", "pp 2, and 8", "dp 2, and 16", "cp 1, and 32", "num_layers 4, and 64"],
    ),
    "ep": (["--ep-size", 2], 3, ["ep 1, and 2"]),
    "vpp": (["--vpp-size", 2], 3, ["2", "1"]),
    "another split": (["--stage-list", 1, 3], 3, ["layer"]),
    "other stages": (["--stage-list", 1, 1, 2], 3, ["3 stages", "2 stages"]),
    "noop": (["--noop", 3], 3, ["layer"]),
    "another run's map": (["--param-map-path", "{experts}/param_map"], 3, ["param_map"]),
    "no map": (["--param-map-path", "{tmp}"], 3, ["{tmp}"]),
    "no config": (["--hf-config", "{tmp}/none"], 3, ["{tmp}/none"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(made: Checkpoints, dense: Path, tools: Tools, tmp_path: Path, name: str) -> None:
    args, code, expected = REFUSED[name]
    filled = [str(a).format(experts=made["experts"], tmp=tmp_path) for a in args]
    found = tools(PT2CKPT, "--megatron-path", dense, "--ms-path", tmp_path / "MS", *filled)
    refused(found, code, tmp_path / "MS", *(w.format(tmp=tmp_path) for w in expected))


@pytest.mark.parametrize("name", [PT2CKPT, CKPT2PT])
def test_usage_of_processes(tmp_path: Path, name: str) -> None:
    """Required flags, and --help, from anywhere."""
    refused(process([script(name, tmp_path), "--ms-path", tmp_path / "x"], cwd=tmp_path), 2, tmp_path / "x", "required")
    found = process([script(name, tmp_path), "--help"], cwd=tmp_path)
    assert_done(found)
    assert "--process_timeout" in found.out


def test_a_long_timeout(dense: Path, tools: Tools, tmp_path: Path) -> None:
    """More seconds than the kernel's alarm counts."""
    found = tools(PT2CKPT, "--megatron-path", dense, "--ms-path", tmp_path / "MS", "--process_timeout", 10**11)
    assert found.code in (0, 2), found.err


@pytest.mark.parametrize(("tool", "flags"), [(PT2CKPT, ["--process-limit", 2]), (CKPT2PT, ["--multiprocess-off"])])
def test_a_timeout_is_continued(dense: Path, shards_dir: Path, tmp_path: Path, tool: str, flags: list[object]) -> None:
    """Exit 7, what is done is kept, and the same command goes on with the same files."""
    src = dense if tool == PT2CKPT else shards_dir
    dst, source = ("--ms-path", "--megatron-path") if tool == PT2CKPT else ("--megatron-path", "--ms-path")
    args = [source, src, dst, tmp_path / "out", *flags]
    found = end(start(slow_tool(tool, *args, "--process_timeout", 3, unit=2048, delay=0.2)))
    assert_refused(found, 7, "--process_timeout", "3 s", "same command")
    assert "successfully" not in found.out
    assert not (tmp_path / "out").exists()
    assert units_done(tmp_path / "out.partial") > 0
    inodes = inodes_below(tmp_path / "out.partial")
    assert_done(end(start(slow_tool(tool, *args, "--process_timeout", 60, unit=2048, delay=0))))
    assert inodes.items() <= inodes_below(tmp_path / "out").items()
    assert_done(cli("verify", tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def inodes_below(path: Path) -> dict[str, int]:
    """Of tensor files."""
    return {str(p.relative_to(path)): p.stat().st_ino for p in path.rglob("*") if p.suffix in (".ckpt", ".pt")}


# ============================================================================================ convert_ckpt2pt.py


@pytest.mark.parametrize("elsewhere", [False, True], ids=["from the project", "from another directory"])
def test_back_by_pt_meta(dense: Path, shards_dir: Path, tmp_path: Path, *, elsewhere: bool) -> None:
    """The real loader takes it; every flag of the original may be said."""
    given = ["--tp-size", 2, "--pp-size", 2, "--dp-size", 2, "--cp-size", 1, "--vpp-size", 1, "--num-layers", 4]
    given += ["--src-model-format", "ckpt", "--param-map-path", shards_dir / "pt_meta", "--process-limit", 2]
    cwd = tmp_path if elsewhere else ROOT
    words = [script(CKPT2PT, cwd), "--ms-path", shards_dir, "--megatron-path", tmp_path / "out"]
    found = process([*words, *(given if elsewhere else [])], cwd=cwd)
    assert_done(found)
    pairs = [support.DONE.fullmatch(line) for line in found.out.splitlines()]
    assert [m and m["src"] for m in pairs] == [str(shards_dir / f"rank_{r}") for r in sorted(DENSE_RANKS.values())]
    places = sorted(f"mp_rank_{place}" for place in DENSE_RANKS)
    assert directories(tmp_path / "out") == ("2", "iter_0000002", places)
    assert load_back(CASES["dense"], tmp_path / "out") == {}
    assert_done(cli("diff", dense, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("plain", ["mp_rank_00"]),
        ("replicas", ["mp_rank_00", "mp_rank_01"]),
        ("experts", ["mp_rank_00_000", "mp_rank_00_001"]),
    ],
)
def test_names_of_directories(made: Checkpoints, tools: Tools, tmp_path: Path, name: str, places: list[str]) -> None:
    """As Megatron has them: no _PPP without stages, _EEE with expert ranks."""
    tools.to_ms(made[name], tmp_path / "MS", "--format", "safetensors")
    tools.to_pt(tmp_path / "MS", tmp_path / "out", "--src-model-format", "safetensors")
    assert directories(tmp_path / "out") == ("2", "iter_0000002", places)
    assert load_back(CASES[name], tmp_path / "out") == {}


def test_chunks(made: Checkpoints, tools: Tools, tmp_path: Path, ms: ModuleType) -> None:
    """Virtual stages, both spellings of their size."""
    dst = tools.to_ms(made["chunks"], tmp_path / "MS", "--vpp-per-stage", 2)
    assert_holds(arrays(ms, dst / "rank_5" / "network.ckpt"), shards(made["chunks"])["01_001"])
    tools.to_pt(dst, tmp_path / "out", "--vpp-size", 2)
    assert load_back(CASES["chunks"], tmp_path / "out") == {}


def test_a_list_of_buckets(listed: Path, tools: Tools, tmp_path: Path, ms: ModuleType) -> None:
    """megatron-core 0.6: values by the maps of the run, the way back, and --container."""
    dst = tools.to_ms(listed / "iter_0000007", tmp_path / "MS", "--param-map-path", listed / "param_map")
    names = json.loads((listed / "param_map" / "param_map_buffer0_dp0tp1pp0vpp0.json").read_text())
    state = load(listed / "iter_0000007" / "mp_rank_01" / "distrib_optim.pt")[0]
    ((_, content),) = state.items()
    expected = {}
    for key, (_, shape, first, last, _) in names.items():
        for name, prefix in PREFIXES.items():
            flat = np.concatenate([t.numpy() for t in content[name]])
            expected[prefix + support.mindspore_name(key.removeprefix("module."))] = flat[first:last].reshape(shape)
    assert_holds(arrays(ms, dst / "rank_1" / "network.ckpt"), expected)
    tools.to_pt(dst, tmp_path / "list")
    tools.to_pt(dst, tmp_path / "one", "--container", "coalesced")
    for place in ("00", "01"):
        back, whole = (
            load(tmp_path / kind / f"iter_0000007/mp_rank_{place}/distrib_optim.pt") for kind in ("list", "one")
        )
        assert set(back) == {"per_bucket_numel", "per_bucket_numel_unpadded", 0}
        assert whole["buckets_coalesced"] is True
    for kind in ("list", "one"):
        assert (tmp_path / kind / TRACKER).read_text() == "7"
        assert_done(cli("diff", listed, tmp_path / kind))


@pytest.mark.parametrize("sizes", [[], ["--tp-size", 2, "--pp-size", 1, "--num-layers", 2, "--dp-size", 1]])
def test_a_pt_meta_of_mindspeed(listed: Path, tools: Tools, tmp_path: Path, sizes: list[object]) -> None:
    """Parameter maps and args_*.pt as its converter saves them, without anything of ours."""
    dst = tools.to_ms(listed, tmp_path / "MS")
    for name in ("pt_meta", "strategy"):
        shutil.rmtree(dst / name)
    (dst / MANIFEST).unlink()
    keys = ("args", "checkpoint_version", "iteration", "optimizer", "opt_param_scheduler", "rng_state")
    (tmp_path / "theirs").mkdir()
    for tp in range(2):
        model = rank_file(listed, f"0{tp}")
        meta = {key: model.get(key) for key in (*keys, "num_floating_point_operations_so_far")}
        the_torch().save(meta, tmp_path / "theirs" / f"args_tp0{tp}_pp000.pt")
        name = f"param_map_buffer0_dp0tp{tp}pp0vpp0.json"
        shutil.copy(listed / "param_map" / name, tmp_path / "theirs" / name)
    tools.to_pt(dst, tmp_path / "out", "--param-map-path", tmp_path / "theirs", *sizes)
    assert directories(tmp_path / "out") == ("7", "iter_0000007", ["mp_rank_00", "mp_rank_01"])
    assert_done(cli("diff", listed, tmp_path / "out"))
    assert groups(rank_file(tmp_path / "out", "01")) == groups(rank_file(listed, "01"))


@pytest.mark.parametrize("one", [False, True], ids=["directory", "file"])
@pytest.mark.parametrize("container", [None, "list"])
def test_map_of_the_run_and_a_template(
    listed: Path, tools: Tools, tmp_path: Path, container: str | None, *, one: bool
) -> None:
    dst = tools.to_ms(listed, tmp_path / "MS")
    shutil.rmtree(dst / "pt_meta")
    found = tools(
        CKPT2PT, "--ms-path", dst, "--megatron-path", tmp_path / "no", "--param-map-path", listed / "param_map"
    )
    refused(found, 3, tmp_path / "no", "num_layers", "--num-layers")
    template = listed / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt" if one else listed
    words = ["--param-map-path", listed / "param_map", "--template", template]
    tools.to_pt(dst, tmp_path / "out", *words, *(["--container", container] if container else []))
    assert_done(cli("diff", listed, tmp_path / "out"))
    tree_of = rank_file(tmp_path / "out", "01")
    assert (tree_of["iteration"], tree_of["args"].num_layers) == (7, 2)


def test_map_of_a_newer_run_and_a_template(dense: Path, shards_dir: Path, tools: Tools, tmp_path: Path) -> None:
    """The map has padding between parameters, which no list of buckets has: the container is that of the run."""
    shutil.copytree(shards_dir, tmp_path / "MS", ignore=shutil.ignore_patterns("pt_meta"))
    words = ["--param-map-path", dense / "param_map", "--template", dense]
    tools.to_pt(tmp_path / "MS", tmp_path / "said", *words, "--container", "coalesced")
    assert load_back(CASES["dense"], tmp_path / "said") == {}
    found = tools(CKPT2PT, "--ms-path", tmp_path / "MS", "--megatron-path", tmp_path / "out", *words)
    if found.code == 0:
        assert load_back(CASES["dense"], tmp_path / "out") == {}
    else:
        refused(found, 3, tmp_path / "out", "--container")


def test_uneven_and_noop_layers(made: Checkpoints, tools: Tools, tmp_path: Path) -> None:
    """--stage-list and --noop say what args does not; what they say otherwise is refused."""
    uneven = made["uneven"]
    src = Path(shutil.copytree(uneven, tmp_path / "src"))
    for path in src.glob("*/*/model_optim_rng.pt"):
        edit(path, lambda args: args.__dict__.pop("decoder_first_pipeline_num_layers"))
    refused(tools(PT2CKPT, "--megatron-path", src, "--ms-path", tmp_path / "no"), 3, tmp_path / "no", "layer")
    dst = tools.to_ms(src, tmp_path / "MS", "--stage-list", 1, 3)
    assert tensor_files(dst) == tensor_files(tools.to_ms(uneven, tmp_path / "same"))
    tools.to_pt(dst, tmp_path / "out", "--stage-list", 1, 3)
    assert load_back(CASES["uneven"], tmp_path / "out") == {}
    found = tools(CKPT2PT, "--ms-path", dst, "--megatron-path", tmp_path / "no", "--stage-list", 2, 2)
    refused(found, 3, tmp_path / "no", "(1, 3)", "(2, 2)")
    assert_done(cli("convert", uneven, tmp_path / "six", "--to", "megatron", "--pp", 2, "--noop-layers", "0,5"))
    for path in (tmp_path / "six").glob("*/*/model_optim_rng.pt"):
        edit(path, lambda args: args.__dict__.pop("noop_layers", None))
    dst = tools.to_ms(tmp_path / "six", tmp_path / "MS6", "--noop", 0, 5, "--num-layers", 6)
    tools.to_pt(dst, tmp_path / "out6", "--noop", 0, 5)
    assert_done(cli("convert", tmp_path / "out6", tmp_path / "four", "--to", "megatron", "--pp", 1))
    assert load_back(Case(), tmp_path / "four") == {}


def edit(path: Path, change: Callable[[argparse.Namespace], object]) -> None:
    """Change the args of a rank's file, and leave its enum out."""
    found = load(path)
    change(found["args"])
    del found["args"].model_type
    the_torch().save(found, path)


def test_what_args_lacks(made: Checkpoints, dense: Path, shards_dir: Path, tools: Tools, tmp_path: Path) -> None:
    """Layers by --num-layers or a config.json; a bucket size and a version where no map is."""
    src = Path(shutil.copytree(dense, tmp_path / "src"))
    for path in src.glob("*/*/model_optim_rng.pt"):
        edit(path, lambda args: args.__dict__.pop("num_layers"))
    words = ["--megatron-path", src, "--ms-path", tmp_path / "no"]
    refused(tools(PT2CKPT, *words), 3, tmp_path / "no", "num_layers", "--num-layers")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"num_hidden_layers": 4}')
    for number, flags in enumerate((["--num-layers", 4], ["--hf-config", tmp_path / "hf"])):
        found = tools.to_ms(src, tmp_path / str(number), *flags)
        assert tensor_files(found) == tensor_files(shards_dir)
    refused(tools(PT2CKPT, *words, "--hf-config", tmp_path / "hf", "--num-layers", 5), 3, tmp_path / "no", "4", "5")
    buckets = made["buckets"]
    expected = tensor_files(tools.to_ms(buckets, tmp_path / "mapped"))
    shutil.copytree(buckets, tmp_path / "bare", ignore=shutil.ignore_patterns("param_map", "truth"))
    for path in (tmp_path / "bare").glob("*/*/model_optim_rng.pt"):
        edit(path, lambda args: args.__dict__.pop("ddp_bucket_size"))
    for number, said in enumerate(("", "--bucket-size 900 --megatron-core-version 0.16.1")):
        found = tools.to_ms(tmp_path / "bare", tmp_path / f"bare{number}", *said.split())
        assert tensor_files(found) == expected
        tools.to_pt(found, tmp_path / f"back{number}")
        assert load_back(CASES["buckets"], tmp_path / f"back{number}") == {}


def test_stage_list_that_says_what_is_so(shards_dir: Path, tools: Tools, tmp_path: Path) -> None:
    """As convert_pt2ckpt.py accepts it."""
    tools.to_pt(shards_dir, tmp_path / "out", "--stage-list", 2, 2)


def test_training_goes_on_in_mindspore(
    dense: Path, shards_dir: Path, tools: Tools, tmp_path: Path, ms: ModuleType
) -> None:
    """28 steps later, in files of MindSpore's names without pt_meta: counters advance, weights are the new ones."""
    trained = {}
    for rank in DENSE_RANKS.values():
        values = arrays(ms, shards_dir / f"rank_{rank}" / "network.ckpt")
        values = {n: a * np.float32(1.5) if a.size > 1 else a for n, a in values.items()}
        values |= {"step_num": np.array(30, np.int64), "state_step": np.array([30], np.float32)}
        trained[rank] = values
        folder = tmp_path / "MS" / f"rank_{rank}"
        folder.mkdir(parents=True)
        listing = [{"name": n, "data": ms.Tensor(a)} for n, a in values.items()]
        ms.save_checkpoint(listing, str(folder / f"x_rank_{rank}-1_30.ckpt"))
    tools.to_pt(tmp_path / "MS", tmp_path / "out", "--param-map-path", shards_dir / "pt_meta")
    places = sorted(f"mp_rank_{place}" for place in DENSE_RANKS)
    assert directories(tmp_path / "out") == ("30", "iter_0000030", places)
    for place, rank in DENSE_RANKS.items():
        before, after = rank_file(dense, place), rank_file(tmp_path / "out", place)
        assert after["iteration"] == 30
        assert groups(after) == [{**group, "step": 30} for group in groups(before)]
        samples = 28 * BATCH
        assert after["opt_param_scheduler"] == {**before["opt_param_scheduler"], "num_steps": 16 + samples}
        assert after["args"].consumed_train_samples == 16 + samples
        assert after["args"].iteration == 30
        for name, value in after["model"].items():
            if value is not None:
                new = the_torch().from_numpy(trained[rank][support.mindspore_name(name, 2 * int(place[-1]))].copy())
                assert the_torch().equal(value, new.to(the_torch().bfloat16)), name
    assert_done(cli("convert", tmp_path / "out", tmp_path / "whole", "--to", "mindspore", "--naming", "mindspeed"))
    expected = {n: a * np.float32(1.5) for n, a in wholes(dense).items()}
    assert_holds(arrays(ms, tmp_path / "whole" / "rank_0" / "checkpoint_0.safetensors"), expected)


def test_several_steps_in_mindspore(shards_dir: Path, tools: Tools, tmp_path: Path) -> None:
    """The highest step that every rank has."""
    for rank in DENSE_RANKS.values():
        (tmp_path / "MS" / f"rank_{rank}").mkdir(parents=True)
        for step in (2, 4) if rank != 5 else (2,):
            name = f"x_rank_{rank}-1_{step}.ckpt"
            shutil.copy(shards_dir / f"rank_{rank}" / "network.ckpt", tmp_path / "MS" / f"rank_{rank}" / name)
    found = tools(
        CKPT2PT, "--ms-path", tmp_path / "MS", "--megatron-path", tmp_path / "out", "--param-map-path",
        shards_dir / "pt_meta", "--json",
    )  # fmt: skip
    assert_done(found)
    assert all(path.endswith("_2.ckpt") for path in answer(found)["sources"])


REFUSED_BACK: dict[str, tuple[list[object], int, list[str]]] = {
    "other files": (["--src-model-format", "safetensors"], 3, ["network.ckpt", "safetensors"]),
    "sizes": (["--tp-size", 4], 3, ["tp 2", "4"]),
    "layers": (["--num-layers", 5], 3, ["num_layers 4", "5"]),
    "dp": (["--dp-size", 8], 3, ["rank_16"]),
    "noop": (["--noop", 3], 3, ["noop", "3"]),
    "no meta": (["--param-map-path", "{tmp}/none"], 3, ["{tmp}/none"]),
    "unknown flag": (["--no-such"], 2, ["--no-such"]),
    "unknown container": (["--container", "tuple"], 2, ["tuple"]),
    "iteration": (["--iteration", "last"], 2, ["last"]),
    "no time": (["--process_timeout", 0], 2, ["--process_timeout"]),
    "no version": (["--megatron-core-version", "newest"], 2, ["newest"]),
    "no template": (["--template", "{tmp}/none"], 3, ["{tmp}/none"]),
    "a version without lists": (["--megatron-core-version", "0.16.1", "--container", "list"], 2, ["0.16.1", "list"]),
}


@pytest.mark.parametrize("name", REFUSED_BACK)
def test_refused_back(shards_dir: Path, tools: Tools, tmp_path: Path, name: str) -> None:
    args, code, expected = REFUSED_BACK[name]
    filled = [str(a).format(tmp=tmp_path) for a in args]
    found = tools(CKPT2PT, "--ms-path", shards_dir, "--megatron-path", tmp_path / "out", *filled)
    refused(found, code, tmp_path / "out", *(w.format(tmp=tmp_path) for w in expected))


def test_a_rank_is_missing(ms_dir: Path, tools: Tools, tmp_path: Path) -> None:
    shutil.rmtree(ms_dir / "rank_4")
    refused(tools(CKPT2PT, "--ms-path", ms_dir, "--megatron-path", tmp_path / "out"), 3, tmp_path / "out", "rank_4")


def test_options_of_the_way_back(dense: Path, shards_dir: Path, tools: Tools, tmp_path: Path) -> None:
    """Weights alone, another name, --json, --overwrite, --multiprocess-off."""
    out = tools.to_pt(shards_dir, tmp_path / "out", "--convert-param-only", "--iteration", "release")
    assert directories(out) == ("release", "release", sorted(f"mp_rank_{place}" for place in DENSE_RANKS))
    assert not list(out.rglob("distrib_optim.pt"))
    assert "optimizer" not in rank_file(out, "00_000")
    words = ["--ms-path", shards_dir, "--megatron-path", out, "--json", "--multiprocess-off"]
    assert_refused(tools(CKPT2PT, *words), 2, out, "is not empty")
    assert directories(out)[0] == "release"
    found = tools(CKPT2PT, *words, "--overwrite")
    assert_done(found)
    assert len(answer(found)["sources"]) == len(DENSE_RANKS)
    assert tree(out) == tree(tools.to_pt(shards_dir, tmp_path / "again"))
    assert_done(cli("diff", dense, out))


# ======================================================================================= transform-ckpt to Megatron

LAYOUTS: dict[str, tuple[str, str, Case, list[str]]] = {
    "one rank": ("dense", "--tp 1 --pp 1 --dp 1", Case(), ["00"]),
    "as it is": ("dense", "", CASES["dense"], ["00_000", "00_001", "01_000", "01_001"]),
    "tp and dp": ("dense", "--tp 4 --pp 1 --dp 4", Case(tp=4, dp=4), ["00", "01", "02", "03"]),
    "chunks": (
        "plain", "--pp 2 --layers-per-virtual-stage 1", Case(pp=2, vpp=2), ["00_000", "00_001"],
    ),
    "a list": ("plain", "--pp 2 --num-layer-list 1,3", Case(pp=2, first_stage_layers=1), ["00_000", "00_001"]),
    "a first stage": (
        "plain", "--pp 2 --decoder-first-pipeline-num-layers 3", Case(pp=2, first_stage_layers=3), ["00_000", "00_001"],
    ),
    "a last stage": (
        "uneven", "--pp 3 --decoder-last-pipeline-num-layers 2", Case(pp=3, last_stage_layers=2),
        ["00_000", "00_001", "00_002"],
    ),
    "buckets": ("plain", "--tp 2 --dp 2 --bucket-size 900", Case(tp=2, dp=2, bucket_size=900), ["00", "01"]),
    "ep": ("experts", "--ep 4 --dp 4", Case(ep=4, dp=4, experts=4, layers=2), [f"00_00{e}" for e in range(4)]),
    "etp": (
        "experts", "--tp 2 --etp 1 --ep 2 --dp 2", Case(tp=2, etp=1, ep=2, dp=2, experts=4, layers=2),
        ["00_000", "00_001", "01_000", "01_001"],
    ),
    "no ep": ("experts", "--ep 1 --pp 2 --dp 1", Case(pp=2, experts=4, layers=2), ["00_000", "00_001"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(made: Checkpoints, tmp_path: Path, name: str) -> None:
    """The real loader of the layout takes it; the destination's directories are those that Megatron reads."""
    src, flags, case, places = LAYOUTS[name]
    found = cli("convert", made[src], tmp_path / "out", "--to", "megatron", *flags.split(), "--verify")
    assert_done(found)
    assert "equal to the source" in found.out
    tracker, iteration, there = directories(tmp_path / "out")
    assert (tracker, iteration) == ("1", "iter_0000001")
    assert there == [f"mp_rank_{place}" for place in places]
    assert load_back(case, tmp_path / "out") == {}


def test_more_expert_ranks_than_replicas(made: Checkpoints, tools: Tools, tmp_path: Path) -> None:
    """--ep 4 with dp 2: refused, or dp grows to what its own reader takes."""
    assert_done(cli("convert", made["experts"], tmp_path / "two", "--to", "megatron", "--ep", 2, "--dp", 2))
    found = cli("convert", tmp_path / "two", tmp_path / "out", "--to", "megatron", "--ep", 4)
    if found.code:
        refused(found, 3, tmp_path / "out", "--dp")
    else:
        tools.to_ms(tmp_path / "out", tmp_path / "MS")


@pytest.mark.parametrize(("flags", "counts"), [
    ("--pp 3 --noop-layers 1,4", [[1], [2], [1]]),
    ("--pp 2 --layers-per-virtual-stage 1 --noop-layers 0,5 --tp 2", None),
    ("--pp 2 --schedule dualpipev", [[1, 1], [1, 1]]),
])  # fmt: skip
def test_layers_move(made: Checkpoints, tmp_path: Path, flags: str, counts: list[list[int]] | None) -> None:
    """Noop layers and MindSpeed's schedule: so many layers in each chunk, nothing lost on the way there and back."""
    src = made["plain"]
    found = cli("convert", src, tmp_path / "out", "--to", "megatron", *flags.split())
    assert_done(found)
    if counts is not None:
        trees = [rank_file(tmp_path / "out", f"00_00{pp}") for pp in range(len(counts))]
        models = [[v for k, v in t.items() if k.startswith("model")] for t in trees]
        assert [[sum(".linear_proj.weight" in n for n in m) for m in stage] for stage in models] == counts
    assert_done(cli("diff", src, tmp_path / "out"))
    assert_done(cli("convert", tmp_path / "out", tmp_path / "back", "--to", "megatron", "--tp", 1, "--pp", 1))
    assert load_back(Case(), tmp_path / "back") == {}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("1", "iter_0000001")),
        (["--iteration", 30], ("30", "iter_0000030")),
        (["--iteration", "release"], ("release", "release")),
        (["--no-optimizer"], ("1", "iter_0000001")),
        (["--no-optimizer", "--iteration", 5], ("5", "iter_0000005")),
    ],
)
@pytest.mark.parametrize("converted", [False, True], ids=["of Megatron", "of shards"])
def test_iterations_of_the_output(
    dense: Path, shards_dir: Path, tmp_path: Path, flags: list[object], expected: tuple[str, str], *, converted: bool
) -> None:
    src = shards_dir if converted else dense
    assert_done(cli("convert", src, tmp_path / "out", "--to", "megatron", *flags))
    assert directories(tmp_path / "out")[:2] == expected
    assert bool(list((tmp_path / "out").rglob("distrib_optim.pt"))) == ("--no-optimizer" not in flags)


def test_iterations_of_the_source(dense: Path, tmp_path: Path) -> None:
    """The tracker's, one that is asked for, a directory itself; a tracker that lies is refused."""
    src = tmp_path / "src"
    for number in (2, 4):
        shutil.copytree(dense / "iter_0000002", src / f"iter_000000{number}")
        for path in src.glob(f"iter_000000{number}/*/model_optim_rng.pt"):
            edit(path, lambda args: setattr(args, "train_iters", number))  # noqa: B023 - called at once
    words = ["--to", "megatron", "--tp", 1]
    refused(cli("convert", src, tmp_path / "no", *words), 3, tmp_path / "no", TRACKER, "--iteration")
    (src / TRACKER).write_text("4\n")
    for number, (path, more) in enumerate([(src, []), (src, ["--iteration", 2]), (src / "iter_0000002", [])]):
        assert_done(cli("convert", path, tmp_path / str(number), *words, *more))
        assert rank_file(tmp_path / str(number), "00_000")["args"].train_iters == (2 if number else 4)
    for text, word in (("6", "iter_0000006"), ("../4", TRACKER), ("latest", TRACKER), ("", TRACKER)):
        (src / TRACKER).write_text(text)
        refused(cli("convert", src, tmp_path / "no", *words), 3, tmp_path / "no", src, word)


def test_vocabulary_is_padded(dense: Path, tmp_path: Path) -> None:
    """40 rows to a multiple of 16 * 4, with zeros, in weights and states; and off again to what tp needs."""
    words = ["--to", "megatron", "--tp", 4, "--vocab-divisible-by", 16]
    assert_done(cli("convert", dense, tmp_path / "out", *words))
    for name, place in (("embedding.word_embeddings.weight", "000"), ("output_layer.weight", "001")):
        rows = the_torch().cat([rank_file(tmp_path / "out", f"0{tp}_{place}")["model"][name] for tp in range(4)])
        assert rows.shape == (64, 16)
        assert not rows[40:].any()
        expected = the_torch().from_numpy(wholes(dense)[name]).to(the_torch().bfloat16)
        assert the_torch().equal(rows[:40], expected)
    args = rank_file(tmp_path / "out", "00_000")["args"]
    assert args.padded_vocab_size == 64
    assert_done(cli("convert", tmp_path / "out", tmp_path / "same", *words[:-1], 1))


def test_dialects_of_a_dense_local_model(made: Checkpoints, tmp_path: Path) -> None:
    """The defaults may be said, --experts also where there are none; another dialect is refused."""
    found = cli("convert", made["plain"], tmp_path / "no", "--to", "megatron", "--impl", "te")
    refused(found, 3, tmp_path / "no", "--impl te")
    words = ["--to", "megatron", "--impl", "local", "--experts", "sequential"]
    assert_done(cli("convert", made["plain"], tmp_path / "out", *words))


CONTRADICTIONS: dict[str, tuple[str, int, list[str]]] = {
    "tp": ("--to megatron --tp 3", 3, ["linear_proj", "do not divide into 3", "layers.3."]),
    "pp": ("--to megatron --pp 3", 3, ["4 layers", "3 pipeline stages"]),
    "chunks": ("--to megatron --layers-per-virtual-stage 3", 3, ["4 layers", "3"]),
    "list": ("--to megatron --num-layer-list 1,2", 3, ["[1, 2]", "4"]),
    "stages": ("--to megatron --num-layer-list 1,2,1", 3, ["3 stages", "2 stages"]),
    "first": ("--to megatron --decoder-first-pipeline-num-layers 5", 3, ["4 layers"]),
    "list and chunks": ("--to megatron --num-layer-list 1,3 --layers-per-virtual-stage 1", 3, ["layer"]),
    "no list": ("--to megatron --num-layer-list 1;3", 2, ["1;3"]),
    "zero": ("--to megatron --tp 0", 2, ["--tp"]),
    "iteration": ("--to megatron --iteration last", 2, ["last"]),
    "list and version": ("--to megatron --container list --megatron-core-version 0.16.1", 2, ["0.16.1", "list"]),
    "no version": ("--to megatron --megatron-core-version newest", 2, ["newest"]),
    "hf": ("--to hf", 3, ["megatron to hf"]),
    "torch_dist": ("--to torch_dist", 3, ["megatron to torch_dist"]),
    "from": ("--from mindspore --to megatron", 3, ["megatron", "--from mindspore"]),
    "from hf": ("--from hf --to megatron", 3, ["hf"]),
    "names": ("--to mindspore", 3, ["--naming mindspeed"]),
    "names of mcore": ("--to mindspore --naming mcore", 3, ["mcore", "--naming mindspeed"]),
    "a step": ("--to megatron --step 9", 3, ["iter_0000009"]),
    "source sizes": ("--to megatron --src-tp 4", 3, ["TP is 4"]),
    "strategy of the source": ("--to megatron --src-strategy None.ckpt", 2, ["--src-strategy"]),
    "strategy": ("--to megatron --dst-strategy None.ckpt", 2, ["--dst-strategy"]),
    "unified": ("--to megatron --unified --checkpoint-2 --crc", 2, ["--unified", "--checkpoint-2", "--crc"]),
    "names in Megatron": ("--to megatron --naming mcore --optimizer-names adam", 2, ["--naming", "--optimizer-names"]),
    "options of complete weights": (
        "--to mindspore --naming mindspeed --megatron-shards --unified --crc --prefix x_",
        2,
        ["--unified", "--crc"],
    ),
    "sizes in MindSpore": ("--to mindspore --naming mindspeed --tp 2 --pp 2", 2, ["--tp", "--pp"]),
}


@pytest.mark.parametrize("dry", [False, True], ids=["convert", "plan"])
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(dense: Path, tmp_path: Path, name: str, *, dry: bool) -> None:
    flags, code, words = CONTRADICTIONS[name]
    verb = "plan" if dry else "convert"
    refused(cli(verb, dense, tmp_path / "out", *flags.split()), code, tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "code", "words"), [
    ("--to hf", 3, ["mindspore to hf"]),
    ("--to torch_dist", 3, ["mindspore to torch_dist"]),
    ("--to mindspore --naming mcore", 3, ["mcore"]),
    ("--to mindspore --tp 2", 2, ["--tp"]),
    ("--to megatron --tp 3", 3, ["do not divide into 3"]),
    ("--to megatron --step 9", 4, ["step 9", "network.ckpt"]),
])  # fmt: skip
def test_contradictions_of_shards(shards_dir: Path, tmp_path: Path, flags: str, code: int, words: list[str]) -> None:
    """Of a source that convert_pt2ckpt.py wrote."""
    refused(cli("convert", str(shards_dir), str(tmp_path / "out"), *flags.split()), code, tmp_path / "out", *words)


def test_a_plan_writes_nothing_and_says_what_comes(dense: Path, tmp_path: Path) -> None:
    words = [dense, tmp_path / "out", "--to", "megatron", "--tp", "1", "--dp", "4"]
    with driver.untouched(tmp_path):
        planned = answer(cli("plan", *words, "--json"))
        found = cli("convert", *words, "--dry-run")
        assert_done(found)
        assert "nothing was written" in found.out
        assert answer(cli("convert", *words, "--dry-run", "--json"))["files"] == planned["files"]
    found = cli("convert", *words, "--json")
    assert_done(found)
    assert answer(found)["write_nbytes"] == planned["write_nbytes"]
    sizes = {
        str(p.relative_to(tmp_path / "out")): p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert planned["files"].items() <= sizes.items()
    assert sizes.keys() - planned["files"].keys() == {MANIFEST}
    with driver.untouched(tmp_path):
        for verb in ("plan", "convert"):
            assert_refused(cli(verb, *words), 2, tmp_path / "out", "is not empty")


# ===================================================================================== transform-ckpt to MindSpore


@pytest.mark.parametrize("shards_first", [False, True], ids=["of Megatron", "of shards"])
@pytest.mark.parametrize("name", ["dense", "chunks", "experts"])
def test_complete_weights(
    made: Checkpoints, tools: Tools, tmp_path: Path, ms: ModuleType, name: str, *, shards_first: bool
) -> None:
    """Both ways to the same whole tensors; [gate_r; up_r] are put together."""
    src, words = made[name], ["--to", "mindspore", "--format", "safetensors", "--verify"]
    if shards_first:
        src = tools.to_ms(src, tmp_path / "MS")
    else:
        words += ["--naming", "mindspeed"]
    assert_done(cli("convert", src, tmp_path / "out", *words))
    loaded = arrays(ms, tmp_path / "out" / "rank_0" / "checkpoint_0.safetensors")
    assert_holds(loaded, wholes(made[name]))
    assert [loaded[n].item() for n in ("step_num", "num_steps")] == [2, 16]


def test_names_and_states_of_complete_weights(dense: Path, tmp_path: Path, ms: ModuleType) -> None:
    words = ["--to", "mindspore", "--naming", "mindspeed", "--format", "ckpt"]
    assert_done(cli("convert", dense, tmp_path / "adam", *words, "--optimizer-names", "adam", "--prefix", "x_"))
    renamed = {n.replace("exp_avg_sq.", "adam_v.").replace("exp_avg.", "adam_m."): a for n, a in wholes(dense).items()}
    assert_holds(arrays(ms, tmp_path / "adam" / "rank_0" / "x_0.ckpt"), renamed)
    assert_done(cli("convert", dense, tmp_path / "none", *words, "--no-optimizer"))
    loaded = ms.load_checkpoint(str(tmp_path / "none" / "rank_0" / "checkpoint_0.ckpt"))
    expected = {n: a for n, a in wholes(dense).items() if not n.startswith("exp_avg")}
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        rounded = the_torch().from_numpy(expected[name]).to(the_torch().bfloat16).float().numpy()
        assert np.array_equal(value.astype(ms.float32).asnumpy(), rounded), name


def test_shards_are_those_of_the_tool(dense: Path, shards_dir: Path, tmp_path: Path) -> None:
    """--megatron-shards, and its strategy: what is in it can be sliced by it."""
    words = ["--to", "mindspore", "--naming", "mindspeed", "--verify"]
    assert_done(cli("convert", dense, tmp_path / "out", *words, "--megatron-shards"))
    assert tensor_files(tmp_path / "out") == tensor_files(shards_dir)
    assert_done(cli("verify", tmp_path / "out", "--strategy", tmp_path / "out" / "strategy"))
    assert_done(cli("diff", tmp_path / "out", shards_dir))


def test_without_pt_meta(ms_dir: Path, tools: Tools, tmp_path: Path) -> None:
    """[gate_r; up_r] are in no strategy: without what says so every way is refused by its name."""
    assert_done(cli("convert", ms_dir, tmp_path / "with", "--to", "mindspore"))
    shutil.rmtree(ms_dir / "pt_meta")
    for words in (["mindspore"], ["megatron"], ["mindspore", "--src-strategy", ms_dir / "strategy"]):
        found = cli("convert", ms_dir, tmp_path / "out", "--to", *map(str, words))
        assert found.code in (3, 4), found
        named = "linear_fc1" if "--src-strategy" in words else "pt_meta" if words == ["megatron"] else "strategy"
        refused(found, found.code, tmp_path / "out", named)
    refused(tools(CKPT2PT, "--ms-path", ms_dir, "--megatron-path", tmp_path / "out"), 3, tmp_path / "out", "pt_meta")


def test_inspect_verify_and_diff(dense: Path, ms_dir: Path, tmp_path: Path) -> None:
    found = answer(cli("inspect", dense, "--json"))
    assert (found["format"], found["step"], len(found["files"])) == ("megatron", 2, 8)
    shapes = {t["name"]: (t["dtype"], t["shape"]) for t in found["tensors"]}
    assert shapes["decoder.layers.3.mlp.linear_fc1.weight"] == ("BF16", [24, 16])
    assert shapes["optimizer.state.exp_avg.decoder.layers.3.mlp.linear_fc1.weight"] == ("F32", [24, 16])
    found = answer(cli("inspect", ms_dir, "--strategy", ms_dir / "strategy", "--json"))
    assert (found["step"], found["values"]["step_num"]) == (2, 2)
    out = tmp_path / "out"
    assert_done(cli("convert", dense, out, "--to", "megatron", "--tp", "1"))
    for words in (["verify", out], ["verify", out, "--against", dense], ["diff", dense, out]):
        assert_done(cli(*words))
    assert_done(cli("convert", dense, tmp_path / "weights", "--to", "megatron", "--no-optimizer"))
    assert_refused(cli("diff", dense, tmp_path / "weights"), 6, "81 of 108")
    driver.flip(out / "iter_0000001" / "mp_rank_00_001" / "distrib_optim.pt", -3000)
    assert_refused(cli("verify", out), 6, "mp_rank_00_001/distrib_optim.pt")
    assert_refused(cli("diff", dense, out), 6, "1 of 108")
    (manifest,) = ms_dir.glob(MANIFEST)
    assert_done(cli("verify", ms_dir))
    driver.flip(ms_dir / "pt_meta" / "layout.json", 10)
    assert_refused(cli("verify", ms_dir), 6, "layout.json")
    assert "/" not in json.loads(manifest.read_text()).get("source", {}).get("path", "")


def test_diff_of_weights_alone(dense: Path, tmp_path: Path) -> None:
    assert_done(cli("convert", dense, tmp_path / "weights", "--to", "megatron", "--no-optimizer"))
    assert_done(cli("diff", dense, tmp_path / "weights", "--no-optimizer"))


# =================================================================================================== runs that end


@pytest.fixture(scope="module")
def large(made: Checkpoints) -> Path:
    """53 MB in one rank."""
    return made["large"]


LARGE_WORDS = ("--to", "megatron", "--tp", "2", "--pp", "2", "--dp", "2")


def test_the_same_bytes_however_it_was_run(large: Path, tmp_path: Path) -> None:
    """Processes as a user starts them: one worker, two, again, and after SIGKILL in the middle."""
    for number in ("1", "2"):
        words = ["-m", "transform_ckpt", "convert", large, tmp_path / number, *LARGE_WORDS, "--workers", number]
        assert_done(process(words))
    whole = tree(tmp_path / "1")
    assert tree(tmp_path / "2") == whole
    words = ["convert", str(large), str(tmp_path / "out"), *LARGE_WORDS, "--workers", "2"]
    running = start(driver.slow_command(words, unit=1 << 20, delay=0.05))
    partial = tmp_path / "out.partial"
    wait_for(lambda: running.poll() is not None or units_done(partial) >= 5)
    os.killpg(running.pid, signal.SIGKILL)
    assert end(running).code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = units_done(partial)
    inodes = inodes_below(partial)
    for _ in range(100):  # workers may still be letting go
        found = end(start(driver.slow_command(words, unit=1 << 20, delay=0)))
        if "another run" not in found.err:
            break
    assert_done(found)
    assert f"{done} units kept" in found.out
    assert inodes.items() <= inodes_below(tmp_path / "out").items()
    assert {**tree(tmp_path / "out"), MANIFEST: None} == {**whole, MANIFEST: None}  # units of another size
    assert_done(cli("verify", tmp_path / "out"))
    assert load_back(Case(hidden=256, ffn=768, vocab=4096, layers=2, tp=2, pp=2, dp=2), tmp_path / "out") == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_disk_is_full_in_the_middle(
    dense: Path, shards_dir: Path, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Exit 5 that names the file; nothing under the final name; the same command continues."""
    monkeypatch.setattr(planner, "UNIT_NBYTES", 2048)
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)
    real = os.pwrite

    def write(fd: int, *args: Any) -> int:
        if "rank_4/network.ckpt" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, *args)

    dst = tmp_path / "MS"
    words = ["--megatron-path", dense, "--ms-path", dst, "--process-limit", workers]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        found = tools(PT2CKPT, *words)
    assert_refused(found, 5, "rank_4/network.ckpt", "No space left", "same command")
    assert "successfully" not in found.out
    assert not dst.exists()
    assert_done(tools(PT2CKPT, *words))
    assert tensor_files(dst) == tensor_files(shards_dir)


@pytest.mark.parametrize("name", ["mcore060/legacy_tp2_pp2_dp2_buckets", "mcore060/legacy_tp1_pp2_vpp2_dp2"])
def test_checkpoints_of_the_real_systems(golden: Path, tmp_path: Path, ms: ModuleType, name: str) -> None:
    """megatron-core 0.6 with several buckets, and with virtual stages, by the command lines of the documentation."""
    src = golden / "dist_opt" / name
    flags = ["--param-map-path", src / "param_map", "--generate-all-dp-cp"]
    found = process([script(PT2CKPT), "--megatron-path", src / "iter_0000002", "--ms-path", tmp_path / "MS", *flags])
    assert_done(found)
    assert {m[1] for m in support.DONE.finditer(found.out)} == sources_of(src)
    tp = len({p.name[:10] for p in src.glob("iter_0000002/mp_rank_*")})
    for path in sorted((src / "truth").glob("truth_tp*.npz")):
        rank_tp, rank_pp = (int(n) for n in re.findall(r"(?:tp|pp)(\d+)", path.stem))
        with np.load(path) as truth:
            sizes = sorted(truth[key].tobytes() for key in truth if truth[key].size > 1)
        for dp in range(2):
            rank = rank_pp * 2 * tp + dp * tp + rank_tp
            loaded = arrays(ms, tmp_path / "MS" / f"rank_{rank}" / "network.ckpt")
            assert sorted(a.tobytes() for a in loaded.values() if a.size > 1) == sizes
    out = tmp_path / "out"
    words = ["--ms-path", tmp_path / "MS", "--param-map-path", tmp_path / "MS" / "pt_meta", "--megatron-path", out]
    assert_done(process([script(CKPT2PT, tmp_path), *words], cwd=tmp_path))
    assert_done(cli("diff", src, out))
