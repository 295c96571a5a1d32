"""Which files of a directory are one checkpoint: steps by number, odd names, name maps, and what cannot be told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import support
from transform_ckpt.errors import InputError, PlanError
from transform_ckpt.formats import mindspore_dir
from transform_ckpt.formats.mindspore_dir import detect, find, parse_step
from transform_ckpt.source import open_source


def make(root: Path, ranks: Mapping[int | str, Iterable[str]]) -> str:
    """Empty files in rank directories; a key that is a string is the directory's name ("." is the root)."""
    for rank, names in ranks.items():
        folder = root / (f"rank_{rank}" if isinstance(rank, int) else rank)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()
    return str(root)


def chosen(root: str, step: int | None = None) -> dict[int, list[str]]:
    """Rank -> file names."""
    return {rank: [Path(p).name for p in paths] for rank, paths in find(root, step).ranks.items()}


# ------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("llama-1_9.ckpt", (1, 9)),
        ("llama_7b_rank_0-12_345.safetensors", (12, 345)),
        ("llama-1_9_breakpoint.ckpt", (1, 9)),
        ("a-b-3_4-5_6.ckpt", (5, 6)),
        ("llama-0001_0010.ckpt", (1, 10)),
        ("-1_2.ckpt", (1, 2)),
        ("llama.ckpt", None),
        ("llama-9.ckpt", None),
        ("llama_1_9.ckpt", None),
        ("llama-1_9.ckpt.tmp", None),
        ("llama-1_9.bin", None),
        ("llama-1_9_10.ckpt", None),
        ("llama--1_9x.ckpt", None),
    ],
)
def test_steps_of_names(name: str, step: tuple[int, int] | None) -> None:
    assert parse_step(name) == step


def test_mindspore_names_its_files_so(ms: ModuleType) -> None:
    """The names that ModelCheckpoint really gives (its config and callback, without training)."""
    source = Path(ms.train.callback._checkpoint.__file__).read_text(encoding="utf-8")
    assert 'cur_ckpoint_file = self._prefix + "-" + str(cb_params.cur_epoch_num) + "_" \\' in source


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_the_highest_step_is_found_by_number(tmp_path: Path, suffix: str) -> None:
    names = [f"net-1_{n}.{suffix}" for n in (9, 10, 2, 100)]
    root = make(tmp_path, {0: names, 1: names})
    assert chosen(root) == {0: [f"net-1_100.{suffix}"], 1: [f"net-1_100.{suffix}"]}
    assert chosen(root, 9) == {0: [f"net-1_9.{suffix}"], 1: [f"net-1_9.{suffix}"]}
    assert find(root).step == 100
    assert find(root, 10).step == 10


def test_epochs_count_before_steps(tmp_path: Path) -> None:
    """MindSpore counts steps within an epoch."""
    names = ["net-1_10.ckpt", "net-2_5.ckpt", "net-10_1.ckpt"]
    root = make(tmp_path, {0: names, 1: names})
    assert chosen(root) == {0: ["net-10_1.ckpt"], 1: ["net-10_1.ckpt"]}
    assert chosen(root, 5)[0] == ["net-2_5.ckpt"]


def test_a_step_of_two_epochs_cannot_be_told(tmp_path: Path) -> None:
    names = ["net-1_5.ckpt", "net-2_5.ckpt"]
    with pytest.raises(
        PlanError, match=r"which file of step 5 is meant; candidates: rank_0: net-1_5.ckpt, net-2_5.ckpt"
    ):
        find(make(tmp_path, {0: names, 1: names}), 5)


def test_the_highest_step_that_every_rank_has(tmp_path: Path) -> None:
    root = make(
        tmp_path,
        {
            0: ["r0-1_8.ckpt", "r0-1_9.ckpt", "r0-1_10.ckpt"],
            1: ["r1-1_8.ckpt", "r1-1_9.ckpt"],
            2: ["r2-1_9.ckpt", "r2-1_11.ckpt"],
        },
    )
    assert chosen(root) == {0: ["r0-1_9.ckpt"], 1: ["r1-1_9.ckpt"], 2: ["r2-1_9.ckpt"]}
    with pytest.raises(InputError, match=r"step 10 is not in every rank directory; found: rank_0: .*r0-1_10.ckpt"):
        find(root, 10)


