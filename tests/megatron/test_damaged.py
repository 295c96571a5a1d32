"""Megatron checkpoints, maps and pt_meta that are damaged, hostile or of another run: refused by name, never run."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.megatron.support import Small, Trees, back, differences, only_iteration, save, to_megatron, to_mindspore
from tests.megatron.support import torch as the_torch
from tests.megatron.support import trees as trees_of
from transform_ckpt.errors import InputError, TransformError
from transform_ckpt.megatron_plans import MegatronSource

RANKS = [f"iter_0000007/mp_rank_{rank:02d}" for rank in range(2)]
KINDS = {
    "list": Small(),
    "coalesced": Small(coalesced=True),
    "coalesced one bucket": Small(coalesced=True, buckets=False),
}
kinds = pytest.mark.parametrize("kind", KINDS)
PATIENT = settings(
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate],  # what fails is a tree of files: to shrink it takes minutes
)
Routes = dict[str, Callable[[Path, Path, MegatronSource], object]]
ROUTES: Routes = {
    "to MindSpore": to_mindspore,
    "to another layout": lambda src, dst, source: to_megatron(src, dst, source, layout={"tp": 1, "pp": 2}),
}
routes = pytest.mark.parametrize("route", ROUTES)


def optimizer_file(rank: int) -> str:
    return f"{RANKS[rank]}/distrib_optim.pt"


def model_file(rank: int) -> str:
    return f"{RANKS[rank]}/model_optim_rng.pt"


def content(trees: Trees, rank: int = 0) -> dict[str, Any]:
    """The states of a rank's one buffer."""
    return next(iter(trees[optimizer_file(rank)][0].values()))


def mapped(root: Path) -> MegatronSource:
    return MegatronSource(param_map=str(root / "param_map"))


def refused(
    root: Path, source: MegatronSource | None = None, *, route: str = "to MindSpore", error: type = InputError
) -> str:
    """The message of the error that a conversion ends with; nothing is left behind."""
    out = root.parent / "out"
    with pytest.raises(error) as caught:
        ROUTES[route](root, out, source or MegatronSource())
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    return str(caught.value)


@kinds
@routes
def test_the_small_checkpoint_is_read(kind: str, route: str, tmp_path: Path) -> None:
    """What is damaged below is not refused as it is."""
    root = save(KINDS[kind].trees(), tmp_path / "root", KINDS[kind].maps())
    ROUTES[route](root, tmp_path / "out", mapped(root))
    if kind != "coalesced":  # its bucket size is none that args could say
        ROUTES[route](root, tmp_path / "rebuilt", MegatronSource())


@kinds
def test_the_small_checkpoint_and_back(kind: str, tmp_path: Path) -> None:
    root = save(KINDS[kind].trees(), tmp_path / "root", KINDS[kind].maps())
    again = back(to_mindspore(root, tmp_path / "out", mapped(root)), tmp_path / "back")
    old, new = trees_of(root / "iter_0000007"), trees_of(only_iteration(again))
    assert not [fault for path in old for fault in differences(old[path], new[path], path)]


# ------------------------------------------------------------------------------------------------ files of the source


@routes
def test_a_missing_rank_directory(route: str, tmp_path: Path) -> None:
    root = save(Small().trees(), tmp_path / "root")
    shutil.rmtree(root / RANKS[1])
    assert "(1, 0)" in refused(root, route=route)


@routes
def test_the_optimizer_of_one_rank_is_missing(route: str, tmp_path: Path) -> None:
    root = save(Small().trees(), tmp_path / "root")
    (root / optimizer_file(1)).unlink()
    message = refused(root, route=route)
    assert "tp 1, pp 0" in message
    assert "distrib_optim.pt" in message


