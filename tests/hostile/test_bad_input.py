"""Sources and strategies that are missing, truncated, damaged, of another run, or hostile: refused, never half done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transform_ckpt
from tests import support
from tests.hostile import driver
from tests.hostile.driver import Case, Model, assert_done, assert_refused, make_case, run, untouched
from transform_ckpt.errors import InputError, PlanError
from transform_ckpt.formats import ckpt, read_header, safetensors
from transform_ckpt.tensors import TensorSpec

LAYOUTS = {"opt": (2, 1, 4, 2), "dp": (2, 1, 4), "mp": (1, 2, 2), "pp": (1, 1, 4)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A good checkpoint of each layout and format, written once; to be copied before it is damaged."""
    made: dict[tuple[str, str, bool, bool], Case] = {}

    def get(layout: str = "opt", fmt: str = "ckpt", *, optimizer: bool = True, states: bool = True) -> Case:
        key = (layout, fmt, optimizer, states)
        if key not in made:
            model = Model(optimizer=optimizer, states=states)
            made[key] = make_case(tmp_path_factory.mktemp("good"), fmt, LAYOUTS[layout], model=model)
        return made[key]

    return get


@pytest.fixture
def fresh(cases: Callable[..., Case], tmp_path: Path) -> Callable[..., Case]:
    """A copy of a good checkpoint."""
    return lambda *args, **kwargs: driver.copy(cases(*args, **kwargs), tmp_path / "case")


def refused(case: Case, args: list[str], code: int, *words: object) -> None:
    """Refused, and an old output that --overwrite would have replaced is still there, with nothing beside it."""
    if not case.dst.exists():
        driver.old_output(case.dst)
    with untouched(case.dst, case.src):
        assert_refused(run([*args, "--overwrite"]), code, *words)
    assert not Path(f"{case.dst}.partial").exists()


# ---------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    ("layout", "ranks", "words"),
    [
        ("opt", [0], ["rank directories 0 are absent", "model.", "files of ranks 1 hold only a part"]),
        ("opt", [7], ["rank directories 7 are absent", "model.layers.3.", "files of ranks 6 hold only a part"]),
        ("opt", [6, 7], ["no file holds", "lm_head", "files of ranks 6-7"]),
        ("dp", [6, 7], ["no file holds", "lm_head", "files of ranks 6-7"]),
        ("dp", [0, 1], ["no file holds", "embed", "files of ranks 0-1"]),
        ("mp", [3], ["rank directories 3 are absent", "model.layers.2.", "files of ranks 2 hold only a part"]),
        ("pp", [3], ["no file holds", "files of ranks 3"]),
    ],
)
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_ranks_that_nobody_replaces(
    fresh: Callable[..., Case], layout: str, fmt: str, ranks: list[int], words: list[str], how: str
) -> None:
    case = fresh(layout, fmt)
    for rank in ranks:
        shutil.rmtree(case.src / f"rank_{rank}")
        if how == "empty":
            (case.src / f"rank_{rank}").mkdir()
    refused(case, case.args(), 4, *words)


def test_a_rank_whose_slices_others_hold_may_be_absent(fresh: Callable[..., Case]) -> None:
    case = fresh("dp")
    shutil.rmtree(case.src / "rank_0")
    found = run(case.args("--verify"))
    assert_done(found)
    assert "rank directories 0 are absent" in found.err


@pytest.mark.parametrize("content", ["training state", "weights"])
@pytest.mark.parametrize(("layout", "rank"), [("opt", 1), ("mp", 3), ("pp", 0), ("pp", 3)])
def test_a_ckpt_cut_anywhere(fresh: Callable[..., Case], layout: str, rank: int, content: str) -> None:
    """At every record's end, in heads and in data: never a success with fewer tensors."""
    case = fresh(layout, optimizer=content == "training state")
    path, whole = case.file(rank), tree_of(case)
    data = path.read_bytes()
    ends = [t.extents[-1].offset_bytes + t.extents[-1].nbytes for t in read_header(str(path)).tensors.values()]
    for end in ends[2:-1]:  # without the states, the first two records, nothing but the file would be smaller
        path.write_bytes(data[:end])
        found = run(case.args())
        if found.code == 0:  # what is gone, another rank holds too
            assert tensors_of(case.dst) == whole
            shutil.rmtree(case.dst)
        else:
            assert_refused(found, 4, "missing or truncated")
    for end in [*range(1, 30), *(e + d for e in ends[:-1:7] for d in (1, 5, 40)), len(data) - 1]:
        if end not in ends:
            path.write_bytes(data[:end])
            assert_refused(run(case.args()), 3, path, "truncated", "fetch or save it again")
    assert not case.dst.exists()
    assert driver.litter(case.root, "src", case.strategy.name, case.other.name) == []


