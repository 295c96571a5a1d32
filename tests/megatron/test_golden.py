"""Checkpoints of real Megatron versions: to MindSpore and back, to other layouts and back, bit for bit.

Every case below ../shared/golden/dist_opt is used; `truth` there is what each parameter and its Adam states are, found
by the training itself, and not from the buffers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from strategy.mindspore_file import read_strategy
from tests import support as mindspore_support
from tests.megatron.support import (
    STATES,
    Array,
    back,
    carry_out,
    differences,
    flat_bytes,
    load,
    only_iteration,
    to_megatron,
    to_mindspore,
    trees,
)
from transform_ckpt import execute, planner
from transform_ckpt.execute import RunOptions
from transform_ckpt.megatron.mindspore_target import ConvertedOptions
from transform_ckpt.megatron_plans import MegatronSource, MegatronTarget, converted_to_megatron, megatron_to_mindspore

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "dist_opt"
PREFIXES = {"param": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}
RENAMED = {
    "dense_h_to_4h": "mapping",
    "dense_4h_to_h": "projection",
    "self_attention": "attention",
    "query_key_value": "qkv_proj",
    "dense": "out_proj",
}
"""Components of names that MindSpeed's converter calls otherwise."""
GATED = re.compile(r".*(?:linear_fc1|dense_h_to_4h|mapping)\..*")


# ------------------------------------------------------------------------------------------------------ golden cases


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint that a real Megatron wrote, with what its parameters and Adam states are."""

    path: Path
    sizes: Mapping[str, Any]
    layers: int
    version: str

    def size(self, key: str) -> int:
        """Size of a parallel dimension."""
        return int(self.sizes.get(key, 1))

    @property
    def listed(self) -> bool:
        """Is the optimizer's container the list of buckets?"""
        return self.version.startswith("0.6")

    @property
    def bucket_size(self) -> int | None:
        """What the run was told, in elements."""
        return self.sizes.get("bucket") if self.sizes.get("overlap") else None

    @property
    def given(self) -> dict[str, Any]:
        """Sizes that args of this case lack."""
        return {} if self.listed else {"dp": self.size("dp"), "ep": self.size("ep")}

    def source(self, *, mapped: bool) -> MegatronSource:
        """How it is read, with the maps of the run or without."""
        if mapped:
            return MegatronSource(param_map=str(self.path / "param_map"), given=self.given)
        if self.listed:
            return MegatronSource()
        return MegatronSource(version=self.version, bucket_size=self.bucket_size, given=self.given)

    @property
    def iteration(self) -> Path:
        return only_iteration(self.path)

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """(tp, pp, ep) of every rank directory."""
        for tp in range(self.size("tp")):
            for pp in range(self.size("pp")):
                for ep in range(self.size("ep")):
                    yield tp, pp, ep

    def folder(self, tp: int, pp: int, ep: int) -> Path:
        """Directory of a rank."""
        parts = [f"mp_rank_{tp:02d}"]
        parts += [f"{pp:03d}"] if self.size("pp") > 1 else []
        parts += [f"{ep:03d}"] if self.size("ep") > 1 else []
        return self.iteration / "_".join(parts)

    def truth(self, tp: int, pp: int, ep: int) -> dict[tuple[int, str, str], Array]:
        """(chunk, local name without "module.", state) -> values of one rank."""
        expert = f"_ep{ep:03d}" if self.size("ep") > 1 else ""
        found = {}
        with np.load(self.path / "truth" / f"truth_tp{tp:02d}_pp{pp:03d}{expert}.npz") as arrays:
            for key in arrays:
                chunk, name, state = key.split("|")
                found[int(chunk.removeprefix("chunk")), name.removeprefix("module."), state] = arrays[key]
        return found

    def full(self) -> dict[tuple[str, str], Array]:
        """(name of the whole model, state) -> values; [gates; ups] as on one rank, experts by their global numbers."""
        found = {}
        with np.load(self.path / "truth" / "truth_full.npz") as arrays:
            for key in arrays:
                name, state = key.removeprefix("module.").split("|")
                name, _, stage = name.partition("@pp")
                name, _, expert = name.partition("@ep")
                value = arrays[key]
                if GATED.fullmatch(name):
                    tp = self.size("tp")
                    parts = value.reshape(tp, 2, value.shape[0] // tp // 2, *value.shape[1:])
                    value = parts.swapaxes(0, 1).reshape(value.shape)
                if not stage:  # what a later stage has of a tied embedding is the same tensor
                    found[self.with_expert(name, int(expert or 0)), state] = value
        return found

    def with_layer(self, name: str, pp: int, chunk: int) -> str:
        """A local name with the layer's number in the whole model."""
        vpp = self.size("vpp")
        first = chunk * (self.layers // vpp) + pp * (self.layers // vpp // self.size("pp"))
        return re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + first), name, count=1)

    def with_expert(self, name: str, ep: int) -> str:
        """A local name with the expert's number in the whole model."""
        count = self.size("moe") // self.size("ep")
        return re.sub(r"(?<=local_experts\.)\d+", lambda match: str(int(match[0]) + ep * count), name)

    def global_name(self, name: str, pp: int, chunk: int, ep: int) -> str:
        """A local name as the whole model has it."""
        return self.with_expert(self.with_layer(name, pp, chunk), ep)

    def mindspore_rank(self, tp: int, pp: int, ep: int) -> int:
        """The first global rank that has these parts: order tp-cp-ep-dp-pp, experts cut over TP as all is."""
        return (pp * self.size("dp") + ep) * self.size("tp") + tp


