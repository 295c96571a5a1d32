"""Checkpoint 2.0 and unified directories as input, damaged: one message with the file, an exit code, no output."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import support
from tests.hostile import driver
from tests.hostile.driver import Case, assert_done, assert_refused, make_case, run, untouched

FIRST, LAST = "iteration_00000007", "iteration_00000012"
TRACKER, METADATA, COMMON = "latest_checkpointed_iteration.txt", "metadata.json", "common.json"
NAME_MAP = "param_name_map.json"
LAYOUT = (2, 2, 2, 2)
"""dp2 mp2 pp2 with optimizer shard: matrices lie once, vectors on each rank of their stage."""


class Good:
    """What is converted, and the two directories made of it: iterations 7 and 12, and parts."""

    def __init__(self, root: Path) -> None:
        self.old = make_case(root / "old", "safetensors", (1, 2, 2), LAYOUT)
        self.new = driver.copy(self.old, root / "new")
        whole = {name: (a + 1).astype(a.dtype) for name, a in self.new.model.whole().items()}
        stages = self.new.model.stages(1, 2, 2)
        for rank in range(4):
            self.new.file(rank).unlink()
            path = self.new.src / f"rank_{rank}" / "net-2_12.safetensors"
            driver.write_file(path, support.slice_rank(whole, stages, rank))
        self.checkpoint2, self.unified = root / "checkpoint2", root / "unified"
        for case in (self.old, self.new):
            assert_done(run(case.args("--checkpoint-2", "--overwrite")))
        shutil.move(self.new.dst, self.checkpoint2)
        shutil.move(self.old.dst / FIRST, self.checkpoint2)
        words = ["convert", self.new.src, self.unified, "--to", "mindspore", "--unified"]
        assert_done(run([str(w) for w in (*words, "--src-strategy", self.new.strategy)]))
        for made in (self.checkpoint2, self.unified):
            (made / "transform_ckpt.json").unlink()  # as the real writers leave it


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def root(good: Good, tmp_path: Path) -> Path:
    """A Checkpoint 2.0 directory to be damaged."""
    return Path(shutil.copytree(good.checkpoint2, tmp_path / "src"))


@pytest.fixture
def last(root: Path) -> Path:
    """The iteration that the tracker names."""
    return root / LAST


@pytest.fixture
def unified(good: Good, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good.unified, tmp_path / "src"))


def words(src: Path, *more: object) -> list[str]:
    return ["convert", str(src), str(src.parent / "out"), "--to", "mindspore", *map(str, more)]


def refused(src: Path, code: int, *said: object, more: tuple[object, ...] = (), inside: Path | None = None) -> None:
    """Refused by convert and plan, with nothing written and an old output kept."""
    out = src.parent / "out"
    if not out.exists():
        driver.old_output(out)
    with untouched(out, inside or src):
        assert_refused(run(words(src, "--overwrite", *more)), code, *said)
    assert driver.litter(src.parent, "src", "out") == []
    assert_refused(run(["plan", str(src), str(src.parent / "plan"), "--to", "mindspore", *map(str, more)]), code, *said)


def accepted(src: Path, against: Case, *more: object) -> str:
    """Converted, and equal to what the checkpoint was made of; returns the notes."""
    out = src.parent / "out"
    found = run(words(src, "--dst-strategy", against.other, "--verify", "--overwrite", *more))
    assert_done(found)
    stages = against.model.stages(*LAYOUT)
    assert len(list(out.glob("rank_*"))) == support.world_size(stages)
    names = ["diff", out, against.src, "--a-strategy", against.other, "--b-strategy", against.strategy]
    differing = run([str(w) for w in names])
    lines = [line for line in differing.out.splitlines() if "model." in line]
    assert lines == [], "only numbers of common.json may have another type"
    return found.err


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.safetensors"))


def drop(path: Path, *names: str) -> None:
    """A safetensors file without some of its tensors, otherwise sound."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header.pop("__metadata__", {})
    body, kept = b"", {}
    for name, entry in header.items():
        if name not in names:
            start, stop = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [len(body), len(body) + stop - start]}
            body += data[end + start : end + stop]
    assert len(kept) == len(header) - len(names)
    driver.raw_safetensors(path, {"__metadata__": metadata, **kept}, body)