def test_a_safetensors_cut_anywhere(fresh: Callable[..., Case]) -> None:
    case = fresh("mp", "safetensors")
    path = case.file(2)
    data = path.read_bytes()
    for end in [*range(12), 100, 2000, len(data) // 2, len(data) - 8, len(data) - 1]:
        path.write_bytes(data[:end])
        assert_refused(run(case.args()), 3, path, "fetch or save it again")
    path.write_bytes(data + b"\0")
    refused(case, case.args(), 3, path, "behind the last tensor")


def test_states_alone_are_not_a_checkpoint(fresh: Callable[..., Case]) -> None:
    case = fresh("pp", optimizer=False)
    for rank in range(4):
        driver.write_file(case.file(rank), {"global_step": np.array([1], np.int64)})
    refused(case, case.args(), 3, case.src, "no file holds any tensor of", case.strategy)


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
def test_a_file_without_tensors(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / "src" / "rank_0" / f"net.{fmt}"
    path.parent.mkdir(parents=True)
    if fmt == "ckpt":
        path.write_bytes(b"crc_num" + bytes(10))
    else:
        driver.raw_safetensors(path, {})
    found = run(["convert", str(tmp_path / "src"), str(tmp_path / "out"), "--to", "mindspore"])
    assert_refused(found, 3, tmp_path / "src", "no tensor")


# ---------------------------------------------------------------------------------------------- bit damage


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
def test_no_damage_of_a_header_passes(fresh: Callable[..., Case], fmt: str) -> None:
    """Every byte that is no tensor's, one after the other (sampled): refused, or nothing that anyone would see."""
    case = fresh("mp", fmt, states=False)
    path = case.file(1)
    whole = tree_of(case)
    header = read_header(str(path))
    data = {
        i for t in header.tensors.values() for e in t.extents for i in range(e.offset_bytes, e.offset_bytes + e.nbytes)
    }
    heads = sorted(set(range(path.stat().st_size)) - data)
    for offset in heads[:: max(1, len(heads) // 120)]:
        driver.flip(path, offset, 0x04)
        found = run(case.args())
        driver.flip(path, offset, 0x04)
        assert "Traceback" not in found.err
        if found.code == 0:
            kept = tensors_of(case.dst)
            assert {key: kept.get(key) for key in whole} == whole, f"byte {offset} of {path.name}"
            assert all(name in found.err for _, name in kept.keys() - whole.keys()), f"byte {offset} of {path.name}"
            shutil.rmtree(case.dst)
        else:
            assert found.code in (3, 4)
            assert str(case.src) in found.err or str(case.strategy) in found.err or "rank" in found.err


Tensors = dict[tuple[str, str], bytes]


def tree_of(case: Case) -> Tensors:
    """The tensors that an undamaged source gives."""
    assert_done(run(case.args()))
    found = tensors_of(case.dst)
    shutil.rmtree(case.dst)
    return found


def tensors_of(folder: Path) -> Tensors:
    """(file, tensor) -> bytes of every tensor file below."""
    found: Tensors = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".ckpt", ".safetensors")):
        data = path.read_bytes()
        for name, tensor in read_header(str(path)).tensors.items():
            parts = [data[e.offset_bytes : e.offset_bytes + e.nbytes] for e in tensor.extents]
            found[str(path.relative_to(folder)), name] = b"".join(parts)
    return found


def test_damage_under_a_checksum(tmp_path: Path) -> None:
    case = make_case(tmp_path, crc=True)
    assert_done(run(case.args()))
    shutil.rmtree(case.dst)
    path = case.file(5)
    for offset in (-20, -600, path.stat().st_size // 2, -1):
        driver.flip(path, offset)
        refused(case, case.args(), 3, path, "crc_check value", "fetch or save it again")
        driver.flip(path, offset)


def test_verify_compares_copies_that_stages_cut_in_different_ways(tmp_path: Path) -> None:
    """A tied parameter: halves on the first stage, whole on each rank of the second."""
    layouts = [support.Layout((2,), (0, -1)), support.Layout((2,), (-1, -1))]
    stages = [{"tied.weight": layout, f"w{i}.weight": layout} for i, layout in enumerate(layouts)]
    rng = np.random.default_rng(3)
    names = ("tied.weight", "w0.weight", "w1.weight")
    whole = {name: rng.standard_normal((8, 4)).astype(np.float32) for name in names}
    strategy = driver.write_layout(stages, tmp_path / "strategy.ckpt")
    for rank in range(4):
        path = driver.write_file(tmp_path / "src" / f"rank_{rank}" / "a.ckpt", support.slice_rank(whole, stages, rank))
    words = ["verify", str(tmp_path / "src"), "--strategy", str(strategy)]
    assert_done(run(words))
    data = path.read_bytes()
    driver.flip(path, data.index(whole["tied.weight"].tobytes()) + 70, 1)
    assert_refused(run(words), 6, "tied.weight", "its copies on ranks [0, 1, 3] differ", "element 17")


@pytest.mark.parametrize("fmt", ["ckpt", "safetensors"])
def test_a_result_that_lacks_what_the_source_lacks_is_verified(fresh: Callable[..., Case], fmt: str) -> None:
    case = fresh("mp", fmt)
    name = "model.layers.1.w1.weight"
    whole = {n: a for n, a in case.model.whole().items() if n != name}
    for rank in range(4):
        stages = case.model.stages(1, 2, 2)
        stages = [{n: layout for n, layout in stage.items() if n != name} for stage in stages]
        driver.write_file(case.file(rank), support.slice_rank(whole, stages, rank))
    refused(case, case.args(), 4, name, "--allow-missing")
    shutil.rmtree(case.dst)
    assert_done(run(case.args("--allow-missing", name, "--verify")))
    both = {"src_strategy": case.strategy, "dst_strategy": case.other}
    with pytest.raises(PlanError, match="allow-missing"):
        transform_ckpt.load(case.src, **both)
    assert name not in dict(transform_ckpt.load(case.src, allow_missing=[name], **both))


def test_ranks_that_no_tensor_belongs_to_are_named(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", layout=(1, 2, 2), model=Model(optimizer=False, states=False))
    stages = case.model.stages(1, 2, 2)
    other = [{**stages[0], **stages[1]}, {"another.weight": support.Layout((1, 2), (-1,))}]
    strategy = driver.write_layout(other, tmp_path / "other.ckpt")
    words = ["convert", str(case.src), str(case.dst), "--to", "mindspore", "--src-strategy", str(case.strategy)]
    found = run([*words, "--dst-strategy", str(strategy)])
    assert_done(found)
    assert "ranks 2-3: their .ckpt files are empty" in found.err
    words += ["--dst-strategy", str(strategy), "--overwrite", "--format", "safetensors", "--verify"]
    assert "are empty" not in run(words).err


def test_no_optimizer_drops_states_that_no_strategy_lists(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", layout=(1, 2, 2))
    stages = case.model.stages(1, 2, 2)
    whole = case.model.whole()
    for rank in range(4):
        held = {**support.slice_rank(whole, stages, rank), "adam_m.other.weight": np.ones((2, 2), np.float32)}
        driver.write_file(case.file(rank), held)
    assert_refused(run(case.args()), 3, "adam_m.other.weight", "does not list")
    assert_done(run(case.args("--no-optimizer", "--verify")))


@pytest.mark.parametrize("length", [0, 1, 20_000, 20_001])
@pytest.mark.parametrize("output", [{"container": "safetensors"}, {"container": "ckpt"}, {"unified": True}])
def test_strings_of_any_length(tmp_path: Path, length: int, output: dict[str, Any]) -> None:
    text = ("漢a" * length)[:length]
    specs = [TensorSpec("w", "F32", (2, 3)), TensorSpec("note", "STR", (), 4 * length)]
    laid_out = ckpt.skeleton(specs)
    data = bytearray(laid_out.nbytes)
    for offset, chunk in laid_out.chunks:
        data[offset : offset + len(chunk)] = chunk
    (extent,) = laid_out.places["note"]
    data[extent.offset_bytes : extent.offset_bytes + extent.nbytes] = text.encode("utf-32-le")
    (tmp_path / "a.ckpt").write_bytes(data)
    transform_ckpt.convert(tmp_path / "a.ckpt", tmp_path / "out", verify=True, **output)
    assert dict(transform_ckpt.load(tmp_path / "out"))["note"] == text


def test_strings_of_complete_weights_are_left_out_of_checkpoint_2(tmp_path: Path) -> None:
    laid_out = safetensors.skeleton([TensorSpec("w", "F32", ())], {}, {"note": "text"})
    ((_, head),) = laid_out.chunks
    (tmp_path / "a.safetensors").write_bytes(head + bytes(4))
    found = transform_ckpt.convert(tmp_path / "a.safetensors", tmp_path / "out", checkpoint_2=True, verify=True)
    assert [note for note in found.notes if "left out: note" in note]
    assert [name for name, _ in transform_ckpt.load(tmp_path / "out") if name in ("w", "note")] == ["w"]


def test_verify_sees_every_kind_of_damage_of_our_output(fresh: Callable[..., Case]) -> None:
    case = fresh("mp")
    assert_done(run(case.args("--crc")))
    assert_done(run(["verify", str(case.dst)]))
    path = case.dst / "rank_1" / "checkpoint_1.ckpt"
    for offset in (3, 50, 500, -100, -1):
        driver.flip(path, offset)
        assert_refused(run(["verify", str(case.dst)]), 6, "rank_1/checkpoint_1.ckpt")
        driver.flip(path, offset)
    assert_done(run(["verify", str(case.dst)]))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert_refused(run(["verify", str(case.dst)]), 6, "rank_1/checkpoint_1.ckpt", "was written with")
    path.unlink()
    assert_refused(run(["verify", str(case.dst)]), 6, "rank_1/checkpoint_1.ckpt", "is missing")
    path.write_bytes(data)
    (case.dst / "rank_1" / "extra.ckpt").write_bytes(data)
    assert_refused(run(["verify", str(case.dst)]), 6, "extra.ckpt")


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], int, str]] = {
    "only a version": (lambda m: {"format_version": 1}, 3, "damaged"),
    "files a list": (lambda m: {**m, "files": [1]}, 3, "not a map"),
    "no target": (lambda m: {k: v for k, v in m.items() if k != "target"}, 3, "dropped"),
    "no files": (lambda m: {**m, "files": {}}, 6, "is not in transform_ckpt.json"),
    "entry empty": (lambda m: {**m, "files": {"x": {}}}, 3, "no size"),
    "digest cut": (lambda m: with_digest(m, lambda d: d[:-1]), 3, "the digest of"),
    "digest garbage": (lambda m: with_digest(m, lambda d: "a:b"), 3, "the digest of"),
    "digest a number": (lambda m: with_digest(m, lambda d: 5), 3, "no digests"),
    "digest absent": (lambda m: with_digest(m, lambda d: ""), 6, "digests of 0 of"),
    "digest endless": (lambda m: with_digest(m, lambda d: "9" * 18 + ":" + "0" * 32), 6, "not what was written"),
    "other digest": (lambda m: with_digest(m, lambda d: d[:-32] + "0" * 32), 6, "not what was written"),
    "leaves": (lambda m: {**m, "files": {"../x.ckpt": next(iter(m["files"].values()))}}, 3, "leaves the directory"),
    "absolute": (
        lambda m: {**m, "small_files": {"/etc/passwd": {"nbytes": 1, "digest": ""}}},
        3,
        "leaves the directory",
    ),
    "deep": (lambda m: b"[" * 100_000, 3, "not JSON"),
    "cut": (lambda m: json.dumps(m).encode()[:300], 3, "not JSON"),
    "of the future": (lambda m: {**m, "format_version": 2}, 3, "version"),
}


def with_digest(found: dict[str, Any], change: Callable[[str], Any]) -> dict[str, Any]:
    """One tensor's digest changed."""
    name, entry = next(iter(found["files"].items()))
    tensor, digest = next(iter(entry["tensors"].items()))
    return {
        **found,
        "files": {**found["files"], name: {**entry, "tensors": {**entry["tensors"], tensor: change(digest)}}},
    }


@pytest.mark.parametrize(("change", "code", "word"), MANIFESTS.values(), ids=list(MANIFESTS))
def test_a_damaged_manifest(
    fresh: Callable[..., Case], change: Callable[[dict[str, Any]], Any], code: int, word: str
) -> None:
    case = fresh("mp")
    assert_done(run(case.args()))
    path = case.dst / "transform_ckpt.json"
    changed = change(json.loads(path.read_text()))
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    assert_refused(run(["verify", str(case.dst)]), code, case.dst, word)


# ---------------------------------------------------------------------------------------------- wrong strategies


def with_strategy(case: Case, stages: list[dict[str, support.Layout]], side: str) -> list[str]:
    """The conversion with another strategy on one side."""
    path = driver.write_layout(stages, case.root / "another.ckpt")
    old = str(case.strategy if side == "src" else case.other)
    return [str(path) if word == old else word for word in case.args()]


@pytest.mark.parametrize(
    ("written", "read", "words"),
    [
        ((2, 2, 1), (1, 4, 1), ["hold equal bytes", "not the strategy of this checkpoint"]),
        ((2, 2, 1), (4, 1, 1), ["unrelated", "not the strategy of this checkpoint"]),
        ((2, 2, 1), (4, 1, 1, 4), ["hold equal bytes", "not the strategy of this checkpoint"]),
        ((2, 2, 1), (1, 1, 4), ["whose stage does not list them", "not the strategy of this checkpoint"]),
        ((2, 2, 1), (2, 1, 2), ["not the strategy of this checkpoint"]),
        ((1, 4, 1), (2, 2, 1), ["unrelated", "not the strategy of this checkpoint"]),
        ((4, 1, 1, 4), (4, 1, 1), ["unrelated", "not the strategy of this checkpoint"]),
        ((4, 1, 1), (1, 4, 1), ["hold equal bytes", "not the strategy of this checkpoint"]),
        ((2, 1, 4, 2), (1, 2, 2), ["ranks 4-7", "is for 4 ranks"]),
    ],
)
def test_the_strategy_of_another_run_of_this_model(
    tmp_path: Path, written: tuple[int, ...], read: tuple[int, ...], words: list[str]
) -> None:
    """As many ranks, shapes that divide: only the bytes tell."""
    case = make_case(tmp_path, layout=written, other=(1, 1, 1))
    assert_done(run(case.args("--dry-run")))
    refused(case, with_strategy(case, case.model.stages(*read), "src"), 3, case.src, *words)


def test_constant_tensors_do_not_look_like_a_wrong_strategy(tmp_path: Path) -> None:
    """Zeros, ones, and replicas that drifted apart in their last bits are normal."""
    case = make_case(tmp_path, layout=(2, 2, 1), other=(1, 1, 1), model=Model(optimizer=False))
    stages = case.model.stages(2, 2, 1)
    whole = {name: np.ones_like(a) if "w1" in name else a for name, a in case.model.whole().items()}
    for rank in range(4):
        part = support.slice_rank(whole, stages, rank)
        drifted = {n: a * np.float32(1 + rank * 2**-20) if a.size > 1 else a for n, a in part.items()}
        driver.write_file(case.file(rank), drifted)
    assert_done(run(case.args()))


@pytest.mark.parametrize(
    ("side", "model", "layout", "code", "words"),
    [
        ("src", Model(name="other"), (2, 1, 4, 2), 3, ["another model"]),
        (
            "dst",
            Model(name="other"),
            (1, 2, 2),
            3,
            ["not in the destination strategy", "another.ckpt", "another model"],
        ),
        ("src", Model(layers=8), (2, 1, 4, 2), 4, ["no file holds", "model.layers."]),
        ("dst", Model(layers=2), (1, 2, 1), 3, ["model.layers.2", "another.ckpt"]),
        (
            "dst",
            Model(),
            (1, 5, 1),
            3,
            ["model.embed.weight", "[24, 16]", "does not divide into 5 parts", "another.ckpt"],
        ),
        ("src", Model(), (2, 2, 1), 3, ["ranks 4-7", "another.ckpt", "is for 4 ranks"]),
        ("src", Model(), (4, 1, 4, 2), 4, ["no file holds"]),
        ("src", Model(optimizer=False), (2, 1, 4, 2), 0, []),
        ("dst", Model(optimizer=False), (1, 2, 2), 0, []),
    ],
)
def test_strategies_of_other_models_and_worlds(
    fresh: Callable[..., Case], side: str, model: Model, layout: tuple[int, ...], code: int, words: list[str]
) -> None:
    case = fresh()
    args = with_strategy(case, model.stages(*layout), side)
    if code:
        refused(case, args, code, *words)
    else:
        assert_done(run(args))


@pytest.mark.parametrize("weight", ["model.lm_head.weight", "model.norm_out.weight", "model.layers.1.w2.weight"])
@pytest.mark.parametrize("sides", [("src",), ("dst",), ("src", "dst")])
def test_a_weight_that_a_strategy_does_not_list(
    fresh: Callable[..., Case], weight: str, sides: tuple[str, ...]
) -> None:
    case = fresh()
    args = case.args()
    for side, layout, path in (("src", LAYOUTS["opt"], case.strategy), ("dst", (1, 2, 2), case.other)):
        if side in sides:
            stages = [{n: v for n, v in s.items() if not n.endswith(weight)} for s in case.model.stages(*layout)]
            args[args.index(str(path))] = str(driver.write_layout(stages, case.root / f"{side}_without.ckpt"))
    refused(case, args, 3, weight, "strategy")


def test_a_vector_that_no_strategy_lists_is_still_a_weight(fresh: Callable[..., Case]) -> None:
    """Equal on every rank that has it, so that nothing but its name tells it from a state."""
    case = fresh("dp", optimizer=False)
    args, weight = case.args(), "model.norm_out.weight"
    for layout, path in ((LAYOUTS["dp"], case.strategy), ((1, 2, 2), case.other)):
        stages = [{n: v for n, v in s.items() if n != weight} for s in case.model.stages(*layout)]
        args[args.index(str(path))] = str(driver.write_layout(stages, case.root / f"without_{path.name}"))
    refused(case, args, 3, weight, "strategy", "--carry")
    assert_done(run([*args, "--carry", weight, "--overwrite"]))


def test_swapped_strategies(fresh: Callable[..., Case]) -> None:
    case = fresh()
    swap = {str(case.strategy): str(case.other), str(case.other): str(case.strategy)}
    refused(case, [swap.get(word, word) for word in case.args()], 3, case.src, case.other, "is for 4 ranks")


def test_no_strategy_for_several_ranks(fresh: Callable[..., Case]) -> None:
    case = fresh()
    args = ["convert", str(case.src), str(case.dst), "--to", "mindspore"]
    refused(case, args, 3, case.src, "ranks 0-7", "--src-strategy")
    for rank in range(1, 8):
        shutil.rmtree(case.src / f"rank_{rank}")
    (case.src / "rank_0").rename(case.src / "rank_5")
    refused(case, args, 3, "ranks 5", "--src-strategy")


STRATEGIES: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-3]), 3, "damaged"),
    "empty": (lambda p: p.write_bytes(b""), 3, "is empty"),
    "text": (lambda p: p.write_text("hello"), 3, "not a strategy file"),
    "gone": (lambda p: p.unlink(), 3, "no such file"),
    "fifo": (lambda p: (p.unlink(), os.mkfifo(p)), 3, "not a regular file"),
    "device": (lambda p: (p.unlink(), p.symlink_to("/dev/zero")), 3, "not a regular file"),
    "empty directory": (lambda p: (p.unlink(), p.mkdir()), 3, "no strategy files"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("side", ["strategy", "other"])
@pytest.mark.parametrize(("damage", "code", "word"), STRATEGIES.values(), ids=list(STRATEGIES))
def test_damaged_strategies(
    fresh: Callable[..., Case], damage: Callable[[Path], None], code: int, word: str, side: str
) -> None:
    case = fresh()
    path = getattr(case, side)
    damage(path)
    refused(case, case.args(), code, path, word)


def test_a_tensor_file_is_no_strategy_and_one_stage_is_not_all(fresh: Callable[..., Case], tmp_path: Path) -> None:
    from strategy.mindspore_file import read_strategy, write_stage

    case = fresh()
    args = case.args()
    args[args.index(str(case.strategy))] = str(case.file(0))
    refused(case, args, 3, case.file(0), "tensor checkpoint")
    for stage, words in ((0, ["is for 2 ranks", "ranks 2-7"]), (2, ["stage 2 only", "the merged file"])):
        path = tmp_path / f"stage_{stage}.ckpt"
        write_stage(read_strategy(str(case.strategy)), stage, str(path))
        args[args.index("--src-strategy") + 1] = str(path)
        refused(case, args, 3, path, *words)


# ---------------------------------------------------------------------------------------------- odd directories


def test_rank_directories_of_all_kinds(fresh: Callable[..., Case]) -> None:
    case = fresh("dp")
    folder = case.src / "rank_3"
    elsewhere = folder.rename(case.root / "elsewhere")
    folder.symlink_to(elsewhere)
    assert_done(run(case.args("--verify")))
    shutil.rmtree(case.dst)
    (case.src / "rank_03").mkdir()
    refused(case, case.args(), 4, "rank_03 and rank_3 are both rank 3")
    (case.src / "rank_03").rmdir()
    case = driver.copy(case, case.root / "again")
    for rank in (2, 3):
        path = case.src / f"rank_{rank}"
        shutil.rmtree(path) if not path.is_symlink() else path.unlink()
        path.write_text("a file") if rank == 2 else path.symlink_to("/nonexistent")
    refused(case, case.args(), 4, "files of ranks 2-3")


def test_several_steps(fresh: Callable[..., Case]) -> None:
    case = fresh()
    for rank in range(8):
        folder = case.src / f"rank_{rank}"
        shutil.copy(folder / "net-1_7.ckpt", folder / "net-1_10.ckpt")
        if rank != 4:
            (folder / "net-2_12.ckpt").write_bytes(b"not looked at: rank 4 has none")
    assert_done(run(case.args()))
    assert json.loads((case.dst / "transform_ckpt.json").read_text())["source"]["step"] == 10
    shutil.rmtree(case.dst)
    refused(case, case.args("--step", 12), 3, "step 12", "rank_4", "--step")
    refused(case, case.args("--step", -1), 3, "step -1")
    (case.src / "rank_2" / "final.ckpt").write_bytes(b"")
    refused(case, case.args(), 4, "cannot tell which file", "rank_2", "final.ckpt")


def test_formats_may_mix_between_ranks(fresh: Callable[..., Case], tmp_path: Path) -> None:
    case = fresh()
    stages, whole = case.model.stages(*LAYOUTS["opt"]), case.model.whole()
    case.file(2).unlink()
    driver.write_file(case.src / "rank_2" / "net-1_7.safetensors", support.slice_rank(whole, stages, 2))
    assert_done(run(case.args("--verify")))


@pytest.mark.parametrize(
    ("make", "code", "word"),
    [
        (lambda p: None, 3, "not found"),
        (lambda p: p.mkdir(), 3, "no checkpoint found"),
        (lambda p: (p / "rank_0").mkdir(parents=True), 3, "no .ckpt or .safetensors file"),
        (lambda p: p.write_text("hello"), 3, "neither in .ckpt nor in .safetensors"),
        (os.mkfifo, 3, "neither a file nor a directory"),
        (lambda p: p.symlink_to("/dev/zero"), 3, "neither a file nor a directory"),
        (lambda p: p.symlink_to(p), 3, "not found"),
    ],
)
@pytest.mark.timeout(30)
def test_what_is_no_checkpoint(tmp_path: Path, make: Callable[[Path], None], code: int, word: str) -> None:
    path = tmp_path / "src"
    make(path)
    for verb in ("convert", "plan"):
        found = run([verb, str(path), str(tmp_path / "out"), "--to", "mindspore"])
        assert_refused(found, code, path, word)
    assert driver.litter(tmp_path, "src") == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.mkdir()])