def golden_cases() -> list[Any]:
    """Parameters of a test: every case that is there."""
    if not GOLDEN.is_dir():
        reason = "golden checkpoints absent: expected in ../shared/golden beside this checkout"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    return [pytest.param(_case(path), id=f"{path.parent.name}-{path.name}") for path in sorted(GOLDEN.glob("*/*"))]


def _case(path: Path) -> Case:
    meta = json.loads((path / "truth" / "meta.json").read_text())
    return Case(path, meta["case"], meta["config"]["layers"], meta["megatron_core"].split()[0])


def mindspore_name(name: str) -> str:
    """A name as MindSpeed's converter writes it."""
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


cases = pytest.mark.parametrize("case", golden_cases())
mapped = pytest.mark.parametrize("mapped", [True, False], ids=["maps", "rebuilt"])


# ------------------------------------------------------------------------------------------------------ to MindSpore


@cases
@mapped
@pytest.mark.parametrize("container", ["ckpt", "safetensors"])
def test_every_tensor_is_the_truth(case: Case, container: str, tmp_path: Path, ms: ModuleType, *, mapped: bool) -> None:
    out = to_mindspore(case.path, tmp_path / "out", case.source(mapped=mapped), container=container)
    files = mindspore_support.rank_files(out)
    assert sorted(files) == sorted(case.mindspore_rank(*rank) for rank in case.ranks())
    for rank in case.ranks():
        path = files[case.mindspore_rank(*rank)]
        assert path.name == f"network.{container}"
        expected = expected_tensors(case, rank) | expected_scalars(case, rank)
        mindspore_support.assert_same(mindspore_support.load_file(ms, path), expected, str(path))


def expected_tensors(case: Case, rank: tuple[int, int, int]) -> dict[str, Array]:
    """What a rank's file holds, by MindSpore's names."""
    tp, pp, ep = rank
    return {
        PREFIXES[state] + mindspore_name(case.global_name(name, pp, chunk, ep)): value
        for (chunk, name, state), value in case.truth(tp, pp, ep).items()
    }


