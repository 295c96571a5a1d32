"""Write a Llama-like Megatron checkpoint with its distributed optimizer, of a given size.

    python -m benchmarks.make_dist_opt OUT --gb 4.3 --container list --tp 2 --pp 2

OUT/iter_0000010/mp_rank_TT[_PPP]/{model_optim_rng,distrib_optim}.pt, OUT/latest_checkpointed_iteration.txt and, as
MindSpeed's patch of Megatron-LM leaves them, OUT/param_map/*.json.  `list` is what megatron-core 0.6 writes (the model
of megatron.legacy), `coalesced` what 0.7 to 0.16 do (the model of Megatron-Core).  One rank is in memory at a time, and
torch.save writes it.  The weights are the master weights in bf16; the values depend on the seed and the names, not on
the parallel layout, so that a checkpoint of one layout is the expected conversion of another.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks.make_state import values
from tests.support import Array

CONTAINERS = ("list", "coalesced")
ITERATION, DP, LAYERS, HEADS, GROUPS, SAMPLES = 10, 2, 4, 32, 8, 64
ADAM = {"param": "", "exp_avg": "adam_m.", "exp_avg_sq": "adam_v."}
"""States, and the prefixes by which make_state.values knows that a second moment is not negative."""
KEY = (torch.bfloat16, torch.float32)
STEP = 128
"""`hidden` is a multiple of it.  Then every parameter of every TP shard is, and no version's buffers have padding."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a kind of model calls its parameters.

    `layer` is in the order of registration: input norm, then in this order attention, then norm, fc1 and fc2.
    """

    embedding: str
    layers: str
    layer: tuple[str, str, str, str, str, str]
    norm: str
    head: str


LEGACY = Names(
    "language_model.embedding.word_embeddings.weight",
    "language_model.encoder.layers",
    (
        *("input_norm.weight", "self_attention.query_key_value.weight", "self_attention.dense.weight"),
        *("post_attention_norm.weight", "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
    ),
    "language_model.encoder.final_norm.weight",
    "language_model.output_layer.weight",
)
CORE = Names(
    "embedding.word_embeddings.weight",
    "decoder.layers",
    (
        *("input_layernorm.weight", "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight"),
        *("pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
    ),
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
NAMES = {"list": LEGACY, "coalesced": CORE}
ROWS = ("query_key_value", "linear_qkv")
COLUMNS = ("self_attention.dense", "linear_proj", "4h_to_h", "linear_fc2")


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter: stored name (with the stage's own layer number), global name, whole shape, what TP does with it.

    `axis` is cut (None: every TP rank has all); `gated`: [gate; up], each of which is cut.
    """

    name: str
    seed_name: str
    shape: tuple[int, ...]
    axis: int | None
    gated: bool = False

    def shard_shape(self, tp: int) -> tuple[int, ...]:
        """Of one TP rank."""
        return tuple(n // tp if axis == self.axis else n for axis, n in enumerate(self.shape))

    def shard(self, state: str, seed: int, tp: int, rank: int) -> Array:
        """One TP rank's fp32 values of a state."""
        nbytes = 4 * prod(self.shape)
        whole: Array = values(seed, ADAM[state] + self.seed_name, nbytes, 4).view(np.float32)
        if self.axis is None:
            return whole
        parts = 2 if self.gated else 1
        halves = np.split(whole.reshape(self.shape), parts)
        mine: Array = np.concatenate([np.split(half, tp, self.axis)[rank] for half in halves])
        return mine.reshape(-1)


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes; vocabulary and feed-forward grow with `hidden` as those of a 1B Llama at 2048: 32000 and 5632."""

    hidden: int

    @property
    def vocab(self) -> int:
        """Padded to 2 * 128."""
        return self.hidden * 125 // 8 // 256 * 256

    @property
    def ffn(self) -> int:
        """Of gate and of up."""
        return self.hidden * 11 // 4

    @property
    def bucket_size(self) -> int:
        """Elements: several buckets in a first stage."""
        return 5 * self.hidden**2

    def params(self, names: Names, pp: int, stage: int) -> Iterator[Param]:
        """Of one stage, in named_parameters order."""
        h, each = self.hidden, LAYERS // pp
        if stage == 0:
            yield Param(names.embedding, names.embedding, (self.vocab, h), 0)
        for local in range(each):
            for name in names.layer:
                stored, own = (f"{names.layers}.{n}.{name}" for n in (local, stage * each + local))
                yield Param(stored, own, *self._layer(name))
        if stage == pp - 1:
            yield Param(names.norm, names.norm, (h,), None)
            yield Param(names.head, names.head, (self.vocab, h), 0)

    def _layer(self, name: str) -> tuple[tuple[int, ...], int | None, bool]:
        """Shape, cut axis, gated."""
        h = self.hidden
        if "norm" in name:
            return (h,), None, False
        if any(part in name for part in ROWS):
            return (h + 2 * GROUPS * h // HEADS, h), 0, False
        if any(part in name for part in COLUMNS):
            return (h, h if "attention" in name else self.ffn), 1, False
        return (2 * self.ffn, h), 0, True


def model_of(gigabytes: float) -> Model:
    """A model whose files (14 bytes a parameter) are about `gigabytes` long."""
    per_hidden_squared = 2 * 125 / 8 + LAYERS * (1.5 + 1 + 3 * 11 / 4)
    return Model(max(1, round(sqrt(gigabytes * 1e9 / 14 / per_hidden_squared) / STEP)) * STEP)


# --------------------------------------------------------------------------------------------- optimizer


def buckets_of(params: Sequence[Param], tp: int, size: int | None) -> list[list[Param]]:
    """Megatron's: in reverse order, closed by the parameter that fills them."""
    buckets: list[list[Param]] = [[]]
    numel = 0
    for param in reversed(params):
        if size is not None and numel >= size:
            buckets.append([])
            numel = 0
        buckets[-1].append(param)
        numel += prod(param.shard_shape(tp))
    return buckets


def optimizer_state(container: str, buckets: Sequence[Mapping[str, torch.Tensor]]) -> dict[Any, Any]:
    """distrib_optim.pt from the states of every bucket."""
    numels = [len(bucket["param"]) for bucket in buckets]
    if container == "list":
        states: dict[str, Any] = {state: [bucket[state] for bucket in buckets] for state in ADAM}
        sizes = [{KEY: numels}]
        return {"per_bucket_numel": sizes, "per_bucket_numel_unpadded": sizes, 0: {KEY: states}}
    states = {state: torch.cat([bucket[state] for bucket in buckets]) for state in ADAM}
    return {"buckets_coalesced": True, 0: {KEY: {**states, "numel_unpadded": sum(numels)}}}


def param_map(buckets: Sequence[Sequence[Param]], tp: int) -> dict[str, list[Any]]:
    """What the patch dumps of a buffer."""
    found: dict[str, list[Any]] = {}
    end = 0
    for number, bucket in enumerate(buckets):
        for param in bucket:
            shape = param.shard_shape(tp)
            start, end = end, end + prod(shape)
            found[f"module.{param.name}"] = ["torch.bfloat16", list(shape), start, end, number]
    return found


# --------------------------------------------------------------------------------------------- model file


def model_type() -> Any:
    """args.model_type: pickled as Megatron-Core's enum, which need not be installed."""
    name = "megatron.core.enums"
    if name not in sys.modules:
        for at in ("megatron", "megatron.core", name):
            sys.modules.setdefault(at, ModuleType(at))
        kind = Enum("ModelType", {"encoder_or_decoder": 1, "encoder_and_decoder": 2}, module=name)  # type: ignore[misc]
        sys.modules[name].ModelType = kind  # type: ignore[attr-defined]
    return sys.modules[name].ModelType(1)


def arguments(model: Model, container: str, tp: int, pp: int) -> argparse.Namespace:
    """As Megatron-LM's `args`, as far as anything reads them."""
    fields: dict[str, Any] = {"num_layers": LAYERS, "hidden_size": model.hidden, "ffn_hidden_size": model.ffn}
    fields |= {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "group_query_attention": True}
    fields |= {"kv_channels": model.hidden // HEADS, "seq_length": 4096, "max_position_embeddings": 4096}
    fields |= {"padded_vocab_size": model.vocab, "vocab_size": model.vocab, "make_vocab_size_divisible_by": 128}
    fields |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": 1}
    fields |= {"virtual_pipeline_model_parallel_size": None, "num_layers_per_virtual_pipeline_stage": None}
    fields |= {"expert_model_parallel_size": 1, "data_parallel_size": DP, "world_size": tp * pp * DP, "rank": 0}
    fields |= {"micro_batch_size": 1, "global_batch_size": SAMPLES, "train_iters": 1000, "iteration": ITERATION}
    fields |= {"consumed_train_samples": ITERATION * SAMPLES, "consumed_valid_samples": 0, "bf16": True, "fp16": False}
    fields |= {"params_dtype": torch.bfloat16, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    fields |= {"ddp_bucket_size": model.bucket_size, "accumulate_allreduce_grads_in_fp32": True}
    fields |= {"untie_embeddings_and_output_weights": True, "swiglu": True, "add_bias_linear": False}
    fields |= {"normalization": "RMSNorm", "position_embedding_type": "rope", "use_mcore_models": container != "list"}
    fields |= {"num_experts": None, "transformer_impl": "local", "model_type": model_type()}
    return argparse.Namespace(**fields)


def groups(stage: int) -> list[dict[str, Any]]:
    """Parameter groups in the order of a stage's first parameters: an embedding decays, a norm does not."""
    common = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "max_lr": 3e-4, "min_lr": 3e-5}
    more = {"lr": 2.5e-4, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8}
    decay = [1.0, 0.0] if stage == 0 else [0.0, 1.0]
    return [{"wd_mult": wd, **common, **more, "weight_decay": 0.1 * wd, "step": ITERATION} for wd in decay]


def random_states(seed: int) -> dict[str, Any]:
    """An element of rng_state; a generator on the device has some bytes, too."""
    own = random.Random(seed)  # noqa: S311 - a generator's state is what a checkpoint holds
    states = torch.Generator().manual_seed(seed).get_state()
    return {
        "random_rng_state": own.getstate(),
        "np_rng_state": np.random.RandomState(seed).get_state(),
        "torch_rng_state": states,
        "cuda_rng_state": states[:16].clone(),
        "rng_tracker_states": {"model-parallel-rng": states[:16].clone()},
    }


def state_dict(container: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Flat, or nested as megatron.legacy has it: encoder.* is flat below its name, all else nests to the end."""
    if container != "list":
        return OrderedDict(weights)
    nested: dict[str, Any] = {}
    for name, weight in weights.items():
        top, part, rest = name.split(".", 2)
        keys = [top, part, *([rest] if part == "encoder" else rest.split("."))]
        at = nested
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = weight
    return nested


def model_file(
    model: Model, container: str, weights: Mapping[str, torch.Tensor], *, tp: int, pp: int, stage: int
) -> dict[str, Any]:
    """model_optim_rng.pt."""
    scheduler: dict[str, Any] = {"max_lr": 3e-4, "lr_warmup_steps": SAMPLES, "num_steps": ITERATION * SAMPLES}
    scheduler |= {"lr_decay_style": "cosine", "lr_decay_steps": 1000 * SAMPLES, "min_lr": 3e-5}
    scheduler |= {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant", "wd_incr_steps": 1000 * SAMPLES}
    return {
        "args": arguments(model, container, tp, pp),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 1e15,
        "model": state_dict(container, weights),
        "optimizer": {"optimizer": {"param_groups": groups(stage)}},
        "opt_param_scheduler": scheduler,
        "rng_state": [random_states(stage)],
    }


# --------------------------------------------------------------------------------------------- files


def write_rank(out: Path, model: Model, container: str, *, tp: int, pp: int, rank: int, stage: int, seed: int) -> None:
    """One rank directory and its map."""
    folder = out / f"iter_{ITERATION:07d}" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
    folder.mkdir(parents=True)
    params = list(model.params(NAMES[container], pp, stage))
    buckets = buckets_of(params, tp, None if stage else model.bucket_size)
    weights: dict[str, torch.Tensor] = {}
    made: list[dict[str, torch.Tensor]] = []
    for bucket in buckets:
        numel = sum(prod(param.shard_shape(tp)) for param in bucket)
        states = {state: torch.empty(numel) for state in ADAM}
        at = 0
        for param in bucket:
            shape = param.shard_shape(tp)
            part = slice(at, at + prod(shape))
            for state, tensor in states.items():
                tensor[part] = torch.from_numpy(param.shard(state, seed, tp, rank))
            weights[param.name] = states["param"][part].reshape(shape).bfloat16()
            at = part.stop
        made.append(states)
    ordered = {param.name: weights[param.name] for param in params}
    torch.save(
        model_file(model, container, ordered, tp=tp, pp=pp, stage=stage),
        folder / "model_optim_rng.pt",
    )
    torch.save(optimizer_state(container, made), folder / "distrib_optim.pt")
    maps = out / "param_map"
    maps.mkdir(exist_ok=True)
    for dp in range(DP):
        name = f"param_map_buffer0_dp{dp}tp{rank}pp{stage}vpp0.json"
        (maps / name).write_text(json.dumps(param_map(buckets, tp)))


def make(out: Path, model: Model, container: str, *, tp: int, pp: int, seed: int) -> None:
    """Write a checkpoint below `out`, which must not hold one yet."""
    for stage in range(pp):
        for rank in range(tp):
            write_rank(out, model, container, tp=tp, pp=pp, rank=rank, stage=stage, seed=seed)
    (out / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_dist_opt", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gb", type=float, default=4.3, help="size of all .pt files in 10**9 bytes")
    parser.add_argument("--container", choices=CONTAINERS, default=CONTAINERS[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    make(args.out, model_of(args.gb), args.container, tp=args.tp, pp=args.pp, seed=args.seed)


if __name__ == "__main__":
    main()