def test_later_steps_of_some_ranks_are_said(tmp_path: Path) -> None:
    """A job of fewer ranks that saved into the same directory leaves the others' files behind."""
    names = ["llama-1_4.ckpt", "llama-1_8.ckpt"]
    found = find(make(tmp_path, {0: names, 1: names[:1], 2: names[:1]}))
    (note,) = found.notes
    assert note.startswith("ranks 0 have epoch 1 step 8, the others do not: epoch 1 step 4 is taken")
    assert find(str(tmp_path), 4).notes == ()  # asked for
    assert find(make(tmp_path / "even", {0: names, 1: names})).notes == ()


def test_ranks_without_a_common_step(tmp_path: Path) -> None:
    root = make(tmp_path, {0: ["r0-1_10.ckpt"], 1: ["r1-1_9.ckpt"]})
    with pytest.raises(InputError) as caught:
        find(root)
    assert "no step that every rank has; found: rank_0: r0-1_10.ckpt; rank_1: r1-1_9.ckpt" in str(caught.value)
    many = make(tmp_path / "many", {rank: [f"n-1_{rank}.ckpt"] for rank in range(20)})
    with pytest.raises(InputError, match=r"\.\.\. 12 more ranks"):
        find(many)


@pytest.mark.parametrize(
    ("ranks", "step"),
    [
        ({0: ["a.ckpt", "b.ckpt"], 1: ["a.ckpt"]}, None),
        ({0: ["a-1_1.ckpt", "b-1_1.ckpt"], 1: ["a-1_1.ckpt"]}, None),
        ({0: ["a-1_1.ckpt", "a-1_1.safetensors"], 1: ["a-1_1.ckpt"]}, None),
        ({0: ["a-1_1.ckpt", "a-1_1_breakpoint.ckpt"]}, None),
        ({0: ["a-1_1.ckpt", "final.ckpt"], 1: ["a-1_1.ckpt"]}, None),
        ({0: ["a.ckpt"], 1: ["a.ckpt"]}, 3),
        ({".": ["a.ckpt", "b.ckpt"]}, None),
        ({".": ["a.ckpt", "b.safetensors"]}, None),
        ({".": ["a.safetensors", "b.safetensors"]}, 3),
        ({".": ["a-1_1.ckpt", "a-1_1.safetensors"]}, None),
    ],
    ids=range(10),
)
def test_what_names_cannot_tell_is_asked_with_the_candidates(
    tmp_path: Path, ranks: Mapping[int | str, list[str]], step: int | None
) -> None:
    with pytest.raises(PlanError, match="cannot tell which file") as caught:
        find(make(tmp_path, ranks), step)
    assert all(name in str(caught.value) for name in next(iter(ranks.values())))
    assert "names that end in -{epoch}_{step}" in str(caught.value)


def test_one_file_for_each_rank_needs_no_step(tmp_path: Path) -> None:
    root = make(tmp_path, {0: ["whatever.ckpt"], 1: ["net-1_9.safetensors"], 10: ["x.ckpt"]})
    assert chosen(root) == {0: ["whatever.ckpt"], 1: ["net-1_9.safetensors"], 10: ["x.ckpt"]}
    assert find(root).step is None
    assert find(make(tmp_path / "b", {0: ["r0-2_7.ckpt"], 1: ["r1-2_7.ckpt"]})).step == 7


# ---------------------------------------------------------------------------------------------------- rank dirs


def test_ranks_are_numbers(tmp_path: Path) -> None:
    root = make(tmp_path, {rank: ["x.ckpt"] for rank in (10, 9, 2, 1)})
    assert list(find(root).ranks) == [1, 2, 9, 10]
    assert not find(root).complete


def test_two_names_of_one_rank(tmp_path: Path) -> None:
    root = make(tmp_path, {"rank_01": ["x.ckpt"], "rank_1": ["x.ckpt"]})
    with pytest.raises(PlanError, match="rank_01 and rank_1 are both rank 1: remove one"):
        find(root)
    assert list(find(make(tmp_path / "b", {"rank_00": ["x.ckpt"], "rank_01": ["x.ckpt"]})).ranks) == [0, 1]


def test_what_is_no_rank_directory(tmp_path: Path) -> None:
    """Files of that name, other names and hidden ones are passed over, as are files beside the directories."""
    others = ["rank_", "rank_a", "rank_-1", "rank_1x", "xrank_1", "Rank_2", "rank_3.bak", ".rank_4", "strategy"]
    root = make(tmp_path, {0: ["x.ckpt"], ".": ["beside.ckpt", "log.txt"], **{name: ["x.ckpt"] for name in others}})
    (tmp_path / "rank_7").touch()
    assert chosen(root) == {0: ["x.ckpt"]}


