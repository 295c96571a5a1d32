"""What the hostile tests share: a small model on disk under any layout, and the command line run in many ways.

Checkpoints are sliced by `tests.support` and written by the product's own container writers, which takes milliseconds;
their agreement with the real MindSpore is proven elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strategy import layout as product_layout
from strategy.mindspore_file import write_strategy
from tests import support
from tests.support import Array, Layout
from transform_ckpt import cli
from transform_ckpt.formats import ckpt, safetensors
from transform_ckpt.tensors import TensorSpec

ROOT = Path(__file__).resolve().parents[2]
CODES = {"float32": "F32", "int64": "I64", "float16": "F16"}


# ------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Model:
    """Sizes of a small Llama-like training state."""

    layers: int = 4
    hidden: int = 16
    wide: int = 24
    optimizer: bool = True
    states: bool = True
    name: str = "model"

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Weight -> (shape, kind of layout), in the order of layers."""
        h, w = self.hidden, self.wide
        found: dict[str, tuple[tuple[int, ...], str]] = {f"{self.name}.embed.weight": ((w, h), "column")}
        for i in range(self.layers):
            found[f"{self.name}.layers.{i}.wq.weight"] = ((h, h), "column")
            found[f"{self.name}.layers.{i}.w1.weight"] = ((w, h), "column")
            found[f"{self.name}.layers.{i}.w2.weight"] = ((h, w), "row")
            found[f"{self.name}.layers.{i}.norm.weight"] = ((h,), "whole")
        found[f"{self.name}.norm_out.weight"] = ((h,), "whole")
        found[f"{self.name}.lm_head.weight"] = ((w, h), "column")
        return found

    def whole(self) -> dict[str, Array]:
        """Every tensor of the complete state; no two slices are equal."""
        rng = np.random.default_rng(7)
        shapes = self.shapes()
        prefixes = ["", "adam_m.", "adam_v."] if self.optimizer else [""]
        found: dict[str, Array] = {
            p + n: rng.standard_normal(shape).astype(np.float32) for p in prefixes for n, (shape, _) in shapes.items()
        }
        if self.states:
            found["global_step"] = np.array([11], np.int64)
            found["loss_scale"] = np.array(65536.0, np.float32)
        return found

    def stages(self, dp: int, mp: int, pp: int, opt: int = 0) -> list[dict[str, Layout]]:
        """The strategy of dp x mp x pp ranks; `opt` is the optimizer shard's size."""
        maps = {"column": (0, -1), "row": (-1, 0), "whole": (-1,)}
        found: list[dict[str, Layout]] = [{} for _ in range(pp)]
        for name, (shape, kind) in self.shapes().items():
            parts = name.split(".")
            if "layers" in parts:
                stage = int(parts[2]) * pp // self.layers
            else:
                stage = 0 if "embed" in parts else pp - 1
            step = mp if kind != "whole" and mp > 1 else 1
            layout = Layout((dp, mp), maps[kind], step if opt and len(shape) > 1 else 0, opt if len(shape) > 1 else 0)
            for prefix in ("", "adam_m.", "adam_v.") if self.optimizer else ("",):
                found[stage][prefix + name] = layout
        return found