def held(path: Path) -> list[str]:
    data = path.read_bytes()
    return [n for n in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if n != "__metadata__"]


# ------------------------------------------------------------------------------------------------------- undamaged


def test_both_iterations(good: Good, root: Path) -> None:
    accepted(root, good.new)
    accepted(root, good.new, "--step", 12)
    accepted(root, good.old, "--step", 7)
    accepted_iteration = root / FIRST
    found = run(words(root, "--step", 7, "--overwrite", "--json"))
    assert_done(found)
    tree = driver.tree(root.parent / "out" / "rank_0")
    assert_done(run(["convert", str(accepted_iteration), str(root.parent / "one"), "--to", "mindspore"]))
    assert driver.tree(root.parent / "one" / "rank_0") == tree


# ---------------------------------------------------------------------------------------------- tracker and --step


@pytest.mark.parametrize("text", ["", "x", "-1", "12.0", "9" * 30, "٣", "12 7", "release"])
def test_wrong_tracker(good: Good, root: Path, text: str) -> None:
    (root / TRACKER).write_text(text)
    refused(root, 3, root / TRACKER, "is not an iteration number", "--step")


def test_the_tracker_names_what_is_not_there(good: Good, root: Path) -> None:
    (root / TRACKER).write_text("8")
    refused(root, 3, root, "iteration 8", "found: 7, 12", "--step")
    accepted(root, good.old, "--step", 7)


def test_the_tracker_names_an_empty_iteration(good: Good, root: Path) -> None:
    (root / "iteration_00000013").mkdir()
    (root / TRACKER).write_text("13")
    refused(root, 3, root, "iteration_00000013")


def test_no_tracker(good: Good, root: Path) -> None:
    (root / TRACKER).unlink()
    assert "took the highest iteration" in accepted(root, good.new)
    accepted(root, good.old, "--step", 7)
    (root / TRACKER).mkdir()  # a directory of that name is none, either
    assert "took the highest iteration" in accepted(root, good.new)


@pytest.mark.parametrize("step", [0, 8, 99, -1, 10**30])
def test_a_step_that_is_not_there(root: Path, step: int) -> None:
    refused(root, 3, f"iteration {step}", "found: 7, 12", more=("--step", step))


def test_a_step_of_an_iteration_directory(root: Path) -> None:
    found = run(words(root / FIRST, "--step", 12))
    assert_refused(found, 3, root / FIRST, "asked for step 12", "7")


def test_an_older_save_may_be_damaged(good: Good, root: Path) -> None:
    shutil.rmtree(root / FIRST)
    (root / FIRST).mkdir()
    accepted(root, good.new)


def test_rank_directories_beside_iterations(good: Good, root: Path) -> None:
    """A job that changed use_legacy_format: neither is taken in silence."""
    for rank in range(4):
        shutil.copytree(good.old.src / f"rank_{rank}", root / f"rank_{rank}")
    refused(root, 4, root, "rank directories and Checkpoint 2.0 iterations")
    for verb in ("inspect", "verify"):
        found = run([verb, str(root)])
        assert "Traceback" not in found.err
    accepted(root, good.old, "--src-strategy", good.old.strategy)
    accepted(root / LAST, good.new)
    shutil.rmtree(root / "out")
    for rank in (1, 2, 3):
        shutil.rmtree(root / f"rank_{rank}")
    shutil.rmtree(root.parent / "out")
    refused(root, 4, root, "rank directories and Checkpoint 2.0 iterations")


def test_a_tracker_beside_rank_directories_alone(good: Good, root: Path) -> None:
    """Megatron's tracker has the same name; without an iteration there is one checkpoint here."""
    for name in (FIRST, LAST):
        shutil.rmtree(root / name)
    for rank in range(4):
        shutil.copytree(good.old.src / f"rank_{rank}", root / f"rank_{rank}")
    accepted(root, good.old, "--src-strategy", good.old.strategy)


def test_a_source_strategy_is_refused(good: Good, root: Path) -> None:
    refused(root, 3, root, "describes its own layout", more=("--src-strategy", good.new.strategy))


# ---------------------------------------------------------------------------------------------------- tensor files


