"""This rank's tensors into a MindFormers network, each accounted for.

What MindFormers 1.9.0 does between reading and loading (trainer/utils.py `load_ckpt`) is done here, too: adapters of
S-LoRA, the network's `fuse_weight_from_ckpt`, old names of adapters, the step at another batch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from strategy.layout import Strategy
from transform_ckpt.auto.accounting import account
from transform_ckpt.auto.mindformers import places
from transform_ckpt.auto.mindformers.adapters import adapter_parameters, is_adapter
from transform_ckpt.auto.mindformers.config import COMPILED_MODES, Call
from transform_ckpt.auto.settings import JobSettings
from transform_ckpt.auto.transform import AutoTransform
from transform_ckpt.errors import InputError, name_some
from transform_ckpt.states import is_state, split_optimizer
from transform_ckpt.views import Shape

if TYPE_CHECKING:
    import numpy as np

STEP = "global_step"
Held = dict[str, Any]
"""Name -> mindspore.Parameter, or a text."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The parameters of a job on this rank: name -> shape.  `optional` may keep their values; `elsewhere` are other
    ranks' that the network lists.
    """

    required: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()


def load(job: AutoTransform, call: Call, settings: JobSettings) -> None:
    """Read, adapt, account, load.  InputError when something is missing, left over or of another shape."""
    held: Held = dict(_parameters(job.load()))
    held.update(adapter_parameters(call, job.strategy, job.launcher.rank))
    held = _adapted(held, call)
    if hasattr(call.network, "llm_boost"):
        call.network.llm_boost.set_weights(held)
        return
    scale_step(held, call.config)
    wanted = _wanted(call, job.strategy, job.launcher.rank)
    shapes = {name: () if isinstance(value, str) else tuple(value.shape) for name, value in held.items()}
    optional = {name: shape for name, shape in wanted.optional.items() if name in held}
    result = account({**wanted.required, **optional}, shapes, elsewhere=wanted.elsewhere)
    for line in result.lines():
        job.say(f"rank {job.launcher.rank}: {line}")
    result.check(strict=settings.load_strict)
    _into_cells(held, _cells(call), result.loaded)


def scale_step(held: Held, config: Any) -> None:
    """global_step counts batches: with another global batch size it is another number (runner_config.step_scale)."""
    import mindspore as ms
    import numpy as np

    scale = config.runner_config.step_scale
    if scale is None or STEP not in held:
        return
    step = held[STEP].asnumpy()
    scaled = np.array([int(int(step.reshape(-1)[0]) * scale)], dtype=step.dtype)
    held[STEP] = ms.Parameter(ms.Tensor(scaled), name=STEP)


def _parameters(tensors: Iterable[tuple[str, np.ndarray[Any, Any] | str]]) -> Iterator[tuple[str, Any]]:
    """MindSpore 2.9.0 makes a bfloat16 Tensor of an ml_dtypes array bit for bit; through float32 NaNs would change."""
    import mindspore as ms

    for name, value in tensors:
        if isinstance(value, str):
            yield name, value
            continue
        try:
            tensor = ms.Tensor(value)
        except TypeError:
            raise InputError(f"{name}: MindSpore has no tensors of {value.dtype}, so it cannot be loaded") from None
        yield name, ms.Parameter(tensor, name=name)


def _adapted(held: Held, call: Call) -> Held:
    from mindformers.models.base_model import BaseModel
    from mindformers.models.modeling_utils import PreTrainedModel

    if isinstance(call.network, (BaseModel, PreTrainedModel)):
        held = call.network.fuse_weight_from_ckpt(held)
    renamed: Any = places.function(places.RENAME_ADAPTERS)(held)
    return dict(renamed)


# ------------------------------------------------------------------------------------------- what is wanted


def _cells(call: Call) -> list[Any]:
    """What is loaded into: resuming, all that the training has (network, optimizer, loss scaling)."""
    if not call.config.resume_training or call.optimizer is None:
        return [call.network]
    training = getattr(call.model, "_train_network", None)
    return [call.network, call.optimizer] if training is None else [training]


def _wanted(call: Call, strategy: Strategy | None, rank: int) -> Wanted:
    own = _shapes(call.network)
    states = _shapes(call.optimizer) if call.optimizer is not None and call.config.resume_training else {}
    # learning_rate and the like: the configuration gives them, too
    small = {n: s for n, s in states.items() if n not in own and n != STEP and is_state(n, "F32", s)}
    required = {**own, **{name: shape for name, shape in states.items() if name not in small}}
    more: dict[str, Shape] = {}
    for cell in _cells(call):
        more.update(_shapes(cell))
    optional = {**more, **small}
    adapters = {name: optional[name] for name in required if is_adapter(name)}
    return Wanted(
        {name: shape for name, shape in required.items() if name not in adapters},
        {name: shape for name, shape in optional.items() if name not in required or name in adapters},
        elsewhere(_cells(call), strategy, rank),
    )


def _shapes(cell: Any) -> dict[str, Shape]:
    return {param.name: tuple(param.data.shape) for _, param in cell.parameters_and_names()}


def elsewhere(cells: Iterable[Any], strategy: Strategy | None, rank: int) -> frozenset[str]:
    """Parameters of other stages, and what MindSpore 2.9.0 passes over (`load_param_into_net`): parameters that stages
    share, and in a compiled network those that were not laid out.
    """
    import mindspore as ms

    found: set[str] = set()
    if strategy is not None:
        stage = strategy.stage_of(rank)
        own = strategy.stages[stage].layouts
        listed = {name for name in strategy.names if name not in own}
        found = listed | {name for cell in cells for name in _shapes(cell) if split_optimizer(name)[1] in listed}
    compiled = ms.get_auto_parallel_context("parallel_mode") in COMPILED_MODES
    parameters = [param for cell in cells for _, param in cell.parameters_and_names()]
    found.update(p.name for p in parameters if p.param_info.is_pipeline_shared_param)
    if compiled and any(p.sliced for p in parameters):
        found.update(p.name for p in parameters if not p.sliced)
    return frozenset(found)


def _into_cells(held: Held, cells: Iterable[Any], loaded: Iterable[str]) -> None:
    import mindspore as ms

    left: set[str] = set()
    for cell in cells:
        not_loaded, _ = ms.load_param_into_net(cell, held)
        left.update(not_loaded)
    lost = left & set(loaded)
    if lost:
        raise InputError(f"mindspore.load_param_into_net did not load what was read: {name_some(lost)}")