def test_what_is_no_checkpoint_file(tmp_path: Path) -> None:
    """Half-written, hidden and other files, and directories, are passed over."""
    names = [".hidden.ckpt", "a.tmp", "x.ckpt.tmp", "x.CKPT", "meta.json", "graph.meta", "x.safetensors.index.json"]
    root = make(tmp_path, {0: ["x.ckpt", *names], "rank_0/dir.ckpt": []})
    assert chosen(root) == {0: ["x.ckpt"]}


def test_empty_rank_directories_are_noted(tmp_path: Path) -> None:
    found = find(make(tmp_path, {0: ["x.ckpt"], 1: [], 2: ["notes.txt"], 3: [".x.ckpt"], 4: ["x.ckpt"]}))
    assert list(found.ranks) == [0, 4]
    assert found.notes == ("no checkpoint file in the directories of ranks 1-3",)
    with pytest.raises(InputError, match=r"no .ckpt or .safetensors file in any rank directory"):
        find(make(tmp_path / "b", {0: [], 1: []}))


def test_links_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", {0: ["x.ckpt"]})
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "rank_0").symlink_to(tmp_path / "elsewhere" / "rank_0")
    (tmp_path / "src" / "rank_1").mkdir()
    (tmp_path / "src" / "rank_1" / "y.ckpt").symlink_to(tmp_path / "elsewhere" / "rank_0" / "x.ckpt")
    (tmp_path / "src" / "rank_1" / "broken.ckpt").symlink_to(tmp_path / "nowhere")
    assert chosen(str(tmp_path / "src")) == {0: ["x.ckpt"], 1: ["y.ckpt"]}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found: check the path"):
        find(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no checkpoint: expected rank_0/"):
        find(str(tmp_path))
    assert not detect(str(tmp_path))
    assert not detect(str(tmp_path / "nowhere"))
    (tmp_path / "readme.txt").touch()
    assert not detect(str(tmp_path))
    assert not detect(str(tmp_path / "readme.txt"))
    assert detect(make(tmp_path, {0: []}))
    assert detect(make(tmp_path / "b", {".": ["x.safetensors"]}))
    assert detect(str(tmp_path / "b" / "x.safetensors"))


# ----------------------------------------------------------------------------------------------------- complete


def test_one_file(tmp_path: Path) -> None:
    root = make(tmp_path, {".": ["net-1_9.ckpt", "other.ckpt"]})
    found = find(f"{root}/net-1_9.ckpt")
    assert (dict(found.ranks), found.complete, found.step) == ({0: (f"{root}/net-1_9.ckpt",)}, True, 9)
    assert find(f"{root}/net-1_9.ckpt", 9) == found
    for name in ("net-1_9.ckpt", "other.ckpt"):
        with pytest.raises(InputError, match="does not say step 8: drop --step"):
            find(f"{root}/{name}", 8)


def test_a_directory_of_complete_files_by_step(tmp_path: Path) -> None:
    for suffix in ("ckpt", "safetensors"):
        root = make(tmp_path / suffix, {".": [f"net-1_9.{suffix}", f"net-1_10.{suffix}"]})
        assert chosen(root) == {0: [f"net-1_10.{suffix}"]}
        assert chosen(root, 9) == {0: [f"net-1_9.{suffix}"]}
        assert find(root).complete
        with pytest.raises(InputError, match="step 3 is not in"):
            find(root, 3)


def test_several_safetensors_without_steps_are_parts(tmp_path: Path) -> None:
    names = ["hyper_param.safetensors", "part0.safetensors", "part1.safetensors"]
    found = find(make(tmp_path, {".": [*names, "notes.txt", ".part2.safetensors"]}))
    assert [Path(p).name for p in found.ranks[0]] == names
    assert (found.complete, found.step, found.weight_map) == (True, None, None)


# -------------------------------------------------------------------------------------------------------- maps


def unified(ms: ModuleType, root: Path, content: Any) -> Path:
    """Two parts and a file of states, with any name map."""
    arrays = {"a": np.arange(4, dtype=np.float32), "b": np.arange(6, dtype=np.float16).reshape(2, 3)}
    support.save_file(ms, {"a": arrays["a"]}, root / "part0.safetensors")
    support.save_file(ms, {"b": arrays["b"]}, root / "part1.safetensors")
    support.save_file(ms, {"global_step": np.array(7, np.int32)}, root / "hyper_param.safetensors")
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "param_name_map.json").write_text(text, encoding="utf-8")
    return root