@pytest.mark.parametrize("name", ["distrib_optim.pt", "model_optim_rng.pt"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(name: str, part: float, tmp_path: Path) -> None:
    root = save(Small().trees(), tmp_path / "root")
    path = root / RANKS[1] / name
    os.truncate(path, int(path.stat().st_size * part))
    assert str(path) in refused(root)


@kinds
@routes
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_a_flipped_bit_of_a_master_weight(kind: str, route: str, rank: int, where: str, tmp_path: Path) -> None:
    """The bfloat16 weight beside it tells, whatever is converted."""
    trees = KINDS[kind].trees()
    param = content(trees, rank)["param"]
    tensors = [param] if KINDS[kind].coalesced else param
    tensor, at = {"first": (tensors[0], 0), "last": (tensors[-1], -1), "middle": (tensors[0], 40)}[where]
    tensor.numpy().view(np.uint32)[at] ^= 1 << 20
    root = save(trees, tmp_path / "root", KINDS[kind].maps())
    message = refused(root, mapped(root), route=route)
    names = {"first": "output_layer.weight", "last": "embedding.word_embeddings.weight", "middle": "linear_fc1.weight"}
    assert names[where] in message
    assert str(root / RANKS[rank]) in message


def test_a_flipped_bit_of_a_moment_is_nobodys_to_tell(tmp_path: Path) -> None:
    """Only checksums would; that the test above does not pass by chance shows here."""
    trees = Small().trees()
    content(trees)["exp_avg"][0].numpy().view(np.uint32)[0] ^= 1 << 20
    to_mindspore(save(trees, tmp_path / "root"), tmp_path / "out")


def test_two_parameters_of_one_size_exchanged(tmp_path: Path) -> None:
    """A map that fits in every number, and is wrong."""
    small = Small()
    maps = small.maps()
    for name in maps:
        one, two = (f"module.decoder.layers.{n}.input_layernorm.weight" for n in (0, 1))
        maps[name][one], maps[name][two] = maps[name][two], maps[name][one]
    root = save(small.trees(), tmp_path / "root", maps)
    assert "input_layernorm.weight" in refused(root, mapped(root))


@pytest.mark.parametrize("number", ["numel_unpadded", "shape", "missing state", "gap"])
def test_a_container_that_contradicts_itself(number: str, tmp_path: Path) -> None:
    trees = Small(coalesced=True, buckets=False).trees()
    buffer = content(trees, 1)
    if number == "numel_unpadded":
        buffer["numel_unpadded"] -= 1
    elif number == "shape":
        buffer["exp_avg"] = buffer["exp_avg"][:-1].clone()
    elif number == "missing state":
        del buffer["exp_avg_sq"]
    else:
        trees[optimizer_file(1)][2] = trees[optimizer_file(1)][0]
    message = refused(save(trees, tmp_path / "root"))
    assert str(tmp_path / "root" / optimizer_file(1)) in message


@kinds
def test_one_buffer_is_missing(kind: str, tmp_path: Path) -> None:
    trees = KINDS[kind].trees()
    del trees[optimizer_file(0)][0]
    root = save(trees, tmp_path / "root", KINDS[kind].maps())
    assert str(root / optimizer_file(0)) in refused(root, mapped(root))


def test_one_bucket_of_the_list_is_missing(tmp_path: Path) -> None:
    trees = Small().trees()
    for state in content(trees).values():
        state.pop()
    root = save(trees, tmp_path / "root", Small().maps())
    for source in (mapped(root), MegatronSource()):
        assert str(root / optimizer_file(0)) in refused(root, source)


@pytest.mark.parametrize("coalesced", [False, True])
def test_buckets_that_are_shorter(coalesced: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """As with another dp, whose padding is another, or of another model."""
    small = Small(coalesced=coalesced)
    trees = small.trees()
    buffer = content(trees)
    for state in ("param", "exp_avg", "exp_avg_sq"):
        if coalesced:
            buffer[state] = buffer[state][:-5].clone()
        else:
            buffer[state][-1] = buffer[state][-1][:-5].clone()
    if coalesced:
        buffer["numel_unpadded"] -= 5
    root = save(trees, tmp_path / "root", small.maps())
    for source in (mapped(root), MegatronSource()):
        message = refused(root, source)
        assert str(root / optimizer_file(0)) in message


def test_a_tensor_of_another_type_among_the_states(tmp_path: Path) -> None:
    trees = Small(coalesced=True, buckets=False).trees()
    buffer = content(trees)
    buffer["param"] = buffer["param"].to(the_torch().int64)
    assert "param" in refused(save(trees, tmp_path / "root"), error=TransformError)


@pytest.mark.parametrize("where", ["weight", "state"])
def test_a_tensor_that_is_not_contiguous(where: str, tmp_path: Path) -> None:
    """Its bytes are not one run of the storage."""
    trees = Small(coalesced=True, buckets=False).trees()
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    if where == "weight":
        model = trees[model_file(1)]["model"]
        model[name] = model[name].t().contiguous().t()
    else:
        name, buffer = "exp_avg", content(trees, 1)
        buffer[name] = the_torch().zeros(2 * len(buffer[name]))[::2]
    message = refused(save(trees, tmp_path / "root"))
    assert name in message
    assert RANKS[1] in message


def test_ranks_of_different_models(tmp_path: Path) -> None:
    trees = Small().trees()
    model = trees[model_file(1)]["model"]
    model["decoder.layers.0.mlp.linear_fc2.weight"] = model["decoder.layers.0.mlp.linear_fc2.weight"][:, :2].clone()
    assert "decoder.layers.0.mlp.linear_fc" in refused(save(trees, tmp_path / "root"))


def test_a_layer_that_nobody_has(tmp_path: Path) -> None:
    trees = Small().trees()
    for rank in range(2):
        trees[model_file(rank)]["args"].num_layers = 3
    assert "layers 2" in refused(save(trees, tmp_path / "root"))


ALONE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from transform_ckpt import megatron_plans as plans
from transform_ckpt.errors import TransformError
from transform_ckpt.megatron.mindspore_target import ConvertedOptions
try:
    if sys.argv[1] == "back":
        plans.converted_to_megatron(sys.argv[2], plans.MegatronTarget())
    else:
        plans.megatron_to_mindspore(sys.argv[2], plans.MegatronSource(), ConvertedOptions())
except TransformError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def refused_soon(route: str, root: Path) -> str:
    """The message of a plan's InputError, in a process that may take neither long nor much memory."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, route, str(root)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        check=False,
        text=True,
        timeout=20,
    )
    assert done.returncode == InputError.exit_code, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["num_layers", "tensor_model_parallel_size", "expert_model_parallel_size"])
def test_args_of_an_unlikely_size(name: str, tmp_path: Path) -> None:
    """Refused before anything of that size is made."""
    trees = Small().trees()
    for rank in range(2):
        setattr(trees[model_file(rank)]["args"], name, 1 << 30)
    root = save(trees, tmp_path / "root")
    assert str(root) in refused_soon("there", root)


def test_more_directories_than_args_says(tmp_path: Path) -> None:
    trees = Small().trees()
    for rank in range(2):
        trees[model_file(rank)]["args"].tensor_model_parallel_size = 1
    assert "mp_rank_01" in refused(save(trees, tmp_path / "root"))


@pytest.mark.parametrize("value", [{}, [1], None, "x", float("nan")])
def test_groups_without_a_meaning(value: Any, tmp_path: Path) -> None:
    """Marks that tell parameter groups apart, and are none: to refuse, or not to care."""
    trees = Small().trees()
    for rank in range(2):
        trees[model_file(rank)]["optimizer"]["optimizer"]["param_groups"][0]["wd_mult"] = value
    root = save(trees, tmp_path / "root")
    with suppress(TransformError):
        to_mindspore(root, tmp_path / "shards")
        back(tmp_path / "shards", tmp_path / "back")
    with suppress(TransformError):
        to_megatron(root, tmp_path / "again")


def test_ranks_of_two_iterations(tmp_path: Path) -> None:
    trees = Small().trees()
    trees[model_file(1)]["iteration"] = 8
    message = refused(save(trees, tmp_path / "root"))
    assert "iteration" in message
    assert RANKS[1] in message


# --------------------------------------------------------------------------------------------------- parameter maps


def test_the_map_of_another_tensor_parallel_size(tmp_path: Path) -> None:
    small = Small()
    maps = {
        name: {
            param: [dtype, [shape[0] * 2, *shape[1:]], 2 * start, 2 * end, bucket]
            for param, (dtype, shape, start, end, bucket) in entries.items()
        }
        for name, entries in small.maps().items()
    }
    root = save(small.trees(), tmp_path / "root", maps)
    message = refused(root, mapped(root))
    assert "another" in message
    assert str(root / optimizer_file(0)) in message


def test_the_map_of_another_run(tmp_path: Path) -> None:
    """The same elements under other names."""
    small = Small(coalesced=True)
    maps = {name: json.loads(json.dumps(entries).replace("mlp", "ffn")) for name, entries in small.maps().items()}
    root = save(small.trees(), tmp_path / "root", maps)
    assert "decoder.layers.0.ffn.linear_fc1.weight" in refused(root, mapped(root))


def test_the_map_of_one_rank_is_missing(tmp_path: Path) -> None:
    small = Small()
    maps = small.maps()
    del maps["param_map_buffer0_dp0tp1pp0vpp0.json"]
    root = save(small.trees(), tmp_path / "root", maps)
    message = refused(root, mapped(root))
    assert "tp 1, pp 0" in message
    assert str(root / "param_map") in message


def test_maps_of_two_buffers_for_one(tmp_path: Path) -> None:
    small = Small()
    maps = small.maps()
    maps["param_map_buffer1_dp0tp0pp0vpp0.json"] = maps["param_map_buffer0_dp0tp0pp0vpp0.json"]
    root = save(small.trees(), tmp_path / "root", maps)
    assert "buffers" in refused(root, mapped(root))


def _edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        entries = json.loads(text)
        edit(entries)
        return json.dumps(entries)

    return apply


FIRST = "module.output_layer.weight"
BAD_MAPS: dict[str, Callable[[str], str]] = {
    "overlap": _edited(lambda m: m.update({"module.more": ["torch.bfloat16", [4], 0, 4, 0]})),
    "twice": lambda text: text[:-1] + f', "{FIRST}": ["torch.bfloat16", [4, 4], 0, 16, 0]' + "}",
    "null": _edited(lambda m: m.update({FIRST: None})),
    "null numbers": _edited(lambda m: m.update({FIRST: ["torch.bfloat16", [4, 4], None, None, 0]})),
    "huge": _edited(lambda m: m.update({FIRST: ["torch.bfloat16", [4, 4], 0, 1 << 80, 0]})),
    "huge shape": _edited(lambda m: m.update({FIRST: ["torch.bfloat16", [1 << 40, 1 << 40], 0, 16, 0]})),
    "negative": _edited(lambda m: m.update({FIRST: ["torch.bfloat16", [4, 4], -16, 0, 0]})),
    "float": _edited(lambda m: m.update({FIRST: ["torch.bfloat16", [4, 4], 0.0, 16.0, 0]})),
    "bucket 7": _edited(lambda m: m[FIRST].__setitem__(4, 7)),
    "a list": lambda text: f"[{text}]",
    "a number": lambda _: "1e999",
    "deep": lambda _: "[" * 100_000,
    "empty": lambda _: "",
    "an empty object": lambda _: "{}",
    "half": lambda text: text[: len(text) // 2],
    "another dtype": _edited(lambda m: m[FIRST].__setitem__(0, "float; import os")),
    "behind the end": _edited(lambda m: m.update({"module.more": ["torch.bfloat16", [4], 9000, 9004, 1]})),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_a_bad_map(name: str, tmp_path: Path) -> None:
    root = save(Small().trees(), tmp_path / "root", Small().maps())
    path = root / "param_map" / "param_map_buffer0_dp0tp1pp0vpp0.json"
    path.write_text(BAD_MAPS[name](path.read_text()))
    message = refused(root, mapped(root))
    assert "tp1" in message or RANKS[1] in message


# ---------------------------------------------------------------------------------------------------------- trackers


BAD_TRACKERS = ["", "../x", "7/../../x", "-7", "7" * 5000, "release\0", "8", "\N{ARABIC-INDIC DIGIT SEVEN}"]


@pytest.mark.parametrize("text", BAD_TRACKERS)
def test_a_bad_tracker(text: str, tmp_path: Path) -> None:
    root = save(Small().trees(), tmp_path / "root")
    (tmp_path / "x").mkdir()
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    message = refused(root)
    assert str(tracker if text != "8" else root) in message
    assert len(message) < 2000


def test_a_tracker_that_is_a_directory(tmp_path: Path) -> None:
    root = save(Small().trees(), tmp_path / "root")
    (root / "latest_checkpointed_iteration.txt").unlink()
    (root / "latest_checkpointed_iteration.txt").mkdir()
    refused(root, error=TransformError)


# --------------------------------------------------------------------------------------------------- hostile pickles


class Reduced:
    """Pickled as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __call__(self) -> None:
        """Pickle wants what it calls to be callable."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def _commands(marker: Path) -> dict[str, Any]:
    touch = f"touch {marker}"
    import posix

    return {
        "os.system": Reduced(os.system, touch),
        "posix.system": Reduced(posix.system, touch),
        "eval": Reduced(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Reduced(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Reduced(getattr, Reduced(__import__, "os"), "system"),
        "a call of getattr": Reduced(Reduced(getattr, Reduced(__import__, "os"), "system"), touch),
        "open": Reduced(open, str(marker), "w"),
        "a key": {Reduced(os.system, touch): 1},
    }


PLACES: dict[str, Callable[[Trees, Any], object]] = {
    "args": lambda trees, value: setattr(trees[model_file(1)]["args"], "hook", value),
    "instead of args": lambda trees, value: trees[model_file(1)].update(args=value),
    "model": lambda trees, value: trees[model_file(1)]["model"].update({"decoder.final_layernorm.weight": value}),
    "extra state": lambda trees, value: trees[model_file(1)]["model"].update({"decoder._extra_state": value}),
    "rng": lambda trees, value: trees[model_file(1)].update(rng_state=[value]),
    "unknown key": lambda trees, value: trees[model_file(1)].update(more=value),
    "states": lambda trees, value: content(trees, 1).update(param=value),
    "beside the states": lambda trees, value: trees[optimizer_file(1)].update(more=value),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", _commands(Path("x")))
def test_a_hostile_pickle(place: str, command: str, tmp_path: Path) -> None:
    trees = Small().trees()
    marker = tmp_path / "marker"
    PLACES[place](trees, _commands(marker)[command])
    file = optimizer_file(1) if "states" in place else model_file(1)
    try:
        root = save(trees, tmp_path / "root")
    except (TypeError, AttributeError):
        pytest.skip("not even pickle makes this one")
    message = refused(root)
    assert str(root / file) in message
    assert re.search("system|eval|exec|getattr|open|__import__", message)
    assert not marker.exists()


# --------------------------------------------------------------------------- rank directories of MindSpore, and pt_meta


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint; copy it to change it."""
    top = tmp_path_factory.mktemp("shards")
    return to_mindspore(save(Small().trees(), top / "root", Small().maps()), top / "out")


def copy_of(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / "transform_ckpt.json").unlink()  # or its digests tell before anything else
    return tmp_path / "shards"


def not_back(shards: Path) -> str:
    out = shards.parent / "back"
    with pytest.raises(TransformError) as caught:
        back(shards, out)
    assert not out.exists()
    return str(caught.value)


def test_a_rank_file_is_missing(shards: Path, tmp_path: Path) -> None:
    found = copy_of(shards, tmp_path)
    shutil.rmtree(found / "rank_1")
    message = not_back(found)
    assert "rank_1" in message
    assert "tp 1" in message


def test_a_rank_file_is_truncated(shards: Path, tmp_path: Path) -> None:
    found = copy_of(shards, tmp_path)
    path = found / "rank_1" / "network.ckpt"
    os.truncate(path, path.stat().st_size - 10)
    assert str(path) in not_back(found)


@pytest.mark.parametrize("change", ["added", "removed", "reshaped"])
def test_other_tensors_than_pt_meta_lists(change: str, shards: Path, tmp_path: Path, ms: Any) -> None:
    from tests.support import load_file, save_file

    found = copy_of(shards, tmp_path)
    path = found / "rank_1" / "network.ckpt"
    arrays = load_file(ms, path)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    if change == "added":
        name = "decoder.layers.1.mlp.linear_fc3.weight"
        arrays[name] = np.zeros((2, 2), np.float32)
    elif change == "removed":
        del arrays[name]
    else:
        arrays[name] = arrays[name].reshape(-1)[:-1]
    save_file(ms, arrays, path)
    message = not_back(found)
    assert name in message


@pytest.mark.parametrize("change", ["another step", "no step"])
def test_ranks_of_two_steps(change: str, shards: Path, tmp_path: Path, ms: Any) -> None:
    """Two ranks that have trained to different steps are no checkpoint."""
    from tests.support import load_file, save_file

    found = copy_of(shards, tmp_path)
    path = found / "rank_1" / "network.ckpt"
    arrays = load_file(ms, path)
    if change == "another step":
        arrays["step_num"] = np.array(9, np.int64)
    else:
        del arrays["step_num"]
    save_file(ms, arrays, path)
    message = not_back(found)
    assert "rank_1" in message
    assert "step" in message


LAYOUT_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "version": lambda c: c.update(version=99),
    "tp 0": lambda c: c["sizes"].update(tp=0),
    "tp -1": lambda c: c["sizes"].update(tp=-1),
    "tp 4": lambda c: c["sizes"].update(tp=4),
    "tp text": lambda c: c["sizes"].update(tp="2"),
    "tp null": lambda c: c["sizes"].update(tp=None),
    "an unknown size": lambda c: c["sizes"].update(xp=1),
    "no sizes": lambda c: c.pop("sizes"),
    "no layers": lambda c: c["outline"].update(layers={}),
    "layers are a list": lambda c: c["outline"].update(layers=[[]]),
    "a depth of 0": lambda c: c["outline"]["before"][0].__setitem__(1, 0),
    "a name that is none": lambda c: c["outline"]["before"][0].__setitem__(0, None),
    "another name": lambda c: c["outline"]["before"][0].__setitem__(0, "embedding.other"),
    "num_layers 3": lambda c: c.update(num_layers=3),
    "num_layers text": lambda c: c.update(num_layers="2"),
    "schedule": lambda c: c.update(schedule="sometimes"),
    "noop": lambda c: c.update(noop_layers=[0]),
    "noop null": lambda c: c.update(noop_layers=None),
    "num_layer_list null": lambda c: c.update(num_layer_list=None),
    "megatron_core null": lambda c: c.update(megatron_core=[None, 16]),
    "weights of no type": lambda c: c["weights"].update({"decoder.final_layernorm.weight": ["BF16"]}),
    "weights of an unknown type": lambda c: c["weights"].update({"decoder.final_layernorm.weight": "BF17"}),
    "a bucket of no size": lambda c: c["buffers"][0][2][0].update(padded=[None, 1]),
    "a bucket of another size": lambda c: c["buffers"][0][2][0].update(unpadded=[999, 1], padded=[999, 1]),
    "no buffers": lambda c: c.pop("buffers"),
    "buffers are text": lambda c: c.update(buffers="x"),
}


@pytest.mark.parametrize("name", ["tp", "pp", "num_layers"])
def test_a_layout_of_an_unlikely_size(name: str, shards: Path, tmp_path: Path) -> None:
    """Refused before anything of that size is made."""
    found = copy_of(shards, tmp_path)
    path = found / "pt_meta" / "layout.json"
    content = json.loads(path.read_text())
    (content["sizes"] if name in content["sizes"] else content)[name] = 1 << 40
    path.write_text(json.dumps(content))
    assert str(found) in refused_soon("back", found)


@pytest.mark.parametrize("name", LAYOUT_EDITS)
def test_a_damaged_layout(name: str, shards: Path, tmp_path: Path) -> None:
    found = copy_of(shards, tmp_path)
    path = found / "pt_meta" / "layout.json"
    content = json.loads(path.read_text())
    LAYOUT_EDITS[name](content)
    path.write_text(json.dumps(content))
    assert str(found) in not_back(found)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "\0", "[" * 100_000, '{"version": 1}'])
