"""What the product makes of a case's directory for another case, and how two directories differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.megatron_real.case import Case
from transform_ckpt import execute
from transform_ckpt.megatron.mindspore_target import ConvertedOptions
from transform_ckpt.megatron_plans import (
    MegatronSource,
    MegatronTarget,
    converted_to_megatron,
    megatron_to_megatron,
    megatron_to_mindspore,
)
from transform_ckpt.planner import Plan

torch = pytest.importorskip("torch", reason="torch is not installed: make venv")

_LAYOUT = ("tp", "pp", "vpp", "ep", "cp", "dp", "first_stage_layers", "last_stage_layers")
_OWN_ARGS = {"rank", "sequence_parallel"}
"""Of one rank; what a layout does not decide."""


def run(plan: Plan, out: Path) -> Path:
    """Writes it, in one process."""
    execute.run(plan, str(out), execute.RunOptions(workers=1))
    return out


def target(case: Case, source: Case) -> MegatronTarget:
    """The options of a destination that a case's own loader is to take: all of the layout, else what differs."""
    layout = {name: getattr(case, name) for name in _LAYOUT} | {"etp": case.expert_tp}
    container = "coalesced" if case.at_least("0.7.0") else "list"
    return MegatronTarget(
        layout=layout,
        version=None if case.version == source.version else case.version,
        container=None if source.at_least("0.7.0") == case.at_least("0.7.0") else container,
        bucket_size=None if case.bucket_size == source.bucket_size else case.bucket_size or 0,
        keep_step=True,
    )


def reshard(source: Path, options: MegatronTarget, out: Path, *, optimizer: bool = True) -> Path:
    """Megatron files of Megatron files."""
    return run(megatron_to_megatron(str(source), MegatronSource(optimizer=optimizer), options), out)


def through_mindspore(source: Path, options: MegatronTarget, out: Path, container: str) -> Path:
    """Megatron files of MindSpore files of Megatron files."""
    plan, _ = megatron_to_mindspore(str(source), MegatronSource(), ConvertedOptions(container=container))
    run(plan, out / "mindspore")
    return run(converted_to_megatron(str(out / "mindspore"), options), out / "megatron")


def buffers(directory: Path, param_map: Path | None) -> dict[Any, list[Any]]:
    """Parameter ranges of every buffer: as the param_map says, or rebuilt from the model."""
    found = MegatronSource(param_map=None if param_map is None else str(param_map)).open(str(directory))
    return {key: [entry.map.ranges for entry in placed] for key, placed in found.buffers.items()}


def load(path: Path) -> Any:
    """A torch file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what megatron.core.enums imports
        return torch.load(path, weights_only=False)


def models(directory: Path) -> dict[str, Any]:
    """ "{directory}|{model key}|{name}" -> tensor or extra state, in the order of the files, nested names joined."""
    found: dict[str, Any] = {}
    for path in sorted(directory.glob("*/*/model_optim_rng.pt")):
        for key, model in load(path).items():
            if key.startswith("model"):
                found.update((f"{path.parent.name}|{key}|{name}", value) for name, value in _leaves(model, ()))
    return found


def _leaves(tree: Any, above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield "/".join((*above, key)), value


def assert_same_models(found: Path, expected: Path) -> None:
    """The same names in the same order with the same bits, in every rank's file that Megatron has."""
    one, two = models(found), models(expected)
    folders = {name.partition("|")[0] for name in two}
    one = {name: value for name, value in one.items() if name.partition("|")[0] in folders}
    assert list(one) == list(two)
    for name, value in two.items():
        assert one[name] is None if value is None else bits(one[name]) == bits(value), name


def bits(tensor: Any) -> tuple[Any, Any, bytes]:
    """Dtype, shape and bytes."""
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_files(found: Path, expected: Path) -> None:
    """The same rank directories, optimizer files of the same structure, and args of the same layout."""
    for path in sorted(expected.glob("*/*/*.pt")):
        mine = found / path.relative_to(expected)
        assert mine.is_file(), f"{mine} is missing"
        if path.name == "distrib_optim.pt":
            assert _tree(load(mine), _kind) == _tree(load(path), _kind), mine
        else:
            one, two = load(mine), load(path)
            assert one.keys() | {"rng_state"} == two.keys() | {"rng_state"}, mine
            _assert_same_args(vars(one["args"]), vars(two["args"]), mine)
    optimizers = [{path.parent.name for path in base.glob("*/*/distrib_optim.pt")} for base in (found, expected)]
    assert optimizers[0] == optimizers[1]


def assert_same_optimizers(found: Path, expected: Path) -> None:
    """The same bits in every distrib_optim.pt, padding included."""
    for path in sorted(expected.glob("*/*/distrib_optim.pt")):
        mine = found / path.relative_to(expected)
        assert _tree(load(mine), bits) == _tree(load(path), bits), mine


def _tree(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """The tree with something else for each tensor."""
    if isinstance(tree, dict):
        return {key: _tree(value, leaf) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_tree(value, leaf) for value in tree]
    return leaf(tree) if isinstance(tree, torch.Tensor) else tree


def _kind(tensor: Any) -> tuple[Any, Any]:
    return tensor.dtype, tensor.shape


def _assert_same_args(one: dict[str, Any], two: dict[str, Any], where: Path) -> None:
    """What another layout on the way has left is None."""
    assert {name for name, value in one.items() if name in two or value is not None} == two.keys(), where
    differ = {
        name: (one[name], two[name]) for name in two if name not in _OWN_ARGS and str(one[name]) != str(two[name])
    }
    assert not differ, where
