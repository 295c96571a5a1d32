"""One rank's training objects: model chunks under the data-parallel wrapper and their distributed optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from tests.megatron_real import logical, model_zoo
from tests.megatron_real.case import ITERATION, STATES, Case
from tests.megatron_real.cuts import named_cuts
from tests.megatron_real.logical import Cut


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of this rank; `key` is "chunk{v}|{stored name}", `inner` the optimizer that trains it."""

    key: str
    live: Any
    cut: Cut
    inner: Any

    def shard(self) -> tuple[int, int] | None:
        """First and last+1 element of it that this data-parallel rank trains, None for none."""
        if self.live not in self.inner.model_param_gbuf_map:
            return None
        part = self.inner._get_model_param_range_map(self.live)["param"]
        return part.start, part.end

    def states(self) -> dict[str, torch.Tensor]:
        """The trained shard's master weight and Adam states."""
        group, order = self.inner.model_param_group_index_map[self.live]
        main = self.inner.optimizer.param_groups[group]["params"][order]
        found = self.inner.optimizer.state[main]
        return dict(zip(STATES, (main.data, found["exp_avg"], found["exp_avg_sq"]), strict=True))


@dataclass(frozen=True, slots=True)
class Session:
    """Chunks (wrapped), what get_megatron_optimizer gave, and the distributed optimizers in it."""

    case: Case
    chunks: list[Any]
    optimizer: Any
    parameters: list[Parameter]

    @property
    def inners(self) -> list[Any]:
        """The DistributedOptimizers: dense, then experts."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def set_weights(self, function: Any) -> None:
        """Model weights from `function(name, logical shape)`, whole."""
        for parameter in self.parameters:
            _fill(parameter.live.data, function, parameter.cut)

    def train(self) -> None:
        """The optimizer's steps; gradients go straight where a reduction would have left them."""
        for step in range(1, ITERATION + 1):
            for parameter in self.parameters:
                _fill(parameter.live.main_grad, lambda n, s, step=step: logical.gradient(n, s, step), parameter.cut)
            self.schedule()
            if not self.optimizer.step()[0]:
                raise RuntimeError("the optimizer skipped its step")

    def schedule(self) -> None:
        """Learning rate and weight decay a group, as OptimizerParamScheduler.step sets them."""
        for inner in self.inners:
            for group in inner.param_groups:
                group["lr"] = logical.LR
                group["weight_decay"] = logical.WEIGHT_DECAY * group["wd_mult"]


def _fill(tensor: torch.Tensor, function: Any, cut: Cut) -> None:
    flat = torch.from_numpy(cut.take(function(cut.logical, cut.shape)))
    tensor.copy_(flat.reshape(tensor.shape))


def start(case: Case) -> Session:
    """A rank's session with the first weights; the process group exists."""
    _initialize(case)
    modules = model_zoo.build(case)
    for module in modules:
        for _, live, cut in named_cuts(case, module):
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(live)
            _fill(live.data, logical.initial, cut)
    chunks = [_wrap(case, module, number) for number, module in enumerate(modules)]
    optimizer = get_megatron_optimizer(_optimizer_config(), chunks)
    found = list(_parameters(case, chunks, optimizer))
    return Session(case, chunks, optimizer, found)


def _parameters(case: Case, chunks: list[Any], optimizer: Any) -> Iterator[Parameter]:
    inners = getattr(optimizer, "chained_optimizers", [optimizer])
    for number, chunk in enumerate(chunks):
        for name, live, cut in named_cuts(case, chunk.module):
            expert = not getattr(live, "allreduce", True)
            yield Parameter(f"chunk{number}|{name}", live, cut, inners[1 if expert else 0])


def _initialize(case: Case) -> None:
    initialize = mpu.initialize_model_parallel
    options: dict[str, Any] = {
        "context_parallel_size": case.cp,
        "expert_model_parallel_size": case.ep,
        "distributed_timeout_minutes": 1,
    }
    if case.etp is not None:
        options |= model_zoo.known(initialize, {"expert_tensor_parallel_size": case.etp})
    relaxed = case.vpp > 1 and case.pp == 2 and not case.at_least("0.9.0")  # a check that MindSpeed takes out
    virtual = None if case.vpp == 1 or relaxed else case.vpp
    initialize(case.tp, case.pp, virtual, **options)
    if relaxed:
        mpu.set_virtual_pipeline_model_parallel_world_size(case.vpp)
        mpu.set_virtual_pipeline_model_parallel_rank(0)


def _wrap(case: Case, module: torch.nn.Module, number: int) -> Any:
    """DistributedDataParallel as Megatron-LM's get_model calls it; its signature changed twice."""
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"overlap_grad_reduce": case.bucket_size is not None, "use_distributed_optimizer": True}
    if case.bucket_size is not None:
        options["bucket_size"] = case.bucket_size
    groups: dict[str, Any] = {}
    if "data_parallel_group" in accepted:
        groups["data_parallel_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
        groups["expert_data_parallel_group"] = mpu.get_data_modulo_expert_parallel_group()
    if "ddp_config" in accepted:
        from megatron.core.distributed import DistributedDataParallelConfig

        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **options)
        return DistributedDataParallel(module.config, settings, module, disable_bucketing=number > 0, **groups)
    options |= {"accumulate_allreduce_grads_in_fp32": True, "disable_bucketing": number > 0, **groups}
    return DistributedDataParallel(module.config, module, **options)


def _optimizer_config() -> Any:
    beta1, beta2 = logical.BETAS
    return OptimizerConfig(
        optimizer="adam",
        lr=logical.LR,
        min_lr=logical.MIN_LR,
        weight_decay=logical.WEIGHT_DECAY,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=logical.EPS,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )


def rank_directory(case: Case) -> str:
    """This rank's directory, "mp_rank_TT[_PPP][_EEE]" (megatron/training/checkpointing.py, get_checkpoint_name)."""
    name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if case.pp > 1:
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    return name + (f"_{mpu.get_expert_model_parallel_rank():03d}" if case.ep > 1 else "")


def writes_model() -> bool:
    """Whether this rank writes its directory's model_optim_rng.pt: the first of those that hold the same experts."""
    name = "get_expert_data_parallel_rank"
    get = getattr(mpu, name, None) or mpu.get_data_modulo_expert_parallel_rank
    return bool(get() == 0)


def iteration_directory(base: Path) -> Path:
    """Where the tracker file points."""
    number = int((base / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    return base / f"iter_{number:07d}"
