"""What scripts rely on: exit codes, one JSON document on stdout, no surprise from locale, limits or closed streams."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import driver
from tests.hostile.driver import (
    Case,
    Run,
    assert_done,
    assert_refused,
    command,
    environment,
    make_case,
    run,
    spawn,
    tree,
)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A source, its conversion `done`, and the same damaged, `bad`; not to be changed."""
    case = make_case(tmp_path_factory.mktemp("ready"))
    assert_done(run(case.args(dst=case.root / "done")))
    shutil.copytree(case.root / "done", case.root / "bad")
    driver.flip(case.root / "bad" / "rank_0" / "checkpoint_0.ckpt", 600)
    return case


@pytest.fixture
def case(ready: Case, tmp_path: Path) -> Case:
    """A copy to write beside."""
    return driver.copy(ready, tmp_path / "case")


# ---------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--frobnicate"], "--frobnicate"),
        (["--to", "nonsense"], "nonsense"),
        (["--workers", "-1"], "--workers -1"),
        (["--workers", "x"], "'x'"),
        (["--memory", "1k"], "at least 1M"),
        (["--memory", "0"], "at least 1M"),
        (["--memory", "-1G"], "not a size"),
        (["--memory", "nan"], "not a size"),
        (["--memory", "9" * 400 + "G"], "not a size"),
        (["--step", "x"], "'x'"),
        (["--step", "9" * 5000], "--step"),
        (["--format", "pickle"], "pickle"),
        (["--crc", "--format", "safetensors"], "--crc"),
        (["--unified", "--checkpoint-2", "--format", "safetensors"], "--unified and --checkpoint-2"),
        (["--unified", "--format", "ckpt"], "--unified"),
        (["--unified"], "drop the destination strategy"),
        (["--prefix", "../x"], "--prefix"),
        (["--prefix", "."], "--prefix"),
        (["--prefix", "a/b"], "--prefix"),
        (["--src-strategy"], "--src-strategy"),
        (["third"], "third"),
    ],
)
def test_wrong_flags(case: Case, args: list[str], word: str) -> None:
    found = run(case.args("--json", *args))
    assert_refused(found, 2, word)
    assert len(found.err) < 8000
    answer = json.loads(found.out)
    assert (answer["ok"], answer["exit_code"]) == (False, 2)
    assert word in answer["error"]
    assert not case.dst.exists()


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 2), (["frob"], 2), (["frob", "--json"], 2), (["convert"], 2), (["convert", "--help"], 0), (["--help"], 0),
        (["--version"], 0), (["formats", "--json"], 0), (["doctor", "--json"], None), (["layout"], 2), (["verify"], 2),
    ],
)  # fmt: skip
def test_verbs_and_help(args: list[str], code: int | None) -> None:
    found = run(args)
    assert "Traceback" not in found.err
    assert found.code == code or code is None
    if "--json" in args:
        json.loads(found.out)


@pytest.mark.parametrize("flag", ["--from hf", "--from torch_dist", "--to hf", "--to torch_dist"])
def test_what_is_not_built_is_refused_by_name(case: Case, flag: str) -> None:
    assert_refused(run(case.args(*flag.split())), 3, flag.split()[1], "mindspore")


@pytest.mark.parametrize(
    ("flag", "code", "word"),
    [("--from megatron", 3, "is a mindspore checkpoint"), ("--to megatron", 2, "--dst-strategy")],
)
def test_mindspore_weights_are_no_shards_of_megatron(case: Case, flag: str, code: int, word: str) -> None:
    assert_refused(run(case.args(*flag.split())), code, word)


# ---------------------------------------------------------------------------------------------- JSON


def paths(case: Case) -> dict[str, str]:
    """Words of the command lines below."""
    return {
        "src": str(case.src), "done": str(case.root / "done"), "bad": str(case.root / "bad"),
        "none": str(case.root / "no"),
        "s": str(case.strategy), "d": str(case.other), "out": str(case.root / "out"), "file": str(case.file(0)),
    }  # fmt: skip