def write_file(path: Path, arrays: Mapping[str, Array], *, crc: bool = False) -> Path:
    """One tensor file of either container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(n, CODES[a.dtype.name], a.shape) for n, a in arrays.items()]
    laid_out = (
        ckpt.skeleton(specs, crc=crc) if path.suffix == ".ckpt" else safetensors.skeleton(specs, {"format": "ms"})
    )
    data = bytearray(laid_out.nbytes)
    for offset, chunk in laid_out.chunks:
        data[offset : offset + len(chunk)] = chunk
    for name, array in arrays.items():
        (extent,) = laid_out.places[name]
        data[extent.offset_bytes : extent.offset_bytes + extent.nbytes] = array.tobytes()
    if crc:
        import zlib

        end = len(data) - ckpt.CRC_NBYTES
        data[end:] = ckpt.CRC_MARK + zlib.crc32(data[:end]).to_bytes(10, "big")
    path.write_bytes(data)
    return path


def write_layout(stages: Sequence[Mapping[str, Layout]], path: Path) -> Path:
    """A merged strategy file by the product's writer."""

    def convert(layout: Layout) -> product_layout.Layout:
        axes = tuple(layout.axes(dim) for dim in range(len(layout.tensor_map)))
        return product_layout.Layout(layout.dev_matrix, axes, layout.opt_step, layout.opt_size)

    made = [
        product_layout.Stage(support.stage_devices(stages), {name: convert(layout) for name, layout in stage.items()})
        for stage in stages
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_strategy(product_layout.Strategy(tuple(made)), str(path))
    return path


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk: `src` has rank_i/, `strategy` says how it is cut, `other` is another layout's strategy."""

    src: Path
    strategy: Path
    other: Path
    model: Model
    fmt: str

    @property
    def root(self) -> Path:
        return self.src.parent

    @property
    def dst(self) -> Path:
        return self.root / "out"

    def file(self, rank: int) -> Path:
        """The tensor file of one rank."""
        return self.src / f"rank_{rank}" / f"net-1_{7}.{self.fmt}"

    def args(self, *more: object, src: Path | None = None, dst: Path | None = None) -> list[str]:
        """A conversion from `strategy` to `other`."""
        return [
            "convert", str(src or self.src), str(dst or self.dst), "--to", "mindspore", "--src-strategy",
            str(self.strategy), "--dst-strategy", str(self.other), *map(str, more),
        ]  # fmt: skip


def make_case(
    root: Path,
    fmt: str = "ckpt",
    layout: tuple[int, ...] = (2, 1, 4, 2),
    other: tuple[int, ...] = (1, 2, 2),
    model: Model | None = None,
    *,
    crc: bool = False,
) -> Case:
    """Write a model's rank files and strategies below `root`: layouts are (dp, mp, pp, optimizer shard)."""
    model = model or Model()
    stages = model.stages(*layout)
    case = Case(
        root / "src",
        write_layout(stages, root / "src_strategy.ckpt"),
        write_layout(model.stages(*other), root / "dst_strategy.ckpt"),
        model,
        fmt,
    )
    whole = model.whole()
    for rank in range(support.world_size(stages)):
        write_file(case.file(rank), support.slice_rank(whole, stages, rank), crc=crc)
    return case


# ------------------------------------------------------------------------------------------------------ running it


@dataclass(frozen=True)
class Run:
    """What a command line did."""

    code: int
    out: str
    err: str


def run(args: Sequence[str]) -> Run:
    """The command line in this process: an exception that it lets through fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(a) for a in args])
    return Run(code, out.getvalue(), err.getvalue())


def command(args: Sequence[object]) -> list[str]:
    """Words that start the command line as a process."""
    return [sys.executable, "-m", "transform_ckpt", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """The environment, with the project importable from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def spawn(args: Sequence[object], *, timeout: float = 60, env: Mapping[str, str] | None = None, **popen: Any) -> Run:
    """The command line as a process of its own; a hang fails the test."""
    done = subprocess.run(
        command(args),
        capture_output=True,
        timeout=timeout,
        env=environment(**(env or {})),
        check=False,
        stdin=subprocess.DEVNULL,
        **popen,
    )
    return Run(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def run_as_user(
    args: Sequence[object], folder: Path, uid: int = 65534, call: Callable[[list[str]], int] = cli.run
) -> Run:
    """The command line, or what else is called, in a forked child of another user: root is refused nothing.

    Forked, because the interpreter itself may lie where others cannot read; what it imports late is imported before.
    """
    run(["formats"])
    out, err = folder / "user.out", folder / "user.err"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            with out.open("w") as new_out, err.open("w") as new_err:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                with contextlib.redirect_stdout(new_out), contextlib.redirect_stderr(new_err):
                    try:
                        code = call([str(a) for a in args])
                    except BaseException:  # noqa: BLE001 - told by its traceback, as a process would
                        traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Run(code, out.read_text(), err.read_text())


def assert_refused(found: Run, code: int, *words: object) -> None:
    """The exit code, the key words of the message, and no traceback."""
    assert "Traceback" not in found.err, found.err
    assert found.code == code, f"exit {found.code}, expected {code}: {found.err}{found.out}"
    for word in words:
        assert str(word) in found.err, f"{word!r} is not in: {found.err}"


def assert_done(found: Run) -> None:
    """Exit code 0, quietly."""
    assert (found.code, "Traceback" in found.err) == (0, False), f"exit {found.code}: {found.err}{found.out}"


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Relative path -> (mode, bytes) of everything below a directory."""
    found: dict[str, tuple[int, bytes]] = {}
    for entry in sorted(path.rglob("*")):
        mode = entry.lstat().st_mode
        link = os.fsencode(entry.readlink()) if stat.S_ISLNK(mode) else b""
        found[str(entry.relative_to(path))] = (mode, entry.read_bytes() if stat.S_ISREG(mode) else link)
    return found


def old_output(path: Path) -> dict[str, tuple[int, bytes]]:
    """Something of the user's in the destination; returns its `tree`."""
    (path / "rank_0").mkdir(parents=True)
    (path / "rank_0" / "old.ckpt").write_bytes(b"the output of last week")
    (path / "notes.txt").write_text("mine")
    return tree(path)


@contextlib.contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    """What is below the paths (or that they are not there) does not change within."""
    before = [tree(p) if p.exists() else None for p in paths]
    yield
    assert [tree(p) if p.exists() else None for p in paths] == before


def litter(folder: Path, *expected: str) -> list[str]:
    """Names in a folder that were not expected there."""
    return sorted(set(os.listdir(folder)) - set(expected))


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Poll until true; a test fails when it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    """Change one bit pattern of one byte."""
    with path.open("r+b") as stream:
        stream.seek(offset if offset >= 0 else path.stat().st_size + offset)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ mask]))