def expected_scalars(case: Case, rank: tuple[int, int, int]) -> dict[str, Array]:
    """Step, parameter groups and scheduler, from the rank's model_optim_rng.pt as torch reads it."""
    tree = load(case.folder(*rank) / "model_optim_rng.pt")
    found = {"step_num": np.array(tree["iteration"], np.int64), "epoch_num": np.array(0, np.int64)}
    for number, group in enumerate(groups_of(tree["optimizer"])):
        for key, value in group.items():
            if key == "step":
                found["state_step"] = np.array([value], np.float32)
            elif isinstance(value, bool | int | float):
                found[f"{'learning_rate' if key == 'lr' else key}_group_{number}"] = np.array(value, np.float32)
    styles = {"lr_decay_style": ["constant", "WSD", "linear", "cosine"], "wd_incr_style": ["constant", "linear"]}
    for key, value in tree.get("opt_param_scheduler", {}).items():
        if key in styles:
            found[key] = np.array(styles[key].index(value), np.int64)
        else:
            is_count = key.endswith("_steps")
            found[key] = np.array(value, np.int64 if is_count else np.float64)
    consumed = vars(tree["args"]).get("consumed_train_samples")
    return found if consumed is None else found | {"consumed_train_samples": np.array(consumed, np.int64)}


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Parameter groups of one optimizer, or of several."""
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    return [group for entry in optimizers for group in entry["optimizer"]["param_groups"]]


@cases
def test_only_weights(case: Case, tmp_path: Path, ms: ModuleType) -> None:
    """--convert-param-only takes the model's own bfloat16 weights, which are the rounded master weights."""
    out = to_mindspore(case.path, tmp_path / "out", case.source(mapped=False), param_only=True)
    for rank in case.ranks():
        path = out / f"rank_{case.mindspore_rank(*rank)}" / "network.ckpt"
        found = mindspore_support.load_file(ms, path)
        wanted = {
            name: value.astype(ml_dtypes.bfloat16).astype(np.float32)
            for name, value in expected_tensors(case, rank).items()
            if not name.startswith("exp_avg")
        }
        mindspore_support.assert_same({name: found[name] for name in found if name in wanted}, wanted)
        assert not [name for name in found if name.startswith("exp_avg")]
    again = back(out, tmp_path / "back", layout={})
    for rank in case.ranks():
        path = case.folder(*rank) / "model_optim_rng.pt"
        other = load(only_iteration(again) / path.parent.name / path.name)
        models = {key: value for key, value in load(path).items() if key.startswith("model")}
        assert not list(differences(models, {key: other[key] for key in models}))


@cases
def test_every_rank_and_other_names(case: Case, tmp_path: Path, ms: ModuleType) -> None:
    options = {"container": "safetensors", "every_rank": True, "optimizer_names": "adam", "content": ("exp_avg",)}
    source = case.source(mapped=True)
    out = to_mindspore(case.path, tmp_path / "out", source, prefix="some", **options)
    found = {n: mindspore_support.load_file(ms, p) for n, p in mindspore_support.rank_files(out).items()}
    assert sorted(found) == list(range(case.size("tp") * case.size("pp") * case.size("dp")))
    step = case.size("tp")
    for rank in case.ranks():
        first = case.mindspore_rank(*rank)
        replicas = range(first, first + case.size("tp") * (case.size("dp") - rank[2]), step * case.size("ep"))
        wanted = {
            name.replace("exp_avg.", "adam_m."): value
            for name, value in expected_tensors(case, rank).items()
            if name.startswith("exp_avg.")
        }
        assert wanted
        for replica in replicas:
            tensors = {n: v for n, v in found[replica].items() if n in wanted}
            mindspore_support.assert_same(tensors, wanted)
            assert not [n for n in found[replica] if n.startswith(("adam_v.", "exp_avg")) or "embedding" in n[:12]]


@cases
def test_the_strategy_says_the_slices(case: Case, tmp_path: Path, ms: ModuleType) -> None:
    """Of every parameter whose shards are rectangles; [gate; up] shards are none and must not be listed."""
    out = to_mindspore(case.path, tmp_path / "out", case.source(mapped=True))
    strategy = read_strategy(str(out / "strategy"))
    assert strategy == read_strategy(str(out / "strategy" / "merged_ckpt_strategy.ckpt"))
    assert strategy.world == case.size("tp") * case.size("pp") * case.size("dp")
    full = {PREFIXES[state] + mindspore_name(name): value for (name, state), value in case.full().items()}
    found = mindspore_support.load_ranks(ms, out)
    for rank, tensors in found.items():
        stage = strategy.stage_of(rank)
        layouts = strategy.stages[stage].layouts
        for name, tensor in tensors.items():
            if name in layouts and "local_experts" not in name and name in full:
                box = layouts[name].box(rank - strategy.ranks(stage)[0], full[name].shape)
                index = tuple(slice(s, e) for s, e in zip(box.start, box.stop(), strict=True))
                assert full[name][index].tobytes() == tensor.tobytes(), (rank, name)
        parameters = {name for name in tensors if name in full}
        gated = {name for name in parameters if GATED.fullmatch(name)} if case.size("tp") > 1 else set()
        assert gated.isdisjoint(strategy.names)
        assert {n for n in parameters - gated if "local_experts" not in n} <= layouts.keys()