def test_a_rank_file_that_is_no_file(fresh: Callable[..., Case], make: Callable[[Path], None]) -> None:
    case = fresh()
    case.file(3).unlink()
    make(case.file(3))
    assert_refused(run(case.args()), 4, "in the directories of ranks 3", "files of ranks 2 hold only a part")
    assert_refused(
        run(["verify", str(case.src)]),
        *((3, case.file(3), "not a regular file") if not case.file(3).is_dir() else (0,)),
    )


def test_an_empty_rank_file(fresh: Callable[..., Case]) -> None:
    case = fresh()
    case.file(3).write_bytes(b"")
    refused(case, case.args(), 3, case.file(3), "0 bytes")


# ---------------------------------------------------------------------------------------------- hostile headers


def entry(**changes: Any) -> dict[str, Any]:
    """A header of one tensor of 8 bytes."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def meta(**texts: str) -> dict[str, Any]:
    """The same with metadata."""
    return {"__metadata__": texts, **entry()}


TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
HEADERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"hello", "not JSON"),
    "empty": (b"", "not JSON"),
    "a list": ([1], "not a JSON object"),
    "deep": (b'{"w":' + b"[" * 100_000, "not JSON"),
    "not UTF-8": (b'{"\xff":1}', "not JSON"),
    "UTF-16": (json.dumps(entry()).encode("utf-16"), "not JSON"),
    "name twice": (TWICE, "'w' twice"),
    "field twice": (b'{"w":{"shape":[2],"shape":[2]}}', "'shape' twice"),
    "half a character": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not UTF-8"),
    "metadata with half": (b'{"__metadata__":{"x":"\\ud800"},' + json.dumps(entry()).encode()[1:], "not UTF-8"),
    "entry a number": ({"w": 3}, "'w' has no description"),
    "entry empty": ({"w": {}}, "dtype None"),
    "dtype a list": (entry(dtype=[]), "dtype []"),
    "dtype unknown": (entry(dtype="F12"), "'F12'"),
    "negative": (entry(shape=[-2]), "[-2]"),
    "fraction": (entry(shape=[2.0]), "[2.0]"),
    "bool": (entry(shape=[True, 2]), "True"),
    "another size": (entry(shape=[3]), "needs 12"),
    "huge shape": (
        b'{"w":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 3) + b'],"data_offsets":[0,8]}}',
        "'w'",
    ),
    "huge number": (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "not JSON"),
    "huge offset": (entry(data_offsets=[0, 10**4000]), "'w'"),
    "many dimensions": (entry(shape=[1] * 100_000), "'w'"),
    "a hole": (entry(data_offsets=[8, 16]), "a hole before 'w'"),
    "an overlap": ({**entry(), "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "an overlap at 'v'"),
    "metadata a list": ({"__metadata__": [], **entry()}, "__metadata__"),
    "metadata a number": ({"__metadata__": {"a": 1}, **entry()}, "__metadata__"),
    "crc no number": (meta(crc_num="x"), "crc_num"),
    "crc endless": (meta(crc_num="9" * 5000), "crc_num"),
    "crc in other digits": (meta(crc_num="\u0663"), "crc_num"),
    "crc wrong": (meta(crc_num="12"), "crc_check value is 12"),
    "strings deep": (meta(**{"transform_ckpt.strings": "[" * 100_000}), "strings"),
    "strings a number": (meta(**{"transform_ckpt.strings": '{"a":1}'}), "strings"),
    "strings with half": (meta(**{"transform_ckpt.strings": '{"\\ud800":"x"}'}), "UTF-8"),
}


@pytest.mark.parametrize(("header", "word"), HEADERS.values(), ids=list(HEADERS))
def test_hostile_safetensors_headers(tmp_path: Path, header: Any, word: str) -> None:
    path = driver.raw_safetensors(tmp_path / "src" / "rank_0" / "net.safetensors", header, bytes(8))
    args = ["convert", str(tmp_path / "src"), str(tmp_path / "out"), "--to", "mindspore"]
    assert_refused(run(args), 3, path, word)
    assert len(run(args).err) < 2000
    assert driver.litter(tmp_path, "src") == []


@pytest.mark.parametrize("length", [0, 5, 10**6, 100_000_001, 1 << 40, 2**64 - 1])
def test_header_length_that_lies(tmp_path: Path, length: int) -> None:
    path = driver.raw_safetensors(tmp_path / "net.safetensors", entry(), bytes(8), length)
    assert_refused(run(["inspect", str(path)]), 3, path)


def test_names_never_become_paths(tmp_path: Path) -> None:
    names = ["../../evil", "/etc/evil", "a\0b", "a\nb", "", "n" * 4000, "层.权重"]
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    data = bytes(range(8 * len(names)))
    driver.raw_safetensors(tmp_path / "src" / "net.safetensors", header, data)
    assert_done(run(["convert", str(tmp_path / "src"), str(tmp_path / "out"), "--to", "mindspore", "--verify"]))
    assert sorted(driver.tree(tmp_path / "out")) == ["rank_0", "rank_0/checkpoint_0.safetensors", "transform_ckpt.json"]
    assert driver.litter(tmp_path, "src", "out") == []
    assert set(read_header(str(tmp_path / "out/rank_0/checkpoint_0.safetensors")).tensors) == set(names)


def varint(value: int) -> bytes:
    """As protobuf writes it."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def value(tag: bytes, dims: list[int], kind: bytes = b"Float32", content: bytes = bytes(8)) -> bytes:
    """One record of a .ckpt."""
    tensor = b"".join(b"\x08" + varint(n) for n in dims)
    tensor += b"\x12" + varint(len(kind)) + kind + b"\x1a" + varint(len(content)) + content
    body = b"\x0a" + varint(len(tag)) + tag + b"\x12" + varint(len(tensor)) + tensor
    return b"\x0a" + varint(len(body)) + body


