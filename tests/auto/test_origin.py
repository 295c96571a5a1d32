"""What load_checkpoint and src_strategy_path_or_dir mean: all forms that MindFormers documents, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.hostile.driver import Case, make_case, write_file
from transform_ckpt.auto.origin import Origin, resolve
from transform_ckpt.errors import InputError, PlanError

ONE = {"w": np.arange(4, dtype=np.float32)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case") / "job", "ckpt", (2, 1, 2), (1, 2, 2))


def touched(root: Path, *names: str) -> Path:
    """Small checkpoint files below a directory."""
    for name in names:
        write_file(root / name, ONE)
    return root


def look(path: Path | str, strategy: Path | str | None = None, resume: str | None = None) -> Origin:
    return resolve(str(path), None if strategy is None else str(strategy), resume)


# ------------------------------------------------------------------------------------------------ complete weights


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_one_file(tmp_path: Path, suffix: str) -> None:
    touched(tmp_path, f"llama_7b.{suffix}")
    found = look(tmp_path / f"llama_7b.{suffix}")
    assert found == Origin({"llama_7b": str(tmp_path / f"llama_7b.{suffix}")}, "file", 1, frozenset([suffix]), None)
    assert not found.sharded


FORMS: dict[str, tuple[list[str], str, str, dict[str, str], int]] = {
    "several files": (["a.v1.ckpt", "b.ckpt"], "", "complete", {"a": "a.v1.ckpt", "b": "b.ckpt"}, 1),
    "one file": (["a.ckpt"], "", "complete", {"a": "a.ckpt"}, 1),
    "a hidden file": (["a.ckpt", ".b.ckpt"], "", "complete", {"a": "a.ckpt"}, 1),
    "shards": (["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], "", "complete", {"dir": ""}, 1),
    "steps": (["net-1_10.ckpt", "net-1_20.ckpt"], "", "complete", {"dir": ""}, 1),
    "rank_0": (["rank_0/a.ckpt"], "", "ranks", {"dir": ""}, 1),
    "a file of the only rank": (["rank_0/a.ckpt"], "rank_0/a.ckpt", "file", {"a": "rank_0/a.ckpt"}, 1),
    "the only rank": (["rank_0/a.ckpt"], "rank_0", "complete", {"a": "rank_0/a.ckpt"}, 1),
    "ranks": (["rank_0/a.ckpt", "rank_1/a.ckpt"], "", "ranks", {"dir": ""}, 2),
    "a file of one of several ranks": (["rank_0/a.ckpt", "rank_1/a.ckpt"], "rank_1/a.ckpt", "ranks", {"dir": ""}, 2),
    "one of several ranks": (["rank_0/a.ckpt", "rank_1/a.ckpt"], "rank_1", "ranks", {"dir": ""}, 2),
    "ranks that are not dense": (["rank_0/a.ckpt", "rank_10/a.ckpt"], "", "ranks", {"dir": ""}, 2),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slash", ["", "/"])
def test_forms(tmp_path: Path, form: str, slash: str) -> None:
    files, given, kind, named, ranks = FORMS[form]
    root = touched(tmp_path / "dir", *files)
    strategy = tmp_path / "strategy.ckpt"
    strategy.write_bytes(b"")
    path = root / given
    found = look(str(path) + (slash if path.is_dir() else ""), strategy if ranks > 1 else None)
    assert (found.kind, found.ranks, found.sharded) == (kind, ranks, ranks > 1)
    assert found.checkpoints == {name: str(root / rest) for name, rest in named.items()}
    assert found.formats == {Path(files[0]).suffix[1:]}
    assert found.step is None


def test_checkpoint_2(tmp_path: Path) -> None:
    from transform_ckpt import api

    write_file(tmp_path / "whole.safetensors", {"decoder.w": np.arange(8, dtype=np.float32)})
    api.convert(tmp_path / "whole.safetensors", tmp_path / "new", checkpoint_2=True)
    found = look(tmp_path / "new")
    assert (found.kind, list(found.checkpoints), found.strategy, found.sharded) == (
        "checkpoint 2.0",
        ["new"],
        None,
        False,
    )


def test_both_formats_are_named(tmp_path: Path) -> None:
    touched(tmp_path / "dir", "rank_0/a.ckpt", "rank_0/b.safetensors")
    assert look(tmp_path / "dir").formats == {"ckpt", "safetensors"}


# ------------------------------------------------------------------------------------------------ strategies


@pytest.mark.parametrize("given", ["merged", "directory", "rank"])
def test_a_strategy_is_taken_as_given(case: Case, tmp_path: Path, given: str) -> None:
    from strategy.generate_files import write_rank_files
    from transform_ckpt.api import read_strategy

    made = read_strategy(case.strategy)
    assert made is not None
    write_rank_files(made, str(tmp_path / "strategy"))
    path = {
        "merged": case.strategy, "directory": tmp_path / "strategy",
        "rank": tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt",
    }[given]  # fmt: skip
    found = look(case.src, path)
    assert (found.strategy, found.notes) == (str(path), ())


def test_a_strategy_beside_the_checkpoint_is_taken_and_said(tmp_path: Path) -> None:
    root = touched(tmp_path / "out" / "checkpoint", "rank_0/a.ckpt", "rank_1/a.ckpt")
    (tmp_path / "out" / "strategy").mkdir()
    found = look(root)
    assert found.strategy == str(tmp_path / "out" / "strategy")
    assert "is taken" in found.notes[0]
    assert look(root, "").strategy == found.strategy
    assert look(root / "rank_0").strategy == found.strategy


def test_slices_without_a_strategy_are_refused(case: Case) -> None:
    for path in (case.src, case.file(1), case.src / "rank_2"):
        with pytest.raises(
            InputError, match=r"several ranks and src_strategy_path_or_dir is empty: set it to .*rank_\*"
        ):
            look(path)


def test_a_strategy_of_complete_weights_is_not_used_and_said(case: Case, tmp_path: Path) -> None:
    touched(tmp_path, "a.ckpt")
    found = look(tmp_path / "a.ckpt", case.strategy)
    assert found.strategy is None
    assert "is not used" in found.notes[0]


def test_a_strategy_that_is_not_there(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"src_strategy_path_or_dir: .*gone: not found"):
        look(case.src, tmp_path / "gone")


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("name", "step"),
    [("llama-3_5.ckpt", 5), ("llama-3_5", 5), ("a-b_rank_0-1_20.safetensors", 20), ("x-1_2_network", 2)],
)
def test_resume_training_chooses_a_step(case: Case, name: str, step: int) -> None:
    assert look(case.src, case.strategy, name).step == step


@pytest.mark.parametrize("name", ["llama", "True", "llama-3.ckpt", ""])
def test_resume_training_that_names_no_step(case: Case, name: str) -> None:
    with pytest.raises(InputError, match=r"resume_training: .*epoch.*_.*step"):
        look(case.src, case.strategy, name)


def test_a_file_of_a_rank_chooses_its_step(case: Case) -> None:
    assert look(case.file(1), case.strategy).step == 7
    assert look(case.file(1), case.strategy, "net-1_9").step == 9


# ------------------------------------------------------------------------------------------------ links and faults


def test_links_are_followed_once_and_for_all(tmp_path: Path, case: Case) -> None:
    """What a well-known name means later does not count."""
    (tmp_path / "known").symlink_to(case.src)
    (tmp_path / "strategies").symlink_to(case.strategy)
    found = look(tmp_path / "known", tmp_path / "strategies")
    assert found.checkpoints == {"src": str(case.src)}
    assert found.strategy == str(case.strategy)


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched(tmp_path / "here", "rank_0/a.ckpt")
    monkeypatch.chdir(tmp_path / "here")
    assert look(".").checkpoints == {"here": str(tmp_path / "here")}


FAULTS: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "nothing": (lambda root: root / "gone", InputError, "load_checkpoint: .*gone: not found: check the path"),
    "a dangling link": (lambda root: _link(root / "link", root / "gone"), InputError, "not found"),
    "an empty directory": (lambda root: _folder(root / "empty"), InputError, "no rank_0 directory and no checkpoint"),
    "other files": (lambda root: _folder(root / "other", "readme.md"), InputError, "no checkpoint file"),
    "one stem twice": (lambda root: touched(root / "twice", "a.1.ckpt", "a.2.ckpt"), PlanError, "would both become a"),
    "a rank twice": (lambda root: touched(root / "d", "rank_1/a.ckpt", "rank_01/a.ckpt"), PlanError, "both rank 1"),
}


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("")
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    make, kind, text = FAULTS[fault]
    with pytest.raises(kind, match=text):
        look(make(tmp_path))


def test_what_the_last_run_made_is_a_source(tmp_path: Path) -> None:
    """`output/transformed_checkpoint/{name}` through a link, its strategy beside it by name."""
    run = tmp_path / "out" / "auto_trans" / "20200101_000000_abcdef"
    touched(run / "transformed_checkpoint" / "net", "rank_0/checkpoint_0.ckpt", "rank_1/checkpoint_1.ckpt")
    (run / "strategy").mkdir()
    os.symlink(run / "strategy", tmp_path / "out" / "strategy")
    os.symlink(run / "transformed_checkpoint", tmp_path / "out" / "transformed_checkpoint")
    found = look(tmp_path / "out" / "transformed_checkpoint" / "net", tmp_path / "out" / "strategy")
    assert found.checkpoints == {"net": str(run / "transformed_checkpoint" / "net")}
    assert found.strategy == str(run / "strategy")