def test_a_layout_that_is_none(text: str, shards: Path, tmp_path: Path) -> None:
    found = copy_of(shards, tmp_path)
    (found / "pt_meta" / "layout.json").write_text(text)
    assert "layout.json" in not_back(found)


def test_no_pt_meta(shards: Path, tmp_path: Path) -> None:
    found = copy_of(shards, tmp_path)
    shutil.rmtree(found / "pt_meta")
    assert "pt_meta" in not_back(found)


def test_a_hostile_args_file(shards: Path, tmp_path: Path) -> None:
    found = copy_of(shards, tmp_path)
    path = found / "pt_meta" / "args_tp01_pp000.pt"
    the_torch().save({"args": Reduced(os.system, f"touch {tmp_path / 'marker'}")}, path)
    assert str(path) in not_back(found)
    assert not (tmp_path / "marker").exists()


# -------------------------------------------------------------------------------------------------------------- fuzz

META = ["layout.json", "args_tp00_pp000.pt", "param_map_buffer0_dp0tp0pp0vpp0.json"]
ODD: list[Any] = [
    *(None, 0, -1, 1, 2, 3, 1 << 40, 1 << 70, 1.5, float("nan"), float("inf"), True, "", "x", "2", "../x", b"x"),
    *([], {}, (), [None], {"x": 1}, {0: {}}, [[]], {1, 2}, 3 + 4j, "a" * 5000),
]