RECORDS: dict[str, tuple[bytes, str]] = {
    "zeros": (bytes(1000), "not a whole MindSpore .ckpt"),
    "text": (b"hello world" * 10, "not a whole MindSpore .ckpt"),
    "endless number": (b"\xff" * 100, "more than 10 bytes"),
    "encrypted": (bytes.fromhex("d85e3a7f") + bytes(100), "encrypted (AES-GCM"),
    "huge dims": (value(b"w", [2**62] * 400), "'w'"),
    "huge dim": (value(b"w", [2**69]), "'w'"),
    "negative dim": (value(b"w", [2**64 - 2]), "'w'"),
    "another size": (value(b"w", [3]), "needs 12"),
    "name not UTF-8": (value(b"\xff", [2]), "not UTF-8"),
    "name half a character": (value(b"\xed\xa0\x80", [2]), "not UTF-8"),
    "name endless": (value(b"n" * 1_100_000, [2]), "a name of 1,100,000 bytes"),
    "no name": (value(b"", [2]), "a value without"),
    "unknown type": (value(b"w", [2], b"Foo"), "'Foo'"),
    "twice": (value(b"w", [2]) + value(b"v", [2]) + value(b"w", [2]), "'w' is in the file twice"),
    "string of 3 bytes": (value(b"s", [0], b"str", b"abc"), "'s'"),
    "string of no characters": (value(b"s", [0], b"str", b"\xff" * 4), "'s' is not text"),
    "string of half a character": (value(b"s", [0], b"str", b"\0\xd8\0\0"), "'s' is not text"),
    "crc wrong": (value(b"w", [2]) + b"crc_num" + bytes(10), "crc_check value is 0"),
    "length lies": (b"\x0a\xff\xff\xff\xff\x0f" + value(b"w", [2]), "a field of"),
}