MAP = {"a": "part0.safetensors", "b": "part1.safetensors"}
FORMS = [{"metadata": {"total_size": 28}, "weight_map": MAP}, {"weight_map": MAP}, MAP]


@pytest.mark.parametrize("content", FORMS, ids=["new", "without metadata", "old"])
def test_both_forms_of_the_name_map(ms: ModuleType, tmp_path: Path, content: Any) -> None:
    root = unified(ms, tmp_path, content)
    found = find(str(root))
    assert found.weight_map == MAP
    assert [Path(p).name for p in found.ranks[0]] == [
        "hyper_param.safetensors",
        "part0.safetensors",
        "part1.safetensors",
    ]
    source = open_source(str(root))
    assert {name: p.shape for name, p in source.params.items()} == {"a": (4,), "b": (2, 3), "global_step": ()}
    with pytest.raises(InputError, match="describes one checkpoint, of no known step: drop --step 3"):
        find(str(root), 3)


def test_a_map_that_names_a_missing_file(ms: ModuleType, tmp_path: Path) -> None:
    root = unified(ms, tmp_path, {"weight_map": {**MAP, "c": "part2.safetensors"}})
    with pytest.raises(InputError, match=r"param_name_map.json names part2.safetensors, which is not there"):
        find(str(root))
    (root / "param_name_map.json").write_text(json.dumps({**MAP, "c": "notes.txt"}))
    (root / "notes.txt").touch()
    with pytest.raises(InputError, match=r"names notes\.txt"):
        find(str(root))


def test_a_map_that_names_a_tensor_that_the_file_has_not(ms: ModuleType, tmp_path: Path) -> None:
    root = unified(ms, tmp_path, {"weight_map": {"a": "part1.safetensors", "b": "part1.safetensors"}})
    with pytest.raises(InputError, match=r"says part1.safetensors holds a; the file does not"):
        open_source(str(root))


@pytest.mark.parametrize(
    "name",
    ["../part0.safetensors", "/etc/passwd", "sub/part0.safetensors", "..", ".", "", "./part0.safetensors", "part0/"],
)
def test_names_that_leave_the_directory_are_refused(ms: ModuleType, tmp_path: Path, name: str) -> None:
    make(tmp_path / "x", {"sub": ["part0.safetensors"]})
    (tmp_path / "part0.safetensors").touch()
    root = unified(ms, tmp_path / "x", {"weight_map": {**MAP, "a": name}})
    with pytest.raises(InputError, match="leaves the directory: refused"):
        find(str(root))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"a"', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}',
     '{"metadata": {}}', "[" * 100_000, '{"a":' * 100_000],
    ids=range(11),
)  # fmt: skip
def test_maps_that_are_none(ms: ModuleType, tmp_path: Path, text: str) -> None:
    root = unified(ms, tmp_path, text)
    with pytest.raises(InputError, match=r"param_name_map.json: (not JSON|expected a map)"):
        find(str(root))


def test_a_map_that_is_not_utf_8(ms: ModuleType, tmp_path: Path) -> None:
    root = unified(ms, tmp_path, MAP)
    (root / mindspore_dir.PARAM_NAME_MAP).write_bytes(b'{"\xff": "part0.safetensors"}')
    with pytest.raises(InputError, match="not JSON"):
        find(str(root))


def test_one_tensor_in_two_complete_files(ms: ModuleType, tmp_path: Path) -> None:
    for name in ("part0", "part1"):
        support.save_file(ms, {"a": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(PlanError, match=r"'a' is in .*part0.safetensors and in .*part1.safetensors"):
        open_source(str(tmp_path))


def test_the_real_unified_directory_is_read(
    ms: ModuleType, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What mindspore.unified_safetensors writes.  It waits for ever while half of the host's memory is in use."""
    memory = SimpleNamespace(percent=0)
    monkeypatch.setattr(ms.parallel.transform_safetensors.psutil, "virtual_memory", lambda: memory)
    root = golden / "mindspore"
    ms.unified_safetensors(
        str(root / "src_safetensors" / "B"), str(root / "strategy" / "B_merged.ckpt"), str(tmp_path / "u")
    )
    found = find(str(tmp_path / "u"))
    source = open_source(str(tmp_path / "u"))
    (whole,) = support.load_ranks(ms, root / "src_safetensors" / "C").values()
    assert found.weight_map is not None
    assert found.weight_map.keys() <= source.params.keys()
    for name in found.weight_map:
        assert source.params[name].shape == whole[name].shape