def paths_in(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a tree of dictionaries, lists and Namespaces."""
    inner = vars(tree) if hasattr(tree, "__dict__") and not hasattr(tree, "dtype") else tree
    if isinstance(inner, list):
        inner = dict(enumerate(inner))
    if not isinstance(inner, dict):
        return []
    return [path for key in inner for path in ((*above, key), *paths_in(inner[key], (*above, key)))]


def changed(tree: Any, path: tuple[Any, ...], value: Any, *, delete: bool) -> None:
    """Replace or delete one place of a tree."""
    for key in path[:-1]:
        tree = vars(tree)[key] if hasattr(tree, "__dict__") and key in vars(tree) else tree[key]
    inner = vars(tree) if hasattr(tree, "__dict__") and path[-1] in vars(tree) else tree
    if delete:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value


def odd_value(rng: random.Random, trees: Trees) -> Any:
    """Something that is not meant to be there."""
    torch = the_torch()
    kind = rng.randrange(8)
    if kind == 0:
        return torch.zeros(rng.choice([(), (0,), (1,), (4,), (4, 4), (2, 2, 2)]), dtype=torch.bfloat16)
    if kind == 1:
        return torch.zeros(16, dtype=rng.choice([torch.int64, torch.bool, torch.float64, torch.complex64]))
    if kind == 2:
        return torch.zeros(4, 6).t()
    if kind == 3:
        tree = trees[rng.choice(list(trees))]
        for key in rng.choice(paths_in(tree)):
            tree = vars(tree)[key] if hasattr(tree, "__dict__") and key in vars(tree) else tree[key]
        return copy.deepcopy(tree)
    return rng.choice(ODD)


@settings(PATIENT, max_examples=100)
@given(st.randoms(use_true_random=False), st.sampled_from(list(KINDS)), st.integers(1, 3))
def test_odd_trees(tmp_path_factory: pytest.TempPathFactory, rng: random.Random, kind: str, count: int) -> None:
    """Only errors that a user is meant to see, or a conversion that ends, and then the way back too."""
    trees = KINDS[kind].trees()
    for _ in range(count):
        file = rng.choice([*map(model_file, range(2)), *map(optimizer_file, range(2))])
        paths = paths_in(trees[file])
        if paths:
            path = rng.choice(rng.choice([paths, [p for p in paths if len(p) < 3]]))
            changed(trees[file], path, odd_value(rng, trees), delete=rng.random() < 0.25)
    root = save(trees, tmp_path_factory.mktemp("odd") / "root", KINDS[kind].maps())
    source = mapped(root) if rng.random() < 0.5 else MegatronSource()
    for number, route in enumerate(ROUTES.values()):
        out = root.parent / f"out{number}"
        try:
            route(root, out, source)
            if number == 0:
                back(out, root.parent / "back")
        except TransformError:
            continue
    shutil.rmtree(root.parent)


@settings(PATIENT, max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from(META), st.integers(1, 2))
def test_odd_pt_meta(tmp_path_factory: pytest.TempPathFactory, shards: Path, rng: Any, name: str, count: int) -> None:
    found = copy_of(shards, tmp_path_factory.mktemp("odd"))
    path = found / "pt_meta" / name
    is_json = path.suffix == ".json"
    tree = json.loads(path.read_text()) if is_json else the_torch().load(path, weights_only=False)
    for _ in range(count):
        value = odd_value(rng, {"x": tree})
        if is_json and not _is_json(value):
            value = rng.choice([None, -1, 0, 3, "x", [], {}, 1.5, True])
        paths = paths_in(tree)
        if paths:
            changed(tree, rng.choice(paths), value, delete=rng.random() < 0.25)
    if is_json:
        path.write_text(json.dumps(tree))
    else:
        the_torch().save(tree, path)
    for number, options in enumerate(({}, {"layout": {"tp": 1, "pp": 1}})):
        try:
            back(found, found.parent / f"back{number}", **options)
        except TransformError:
            continue
    shutil.rmtree(found.parent)


def _is_json(value: Any) -> bool:
    """Sizes without bound have a test of their own."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, int) or value < 1000