def test_each_file_missing_truncated_and_empty(root: Path, last: Path) -> None:
    for path in tensor_files(last):
        data = path.read_bytes()
        header_nbytes = int.from_bytes(data[:8], "little")
        for cut in (0, 4, 8, 8 + header_nbytes // 2, 8 + header_nbytes, len(data) - 1):
            path.write_bytes(data[:cut])
            assert_refused(run(words(root)), 3, path)
        path.write_bytes(data + b"more")
        assert_refused(run(words(root)), 3, path)
        path.unlink()
        assert_refused(run(words(root)), 3, last, path.name, "is not there")
        path.write_bytes(data)
    assert driver.litter(root.parent, "src") == []


def test_a_file_that_is_no_file(root: Path, last: Path) -> None:
    path = tensor_files(last)[0]
    path.unlink()
    links = [lambda to=to: path.symlink_to(to) for to in ("/dev/zero", "no")]
    for make in (path.mkdir, lambda: os.mkfifo(path), *links):
        make()
        found = run(words(root))
        assert_refused(found, 3, path)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_files_of_two_iterations_mixed(good: Good, root: Path, last: Path) -> None:
    """Sound files of the same names and shapes: only the digests of a manifest can tell, and verify does."""
    out = root.parent / "again"
    words_out = ["convert", str(root), str(out), "--to", "mindspore", "--checkpoint-2"]
    assert_done(run([*words_out, "--dst-strategy", str(good.new.other)]))
    path = tensor_files(last)[3]
    shutil.copy(root / FIRST / path.name, out / LAST / path.name)
    assert_refused(run(["verify", str(out)]), 6, path.name)


def test_swapped_files(root: Path, last: Path) -> None:
    one, two = tensor_files(last)[0], tensor_files(last)[7]
    data = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(data)
    refused(root, 3, last, "expected slice", "save the checkpoint again")


def test_a_tensor_missing_in_one_file(root: Path, last: Path) -> None:
    path = next(p for p in tensor_files(last) if "model.layers.0.wq.weight" in held(p))
    drop(path, "model.layers.0.wq.weight")
    refused(root, 3, path.name, "model.layers.0.wq.weight", "save the checkpoint again")


def test_a_tensor_missing_everywhere(root: Path, last: Path) -> None:
    for path in tensor_files(last):
        if "adam_v.model.norm_out.weight" in held(path):
            drop(path, "adam_v.model.norm_out.weight")
    refused(root, 3, last, "adam_v.model.norm_out.weight", "which no file holds")


def test_a_copy_missing_where_another_is(good: Good, root: Path, last: Path) -> None:
    name = "model.layers.0.norm.weight"
    holder = next(p for p in tensor_files(last) if name in held(p))
    other = next(
        p for p in tensor_files(last) if p.name.startswith("model-") and p.stat().st_ino != holder.stat().st_ino
    )
    rank = int(other.name[6:13])
    key = f"('{name}', (0,))"
    edit(last / METADATA, lambda m: m["storage_data"][key].append({"file_name": other.name, "storage_rank": rank}))
    assert "not every listed copy of model.layers.0.norm.weight is stored" in accepted(root, good.new)
    drop(holder, name)
    shutil.rmtree(root.parent / "out")
    refused(root, 3, last, name, "which no file holds")


@pytest.mark.parametrize("fault", ["shape", "dtype", "name"])
def test_a_tensor_that_is_another(root: Path, last: Path, fault: str) -> None:
    name = "model.layers.0.w2.weight"
    path = next(p for p in tensor_files(last) if name in held(p))
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if fault == "shape":
        header[name]["shape"].reverse()
    elif fault == "dtype":
        header[name]["dtype"] = "I32"
    else:
        header["model.layers.0.other.weight"] = header.pop(name)
    driver.raw_safetensors(path, header, data[end:])
    refused(root, 3, path.name, name)


def test_leftover_files_are_noted(good: Good, root: Path, last: Path) -> None:
    shutil.copy(tensor_files(last)[0], last / "model-0000009-0000010.safetensors")
    (last / "readme.txt").write_text("x")
    assert "model-0000009-0000010.safetensors is not named" in accepted(root, good.new)


# -------------------------------------------------------------------------------------------- metadata and common


def test_json_cut_anywhere(root: Path, last: Path) -> None:
    for name in (METADATA, COMMON):
        data = (last / name).read_bytes()
        for cut in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1):
            (last / name).write_bytes(data[:cut])
            assert_refused(run(words(root)), 3, last / name, "not JSON")
        (last / name).write_bytes(data.replace(b"{", b"\xff", 1))
        assert_refused(run(words(root)), 3, last / name)
        for text in ("[]", "null", "3", '"x"', "[" * 100_000, '{"a":1,"a":2}'):
            (last / name).write_text(text)
            assert_refused(run(words(root)), 3, last / name)
        (last / name).write_bytes(data)
    assert driver.litter(root.parent, "src") == []