@pytest.mark.parametrize(("data", "word"), RECORDS.values(), ids=list(RECORDS))
def test_hostile_ckpt_records(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "src" / "rank_0" / "net.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    for more in ([], ["--format", "safetensors"], ["--unified"]):
        found = run(["convert", str(tmp_path / "src"), str(tmp_path / "out"), "--to", "mindspore", *more])
        assert_refused(found, 3, path, word)
    assert driver.litter(tmp_path, "src") == []


MAPS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "not JSON"),
    "empty": (b"", "not JSON"),
    "deep": (b'{"weight_map":' * 100_000, "not JSON"),
    "a list": (b"[1]", "expected a map"),
    "numbers": (b'{"weight_map":{"w":3}}', "expected a map"),
    "leaves": (b'{"weight_map":{"w":"../part0.safetensors"}}', "leaves the directory"),
    "absolute": (b'{"weight_map":{"w":"/etc/passwd"}}', "leaves the directory"),
    "names a missing file": (b'{"weight_map":{"w":"part1.safetensors"}}', "part1.safetensors, which is not there"),
    "half a character": (b'{"weight_map":{"w":"\\ud800.safetensors"}}', "not there"),
    "lies": (b'{"weight_map":{"v":"part0.safetensors"}}', "part0.safetensors holds v"),
}


