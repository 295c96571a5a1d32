"""What the tests of whole Megatron checkpoints share: torch's reading, conversions, a small checkpoint of our own.

The small checkpoint is made with torch and a few lines of NumPy, nothing of the product: a rank's parameters lie in
their buffers one behind the other, in the reverse of the model's order, as megatron-core 0.6 (a list of buckets) and
0.7 (one tensor) have them.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import importlib.util
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from transform_ckpt.execute import RunOptions, run
from transform_ckpt.megatron.mindspore_target import ConvertedOptions
from transform_ckpt.megatron_plans import (
    MegatronSource,
    MegatronTarget,
    converted_to_megatron,
    megatron_to_megatron,
    megatron_to_mindspore,
)
from transform_ckpt.planner import Plan

Array = np.ndarray[Any, np.dtype[Any]]
Trees = dict[str, Any]
"""Path below the checkpoint -> what torch.save writes there."""

STATES = ("param", "exp_avg", "exp_avg_sq")
ONE_WORKER = RunOptions(workers=1)


class ModelType(enum.Enum):
    """Stands for megatron.core.enums.ModelType in files that torch reads."""

    encoder_or_decoder = 1


@cache
def torch() -> ModuleType:
    """The real torch, imported once in a session."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: make venv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch")


def load(path: Path) -> Any:
    """A file by torch.load, which runs nothing: the few classes of Megatron's files are allowed by name."""
    found = torch()
    known: list[Any] = [argparse.Namespace, (ModelType, "megatron.core.enums.ModelType"), np.dtype, np.ndarray]
    known += [type(np.dtype(code)) for code in ("uint32", "int64")]
    reconstruct = importlib.import_module("numpy._core.multiarray")._reconstruct
    known += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with found.serialization.safe_globals(known):
        return found.load(path, weights_only=True, map_location="cpu")


def flat_bytes(tensor: Any) -> bytes:
    """The elements of a tensor of torch in C order."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch().uint8).numpy().tobytes())


def differences(one: Any, two: Any, where: str = "") -> Iterator[str]:
    """Where two trees of torch files are not the same: types, keys and their order, values, bits of tensors."""
    if type(one) is not type(two):
        yield f"{where}: {type(one).__name__} and {type(two).__name__}"
        return
    if isinstance(one, argparse.Namespace):
        one, two = vars(one), vars(two)
    if where.endswith("/param_groups") and all("default_config" in group for group in (*one, *two)):
        one, two = (sorted(groups, key=lambda g: g["wd_mult"]) for groups in (one, two))  # these are found by marks
    if isinstance(one, list | tuple):
        one, two = dict(enumerate(one)), dict(enumerate(two))
    if not isinstance(one, dict):
        if _comparable(one) != _comparable(two):
            yield f"{where}: {one!r:.80} and {two!r:.80}"
        return
    if list(one) != list(two):
        yield f"{where}: keys {list(one)} and {list(two)}"
    for key in one.keys() & two.keys():
        yield from differences(one[key], two[key], f"{where}/{key}")


def _comparable(value: Any) -> Any:
    """Type, shape and bytes of a tensor or an array; another value as it is."""
    if isinstance(value, torch().Tensor):
        return value.dtype, value.shape, flat_bytes(value)
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def unpadded(tree: Any) -> Any:
    """The tree of a distrib_optim.pt with every bucket cut where its padding begins, which nobody has initialised."""
    if isinstance(tree, list):
        return [unpadded(entry) for entry in tree]
    if tree is None or "per_bucket_numel_unpadded" not in tree:
        return tree
    found = dict(tree)
    for number, sizes in enumerate(tree["per_bucket_numel_unpadded"]):
        found[number] = {
            key: {
                state: [bucket[:used] for bucket, used in zip(buckets, sizes[key], strict=True)]
                for state, buckets in content.items()
            }
            for key, content in tree[number].items()
        }
    return found


def trees(iteration: Path, *, without: Sequence[str] = ()) -> Trees:
    """Every .pt file of an iteration by its path in it: args apart, buckets without padding."""
    found: Trees = {}
    for path in sorted(iteration.rglob("*.pt")):
        tree = load(path)
        if path.name == "distrib_optim.pt":
            tree = unpadded(tree)
        else:
            tree = {key: value for key, value in tree.items() if key not in {"args", *without}}
        found[str(path.relative_to(iteration))] = tree
    return found


def only_iteration(root: Path) -> Path:
    """The one iteration's directory of a checkpoint."""
    (found,) = (path for path in root.iterdir() if path.is_dir() and re.fullmatch(r"iter_\d+|release", path.name))
    return found


# --------------------------------------------------------------------------------------------------- whole conversions


def to_mindspore(src: Path, dst: Path, source: MegatronSource | None = None, **options: Any) -> Path:
    """Converted to rank directories.  Returns `dst`."""
    carry_out(megatron_to_mindspore(str(src), source or MegatronSource(), ConvertedOptions(**options))[0], dst)
    return dst


def to_megatron(src: Path, dst: Path, source: MegatronSource | None = None, **options: Any) -> Path:
    """Converted to another Megatron layout.  Returns `dst`."""
    carry_out(megatron_to_megatron(str(src), source or MegatronSource(), MegatronTarget(**options)), dst)
    return dst