def raw_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header: bytes as they are, anything else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def copy(case: Case, root: Path) -> Case:
    """The same checkpoint elsewhere, to be damaged."""
    shutil.copytree(case.root, root, symlinks=True, dirs_exist_ok=True)
    move = {name: root / getattr(case, name).relative_to(case.root) for name in ("src", "strategy", "other")}
    return Case(model=case.model, fmt=case.fmt, **move)


# ------------------------------------------------------------------------------------------------ in slow motion

_SLOW = """
import sys, time
from transform_ckpt import cli, execute, planner, store
unit, delay = int(sys.argv.pop(1)), float(sys.argv.pop(1))
planner.UNIT_NBYTES, execute.SMALL_NBYTES = unit, 0
write = store.write_fully
def slowly(*args):
    time.sleep(delay)
    write(*args)
store.write_fully = slowly
cli.main()
"""


def slow_command(args: Sequence[object], *, unit: int = 512, delay: float = 0.002) -> list[str]:
    """Words that start a conversion of many tiny units, with worker processes, each write taking its time."""
    return [sys.executable, "-c", _SLOW, str(unit), str(delay), *map(str, args)]


def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that signals reach no other."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes], timeout: float = 60) -> Run:
    """Wait for it; its negative exit code is the signal that killed it."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Run(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def children(pid: int) -> list[int]:
    """Process numbers of the children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def units_done(partial: Path) -> int:
    """Lines in the journal."""
    count = 0
    with contextlib.suppress(FileNotFoundError):  # the run may be finishing meanwhile: logs and directory go
        for log in partial.glob(".journal/units-*"):
            count += sum(data.count(b'"') > 0 for data in log.read_bytes().splitlines())
    return count
