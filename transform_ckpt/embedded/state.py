"""Values into the network and out of it: first weights, MindSpore's loading, files as CheckpointMonitor leaves them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor

from transform_ckpt.embedded.collectives import Array
from transform_ckpt.embedded.config import EmbeddedConfig, Saving
from transform_ckpt.embedded.layout import Slice
from transform_ckpt.errors import InputError, Problems, StorageError, name_some
from transform_ckpt.states import is_state, split_optimizer

Loader = Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Array | str]]
"""Given name -> shape on this rank of all that is wanted: the values."""

Report = Callable[[str], object]

_SPREAD = 0.02
"""Standard deviation of first weights, MindFormers' default (initializer_range)."""


def first_values(config: EmbeddedConfig) -> Callable[[Slice], Array]:
    """Drawn from seed and name for the whole tensor, so that every layout starts with the same weights."""

    def draw(found: Slice) -> Array:
        index = tuple(slice(a, b) for a, b in zip(found.box.start, found.box.stop(), strict=True))
        if len(found.full) == 1:
            return np.ones(found.shape, np.float32)
        words = np.frombuffer(sha256(found.name.encode()).digest(), dtype=np.uint32)
        generator = np.random.default_rng([config.seed, *(int(word) for word in words)])
        values = generator.standard_normal(found.full, dtype=np.float32)
        return np.ascontiguousarray(values[index]) * np.float32(_SPREAD)

    return draw


def zeros(found: Slice) -> Array:
    """What a weight holds that will be loaded."""
    return np.zeros(found.shape, np.float32)


# ------------------------------------------------------------------------------------------------ loading


def load_into(cell: Any, parameters: Sequence[Parameter], load: Loader, where: str, report: Report) -> None:
    """Fill `parameters` (all of them of `cell`) by mindspore.load_param_into_net; InputError unless every one is."""
    wanted = {parameter.name: parameter for parameter in parameters}
    given = load({name: tuple(parameter.shape) for name, parameter in wanted.items()})
    _check(wanted, given, where)
    casts: Counter[str] = Counter()
    taken = {}
    for name, parameter in wanted.items():
        value, kind = np.asarray(given[name]), mindspore.dtype_to_nptype(parameter.dtype)
        if value.dtype != kind:
            casts[f"{value.dtype} to {np.dtype(kind)}"] += 1
        taken[name] = Parameter(Tensor(np.ascontiguousarray(value).astype(kind)), name=name)
    left, _ = mindspore.load_param_into_net(cell, taken)
    left = [name for name in left if name in wanted]
    if left:
        raise InputError(f"{where}: mindspore.load_param_into_net did not load {name_some(left)}")
    report(f"loaded {len(taken)} parameters")
    for cast, count in sorted(casts.items()):
        report(f"cast {count} of them from {cast}")
    unused = [name for name, value in given.items() if name not in wanted and _matters(name, value)]
    if unused:
        report(f"not in this network, left out: {name_some(unused)}")


def _matters(name: str, value: Array | str) -> bool:
    """Counters and optimizer states that nobody asked for are no news."""
    return not (isinstance(value, str) or split_optimizer(name)[0] or is_state(name, "", np.shape(value)))


def _check(wanted: Mapping[str, Parameter], given: Mapping[str, Array | str], where: str) -> None:
    problems = Problems()
    missing = [name for name in wanted if name not in given]
    if missing:
        problems.add(
            f"{where}: the checkpoint lacks {len(missing)} parameters: {name_some(missing)}; expected the weights of "
            "this model, and to resume also its optimizer states (resume_training: False takes weights only)"
        )
    for name, parameter in wanted.items():
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, str) or np.shape(value) != tuple(parameter.shape):
            found = "a string" if isinstance(value, str) else f"shape {list(np.shape(value))}"
            problems.add(f"{where}: {name}: expected shape {list(parameter.shape)} on this rank, found {found}")
    problems.raise_if_any(InputError)


# ------------------------------------------------------------------------------------------------ saving


class Saver:
    """Writes `{output}/checkpoint/rank_{r}/{prefix}_rank_{r}-{epoch}_{step}.{format}` and meta.json beside it.

    Names, append_dict and what is kept: MindFormers 1.9.0 core/callback/callback.py `CheckpointMonitor`.
    """

    def __init__(self, saving: Saving, output_dir: str, rank: int, report: Report) -> None:
        self.saving = saving
        self.directory = os.path.join(output_dir, "checkpoint", f"rank_{rank}")
        self.stem = f"{saving.prefix}_rank_{rank}"
        self.report = report

    def save(self, parameters: Sequence[Parameter], counters: Mapping[str, Any], epoch: int, step: int) -> None:
        """One file under its final name when it is whole; `step` is that of the epoch, from 1."""
        name = f"{self.stem}-{epoch}_{step}.{self.saving.format}"
        part = os.path.join(self.directory, f".part-{name}")
        listed = [{"name": parameter.name, "data": parameter} for parameter in parameters]
        try:
            os.makedirs(self.directory, exist_ok=True)
            mindspore.save_checkpoint(
                listed, part, integrated_save=False, append_dict=dict(counters), format=self.saving.format
            )
            os.replace(part, os.path.join(self.directory, name))
            self._write_meta({"last_epoch": epoch, "last_step": step, "last_ckpt_file": name})
            self._forget(name)
        except (OSError, RuntimeError) as error:
            raise StorageError(f"{os.path.join(self.directory, name)}: cannot be written: {error}") from error
        self.report(f"saved {os.path.join(self.directory, name)}")

    def _write_meta(self, meta: Mapping[str, Any]) -> None:
        part = os.path.join(self.directory, ".part-meta.json")
        with open(part, "w", encoding="utf-8") as file:
            json.dump(meta, file)
        os.replace(part, os.path.join(self.directory, "meta.json"))

    def _forget(self, newest: str) -> None:
        """Remove the oldest files of this prefix until keep_checkpoint_max are left."""
        with os.scandir(self.directory) as entries:
            files = [
                (entry.name != newest, -entry.stat().st_mtime_ns, entry.path)
                for entry in entries
                if entry.name.startswith(f"{self.stem}-") and entry.name.endswith(f".{self.saving.format}")
            ]
        for *_, path in sorted(files)[self.saving.keep or len(files) :]:
            os.unlink(path)