SAID: dict[str, tuple[int, list[str]]] = {
    "convert {src} {out} --to mindspore --src-strategy {s} --dst-strategy {d}": (0, ["dst", "files"]),
    "convert {src} {out} --to mindspore --src-strategy {s} --dst-strategy {d} --verify": (0, ["verified"]),
    "convert {src} {out} --to mindspore --src-strategy {s} --dst-strategy {d} --dry-run": (0, ["write_nbytes"]),
    "convert {src} {done} --to mindspore --src-strategy {s} --dst-strategy {d}": (2, ["error"]),
    "convert {src} {out} --to mindspore": (3, ["error"]),
    "convert {none} {out} --to mindspore": (3, ["error"]),
    "plan {src} {out} --to mindspore --src-strategy {s}": (0, ["files", "problems"]),
    "plan {src} {out} --to mindspore --src-strategy {d}": (3, ["error"]),
    "inspect {src}": (0, ["tensors"]),
    "inspect {src} --strategy {s}": (0, ["tensors"]),
    "inspect {file}": (0, ["tensors"]),
    "inspect {none}": (3, ["error"]),
    "verify {done}": (0, ["checks"]),
    "verify {done} --against {src} --src-strategy {s} --dst-strategy {d}": (0, ["checks"]),
    "verify {bad}": (6, ["differences"]),
    "verify {none}": (3, ["error"]),
    "diff {src} {done} --a-strategy {s} --b-strategy {d}": (0, ["tensors"]),
    "diff {src} {bad} --a-strategy {s} --b-strategy {d}": (6, ["differences"]),
    "diff {src} {none} --a-strategy {s}": (3, ["error"]),
    "layout {s}": (0, ["stages"]),
    "layout {file}": (3, ["error"]),
    "layout {none}": (3, ["error"]),
}


@pytest.mark.parametrize(("line", "expected"), SAID.items(), ids=list(SAID))
def test_stdout_is_one_json_document(ready: Case, line: str, expected: tuple[int, list[str]]) -> None:
    code, keys = expected
    shutil.rmtree(ready.root / "out", ignore_errors=True)
    words = [word.format(**paths(ready)) for word in line.split()]
    found = run([*words, "--json"])
    assert "Traceback" not in found.err
    assert found.code == code, found.err
    answer = json.loads(found.out)
    assert answer["ok"] == (code == 0)
    assert answer.get("exit_code", 0) == code
    assert set(keys) <= set(answer)
    if code:
        assert found.err.startswith(("error: ", "note: "))
    shutil.rmtree(ready.root / "out", ignore_errors=True)
    plain = run(words)
    assert (plain.code, "Traceback" in plain.err) == (code, False)
    if code:
        assert "error: " in plain.err


# ---------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("inspect {src} --all", 0),
        ("inspect {src} --all --json", 0),
        ("formats", 0),
        ("convert {src} {out} --to mindspore --src-strategy {s} --json", 0),
        ("verify {bad} --json", 6),
        ("diff {src} {bad} --a-strategy {s} --b-strategy {d} --json", 6),
        ("verify {none} --json", 3),
        ("frob --json", 2),
    ],
)
@pytest.mark.parametrize("buffered", ["", "1"])
def test_nobody_listens_to_stdout(case: Case, line: str, code: int, buffered: str) -> None:
    """`| head -c0`: the exit code still says what was found."""
    shutil.copytree(case.root / "done", case.root / "copy", dirs_exist_ok=True)
    words = [word.format(**paths(case)) for word in line.split()]
    process = subprocess.Popen(
        command(words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONUNBUFFERED=buffered),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(60), "Traceback" in error, "BrokenPipe" in error) == (code, False, False), error


def test_stdout_is_full(case: Case) -> None:
    for words in (["formats"], case.args("--json")):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command(words), stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
        assert done.returncode == 5
        assert b"standard output: No space left" in done.stderr
        assert b"Traceback" not in done.stderr
    assert_done(run(["verify", str(case.dst)]))


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_streams(case: Case, closed: tuple[int, ...]) -> None:
    """Files must not get the numbers of stdout and stderr and then be written to by a print."""

    def close() -> None:
        for fd in closed:
            os.close(fd)

    assert_done(run(case.args("--crc", dst=case.root / "whole")))
    for dst, code in (("out", 0), ("out", 2)):
        found = spawn(case.args("--crc", dst=case.root / dst), preexec_fn=close)
        assert (found.code, "Traceback" in found.err) == (code, False), found.err
    assert tree(case.root / "out") == tree(case.root / "whole")


# ---------------------------------------------------------------------------------------------- names and locales


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "en_US.ISO-8859-1"])
def test_names_that_are_not_utf8(case: Case, locale: str) -> None:
    root = case.root / os.fsdecode(b"\xff\xfe-\xe5\xb1\x82")
    root.mkdir()
    src = case.src.rename(root / "src")
    dst = root / "out"
    for more in ([], ["--json"], ["--verify", "--overwrite"]):
        found = spawn(case.args(*more, src=src, dst=dst), env={"LC_ALL": locale})
        assert "Traceback" not in found.err
        assert found.code == (2 if more == ["--json"] else 0), found.err
        if more == ["--json"]:
            assert json.loads(found.out)["exit_code"] == 2
    for words in (["inspect", src], ["verify", dst], ["verify", dst, "--json"], ["inspect", src, "--all", "--json"]):
        found = spawn(words, env={"LC_ALL": locale})
        assert (found.code, "Traceback" in found.err) == (0, False), found.err


