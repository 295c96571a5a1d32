"""What stands in, at run time, for a GPU and for the packages that only build beside one.

No file of megatron-core is changed.  Forward and backward never run, so only what building a model, stepping the
optimizer, saving and loading touch is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import packaging.version
import torch

from tests.megatron_real.case import numbers

_TE_LAYERS = "megatron.core.transformer.custom_layers.transformer_engine"


class FusedAdam(torch.optim.Optimizer):  # type: ignore[misc]
    """apex.optimizers.FusedAdam(adam_w_mode=True): `step` in the group, two states a parameter; each operation rounds.

    Groups without parameters count no steps, as in apex 22.03 and later.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,  # noqa: FBT001, FBT002 - apex's signature
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,  # noqa: FBT001, FBT002
        weight_decay: float = 0.0,
    ) -> None:
        if not (adam_w_mode and bias_correction):
            raise ValueError("only decoupled decay with bias correction is written here")
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        if grad is None:
            return
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(grad * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).add_((grad * grad) * (1 - beta2))
        square = state["exp_avg_sq"] * (1 / (1 - beta2 ** group["step"]))
        root = torch.from_numpy(np.sqrt(square.numpy())) + group["eps"]  # torch's own is an ulp off now and then
        update = state["exp_avg"] * (1 / (1 - beta1 ** group["step"])) / root
        parameter.sub_((update + parameter * group["weight_decay"]) * group["lr"])


class Norm(torch.nn.Module):  # type: ignore[misc]
    """Parameters of a layer or RMS norm, by the names all of Megatron's have."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))


class NoAttention(torch.nn.Module):  # type: ignore[misc]
    """Core attention without parameters, for specs whose own cannot be built without Transformer Engine."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class _TransformerEngineLayers(ModuleType):
    """0.6 and 0.7 import these names unconditionally; the local spec uses none but the norm."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "TENorm":
            return Norm
        return type(name, (torch.nn.Module,), {}) if name.startswith("TE") else None


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


def _cuda_type(tensor: torch.Tensor) -> str:
    return str(_REAL_TYPE(tensor)).replace("torch.", "torch.cuda.")


def _no_norm(*_: Any) -> tuple[torch.Tensor, None]:
    """The gradient norm is only logged: clipping is off."""
    return torch.zeros(1), None


_REAL_TYPE = torch.Tensor.type
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")


def _on_cpu(factory: Any) -> Any:
    """A factory of torch that takes device "cuda" for the CPU."""

    def make(*args: Any, **options: Any) -> Any:
        if str(options.get("device")).startswith("cuda"):
            options["device"] = "cpu"
        return factory(*args, **options)

    return make


_SLOTS: tuple[tuple[str, str, Any], ...] = (
    ("models.gpt.gpt_layer_specs", "FusedLayerNorm", Norm),
    ("models.gpt.gpt_layer_specs", "LNImpl", Norm),
    ("models.backends", "LNImpl", Norm),
    ("models.backends", "WrappedTorchNorm", Norm),
    ("transformer.transformer_block", "LayerNormImpl", Norm),
    ("transformer.multi_latent_attention", "HAVE_TE", False),
    ("transformer.moe.grouped_gemm_util", "assert_grouped_gemm_is_available", lambda: None),
)
"""What a module of megatron.core is given for a name that needs a missing package; not every version has each."""


def before_import(version: str) -> None:
    """Call before anything of megatron is imported."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.type = lambda self, *a, **k: _REAL_TYPE(self, *a, **k) if a or k else _cuda_type(self)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _module("apex")
    _module("apex.optimizers", FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)
    _module("apex.multi_tensor_apply", multi_tensor_applier=_no_norm)
    _module("amp_C", multi_tensor_l2norm=None, multi_tensor_scale=None)
    if numbers(version) < (0, 8):
        _module("pkg_resources", packaging=packaging)
        sys.modules[_TE_LAYERS] = _TransformerEngineLayers(_TE_LAYERS)


def after_import() -> None:
    """Imports all that is used and fills the slots."""
    for name in ("distributed", "optimizer", "optimizer.distrib_optimizer", "models.gpt.gpt_model"):
        importlib.import_module(f"megatron.core.{name}")
    tracker = importlib.import_module("megatron.core.tensor_parallel.random").CudaRNGStatesTracker
    tracker.fork = lambda *_, **__: contextlib.nullcontext()  # values are set afterwards
    for name, slot, value in _SLOTS:
        if importlib.util.find_spec(f"megatron.core.{name}") is not None:
            module = importlib.import_module(f"megatron.core.{name}")
            if hasattr(module, slot):
                setattr(module, slot, value)