def back(src: Path, dst: Path, **options: Any) -> Path:
    """Rank directories converted to Megatron again, called after their step.  Returns `dst`."""
    carry_out(converted_to_megatron(str(src), MegatronTarget(keep_step=True, **options)), dst)
    return dst


def carry_out(plan: Plan, dst: Path, options: RunOptions = ONE_WORKER) -> None:
    """Write a plan's output."""
    run(plan, str(dst), options)


# -------------------------------------------------------------------------------------------- a checkpoint of our own

HIDDEN, ROWS, WIDTH = 4, 8, 6
"""Of the small model: its hidden size, its vocabulary, the width of its MLP."""


@dataclass(frozen=True, slots=True)
class Small:
    """A small gated model of two layers on two TP ranks of one stage, in either container of the optimizer."""

    coalesced: bool = False
    buckets: bool = True

    def trees(self) -> Trees:
        """Its files."""
        found: Trees = {}
        for rank in range(2):
            values = _values(rank)
            folder = f"iter_0000007/mp_rank_{rank:02d}"
            found[f"{folder}/model_optim_rng.pt"] = _model_tree(values)
            found[f"{folder}/distrib_optim.pt"] = self._optimizer_tree(values)
        return found

    def maps(self) -> dict[str, Any]:
        """The parameter maps of its ranks, as JSON has them."""
        return {f"param_map_buffer0_dp0tp{rank}pp0vpp0.json": self._map(_values(rank)) for rank in range(2)}

    def _placed(self, values: dict[str, Any]) -> tuple[list[tuple[str, int, int, int]], list[int]]:
        """(name, start, end, bucket) in buffer order, and the sizes of buckets: the second has the first layer."""
        placed, sizes, at = [], [0], 0
        for name in reversed(values):
            if self.buckets and len(sizes) == 1 and name.startswith("decoder.layers.0"):
                sizes.append(0)
            numel = int(np.prod(values[name]["param"].shape))
            placed.append((name, at, at + numel, len(sizes) - 1))
            sizes[-1] += numel
            at += numel
        return placed, sizes

    def _map(self, values: dict[str, Any]) -> dict[str, Any]:
        placed, _ = self._placed(values)
        return {
            f"module.{name}": ["torch.bfloat16", list(values[name]["param"].shape), start, end, bucket]
            for name, start, end, bucket in placed
        }

    def _optimizer_tree(self, values: dict[str, Any]) -> dict[Any, Any]:
        found = torch()
        placed, sizes = self._placed(values)
        key = (found.bfloat16, found.float32)
        flat = {s: found.from_numpy(np.concatenate([values[n][s].ravel() for n, *_ in placed])) for s in STATES}
        if self.coalesced:
            return {"buckets_coalesced": True, 0: {key: {**flat, "numel_unpadded": sum(sizes)}}}
        split = {state: [part.clone() for part in tensor.split(sizes)] for state, tensor in flat.items()}
        listed = {f"per_bucket_numel{suffix}": [{key: list(sizes)}] for suffix in ("", "_unpadded")}
        return {**listed, 0: {key: split}}


def _values(rank: int) -> dict[str, dict[str, Array]]:
    """The parameters of a TP rank in the model's order, each with its states; replicated ones are equal on all."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (ROWS // 2, HIDDEN)}
    for layer in range(2):
        above = f"decoder.layers.{layer}."
        shapes[f"{above}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{above}self_attention.linear_qkv.weight"] = (3 * HIDDEN // 2, HIDDEN)
        shapes[f"{above}self_attention.linear_proj.weight"] = (HIDDEN, HIDDEN // 2)
        shapes[f"{above}mlp.linear_fc1.weight"] = (WIDTH, HIDDEN)
        shapes[f"{above}mlp.linear_fc2.weight"] = (HIDDEN, WIDTH // 2)
    shapes |= {"decoder.final_layernorm.weight": (HIDDEN,), "output_layer.weight": (ROWS // 2, HIDDEN)}
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng((number, 0 if "layernorm" in name else rank))
        found[name] = {state: rng.standard_normal(shape).astype(np.float32) for state in STATES}
    return found


def _model_tree(values: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    found = torch()
    model = OrderedDict((name, found.from_numpy(v["param"].copy()).to(found.bfloat16)) for name, v in values.items())
    group = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "lr": 0.25}
    groups = [{**group, "step": 7}, {**group, "wd_mult": 0.0, "step": 7}]
    args = {
        "num_layers": 2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "untie_embeddings_and_output_weights": True,
        "overlap_grad_reduce": False,
        "consumed_train_samples": 70,
        "global_batch_size": 10,
    }
    return {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": model,
        "optimizer": {"optimizer": {"param_groups": groups}},
        "opt_param_scheduler": {"max_lr": 0.5, "num_steps": 70, "lr_decay_style": "cosine"},
        "rng_state": [{"torch_rng_state": found.arange(9, dtype=found.uint8), "rng_tracker_states": {}}],
    }


def save(files: Trees, root: Path, maps: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint with its tracker, and its maps to param_map.  Returns `root`."""
    for relpath, tree in files.items():
        path = root / relpath
        path.parent.mkdir(parents=True, exist_ok=True)
        torch().save(tree, path)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    for name, content in (maps or {}).items():
        (root / "param_map").mkdir(exist_ok=True)
        (root / "param_map" / name).write_text(json.dumps(content))
    return root