def test_no_metadata(root: Path, last: Path) -> None:
    (last / METADATA).unlink()
    refused(root, 3, last, f"there is no {METADATA}")


def test_no_common_is_noted(good: Good, root: Path, last: Path) -> None:
    (last / COMMON).unlink()
    assert f"no {COMMON}" in accepted(root, good.new)


def test_metadata_of_the_other_iteration_and_of_another_model(root: Path, last: Path) -> None:
    edit(last / METADATA, lambda m: m["state_dict_metadata"].pop("model.embed.weight"))
    found = run(words(root))
    assert "Traceback" not in found.err
    assert (found.code, "model.embed.weight" in found.err) == (3, True), "slices of which nobody says what they are"


ENTRY = "model.layers.0.wq.weight"


def first_stored(m: Any) -> Any:
    return m["storage_data"][f"('{ENTRY}', (0,))"][0]


ENTRY_CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "other shape": (lambda m: m["state_dict_metadata"][ENTRY].update(global_shape=[32, 16]), ENTRY),
    "huge shape": (lambda m: m["state_dict_metadata"][ENTRY].update(global_shape=[2**62, 2**62]), ENTRY),
    "negative": (lambda m: m["state_dict_metadata"][ENTRY].update(global_shape=[-16, 16]), ENTRY),
    "other cuts": (lambda m: m["state_dict_metadata"][ENTRY].update(axis_fragmentations=[2, 2]), ENTRY),
    "huge cuts": (lambda m: m["state_dict_metadata"][ENTRY].update(axis_fragmentations=[2**62, 1]), ENTRY),
    "a chunk less": (lambda m: m["state_dict_metadata"][ENTRY]["chunk"].pop(), ENTRY),
    "other type": (lambda m: m["state_dict_metadata"][ENTRY]["properties"].update(dtype="Int32"), ENTRY),
    "no storage": (lambda m: m["storage_data"].pop(f"('{ENTRY}', (0,))"), "storage_data has no"),
    "no list": (lambda m: m.update(storage_data=[]), "storage_data"),
    "other model": (lambda m: m["state_dict_metadata"].update(ghost=m["state_dict_metadata"][ENTRY]), "ghost"),
    "parent": (lambda m: first_stored(m).update(file_name="../x.safetensors"), "leaves the directory"),
    "absolute": (lambda m: first_stored(m).update(file_name="/etc/x.safetensors"), "leaves the directory"),
    "below": (lambda m: first_stored(m).update(file_name="a/x.safetensors"), "leaves the directory"),
    "nul": (lambda m: first_stored(m).update(file_name="a\0.safetensors"), "leaves the directory"),
    "half a character": (lambda m: first_stored(m).update(file_name="\ud800.safetensors"), "not there"),
    "long": (lambda m: first_stored(m).update(file_name="x" * 5000 + ".safetensors"), "not there"),
    "no tensors": (lambda m: first_stored(m).update(file_name=COMMON), "expected the name of a .safetensors"),
    "rank": (lambda m: first_stored(m).update(storage_rank="0"), "expected a rank"),
    "huge rank": (lambda m: first_stored(m).update(storage_rank=2**64), "expected a rank"),
}


@pytest.mark.parametrize(("change", "word"), ENTRY_CHANGES.values(), ids=list(ENTRY_CHANGES))
def test_lying_metadata(root: Path, last: Path, change: Callable[[Any], object], word: str) -> None:
    edit(last / METADATA, change)
    out = root.parent / "out"
    driver.old_output(out)
    with untouched(out, root):
        found = run(words(root, "--overwrite"))
        assert_refused(found, found.code, word)
    assert found.code in (3, 4)


