"""tools/transform_ckpt.py, transform_checkpoint.py and .sh as a MindFormers user calls them, and as things go wrong."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

import transform_ckpt
from tests import support
from tests.hostile import driver
from tests.hostile.driver import ROOT, Case, Model, Run, assert_done, assert_refused, make_case, run, untouched
from transform_ckpt import coordinate, manifest, planner
from transform_ckpt.cli import dropin

TOOLS = ROOT / "tools"
MERGED = "merged_ckpt_strategy.ckpt"
MARK = "transform_succeed_rank_"
WORLD, PROCESSES = 8, 4
SHARES = (0, 2, 4, 6)
"""Processes that have work: each a block of two of the eight target ranks."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """4 ranks (mp2 pp2) to 8 (dp2 pp4, optimizer shard)."""
    return make_case(tmp_path_factory.mktemp("good"), layout=(1, 2, 2), other=(2, 1, 4, 2))


@pytest.fixture
def case(good: Case, tmp_path: Path) -> Case:
    return driver.copy(good, tmp_path / "case")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A current directory whose names would hide ours."""
    folder = tmp_path / "elsewhere"
    for name in ("transform_ckpt.py", "strategy.py"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('the wrong module')\n")
    return folder


def words_of(name: str, args: Sequence[object]) -> list[str]:
    first = ["bash"] if name.endswith(".sh") else [sys.executable]
    return [*first, str(TOOLS / name), *map(str, args)]


def plain_environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return {**kept, "PYTHON": sys.executable, **more}


def tool(name: str, *args: object, cwd: Path, env: Mapping[str, str] | None = None) -> Run:
    done = subprocess.run(
        words_of(name, args),
        capture_output=True,
        cwd=cwd,
        env=env or plain_environment(),
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return Run(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def flags(tool_name: str, src: Path, src_strategy: object, dst: Path, dst_strategy: object, world: int) -> list[str]:
    """One conversion in each tool's words; the result is in `result_of(tool_name, src, dst)`."""
    if tool_name.endswith(".sh"):
        return [str(w) for w in (src, src_strategy, dst, dst_strategy, world, 1)]
    if tool_name == "transform_ckpt.py":
        names = ("--src_ckpt_dir", "--src_ckpt_strategy", "--dst_ckpt_dir", "--dst_ckpt_strategy")
    else:
        names = ("--src_checkpoint", "--src_strategy", "--dst_checkpoint_dir", "--dst_strategy")
    values = (src, src_strategy, dst, dst_strategy)
    return [str(w) for pair in zip(names, values, strict=True) for w in pair]


def result_of(tool_name: str, src: Path, dst: Path) -> Path:
    return dst if tool_name == "transform_ckpt.py" else dst / src.name


def same_but_marks(path: Path) -> dict[str, tuple[int, bytes]]:
    return {name: entry for name, entry in driver.tree(path).items() if not name.startswith(MARK)}


# --------------------------------------------------------------------------------------------------------- golden

THREE = ["transform_ckpt.py", "transform_checkpoint.py", "transform_checkpoint.sh"]


@pytest.mark.parametrize("path", ["no PYTHONPATH", "hostile PYTHONPATH", "safe path"])
@pytest.mark.parametrize("pair", ["A_to_B", "A_to_C", "C_to_A"])
@pytest.mark.parametrize("name", THREE)
def test_golden(
    *, ms: ModuleType, golden: Path, tmp_path: Path, elsewhere: Path, name: str, pair: str, path: str
) -> None:
    root = golden / "mindspore"
    src_case, dst_case = pair.split("_to_")
    fmt = "safetensors" if path == "hostile PYTHONPATH" else "ckpt"
    strategy = {c: "None" if c == "C" else str(root / "strategy" / f"{c}_merged.ckpt") for c in (src_case, dst_case)}
    env = {
        "no PYTHONPATH": plain_environment(),
        "hostile PYTHONPATH": plain_environment(PYTHONPATH=f"{elsewhere}:{TOOLS}"),
        "safe path": plain_environment(PYTHONSAFEPATH="1"),
    }[path]
    expected = support.load_ranks(ms, root / f"golden_{fmt}" / pair)
    src = root / f"src_{fmt}" / src_case
    words = flags(name, src, strategy[src_case], tmp_path / "out", strategy[dst_case], len(expected))
    assert_done(tool(name, *words, cwd=elsewhere, env=env))
    result = result_of(name, src, tmp_path / "out")
    found = support.load_ranks(ms, result)
    assert list(found) == list(expected)
    for rank, held in expected.items():
        support.assert_same(found[rank], held, f"rank {rank}")
    assert {p.name for p in support.rank_files(result).values()} == {f"checkpoint_{r}.{fmt}" for r in expected}
    assert_done(run(["verify", str(result)]))


def test_linked_into_another_directory(case: Case, tmp_path: Path) -> None:
    for name in THREE:
        link = tmp_path / "bin" / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(TOOLS / name)
        args = flags(name, case.src, case.strategy, tmp_path / f"out_{name}", case.other, WORLD)
        words = words_of(name, args)
        words[1] = str(link)
        done = subprocess.run(words, capture_output=True, cwd=tmp_path, env=plain_environment(), check=False)
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------ strategies


@pytest.fixture
def directory(ms: ModuleType, case: Case) -> Path:
    """The source's strategy as the compiler leaves it: one file a rank."""
    return support.write_strategy(ms, case.model.stages(1, 2, 2), case.root / "strategy")


def convert_words(case: Case, strategy: object, dst: Path) -> list[str]:
    return flags("transform_ckpt.py", case.src, strategy, dst, case.other, WORLD)


def test_a_strategy_directory_is_merged_once(case: Case, directory: Path, elsewhere: Path, ms: ModuleType) -> None:
    path = directory / MERGED
    assert_done(tool("transform_ckpt.py", *convert_words(case, directory, case.root / "one"), cwd=elsewhere))
    assert path.is_file()
    first = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
    assert_done(tool("transform_ckpt.py", *convert_words(case, directory, case.root / "two"), cwd=elsewhere))
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == first
    ms.merge_pipeline_strategys(str(directory), str(case.root / "real.ckpt"))
    real = transform_ckpt.read_strategy(case.root / "real.ckpt")
    assert real is not None
    assert real.stages == transform_ckpt.read_strategy(path).stages  # type: ignore[union-attr]
    assert_done(tool("transform_ckpt.py", *convert_words(case, path, case.root / "three"), cwd=elsewhere))
    assert driver.tree(case.root / "one") == driver.tree(case.root / "two") == driver.tree(case.root / "three")


def test_a_stale_merged_file_is_made_again(case: Case, directory: Path, elsewhere: Path) -> None:
    path = directory / MERGED
    for stale in (case.other.read_bytes(), b"", b"half a fi"):
        path.write_bytes(stale)
        os.utime(path, (2**33, 2**33))  # newer than the rank files: its age is no reason to believe it
        shutil.rmtree(case.root / "out", ignore_errors=True)
        assert_done(tool("transform_ckpt.py", *convert_words(case, directory, case.root / "out"), cwd=elsewhere))
        assert path.read_bytes() not in (stale, b"")
    assert driver.litter(directory, MERGED, *(f"ckpt_strategy_rank_{r}.ckpt" for r in range(4))) == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_read_only_strategy_directory(ms: ModuleType, tmp_path: Path) -> None:
    def call(args: list[str]) -> int:
        sys.argv = ["transform_ckpt.py", *args]
        return dropin.transform_ckpt()

    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to others
        folder = Path(name)
        folder.chmod(0o777)
        case = make_case(folder / "case", layout=(1, 2, 2), other=(2, 1, 4, 2))
        directory = support.write_strategy(ms, case.model.stages(1, 2, 2), folder / "strategy")
        directory.chmod(0o755)
        expected = dropin.strategy_path(str(directory), "--src_ckpt_strategy")
        assert expected == str(directory / MERGED)
        wanted = (directory / MERGED).read_bytes()
        (directory / MERGED).unlink()
        transform_ckpt.convert(case.src, tmp_path / "expected", src_strategy=directory, dst_strategy=case.other)
        with untouched(directory):
            words = convert_words(case, directory, folder / "out")
            found = driver.run_as_user(words, tmp_path, call=call)
        assert_done(found)
        assert driver.tree(folder / "out") == driver.tree(tmp_path / "expected")
    (line,) = [line for line in found.out.splitlines() if line.startswith("src_ckpt_strategy: ")]
    temporary = Path(line.partition(": ")[2])
    assert (temporary.name, temporary.read_bytes()) == (MERGED, wanted)
    shutil.rmtree(temporary.parent)  # a fork does not tidy up at its end, a process of its own does


def test_a_json_directory(ms: ModuleType, golden: Path, tmp_path: Path, elsewhere: Path) -> None:
    root = golden / "mindspore"
    for case in "AB":
        shutil.copytree(root / "strategy" / f"{case}_json", tmp_path / case)
    args = flags("transform_ckpt.py", root / "src_ckpt" / "A", tmp_path / "A", tmp_path / "out", tmp_path / "B", 0)
    assert_done(tool("transform_ckpt.py", *args, cwd=elsewhere))
    expected = support.load_ranks(ms, root / "golden_ckpt" / "A_to_B")
    for rank, held in support.load_ranks(ms, tmp_path / "out").items():
        support.assert_same(held, expected[rank], f"rank {rank}")
    assert (tmp_path / "A" / MERGED).is_file()
    assert (tmp_path / "B" / MERGED).is_file()


def test_a_stage_missing_in_the_directory(case: Case, directory: Path, elsewhere: Path) -> None:
    for rank in (0, 1):
        (directory / f"ckpt_strategy_rank_{rank}.ckpt").rename(case.root / f"{rank}")
    with untouched(directory):
        found = tool("transform_ckpt.py", *convert_words(case, directory, case.dst), cwd=elsewhere)
    assert_refused(found, 3, directory, "stage 0")
    for rank in (2, 3):  # that a last stage is missing, only the checkpoint can tell
        (directory / f"ckpt_strategy_rank_{rank}.ckpt").unlink()
        (case.root / f"{rank - 2}").rename(directory / f"ckpt_strategy_rank_{rank - 2}.ckpt")
    found = tool("transform_ckpt.py", *convert_words(case, directory, case.dst), cwd=elsewhere)
    assert_refused(found, 3, directory, "ranks 2-3 are there", "is for 2 ranks")
    assert not case.dst.exists()


def test_complete_in_and_out_in_every_spelling(case: Case, elsewhere: Path) -> None:
    one = case.root / "one"
    assert_done(tool("transform_ckpt.py", *flags(THREE[0], case.src, case.strategy, one, "None", 1), cwd=elsewhere))
    assert [p.name for p in sorted(one.iterdir())] == ["rank_0", "transform_ckpt.json"]
    ways = [["--src_ckpt_strategy", "None"], ["--src_ckpt_strategy="], [], ["--src_ckpt_strategy", ""]]
    trees = []
    for number, way in enumerate(ways):
        args = ["--src_ckpt_dir", one, "--dst_ckpt_dir", case.root / f"{number}", "--dst_ckpt_strategy", case.other]
        assert_done(tool("transform_ckpt.py", *args, *way, cwd=elsewhere))
        trees.append(driver.tree(case.root / f"{number}"))
    assert all(found == trees[0] for found in trees)


# ----------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("word", ["True", "true", "1", "yes", "ON", "y", "False", "false", "0", "No", "off", "n", ""])
def test_booleans(case: Case, word: str) -> None:
    """In one process, because there are many; upstream takes every word but the empty one for true."""
    assert dropin.boolean(word) == (word.lower() in ("true", "1", "yes", "on", "y"))


def test_booleans_as_flags(case: Case, elsewhere: Path) -> None:
    base = flags(THREE[1], case.src, case.strategy, case.dst, case.other, WORLD)
    trees = []
    for word in ("--transform_by_rank=True", "--transform_by_rank=no", "--transform_by_rank="):
        assert_done(tool("transform_checkpoint.py", *base, word, "--overwrite", cwd=elsewhere))
        trees.append(driver.tree(case.dst / "src"))
    assert trees[0] == trees[1] == trees[2]
    for word in ("maybe", "2", "None"):
        with untouched(case.dst):
            found = tool("transform_checkpoint.py", *base, "--transform_by_rank", word, cwd=elsewhere)
        assert_refused(found, 2, word, "is not a boolean")


def test_abbreviations(case: Case, elsewhere: Path) -> None:
    args = ["--src_c", case.src, "--dst_checkpoint", case.dst, "--src_s", case.strategy, "--dst_s", case.other]
    args += ["--pre", "net_", "--world", WORLD, "--transform_p", 2]
    assert_done(tool("transform_checkpoint.py", *args, cwd=elsewhere))
    assert (case.dst / "src" / "rank_7" / "net_7.ckpt").is_file()
    args = ["--src_ckpt_d", case.src, "--dst_ckpt_d", case.root / "two", "--src_ckpt_s", case.strategy, "--pre", "x-"]
    assert_done(tool("transform_ckpt.py", *args, cwd=elsewhere))
    assert (case.root / "two" / "rank_0" / "x-0.ckpt").is_file()
    assert_refused(tool("transform_checkpoint.py", "--src", case.src, cwd=elsewhere), 2, "ambiguous", "--src_")


WRONG: dict[str, tuple[str, Callable[[Case], list[object]], int, list[str]]] = {
    "unknown flag": (THREE[0], lambda _: ["--frobnicate", "1"], 2, ["--frobnicate"]),
    "unknown flag 2": (THREE[1], lambda _: ["--src_strategy_path_or_dir", "x"], 2, ["--src_strategy_path_or_dir"]),
    "stray word": (THREE[1], lambda _: ["stray"], 2, ["stray"]),
    "source not there": (THREE[0], lambda c: ["--src_ckpt_dir", c.root / "no"], 3, ["no: not found"]),
    "source not there 2": (THREE[1], lambda c: ["--src_checkpoint", c.root / "no"], 3, ["no: not found"]),
    "empty source": (THREE[1], lambda c: ["--src_checkpoint", c.root / "empty"], 3, ["empty: no rank_0 directory"]),
    "strategy not there": (THREE[0], lambda c: ["--src_ckpt_strategy", c.root / "no"], 3, ["--src_ckpt_strategy"]),
    "strategy not there 2": (THREE[1], lambda c: ["--dst_strategy", c.root / "no"], 3, ["--dst_strategy"]),
    "world": (THREE[1], lambda _: ["--world_size", 4], 3, ["--world_size 4", "means 8"]),
    "world 1": (THREE[1], lambda _: ["--world_size", 1], 3, ["--world_size 1", "means 8"]),
    "world 0": (THREE[1], lambda _: ["--world_size", 0], 3, ["--world_size 0"]),
    "world of complete": (THREE[1], lambda _: ["--dst_strategy", "None", "--world_size", 8], 3, ["complete weights"]),
    "processes": (THREE[1], lambda _: ["--transform_process_num", 3], 2, ["3 does not divide", "8"]),
    "no processes": (THREE[1], lambda _: ["--transform_process_num", 0], 2, ["expected 1 or more"]),
    "half a process": (THREE[1], lambda _: ["--transform_process_num", 0.5], 2, ["invalid int value"]),
    "rank": (THREE[1], lambda _: ["--rank_id", 8], 2, ["--rank_id 8 of 8"]),
    "negative rank": (THREE[1], lambda _: ["--rank_id", -1], 2, ["--rank_id -1"]),
    "prefix": (THREE[1], lambda _: ["--prefix", "../x"], 2, ["--prefix"]),
    "wrong strategy": (THREE[0], lambda c: ["--src_ckpt_strategy", c.other], 4, ["rank"]),
}


@pytest.mark.parametrize(("name", "more", "code", "words"), WRONG.values(), ids=list(WRONG))
def test_wrong_words(
    case: Case,
    elsewhere: Path,
    name: str,
    more: Callable[[Case], list[object]],
    code: int,
    words: list[str],
) -> None:
    (case.root / "empty").mkdir()
    before = set(os.listdir(case.root))
    base = flags(name, case.src, case.strategy, case.dst, case.other, WORLD)
    found = tool(name, *base, *more(case), "--json", cwd=elsewhere)
    assert_refused(found, code, *words)
    assert set(os.listdir(case.root)) == before
    said = json.loads(found.out)
    assert (said["ok"], said["exit_code"]) == (False, code)


def test_no_words_and_help(elsewhere: Path) -> None:
    for name in THREE[:2]:
        assert_refused(tool(name, cwd=elsewhere), 2, "required", "--src_")
        found = tool(name, "--help", cwd=elsewhere)
        assert_done(found)
        assert "--overwrite" in found.out


def test_json_says_what_was_done(case: Case, elsewhere: Path) -> None:
    found = tool("transform_ckpt.py", *convert_words(case, case.strategy, case.dst), "--json", cwd=elsewhere)
    assert_done(found)
    said = json.loads(found.out)
    assert (said["ok"], said["dst"], said["files"]) == (True, str(case.dst), WORLD)
    dst = case.root / "second"
    words = flags(THREE[1], case.src, case.strategy, dst, case.other, WORLD)
    found = tool("transform_checkpoint.py", *words, "--json", cwd=elsewhere)
    (said,) = json.loads(found.out)["results"]
    assert said == {"name": "src", "dst": str(dst / "src"), "ranks": [*range(WORLD)], "complete": True}


@pytest.mark.parametrize("name", THREE[:2])
def test_overwrite(case: Case, elsewhere: Path, name: str) -> None:
    words = flags(name, case.src, case.strategy, case.dst, case.other, WORLD)
    result = result_of(name, case.src, case.dst)
    driver.old_output(result)
    with untouched(case.dst):
        assert_refused(tool(name, *words, cwd=elsewhere), 2, result, "--overwrite")
        damaged = driver.copy(case, case.root / "damaged")
        damaged.file(3).write_bytes(damaged.file(3).read_bytes()[:-1])
        bad = flags(name, damaged.src, case.strategy, case.dst, case.other, WORLD)
        assert_refused(tool(name, *bad, "--overwrite", cwd=elsewhere), 3, damaged.file(3), "truncated")
    assert_done(tool(name, *words, "--overwrite", cwd=elsewhere))
    assert not (result / "notes.txt").exists()
    assert_done(run(["verify", str(result), "--against", str(case.src), "--src-strategy", str(case.strategy),
                     "--dst-strategy", str(case.other)]))  # fmt: skip


def test_the_default_destination_is_in_the_current_directory(case: Case, elsewhere: Path) -> None:
    words = ["--src_checkpoint", case.src, "--src_strategy", case.strategy]
    assert_done(tool("transform_checkpoint.py", *words, cwd=elsewhere))
    made = elsewhere / "transformed_checkpoint" / "src"
    assert sorted(os.listdir(made)) == ["rank_0", "transform_ckpt.json", f"{MARK}0.txt"]


# -------------------------------------------------------------------------------------------------------------- .sh


def test_sh_words_and_log(case: Case, elsewhere: Path) -> None:
    words = flags(THREE[2], case.src, case.strategy, case.dst, case.other, WORLD)
    for wrong in ([], words[:5], [*words, "net_", "more"]):
        found = tool(THREE[2], *wrong, cwd=elsewhere)
        assert_refused(found, 2, "usage:", "WORLD_SIZE")
        assert not (elsewhere / "log").exists()
    found = tool(THREE[2], *words, "net_", cwd=elsewhere)
    assert_done(found)
    assert "Transform finished" in found.out
    assert (elsewhere / "log" / "transform.log").read_text() == found.out
    assert (case.dst / "src" / "rank_3" / "net_3.ckpt").is_file()


def test_sh_fails_when_the_transform_fails(case: Case, elsewhere: Path) -> None:
    words = flags(THREE[2], case.src, case.strategy, case.dst, case.other, WORLD)
    wrong: list[tuple[int, object, int]] = [(0, case.root / "no", 3), (4, 4, 3), (5, 3, 2), (3, case.root / "no", 3)]
    for at, word, code in wrong:
        found = tool(THREE[2], *words[:at], word, *words[at + 1 :], cwd=elsewhere)
        assert (found.code, "Traceback" in found.out + found.err) == (code, False), found.out
        assert "error: " in (elsewhere / "log" / "transform.log").read_text()
    case.file(1).write_bytes(case.file(1).read_bytes()[:100])
    found = tool(THREE[2], *words, cwd=elsewhere)
    assert (found.code, "truncated" in found.out) == (3, True)
    assert not case.dst.exists()


_KILLED = """#!{python}
import os, runpy, signal, sys
from transform_ckpt import execute, planner, workers
planner.UNIT_NBYTES, execute.SMALL_NBYTES = 512, 0
loop = workers._work_loop
def die(slot, *args):
    if slot == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loop(slot, *args)
workers._work_loop = die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sh_fails_when_a_worker_is_killed(case: Case, elsewhere: Path) -> None:
    python = case.root / "python"
    python.write_text(_KILLED.format(python=sys.executable))
    python.chmod(0o755)
    words = flags(THREE[2], case.src, case.strategy, case.dst, case.other, WORLD)
    words[-1] = "2"
    env = plain_environment(PYTHON=str(python), PYTHONPATH=str(ROOT))
    found = tool(THREE[2], *words, cwd=elsewhere, env=env)
    assert (found.code, "Traceback" in found.out) == (7, False), found.out
    assert "was killed by SIGKILL" in found.out
    assert os.listdir(case.dst) == ["src.partial"]
    assert_done(tool(THREE[2], *words, cwd=elsewhere))
    assert os.listdir(case.dst) == ["src"]
    assert_done(run(["verify", str(case.dst / "src")]))


# ----------------------------------------------------------------------------------------------------------- shares


def share_words(case: Case, rank: int, *more: object, dst: Path | None = None, src: Path | None = None) -> list[str]:
    base = flags(THREE[1], src or case.src, case.strategy, dst or case.dst, case.other, WORLD)
    return [*base, *map(str, ("--world_size", WORLD, "--transform_process_num", PROCESSES, "--rank_id", rank, *more))]


def share(case: Case, rank: int, *more: object, **kwargs: Path) -> Run:
    """One share in this process, which is as good as one of its own and faster."""
    old = sys.argv
    sys.argv = ["transform_checkpoint.py", *share_words(case, rank, *more, **kwargs)]
    try:
        return captured(dropin.transform_checkpoint)
    finally:
        sys.argv = old


def captured(call: Callable[[], int]) -> Run:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call()
    return Run(code, out.getvalue(), err.getvalue())


@pytest.fixture
def alone(case: Case) -> dict[str, tuple[int, bytes]]:
    """What one process makes of all ranks."""
    dst = case.root / "alone"
    words = flags(THREE[1], case.src, case.strategy, dst, case.other, WORLD)
    old, sys.argv = sys.argv, ["x", *words]
    try:
        assert_done(captured(dropin.transform_checkpoint))
    finally:
        sys.argv = old
    return same_but_marks(dst / "src")


def marks(case: Case) -> list[str]:
    return sorted(p.name for p in (case.dst / "src").glob(f"{MARK}*"))


ALL_MARKS = [f"{MARK}{rank}.txt" for rank in SHARES]


@pytest.mark.parametrize("order", [*itertools.permutations(SHARES)][::5])
def test_shares_in_any_order(
    case: Case, alone: dict[str, tuple[int, bytes]], order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, rank in enumerate(order):
        found = share(case, rank, "--json")
        assert_done(found)
        (said,) = json.loads(found.out)["results"]
        assert (said["ranks"], said["complete"]) == ([rank, rank + 1], number == len(order) - 1)
        assert (case.dst / "src" / manifest.NAME).exists() == said["complete"]
    assert same_but_marks(case.dst / "src") == alone
    assert marks(case) == ALL_MARKS
    assert driver.litter(case.dst, "src") == []
    assert_done(run(["verify", str(case.dst / "src")]))


@pytest.mark.parametrize("unit", [64, 200, 1000])
def test_shares_digest_where_the_whole_plan_cuts(case: Case, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many parts: a share's own plan would cut them elsewhere."""
    monkeypatch.setattr(planner, "UNIT_NBYTES", unit)
    dst = case.root / "alone"
    transform_ckpt.convert(case.src, dst, src_strategy=case.strategy, dst_strategy=case.other)
    for rank in (4, 0, 6, 2):
        assert_done(share(case, rank))
    assert same_but_marks(case.dst / "src") == driver.tree(dst)
    assert_done(run(["verify", str(case.dst / "src")]))


def test_shares_at_the_same_time(case: Case, alone: dict[str, tuple[int, bytes]], elsewhere: Path) -> None:
    """Every process of the job starts one, as MindFormers does; those without a share have nothing to do."""
    started = [
        subprocess.Popen(
            words_of(THREE[1], share_words(case, rank)),
            cwd=elsewhere,
            env=plain_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(WORLD)
    ]
    ended = [driver.end(process) for process in started]
    for rank, found in enumerate(ended):
        assert_done(found)
        assert ("no target rank" in found.out) == (rank not in SHARES)
    assert same_but_marks(case.dst / "src") == alone
    assert marks(case) == ALL_MARKS
    assert driver.litter(case.dst, "src") == []


def test_one_share_fails(case: Case, alone: dict[str, tuple[int, bytes]]) -> None:
    assert_done(share(case, 2))
    good = case.file(3).read_bytes()
    case.file(3).write_bytes(good[:-5])
    with untouched(case.dst):
        assert_refused(share(case, 0), 3, case.file(3), "truncated")
        assert_refused(share(case, 2, "--overwrite"), 3, case.file(3))
    assert not (case.dst / "src" / manifest.NAME).exists()
    assert marks(case) == [f"{MARK}2.txt"]
    case.file(3).write_bytes(good)
    for rank in (0, 4, 6):
        assert_done(share(case, rank))
    assert same_but_marks(case.dst / "src") == alone


def test_a_share_again(case: Case, alone: dict[str, tuple[int, bytes]]) -> None:
    assert_done(share(case, 4))
    with untouched(case.dst):
        assert_refused(share(case, 4), 2, "rank_4 is there already", "--overwrite")
    assert_done(share(case, 4, "--overwrite"))
    for rank in (0, 2, 6):
        assert_done(share(case, rank))
    assert same_but_marks(case.dst / "src") == alone
    for rank in (6, 0):  # of a finished one: it is as whole afterwards
        (case.dst / "src" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt").write_bytes(b"lost")
        assert_done(share(case, rank, "--overwrite"))
        assert same_but_marks(case.dst / "src") == alone
    assert driver.litter(case.dst, "src") == []


@pytest.fixture
def newer(case: Case) -> Path:
    """Another checkpoint of the same model, under the name that the first had."""
    src = case.root / "newer" / "src"
    whole = {name: (array + 1).astype(array.dtype) for name, array in case.model.whole().items()}
    whole["global_step"] += 5
    whole["extra"] = whole["loss_scale"]
    stages = case.model.stages(1, 2, 2)
    for rank in range(4):
        driver.write_file(src / f"rank_{rank}" / "net-1_9.ckpt", support.slice_rank(whole, stages, rank))
    return src


def test_a_finished_destination_is_replaced_share_by_share(
    case: Case, alone: dict[str, tuple[int, bytes]], newer: Path
) -> None:
    for rank in SHARES:
        assert_done(share(case, rank))
    for rank in SHARES:
        with untouched(case.dst):
            assert_refused(share(case, rank, src=newer), 2, "--overwrite")
    for number, rank in enumerate((2, 0, 6, 4)):
        assert_done(share(case, rank, "--overwrite", src=newer))
        assert (case.dst / "src" / manifest.NAME).exists() == (number == 3), "old and new ranks under one manifest"
        assert len(marks(case)) == number + 1, "marks of the old ranks"
    dst = case.root / "expected"
    transform_ckpt.convert(newer, dst, src_strategy=case.strategy, dst_strategy=case.other)
    assert same_but_marks(case.dst / "src") == driver.tree(dst) != alone


def test_shares_of_two_checkpoints_are_never_one(case: Case, newer: Path) -> None:
    """Half from one, half from the other: every rank is there, and no manifest calls that whole."""
    for rank in (0, 2):
        assert_done(share(case, rank))
    for rank in (4, 6):
        found = share(case, rank, src=newer)
        assert_done(found)
        assert "others are not there yet" in found.out
    assert not (case.dst / "src" / manifest.NAME).exists()
    assert marks(case) == ALL_MARKS[2:]
    for rank in (0, 2):
        assert_refused(share(case, rank, src=newer), 2, f"rank_{rank} is there already")
        assert_done(share(case, rank, "--overwrite", src=newer))
    assert_done(run(["verify", str(case.dst / "src"), "--against", str(newer), "--src-strategy", str(case.strategy),
                     "--dst-strategy", str(case.other)]))  # fmt: skip


def test_shares_of_two_process_numbers(case: Case, alone: dict[str, tuple[int, bytes]]) -> None:
    for rank, processes in ((0, 4), (2, 4), (4, 2)):
        assert_done(share(case, rank, "--transform_process_num", processes))
    assert same_but_marks(case.dst / "src") == alone


def test_ranks_of_a_larger_world(case: Case, alone: dict[str, tuple[int, bytes]]) -> None:
    old = case.dst / "src"
    (old / "rank_8").mkdir(parents=True)
    (old / "rank_8" / "checkpoint_8.ckpt").write_bytes(b"old")
    (old / f"{MARK}8.txt").touch()
    (old / "notes.txt").write_text("mine")
    with untouched(case.dst):
        assert_refused(share(case, 0), 2, "rank_8", "--overwrite")
    for rank in SHARES:
        assert_done(share(case, rank, "--overwrite"))
    assert (old / "notes.txt").read_text() == "mine"
    (old / "notes.txt").unlink()
    assert same_but_marks(old) == alone
    assert marks(case) == ALL_MARKS
    assert_done(run(["verify", str(old)]))


def test_killed_while_moving_in(
    case: Case, alone: dict[str, tuple[int, bytes]], newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of replacing: what is there is whole, or has no manifest."""
    for rank in SHARES:
        assert_done(share(case, rank))
    steps = itertools.count(1)

    class KilledError(BaseException):
        pass

    def stop_after(count: int) -> Iterator[None]:
        left = [count]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "unlink", "replace"):
                real = getattr(os, name)

                def counted(*args: object, _real: Callable[..., None] = real, **more: object) -> None:
                    left[0] -= 1
                    if left[0] < 0:
                        raise KilledError
                    _real(*args, **more)

                patch.setattr(coordinate.os, name, counted)
            yield

    for count in steps:
        killed = False
        for _ in stop_after(count):
            try:
                found = share(case, 2, "--overwrite", src=newer)
            except KilledError:
                killed = True
        if not killed:
            break
        if (case.dst / "src" / manifest.NAME).exists():
            assert_done(run(["verify", str(case.dst / "src")]))
    assert_done(found)
    assert 8 < count < 200
    for rank in (0, 6, 4):
        assert_done(share(case, rank, "--overwrite", src=newer))
    dst = case.root / "expected"
    transform_ckpt.convert(newer, dst, src_strategy=case.strategy, dst_strategy=case.other)
    assert same_but_marks(case.dst / "src") == driver.tree(dst)
    assert driver.litter(case.dst, "src") == []


def test_a_part_that_is_not_ours(case: Case) -> None:
    mine = case.dst / "src.rank_2"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with untouched(case.dst):
        assert_refused(share(case, 2, "--overwrite"), 2, mine, "move it away")
    shutil.rmtree(mine)
    mine.write_text("mine")
    with untouched(case.dst):
        assert_refused(share(case, 2), 2, mine, "move it away")


def test_shares_into_the_source_or_a_checkout(case: Case) -> None:
    with untouched(case.src):
        for dst in (case.src.parent, case.src / "rank_0"):
            found = share(case, 0, "--overwrite", dst=dst)
            assert_refused(found, 2, "choose another destination")
    (case.dst / "src" / ".git").mkdir(parents=True)
    with untouched(case.dst):
        assert_refused(share(case, 0, "--overwrite"), 2, "a git checkout")
    case.dst.joinpath("src", ".git").rmdir()
    case.dst.joinpath("src").rmdir()
    case.dst.joinpath("src").write_text("a file")
    with untouched(case.dst):
        assert_refused(share(case, 0, "--overwrite"), 2, "is a file")


# ------------------------------------------------------------------------------------------------------ several files


@pytest.fixture
def several(case: Case) -> Path:
    """Two complete checkpoints, a hidden file, a directory with a name like theirs."""
    folder = case.root / "several"
    for number, name in enumerate(("llama.step_1.ckpt", "qwen.ckpt")):
        whole = {n: (a + number).astype(a.dtype) for n, a in case.model.whole().items()}
        driver.write_file(folder / name, whole)
    (folder / ".half.ckpt").write_bytes(b"half a download")
    (folder / "dir.ckpt").mkdir()
    return folder


def test_several_complete_files(case: Case, several: Path, elsewhere: Path) -> None:
    words = ["--src_checkpoint", several, "--dst_checkpoint_dir", case.dst, "--dst_strategy", case.other, "--json"]
    found = tool(THREE[1], *words, cwd=elsewhere)
    assert_done(found)
    assert [r["name"] for r in json.loads(found.out)["results"]] == ["llama", "qwen"]
    assert sorted(os.listdir(case.dst)) == ["llama", "qwen"]
    for name, file in (("llama", "llama.step_1.ckpt"), ("qwen", "qwen.ckpt")):
        words = ["verify", case.dst / name, "--against", several / file, "--dst-strategy", case.other]
        assert_done(run([str(w) for w in words]))


def test_colliding_stems(case: Case, several: Path, elsewhere: Path) -> None:
    shutil.copy(several / "qwen.ckpt", several / "qwen.step_2.ckpt")
    words = ["--src_checkpoint", several, "--dst_checkpoint_dir", case.dst, "--dst_strategy", case.other]
    found = tool(THREE[1], *words, cwd=elsewhere)
    assert_refused(found, 4, "qwen.ckpt", "qwen.step_2.ckpt", "rename one")
    assert not case.dst.exists()


def test_one_of_several_files_is_damaged(case: Case, several: Path, elsewhere: Path) -> None:
    path = several / "qwen.ckpt"
    path.write_bytes(path.read_bytes()[:-1])
    words = ["--src_checkpoint", several, "--dst_checkpoint_dir", case.dst, "--dst_strategy", case.other]
    assert_refused(tool(THREE[1], *words, cwd=elsewhere), 3, path, "truncated")
    assert_done(run(["verify", str(case.dst / "llama")]))
    assert driver.litter(case.dst, "llama") == []


def test_one_file_and_its_name(case: Case, several: Path, elsewhere: Path) -> None:
    words = ["--src_checkpoint", several / "llama.step_1.ckpt", "--dst_checkpoint_dir", case.dst]
    assert_done(tool(THREE[1], *words, "--world_size", 1, cwd=elsewhere))
    assert sorted(os.listdir(case.dst / "llama" / "rank_0")) == ["checkpoint_0.ckpt"]


def test_a_model_of_weights_only_and_a_strategy_that_lists_more(tmp_path: Path, elsewhere: Path) -> None:
    case = make_case(tmp_path / "weights", layout=(1, 2, 2), other=(2, 1, 4, 2), model=Model(optimizer=False))
    driver.write_layout(Model().stages(2, 1, 4, 2), case.other)
    assert_done(tool("transform_ckpt.py", *convert_words(case, case.strategy, case.dst), cwd=elsewhere))
    assert_done(run(["verify", str(case.dst)]))
