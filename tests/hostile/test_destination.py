"""Destinations that are occupied, impossible, forbidden or full: refused in time, and nobody's files are touched."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile import driver
from tests.hostile.driver import Case, assert_done, assert_refused, make_case, run, spawn, tree, untouched
from transform_ckpt import destination, execute
from transform_ckpt.errors import UsageError

MOUNT, UMOUNT = shutil.which("mount") or "/bin/mount", shutil.which("umount") or "/bin/umount"
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Eight ranks to four."""
    return make_case(tmp_path / "case")


def alone(case: Case, *expected: str) -> None:
    """Nothing lies beside the source but what was expected."""
    assert driver.litter(case.root, "src", case.strategy.name, case.other.name, *expected) == []


# ---------------------------------------------------------------------------------------------- occupied


def test_not_empty(case: Case) -> None:
    driver.old_output(case.dst)
    with untouched(case.dst, case.src):
        assert_refused(run(case.args()), 2, case.dst, "is not empty (2 entries)", "--overwrite")
        assert_refused(run(case.args("--dry-run")), 2, case.dst, "is not empty")
    alone(case, "out")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.write_text("mine"), ["is a file"]),
        (lambda p: p.symlink_to("/nonexistent/there"), ["symbolic link to nothing"]),
        (os.mkfifo, ["is a file"]),
        (lambda p: p.symlink_to("/dev/null"), ["is a file"]),
    ],
)
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--no-resume"]])
def test_no_directory(case: Case, make: Callable[[Path], None], words: list[str], more: list[str]) -> None:
    make(case.dst)
    with untouched(case.root):
        assert_refused(run(case.args(*more)), 2, case.dst, "must be a directory", *words)
    alone(case, "out")


def test_links_to_directories_are_followed(case: Case) -> None:
    real = case.root / "real"
    real.mkdir()
    case.dst.symlink_to("real")
    assert_done(run(case.args("--verify")))
    assert case.dst.is_symlink()
    assert (real / "rank_3").is_dir()
    alone(case, "out", "real")
    (real / "mine").write_text("x")
    assert_refused(run(case.args()), 2, "is not empty")
    assert_done(run(case.args("--overwrite")))
    assert case.dst.is_symlink()
    assert not (real / "mine").exists()
    alone(case, "out", "real")


def test_source_and_destination_apart(case: Case) -> None:
    """Neither may lie in the other, under whatever name, nor in the partial output."""
    (case.root / "link").symlink_to("src")
    with untouched(case.root):
        for dst in (case.src / "new", case.src / "rank_0" / "new", case.root / "link" / "new"):
            assert_refused(run(case.args(dst=dst)), 2, dst.name, "inside the source")
        for dst in (case.src, case.root / "link"):
            assert_refused(run(case.args("--overwrite", dst=dst)), 2, "inside the source")
        assert_refused(run(case.args("--overwrite", dst=case.root)), 2, "inside the destination")
        file = case.file(0)
        args = ["convert", str(file), str(case.src / "rank_0"), "--to", "mindspore", "--overwrite"]
        assert_refused(run(args), 2, file, "inside the destination")
    partial = case.src.rename(case.root / "out.partial")
    (partial / ".journal").mkdir()
    with untouched(partial):
        for more in ([], ["--no-resume"], ["--overwrite"]):
            assert_refused(run(case.args(*more, src=partial)), 2, "out.partial", "source")


def test_a_link_from_the_source_into_the_destination(case: Case) -> None:
    """--overwrite would delete what it reads."""
    moved = case.dst / "rank_3"
    case.dst.mkdir()
    (case.src / "rank_3").rename(moved)
    (case.src / "rank_3").symlink_to(moved)
    with untouched(case.dst):
        assert_refused(run(case.args("--overwrite")), 2, "rank_3", "inside the destination")


def test_beside_a_single_source_file(case: Case) -> None:
    args = ["convert", str(case.file(0)), str(case.src / "rank_0" / "out"), "--to", "mindspore"]
    assert_done(run(args))


