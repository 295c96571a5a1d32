"""The way in for tests: checkpoints that real megatron-core wrote, what is in them, and its verdict on any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.megatron_real import logical
from tests.megatron_real.case import STATES, Case
from tests.megatron_real.environments import Failed, environment
from tests.megatron_real.logical import Array, Cut


def generate(case: Case, out: Path) -> Path:
    """Runs a case and writes its Megatron-LM directory and `truth/`; returns `out`.  Unavailable, or Failed."""
    out.mkdir(parents=True, exist_ok=True)
    environment(case.version).call({"job": "generate", "case": case.to_json(), "directory": str(out.resolve())})
    return out


def load_back(case: Case, directory: Path) -> dict[str, str]:
    """What the real loader of a case's version and layout gets wrong from a directory; empty where all is equal.

    Keys are "rank{r}|chunk{v}|{name}|{model, param, exp_avg or exp_avg_sq}"; "error" has the traceback of a loader
    that raised.
    """
    request = {"job": "load_back", "case": case.to_json(), "directory": str(directory.resolve())}
    try:
        ranks = environment(case.version).call(request)
    except Failed as error:
        return {"error": str(error)}
    return {f"rank{rank}|{key}": text for rank, found in enumerate(ranks) for key, text in found.items()}


def stored_truth(directory: Path) -> Iterator[tuple[str, Cut, dict[str, Array]]]:
    """Every stored parameter of every rank's directory: "truth_TT...|chunk{v}|{name}", its cut, its states."""
    for path in sorted((directory / "truth").glob("truth_*.json")):
        cuts = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as arrays:
            for key, (name, shape, boxes) in cuts.items():
                cut = Cut(name, tuple(shape), tuple(tuple((a, b) for a, b in box) for box in boxes))
                yield f"{path.stem}|{key}", cut, {state: arrays[f"{key}|{state}"] for state in STATES}


def logical_truth(directory: Path) -> dict[str, Array]:
    """ "{logical name}|{state}" -> the whole array, put together from the ranks; ValueError where replicas differ."""
    wholes: dict[str, Array] = {}
    for key, cut, states in stored_truth(directory):
        for state, stored in states.items():
            whole = wholes.setdefault(f"{cut.logical}|{state}", np.full(cut.shape, np.nan, np.float32))
            held = cut.take(whole)
            if not (np.isnan(held).all() or held.tobytes() == stored.tobytes()):
                raise ValueError(f"{key}: differs from another rank's copy of {cut.logical}")
            cut.put(whole, stored.reshape(-1))
    for name, whole in wholes.items():
        if np.isnan(whole).any():
            raise ValueError(f"{name}: no rank holds a part of it")
    return wholes


def expected_state(directory: Path) -> dict[str, Array]:
    """The same names as logical_truth, computed from them and their shapes alone."""
    shapes = {cut.logical: cut.shape for _, cut, _ in stored_truth(directory)}
    return {
        f"{name}|{state}": array
        for name, shape in sorted(shapes.items())
        for state, array in logical.trained(name, shape).items()
    }