# --------------------------------------------------------------------------------------------------------- and back

ADDED_ARGS = {
    *("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "expert_model_parallel_size"),
    *("context_parallel_size", "data_parallel_size", "world_size", "padded_vocab_size"),
}
"""What a Megatron that resumes takes its layout from, and args of some cases lack."""


@cases
@mapped
@pytest.mark.parametrize("container", ["ckpt", "safetensors"])
def test_back_again(case: Case, container: str, tmp_path: Path, *, mapped: bool) -> None:
    out = to_mindspore(case.path, tmp_path / "out", case.source(mapped=mapped), container=container)
    again = back(out, tmp_path / "back")
    tracker = "latest_checkpointed_iteration.txt"
    assert (again / tracker).read_bytes() == (case.path / tracker).read_bytes()
    assert only_iteration(again).name == case.iteration.name
    assert_same_trees(case.iteration, only_iteration(again))
    for rank in case.ranks():
        path = case.folder(*rank) / "model_optim_rng.pt"
        old, new = (vars(load(p)["args"]) for p in (path, only_iteration(again) / path.parent.name / path.name))
        assert not list(differences(old, {key: new[key] for key in old if key in new}))
        assert new.keys() - old.keys() <= ADDED_ARGS


def assert_same_trees(wanted: Path, found: Path, *, without: tuple[str, ...] = ()) -> None:
    """Equal .pt files of two iterations, but for args and what only pads buckets."""
    old, new = trees(wanted, without=without), trees(found, without=without)
    assert old.keys() == new.keys()
    faults = [fault for path in old for fault in differences(old[path], new[path], path)]
    assert not faults, "\n".join(faults[:20])


# ---------------------------------------------------------------------------------------------- Megatron to Megatron

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"tp": 1, "pp": 1, "dp": 1},
    "tp2 pp4 dp4": {"tp": 2, "pp": 4, "dp": 4},
    "vpp2": {"tp": 1, "pp": 2, "vpp": 2, "dp": 3},
    "chunks of one layer": {"tp": 2, "pp": 2, "layers_per_virtual_stage": 1},
    "noop": {"pp": 2, "noop_layers": (0, 5)},
    "list": {"pp": 2, "num_layer_list": (1, -1), "tp": 1},
    "short ends": {"pp": 3, "first_stage_layers": 1, "last_stage_layers": 1},
    "dualpipev": {"tp": 2, "pp": 2, "schedule": "dualpipev"},
    "ep1": {"ep": 1},
    "ep4": {"ep": 4, "dp": 4},
    "ep2 tp2 dp4": {"ep": 2, "tp": 2, "dp": 4},
    "etp1": {"ep": 2, "tp": 2, "etp": 1, "dp": 2},
}


@cases
@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_and_back(case: Case, name: str, tmp_path: Path) -> None:
    layout = {
        key: tuple(n if n > 0 else case.layers + n for n in value) if key == "num_layer_list" else value
        for key, value in LAYOUTS[name].items()
    }
    if ("ep" in layout) != bool(case.size("moe") > 1):
        pytest.skip("experts, or none")
    options: dict[str, Any] = {"version": case.version, "bucket_size": case.bucket_size}
    other = to_megatron(case.path, tmp_path / "other", case.source(mapped=True), layout=layout, **options)
    again = to_megatron(other, tmp_path / "again", MegatronSource(**options), layout=first_layout(case), **options)
    assert_same_trees(case.iteration, only_iteration(again), without=("rng_state",))


def first_layout(case: Case) -> dict[str, int]:
    """A case's own sizes."""
    return {key: case.size(key) for key in ("tp", "pp", "vpp", "ep", "dp")}