@pytest.mark.parametrize("fill", ["file", "full", "ours of another"])
def test_the_partial_name_is_taken(case: Case, fill: str) -> None:
    partial = case.root / "out.partial"
    if fill == "file":
        partial.write_text("mine")
    else:
        partial.mkdir()
        (partial / ("mine" if fill == "full" else "transform_ckpt.json")).write_text("{}")
    with untouched(case.root):
        for more in ([], ["--no-resume"], ["--overwrite"]):
            assert_refused(run(case.args(*more)), 2, partial, "in the way", "move it away")


def test_directories_of_similar_names_are_not_ours(case: Case) -> None:
    for name in ("out.replaced", "out.old", "out.tmp", "out.partial.journal"):
        (case.root / name).mkdir()
        (case.root / name / "mine").write_text("x")
    others = [case.root / n for n in ("out.replaced", "out.old", "out.tmp", "out.partial.journal")]
    with untouched(*others):
        assert_done(run(case.args()))
        assert_done(run(case.args("--overwrite")))
    alone(case, "out", *(p.name for p in others))


# ---------------------------------------------------------------------------------------------- impossible


@pytest.mark.parametrize(
    ("dst", "code", "word"),
    [
        ("", 2, "the destination is empty"),
        ("/", 2, "mount point"),
        ("/proc/x", 5, "/proc/x"),
        ("/dev/null/x", 2, "/dev/null is not a directory"),
        ("{root}/src_strategy.ckpt/a/b", 2, "src_strategy.ckpt is not a directory"),
        ("{root}/" + "n" * 250, 5, "File name too long"),
        ("{root}/" + "n" * 300, 5, "File name too long"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_impossible_places(
    case: Case, dst: str, code: int, word: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case.root)
    with untouched(case.root):
        args = case.args(*more)
        args[2] = dst.format(root=case.root)
        assert_refused(run(args), code, word)


def test_parents_are_made_and_the_umask_counts(case: Case) -> None:
    for mask, directory, file in ((0o077, 0o700, 0o600), (0o027, 0o750, 0o640)):
        old = os.umask(mask)
        try:
            assert_done(run(case.args(dst=case.root / f"a{mask}" / "b" / "c")))
        finally:
            os.umask(old)
        modes = {stat.S_IMODE(p.stat().st_mode) for p in (case.root / f"a{mask}" / "b" / "c").rglob("*") if p.is_dir()}
        assert modes == {directory}
        modes = {stat.S_IMODE(p.stat().st_mode) for p in (case.root / f"a{mask}").rglob("*") if p.is_file()}
        assert modes == {file}


# ---------------------------------------------------------------------------------------------- forbidden


@pytest.fixture
def open_case() -> Iterator[Case]:
    """One that other users can reach (pytest closes its own directories), below a directory that they can write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        case = make_case(Path(folder) / "case")
        case.root.chmod(0o777)
        yield case


@needs_root
@pytest.mark.parametrize(
    ("what", "mode", "words"),
    [
        ("src", 0, ["{src}", "Permission denied"]),
        ("src/rank_3", 0, ["{src}/rank_3", "Permission denied"]),
        ("src/rank_3/net-1_7.ckpt", 0, ["{src}/rank_3/net-1_7.ckpt", "Permission denied"]),
        ("src_strategy.ckpt", 0, ["{root}/src_strategy.ckpt", "Permission denied"]),
        ("dst_strategy.ckpt", 0, ["{root}/dst_strategy.ckpt", "Permission denied"]),
        ("out", 0, ["{root}/out", "Permission denied"]),
        (".", 0o755, ["{root}/out.partial", "Permission denied", "give this user permission"]),
    ],
)
def test_no_permission(open_case: Case, tmp_path: Path, what: str, mode: int, words: list[str]) -> None:
    case = open_case
    if what == "out":
        driver.old_output(case.dst)
    (case.root / what).chmod(mode)
    before = tree(case.root)
    found = driver.run_as_user(case.args("--overwrite"), tmp_path)
    assert_refused(found, 5, *(w.format(src=case.src, root=case.root) for w in words))
    assert tree(case.root) == before


@needs_root
def test_an_old_output_that_may_not_be_deleted_is_named(open_case: Case, tmp_path: Path) -> None:
    driver.old_output(open_case.dst)
    found = driver.run_as_user(open_case.args("--overwrite"), tmp_path)
    assert_done(found)
    assert f"{open_case.dst}.replaced" in found.err
    assert (open_case.root / "out.replaced" / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------- full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs of some options."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        done = subprocess.run(
            [MOUNT, "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=False, capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        mounted = True
        return path

    yield mount
    if mounted:
        subprocess.run([UMOUNT, "-l", str(path)], check=True)


@needs_root
def test_a_small_disk(case: Case, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=48k")
    assert_refused(run(case.args(dst=disk / "out")), 5, disk / "out", "bytes, 49,152 are free there")
    assert list(disk.iterdir()) == []
    found = run(["plan", *case.args("--json", dst=disk / "out")[1:]])
    assert "49,152 are free" in json.loads(found.out)["problems"][0]
    with untouched(disk):
        assert_refused(run(case.args(dst=disk)), 2, disk, "mount point", "directory below it")


@needs_root
def test_a_read_only_disk(case: Case, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=1m,ro")
    assert_refused(run(case.args(dst=disk / "out")), 5, disk / "out", "read-only")


def test_full_while_reserving(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the space between the question and the answer."""
    driver.old_output(case.dst)
    real = execute.preallocate

    def refuse(fd: int, path: str, nbytes: int) -> None:
        if "rank_2" in path:
            from transform_ckpt.formats.files import storage_error

            raise storage_error(path, OSError(errno.ENOSPC, "full"), "reserving")
        real(fd, path, nbytes)

    monkeypatch.setattr(execute, "preallocate", refuse)
    with untouched(case.dst):
        assert_refused(run(case.args("--overwrite")), 5, "rank_2", "free some space")
    alone(case, "out")


@pytest.mark.parametrize("where", ["checkpoint_1.ckpt", "units-", "plan.json", "transform_ckpt.json"])
@pytest.mark.parametrize("workers", [1, 2])
def test_full_in_the_middle(case: Case, monkeypatch: pytest.MonkeyPatch, where: str, workers: int) -> None:
    """ENOSPC from any write: one message that names the file; the same command then continues."""
    assert_done(run(case.args(dst=case.root / "whole")))
    driver.old_output(case.dst)
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)
    monkeypatch.setattr("transform_ckpt.planner.UNIT_NBYTES", 4096)
    with monkeypatch.context() as patch:
        full_disk(patch, where)
        with untouched(case.dst):
            found = run(case.args("--overwrite", "--workers", workers))
            assert_refused(found, 5, where, "No space left", "the same command then continues")
    assert_done(run(case.args("--overwrite", "--workers", workers)))
    assert tensors(case.dst) == tensors(case.root / "whole")


def full_disk(patch: pytest.MonkeyPatch, where: str) -> None:
    """Writes to files of that name fail from the third on (journal) or at once."""
    count = 0

    def checked(real: Callable[..., int]) -> Callable[..., int]:
        def write(fd: int, *args: object) -> int:
            nonlocal count
            if where in os.path.basename(os.readlink(f"/proc/self/fd/{fd}")):
                count += 1
                if count > 2 or "units" not in where:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, *args)

        return write

    real_open = open

    def opening(path: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if isinstance(path, str) and where in os.path.basename(path) and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return real_open(path, mode, *args, **kwargs)  # type: ignore[call-overload]

    patch.setattr(os, "pwrite", checked(os.pwrite))
    patch.setattr(os, "write", checked(os.write))
    patch.setattr("builtins.open", opening)


def tensors(path: Path) -> dict[str, bytes]:
    """Bytes of the tensor files below."""
    return {name: data for name, (_, data) in tree(path).items() if name.endswith(".ckpt")}


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_limit_of_file_size(case: Case, limit: int) -> None:
    driver.old_output(case.dst)
    with untouched(case.dst):
        found = spawn(
            case.args("--overwrite"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        assert_refused(found, 5, "File too large")
    alone(case, "out")


@pytest.mark.parametrize("limit", [9, 16])
def test_a_limit_of_open_files_is_lived_with(case: Case, limit: int) -> None:
    found = spawn(case.args("--verify"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    assert_done(found)


@needs_root
def test_a_limit_of_processes(open_case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)
    monkeypatch.setattr("transform_ckpt.planner.UNIT_NBYTES", 4096)
    real = os.fork
    allowed = 0

    def fork() -> int:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real()

    monkeypatch.setattr(os, "fork", fork)
    assert_refused(run(open_case.args("--workers", 4)), 5, "no worker process", "--workers 1")
    allowed = 2
    assert_done(run(open_case.args("--workers", 4)))


# ---------------------------------------------------------------------------------------------- overwrite


def test_overwrite_replaces_at_the_end_only(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a kernel that can swap two names; a failed swap leaves the old output."""
    old = driver.old_output(case.dst)
    seen: list[bool] = []
    real = execute.give_name

    def look(path: str, dst: str) -> str | None:
        seen.append(tree(case.dst) == old)
        return real(path, dst)

    monkeypatch.setattr(execute, "give_name", look)
    assert_done(run(case.args("--overwrite")))
    assert seen == [True]
    whole = tree(case.dst)
    alone(case, "out")
    monkeypatch.setattr(destination, "_exchange", lambda *_: False)
    assert_done(run(case.args("--overwrite")))
    assert tree(case.dst) == whole
    alone(case, "out")
    rename = os.rename

    def refuse(src: str, dst: str) -> None:
        if str(src).endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), src)
        rename(src, dst)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with untouched(case.dst):
            assert_refused(run(case.args("--overwrite", "--prefix", "new_")), 5, case.dst, "final name")
    alone(case, "out", "out.partial")
    assert_done(run(case.args("--overwrite", "--prefix", "new_")))
    assert (case.dst / "rank_0" / "new_0.ckpt").is_file()
    alone(case, "out")


def test_overwrite_keeps_the_old_output_when_anything_is_wrong(case: Case) -> None:
    driver.old_output(case.dst)
    driver.flip(case.file(3), 3)
    with untouched(case.dst):
        assert_refused(run(case.args("--overwrite")), 3, case.file(3))
    alone(case, "out")


def test_a_verify_that_fails_keeps_the_old_output(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read again before it gets the name."""
    driver.old_output(case.dst)
    real = execute.Execution._finish

    def damage(job: execute.Execution, *args: object) -> None:
        real(job, *args)
        driver.flip(Path(job.paths[2]), 600)

    monkeypatch.setattr(execute.Execution, "_finish", damage)
    with untouched(case.dst):
        assert_refused(run(case.args("--overwrite", "--verify")), 6, "rank_2/checkpoint_2.ckpt", "differences")


def test_the_old_output_survives_every_kind_of_failure_of_a_process(case: Case) -> None:
    """Run where the current directory is the destination: it may be replaced, but not lost."""
    driver.old_output(case.dst)
    before = tree(case.dst)
    words = [sys.executable, "-m", "transform_ckpt", *case.args("--workers", "-1", "--overwrite")]
    done = subprocess.run(words, cwd=case.dst, env=driver.environment(), capture_output=True, check=False)
    assert done.returncode == 2
    assert tree(case.dst) == before
    shutil.rmtree(case.dst)


@pytest.mark.parametrize("precious", ["home", "above", "git"])
def test_overwrite_refuses_what_nobody_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precious: str) -> None:
    dst = tmp_path / "dst"
    (dst / "below").mkdir(parents=True)
    match precious:
        case "home":
            monkeypatch.setenv("HOME", str(dst))
        case "above":
            monkeypatch.chdir(dst / "below")
        case _:
            (dst / ".git").mkdir()
    with pytest.raises(UsageError, match="which --overwrite does not replace"):
        destination.check_destination(str(dst), overwrite=True)
    assert (dst / "below").is_dir()