@pytest.mark.parametrize(("data", "word"), MAPS.values(), ids=list(MAPS))
def test_hostile_name_maps(tmp_path: Path, data: bytes, word: str) -> None:
    driver.raw_safetensors(tmp_path / "src" / "part0.safetensors", entry(), bytes(8))
    (tmp_path / "src" / "param_name_map.json").write_bytes(data)
    args = ["convert", str(tmp_path / "src"), str(tmp_path / "out"), "--to", "mindspore"]
    assert_refused(run(args), 3, tmp_path / "src", word)
    assert driver.litter(tmp_path, "src") == []


def test_golden_rank_missing_and_truncated(golden: Path, tmp_path: Path) -> None:
    """What upstream answers with success and 97 of 124 tensors."""
    for fmt in ("ckpt", "safetensors"):
        root = golden / "mindspore"
        src = tmp_path / fmt
        shutil.copytree(root / f"src_{fmt}" / "A", src)
        args = ["convert", str(src), str(tmp_path / "out"), "--to", "mindspore"]
        args += ["--src-strategy", str(root / "strategy" / "A_merged.ckpt")]
        (path,) = (src / "rank_2").iterdir()
        data = path.read_bytes()
        path.chmod(0o644)
        for cut in (len(data) // 3, len(data) - 1):
            path.write_bytes(data[:cut])
            assert_refused(run(args), 3, path, "truncated")
        path.unlink()
        assert_refused(run(args), 4, "no checkpoint file in the directories of ranks 2", "ranks 3 hold only a part")
        assert driver.litter(tmp_path, "ckpt", "safetensors") == []


def test_a_source_of_ours_that_was_damaged(golden: Path, tmp_path: Path) -> None:
    """Our own output as a source: its header is checked always, its bytes with --verify."""
    made = tmp_path / "made"
    transform_ckpt.convert(golden / "mindspore" / "src_ckpt" / "C", made)
    path = made / "rank_0" / "checkpoint_0.ckpt"
    clean = path.read_bytes()
    damaged = bytearray(clean)
    damaged[ckpt.read_header(str(path)).tensors["lm_head.weight"].extents[0].offset_bytes] ^= 1
    path.write_bytes(damaged)
    transform_ckpt.plan(made)
    with pytest.raises(InputError, match=r"the bytes of 'lm_head.weight' are not what was written"):
        transform_ckpt.convert(made, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
    path.write_bytes(clean.replace(b"lm_head", b"lm_haed"))
    with pytest.raises(InputError, match=r"its header was changed.*or delete transform_ckpt.json"):
        transform_ckpt.plan(made)
    (made / "transform_ckpt.json").unlink()
    transform_ckpt.convert(made, tmp_path / "out", verify=True)