@cases
def test_the_other_container_and_back(case: Case, tmp_path: Path) -> None:
    """Parameter groups come in another order where the other version finds them by their marks."""
    there, here = ("coalesced", "list") if case.listed else ("list", "coalesced")
    options: dict[str, Any] = {"version": "0.16.1" if case.listed else "0.6.0", "bucket_size": case.bucket_size}
    other = to_megatron(case.path, tmp_path / "other", case.source(mapped=True), container=there, **options)
    assert ("per_bucket_numel" in str(load(next(other.rglob("distrib_optim.pt"))))) == (there == "list")
    source = MegatronSource(**options)
    options["version"] = case.version
    again = to_megatron(other, tmp_path / "again", source, container=here, layout=first_layout(case), **options)
    assert_same_trees(case.iteration, only_iteration(again), without=("rng_state", "optimizer"))
    for rank in case.ranks():
        path = case.folder(*rank) / "model_optim_rng.pt"
        found = only_iteration(again) / path.parent.name / path.name
        old, new = (sorted(groups_of(load(p)["optimizer"]), key=str) for p in (path, found))
        assert not list(differences(old, new))


@cases
@mapped
def test_one_rank_is_the_whole_truth(case: Case, tmp_path: Path, *, mapped: bool) -> None:
    """Merged, and decoded without the product: without padding, buckets are the parameters in reverse."""
    layout = {"tp": 1, "pp": 1, "ep": 1, "dp": 1}
    options = {"layout": layout, "container": "list", "version": "0.6.0", "bucket_size": case.bucket_size}
    merged = only_iteration(to_megatron(case.path, tmp_path / "out", case.source(mapped=mapped), **options))
    (folder,) = merged.iterdir()
    model = dict(leaves(load(folder / "model_optim_rng.pt")["model"]))
    states = load(folder / "distrib_optim.pt")
    ((key, content),) = states[0].items()
    sizes = states["per_bucket_numel_unpadded"][0][key]
    found: dict[tuple[str, str], Array] = {}
    for state in STATES:
        flat = np.concatenate([b.numpy()[:n] for b, n in zip(content[state], sizes, strict=True)])
        at = 0
        for name in reversed(model):
            found[name, state] = flat[at : at + model[name].numel()].reshape(tuple(model[name].shape))
            at += model[name].numel()
        assert at == flat.size
    wanted = case.full()
    assert found.keys() == wanted.keys()
    assert not [key for key in wanted if found[key].tobytes() != wanted[key].tobytes()]
    rounded = {name: wanted[name, "param"].astype(ml_dtypes.bfloat16).tobytes() for name in model}
    assert not [name for name in model if flat_bytes(model[name]) != rounded[name]]


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors of a state dict, nested or flat, under their joined names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        elif value is not None:
            yield above + key, value


@cases
def test_through_mindspore_to_another_layout(case: Case, tmp_path: Path) -> None:
    """What MindSpore's shards become on one rank is what the Megatron files become there."""
    layout = {"tp": 1, "pp": 1, "dp": 1} | ({"ep": 1} if case.size("ep") > 1 else {})
    options = {"layout": layout, "bucket_size": case.bucket_size}
    shards = to_mindspore(case.path, tmp_path / "shards", case.source(mapped=True))
    through = back(shards, tmp_path / "through", **options)
    direct = to_megatron(case.path, tmp_path / "direct", case.source(mapped=True), **options)
    assert_same_trees(only_iteration(direct), only_iteration(through), without=("rng_state",))


# -------------------------------------------------------------------------------------------------------- same bytes


@cases
def test_workers_change_no_byte(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)
    monkeypatch.setattr(planner, "UNIT_NBYTES", 4096)
    found: list[dict[str, bytes]] = []
    for workers in (1, 2):
        out, again = tmp_path / f"out{workers}", tmp_path / f"back{workers}"
        plan = megatron_to_mindspore(str(case.path), case.source(mapped=True), ConvertedOptions())[0]
        assert len(plan.units) > 2
        carry_out(plan, out, RunOptions(workers=workers))
        carry_out(converted_to_megatron(str(out), MegatronTarget(keep_step=True)), again, RunOptions(workers=workers))
        files = [path for top in (out, again) for path in sorted(top.rglob("*")) if path.is_file()]
        found.append(
            {str(path.relative_to(tmp_path)).replace(str(workers), "", 1): path.read_bytes() for path in files}
        )
    assert found[0].keys() == found[1].keys()
    assert not [path for path in found[0] if found[0][path] != found[1][path]]
    assert_same_trees(case.iteration, only_iteration(tmp_path / "back2"))