def test_tensor_names_of_all_scripts_under_locale_c(tmp_path: Path) -> None:
    names = ["层.权重", "слой", "a\u202eb", "\U0001f600"]
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    driver.raw_safetensors(tmp_path / "src" / "net.safetensors", header, bytes(16))
    for words in (
        ["inspect", tmp_path / "src", "--all"],
        ["convert", tmp_path / "src", tmp_path / "out", "--to", "mindspore", "--format", "ckpt", "--verify"],
        ["diff", tmp_path / "src", tmp_path / "out"],
    ):
        found = spawn(words, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
        assert (found.code, "Traceback" in found.err) == (0, False), found.err


def test_prefixes_of_all_kinds(case: Case) -> None:
    for number, prefix in enumerate(["", "a b", "a\nb", "-x", "层", os.fsdecode(b"\xff")]):
        dst = case.root / f"out{number}"
        assert_done(run(case.args("--verify", f"--prefix={prefix}", dst=dst)))
        assert (dst / "rank_3" / f"{prefix}3.ckpt").is_file()
        assert_done(run(["verify", str(dst)]))
    assert_refused(run(case.args("--prefix", "n" * 250)), 5, "File name too long")
    assert driver.litter(case.root, *os.listdir(case.root)) == []
    assert not Path(f"{case.dst}.partial").exists()


# ---------------------------------------------------------------------------------------------- resources, places


@pytest.mark.parametrize(
    "more", [["--memory", "1M"], ["--memory", "1.5MB"], ["--workers", "1"], ["--workers", "9" * 30], ["--fsync"]]
)
def test_resources_change_no_byte(case: Case, more: list[str]) -> None:
    assert_done(run(case.args(*more)))
    assert tree(case.dst) == tree(case.root / "done")


def test_huge_worker_counts_start_no_more_than_there_are_units(case: Case) -> None:
    done = driver.end(driver.start(driver.slow_command(case.args("--workers", 10**9), unit=8192, delay=0)))
    assert_done(done)


def test_from_another_directory_with_relative_paths(case: Case, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = [str(os.path.relpath(w, elsewhere)) if w.startswith("/") else w for w in case.args()]
    assert_done(spawn(words, cwd=elsewhere))
    assert tree(case.dst) == tree(case.root / "done")
    assert list(elsewhere.iterdir()) == []


def test_the_installed_command_is_the_same(case: Case) -> None:
    program = Path(sys.executable).parent / "transform-ckpt"
    if not program.exists():
        pytest.skip("transform-ckpt is not installed in this environment")
    for words, code in ((["formats", "--json"], 0), (["frob"], 2), (["inspect", str(case.root / "no")], 3)):
        done = subprocess.run(
            [program, *words], capture_output=True, check=False, cwd="/", env={"PATH": "/usr/bin:/bin"}
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (code, False)


def test_a_deleted_current_directory(case: Case, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    for words, codes in ((case.args(), {0}), (["convert", "src", "out", "--to", "mindspore"], {3})):
        done = subprocess.run(
            ["/bin/sh", "-c", script, str(gone), *command(words)], capture_output=True, check=False, env=environment()
        )
        gone.mkdir(exist_ok=True)
        found = Run(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in found.err
        assert found.code in codes, found.err


OLD_FLAGS: list[tuple[Callable[[Case], list[str]], int, str]] = [
    (lambda c: ["--src_ckpt_strategy", str(c.strategy), "--dst_ckpt_strategy", "None"], 0, ""),
    (lambda c: ["--src_ckpt_strategy", str(c.other), "--dst_ckpt_strategy", "None"], 3, "is for 4 ranks"),
    (lambda c: ["--src_ckpt_strategy", "None", "--dst_ckpt_strategy", "None"], 3, "ranks 0-7"),
    (lambda c: ["--src_ckpt_strategy", str(c.strategy), "--frob", "1"], 2, "--frob"),
]


@pytest.mark.parametrize(("flags", "code", "word"), OLD_FLAGS)
def test_the_drop_in_tool_keeps_the_contract(
    case: Case, repo_root: Path, flags: Callable[[Case], list[str]], code: int, word: str, tmp_path: Path
) -> None:
    words = [sys.executable, str(repo_root / "tools" / "transform_ckpt.py"), "--src_ckpt_dir", str(case.src)]
    words += ["--dst_ckpt_dir", str(case.dst), "--prefix", "net_", *flags(case)]
    env = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, check=False, cwd=tmp_path, env=env)
    found = Run(done.returncode, done.stdout.decode(), done.stderr.decode())
    if code:
        assert_refused(found, code, word)
        assert not case.dst.exists()
    else:
        assert_done(found)
        assert (case.dst / "rank_0" / "net_0.ckpt").is_file()
