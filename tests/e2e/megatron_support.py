"""What the tests of Megatron's command lines share: the tools as processes, small checkpoints, and what they must hold.

The checkpoints are those of real megatron-core (tests.megatron_real) and lists of buckets made with torch
(tests.megatron.support); what is expected of a conversion is computed from them here, with nothing of the product.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.hostile import driver
from tests.hostile.driver import ROOT, Run, assert_refused
from tests.megatron.support import Array, load
from tests.megatron_real import oracle
from tests.megatron_real.case import Case
from transform_ckpt.cli import megatron_tools

PT2CKPT, CKPT2PT = "convert_pt2ckpt", "convert_ckpt2pt"
DONE = re.compile(r"convert '(?P<src>.+)' to '(?P<dst>.+)' successfully\.")
RENAMED = {
    "dense_h_to_4h": "mapping",
    "dense_4h_to_h": "projection",
    "self_attention": "attention",
    "query_key_value": "qkv_proj",
    "dense": "out_proj",
}
"""Components of names that MindSpeed-Core-MS's converter calls otherwise."""
PREFIXES = {"param": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}
TRACKER = "latest_checkpointed_iteration.txt"

_SLOW = """
import sys, time
from transform_ckpt import cli, execute, planner, store
from transform_ckpt.cli import megatron_tools
called, unit, delay = sys.argv.pop(1), int(sys.argv.pop(1)), float(sys.argv.pop(1))
planner.UNIT_NBYTES, execute.SMALL_NBYTES = unit, 0
write = store.write_fully
def slowly(*args):
    time.sleep(delay)
    write(*args)
store.write_fully = slowly
cli.leave(getattr(megatron_tools, called)())
"""


# ---------------------------------------------------------------------------------------------------- running it


def process(words: Iterable[object], *, cwd: Path = ROOT) -> Run:
    """A whole process, as a user starts it; a hang fails the test."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, cwd=cwd, env=kept, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Run(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def cli(*args: object) -> Run:
    """transform-ckpt in this process: an exception that it lets through fails the test."""
    return driver.run([str(a) for a in args])


def script(name: str, cwd: Path = ROOT) -> str:
    """The path of a tool as one types it from a directory: relative in the project, absolute elsewhere."""
    return f"tools/{name}.py" if cwd == ROOT else str(ROOT / "tools" / f"{name}.py")


def slow_tool(name: str, *args: object, unit: int, delay: float) -> list[str]:
    """Words that start a tool whose units are of `unit` bytes and whose writes take `delay` seconds each."""
    return [sys.executable, "-c", _SLOW, name, str(unit), str(delay), *map(str, args)]


class Tools:
    """The tools in this process: an exception that they let through fails the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capture = monkeypatch, capfd

    def __call__(self, name: str, *args: object) -> Run:
        self._monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        self._capture.readouterr()
        code = getattr(megatron_tools, name)()
        return Run(code, *self._capture.readouterr())

    def to_ms(self, src: Path, dst: Path, *args: object) -> Path:
        """convert_pt2ckpt.py, which must succeed.  Returns `dst`."""
        found = self(PT2CKPT, "--megatron-path", src, "--ms-path", dst, *args)
        assert found.code == 0, found.err
        return dst

    def to_pt(self, src: Path, dst: Path, *args: object) -> Path:
        """convert_ckpt2pt.py, which must succeed.  Returns `dst`."""
        found = self(CKPT2PT, "--ms-path", src, "--megatron-path", dst, *args)
        assert found.code == 0, found.err
        return dst


def refused(found: Run, code: int, dst: Path, *words: object) -> None:
    """One message with these words, no word of success, and nothing under the final name or beside it."""
    assert_refused(found, code, *words)
    assert len(re.findall("^error: ", found.err, re.MULTILINE)) == 1, found.err
    assert "successfully" not in found.out
    assert not os.path.lexists(dst), f"{dst} is there"
    assert not os.path.lexists(f"{dst}.partial"), f"{dst}.partial is there"


# -------------------------------------------------------------------------------------------------- what must be there


def mindspore_name(name: str, first_layer: int = 0) -> str:
    """A Megatron name in MindSpore: layers count from the stage's first."""
    name = re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + first_layer}", name)
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


def shards(directory: Path) -> dict[str, dict[str, Array]]:
    """ "TT_PPP" as in a directory's name -> MindSpore's name of every weight and state -> the rank's fp32 shard."""
    found: dict[str, dict[str, Array]] = {}
    for key, cut, states in oracle.stored_truth(directory):
        place = found.setdefault(key.split("|")[0].removeprefix("truth_"), {})
        name = mindspore_name(cut.logical)
        place.update({prefix + name: states[state] for state, prefix in PREFIXES.items()})
    return found


def wholes(directory: Path) -> dict[str, Array]:
    """MindSpore's name of every weight and state -> the complete fp32 array."""
    found = {}
    for key, array in oracle.logical_truth(directory).items():
        name, _, state = key.rpartition("|")
        found[PREFIXES[state] + mindspore_name(name)] = array
    return found


def arrays(ms: ModuleType, path: Path) -> dict[str, Array]:
    """A tensor file as the real mindspore reads it."""
    form = "safetensors" if path.suffix == ".safetensors" else "ckpt"
    return {name: np.asarray(value.asnumpy()) for name, value in ms.load_checkpoint(str(path), format=form).items()}


def assert_holds(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Every expected tensor bit for bit as fp32, and of the others only scalars."""
    missing = expected.keys() - found.keys()
    assert not missing, missing
    for name, array in expected.items():
        one = found[name]
        assert (one.dtype.name, one.shape) == ("float32", array.shape), name
        assert one.tobytes() == array.tobytes(), name
    more = {name for name in found.keys() - expected.keys() if found[name].size != 1}
    assert not more, more


def tensor_files(path: Path) -> dict[str, bytes]:
    """Relative path -> bytes of the tensor files in rank directories."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.glob("rank_*/*"))}


def directories(path: Path) -> tuple[str, str, list[str]]:
    """(tracker's text, iteration's directory, rank directories in it) of a Megatron checkpoint."""
    (iteration,) = (p for p in path.iterdir() if p.is_dir())
    return (path / TRACKER).read_text(), iteration.name, sorted(p.name for p in iteration.iterdir())


def rank_file(path: Path, place: str) -> dict[str, Any]:
    """The tree of a rank's model_optim_rng.pt, of whichever iteration there is."""
    (file,) = path.glob(f"*/mp_rank_{place}/model_optim_rng.pt")
    found: dict[str, Any] = load(file)
    return found


def groups(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of a rank's only optimizer."""
    found: list[dict[str, Any]] = tree["optimizer"]["optimizer"]["param_groups"]
    return found


def answer(found: Run) -> dict[str, Any]:
    """The JSON on stdout, which holds nothing else."""
    content: dict[str, Any] = json.loads(found.out)
    assert content["ok"] is (found.code == 0)
    return content


# ---------------------------------------------------------------------------------------------------- checkpoints

CASES = {
    "dense": Case(tp=2, pp=2, dp=2),
    "replicas": Case(tp=2, dp=2, cp=2, layers=2),
    "experts": Case(ep=2, dp=4, experts=4, layers=2),
    "plain": Case(),
    "chunks": Case(tp=2, pp=2, vpp=2, dp=2),
    "uneven": Case(pp=2, first_stage_layers=1),
    "buckets": Case(tp=2, dp=2, bucket_size=900),
    "large": Case(hidden=256, ffn=768, vocab=4096, layers=2),
}


class Checkpoints:
    """Checkpoints of real megatron-core, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            oracle.generate(CASES[name], path)
        return path
