"""What a rank does for a request: train and save, or load and compare.  Imported where megatron-core is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from megatron.core import package_info

from tests.megatron_real import logical, saving, sharded
from tests.megatron_real.case import ITERATION, STATES, Case
from tests.megatron_real.session import Parameter, Session, iteration_directory, rank_directory, start, writes_model
from transform_ckpt import param_map

_WRECK = 7.0


def check_version(wanted: str) -> None:
    """That the wheel on the path is the one asked for."""
    found = package_info.__version__
    if found != wanted:
        raise RuntimeError(f"megatron-core {wanted} wanted, {found} found: {package_info.__file__}")


def generate(case: Case, base: Path) -> list[str]:
    """Trains, saves, and writes the truth beside; returns the names of the files this rank wrote."""
    session = start(case)
    session.train()
    directory = base / f"iter_{ITERATION:07d}" / rank_directory(case)
    directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    session.optimizer.save_parameter_state(str(directory / "distrib_optim.pt"))
    whole = {parameter.key: _gather(parameter) for parameter in session.parameters}
    param_map.save(session.chunks, base)
    if not writes_model():
        return []
    torch.save(saving.model_file(session), directory / "model_optim_rng.pt")
    truth = base / "truth"
    truth.mkdir(exist_ok=True)
    stem = rank_directory(case).replace("mp_rank", "truth")
    np.savez(truth / f"{stem}.npz", **{f"{key}|{name}": a for key, s in whole.items() for name, a in s.items()})
    cuts = {p.key: [p.cut.logical, p.cut.shape, p.cut.boxes] for p in session.parameters}
    (truth / f"{stem}.json").write_text(json.dumps(cuts))
    if torch.distributed.get_rank() == 0:
        (base / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return [directory.name]


def _gather(parameter: Parameter) -> dict[str, logical.Array]:
    """The whole local parameter's states, from the shards of its data-parallel ranks; each element comes from one."""
    group, shard = parameter.inner.data_parallel_group, parameter.shard()
    gathered = {}
    for number, name in enumerate(STATES):
        bits = torch.zeros(2, parameter.live.numel(), dtype=torch.int32)
        if shard is not None:
            state = list(parameter.states().values())[number]
            bits[0, slice(*shard)] = state.view(torch.int32).reshape(-1)
            bits[1, slice(*shard)] = 1
        torch.distributed.all_reduce(bits, group=group)
        if not bool((bits[1] == 1).all()):
            raise RuntimeError(f"{parameter.key}: its shards do not cover it once")
        gathered[name] = bits[0].view(torch.float32).reshape(parameter.live.shape).numpy()
    return gathered


def load_back(case: Case, base: Path) -> dict[str, str]:
    """Wrecks a fresh session, loads as Megatron-LM's load_checkpoint does, and says what differs from the truth."""
    session = start(case)
    for parameter in session.parameters:
        parameter.live.data.fill_(_WRECK)
    directory = iteration_directory(base) / rank_directory(case)
    saved = torch.load(directory / "model_optim_rng.pt", map_location="cpu", weights_only=False)
    for number, chunk in enumerate(session.chunks):
        chunk.load_state_dict(saved["model" if case.vpp == 1 else f"model{number}"], strict=True)
    session.optimizer.load_state_dict(saved["optimizer"])
    for parameter in session.parameters:
        if parameter.shard() is not None:
            for state in parameter.states().values():
                state.fill_(_WRECK)
    session.optimizer.load_parameter_state(str(directory / "distrib_optim.pt"))
    return dict(_differences(session)) | dict(_group_differences(session))


def _differences(session: Session) -> Iterator[tuple[str, str]]:
    for parameter in session.parameters:
        cut = parameter.cut
        expected = {name: cut.take(a) for name, a in logical.trained(cut.logical, cut.shape).items()}
        model = parameter.live.data.reshape(-1).view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        yield from _compare(f"{parameter.key}|model", model, logical.bfloat16(expected["param"]))
        shard = parameter.shard()
        if shard is not None:
            for name, state in parameter.states().items():
                yield from _compare(f"{parameter.key}|{name}", state.numpy().reshape(-1), expected[name][slice(*shard)])


def _compare(key: str, found: logical.Array, expected: logical.Array) -> Iterator[tuple[str, str]]:
    if found.tobytes() == expected.tobytes():
        return
    bits = np.dtype(f"u{expected.itemsize}")
    wrong = np.flatnonzero(found.view(bits) != expected.view(bits))
    first = int(wrong[0])
    yield key, f"{wrong.size} of {expected.size} differ, the first at {first}: {found[first]} not {expected[first]}"


def _group_differences(session: Session) -> Iterator[tuple[str, str]]:
    """Of groups that train something on this rank."""
    for number, inner in enumerate(session.inners):
        for group in inner.optimizer.param_groups:
            expected = {
                "step": ITERATION,
                "lr": logical.LR,
                "max_lr": logical.LR,
                "min_lr": logical.MIN_LR,
                "weight_decay": logical.WEIGHT_DECAY * group["wd_mult"],
                "eps": logical.EPS,
                "betas": logical.BETAS,
                "bias_correction": True,
            }
            found = {name: group.get(name) for name in expected}
            if group["params"] and found != expected:
                yield f"optimizer{number}|wd_mult {group['wd_mult']}", f"{found} not {expected}"


JOBS: dict[str, Any] = {"generate": generate, "load_back": load_back, "global_pieces": sharded.global_pieces}