@pytest.mark.parametrize("value", [[1], {"a": 1}, 2**70, -(2**70), 1e400])
@pytest.mark.parametrize("name", ["global_step", "step_num", "loss_scale"])
def test_numbers_that_are_none(root: Path, last: Path, name: str, value: Any) -> None:
    edit(last / COMMON, lambda c: c.update({name: value}))
    found = run(words(root))
    assert "Traceback" not in found.err
    fits_float = name == "loss_scale" and isinstance(value, (int, float))
    assert found.code == 3 or (fits_float or value == float("inf")), found.err
    if found.code:
        assert_refused(found, 3, last / COMMON, name)


def test_every_flipped_bit_of_a_header_is_found_or_harmless(good: Good, root: Path, last: Path) -> None:
    """No traceback and no other exit code, whatever byte of a tensor file's header changes."""
    path = tensor_files(last)[2]
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(3)
    for at in sorted({*range(10), *rng.choice(end, 60, replace=False).tolist()}):
        driver.flip(path, at, 1 << int(rng.integers(8)))
        found = run(["plan", str(root), str(root.parent / "plan"), "--to", "mindspore"])
        assert "Traceback" not in found.err
        assert found.code in (0, 3, 4), found.err
        path.write_bytes(data)


# --------------------------------------------------------------------------------------------------------- unified


def test_unified_is_read(good: Good, unified: Path) -> None:
    accepted(unified, good.new)


def test_unified_parts_missing_truncated_and_empty(unified: Path) -> None:
    for path in sorted(unified.glob("*.safetensors")):
        data = path.read_bytes()
        for cut in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            assert_refused(run(words(unified, "--overwrite")), 3, path)
        path.unlink()
        found = run(words(unified, "--overwrite"))
        if path.name.startswith("part"):
            assert_refused(found, 3, unified, path.name, "which is not there")
        path.write_bytes(data)
    assert driver.litter(unified.parent, "src", "out") == []


def test_a_unified_tensor_missing(unified: Path) -> None:
    drop(unified / "part0.safetensors", "model.layers.1.w1.weight")
    refused(unified, 3, unified, "part0.safetensors", "model.layers.1.w1.weight", "fetch both again")


def test_a_unified_tensor_twice(unified: Path) -> None:
    shutil.copy(unified / "part0.safetensors", unified / "part1.safetensors")
    refused(unified, 4, "part0.safetensors", "part1.safetensors")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("../part0.safetensors", "leaves the directory"),
        ("/part0.safetensors", "leaves the directory"),
        ("", "leaves the directory"),
        (".", "leaves the directory"),
        ("part9.safetensors", "part9.safetensors, which is not there"),
        ("hyper_param.safetensors", "hyper_param.safetensors holds"),
        (7, "expected a map"),
        (None, "expected a map"),
    ],
)
def test_wrong_name_map(unified: Path, value: Any, said: str) -> None:
    edit(unified / NAME_MAP, lambda c: c["weight_map"].update({"model.embed.weight": value}))
    refused(unified, 3, unified, said)


def test_name_map_cut_anywhere(unified: Path) -> None:
    data = (unified / NAME_MAP).read_bytes()
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        (unified / NAME_MAP).write_bytes(data[:cut])
        assert_refused(run(words(unified)), 3, unified / NAME_MAP, "not JSON")


def test_unified_without_its_map(good: Good, unified: Path) -> None:
    (unified / NAME_MAP).unlink()
    accepted(unified, good.new)


def test_unified_with_a_step_and_with_a_strategy(good: Good, unified: Path) -> None:
    refused(unified, 3, NAME_MAP, "--step 7", more=("--step", 7))
    refused(unified, 3, unified, "complete weights", "is for 4 ranks", more=("--src-strategy", good.new.strategy))


def test_unified_beside_rank_directories(good: Good, unified: Path) -> None:
    """mindspore.unified_safetensors into the directory of the source: rank directories win with their strategy only."""
    case = replace(good.new)
    for rank in range(4):
        shutil.copytree(case.src / f"rank_{rank}", unified / f"rank_{rank}")
    accepted(unified, case, "--src-strategy", case.strategy)
    shutil.rmtree(unified.parent / "out")
    refused(unified, 3, "ranks 0-3", "--src-strategy")
