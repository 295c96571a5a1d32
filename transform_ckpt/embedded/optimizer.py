"""AdamW with the states that MindFormers 1.9.0's AdamW has: adam_m.*, adam_v.*, global_step.

Loshchilov and Hutter, Decoupled Weight Decay Regularization.  Vectors and biases do not decay, as MindFormers groups
them (trainer/optimizer_grouped_parameters.py).  The bias correction lies in the scalars of MindSpore's fused update,
which has none of its own: lr * (m / c1) / (sqrt(v / c2) + eps) is lr * sqrt(c2) / c1 * m / (sqrt(v) + eps * sqrt(c2)).
"""

# ruff: noqa: D102 - construct and bprop do what their class says

from __future__ import annotations

from collections.abc import Sequence

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from transform_ckpt.embedded.collectives import Cell
from transform_ckpt.embedded.config import Optimizer
from transform_ckpt.embedded.layout import STATE_PREFIXES, STEP


class AdamW(Cell):
    """One step for all parameters; `rate` is the learning rate of the step."""

    def __init__(self, parameters: Sequence[Parameter], settings: Optimizer) -> None:
        super().__init__(auto_prefix=False)
        self.settings = settings
        self.weights = ParameterTuple(parameters)
        self.global_step = Parameter(Tensor(np.zeros(1, np.int32)), name=STEP, requires_grad=False)
        self.first, self.second = (ParameterTuple(_states(prefix, parameters)) for prefix in STATE_PREFIXES)
        self.update = ops.AdamWeightDecay()

    @property
    def steps(self) -> int:
        """Finished steps."""
        return int(self.global_step.asnumpy()[0])

    @property
    def states(self) -> list[Parameter]:
        """What a checkpoint holds beside the weights."""
        return [*self.first, *self.second, self.global_step]

    def construct(self, gradients: Sequence[Tensor], rate: float) -> None:
        step = self.steps + 1
        beta1, beta2 = (float(np.float32(beta)) for beta in self.settings.betas)  # as the update itself rounds them
        corrected = self.settings.bias_correction
        first, root = (1 - beta1**step, (1 - beta2**step) ** 0.5) if corrected else (1.0, 1.0)
        eps = self.settings.eps * root
        for weight, gradient, mean, square in zip(self.weights, gradients, self.first, self.second, strict=True):
            decay = self._decay(weight) * first / root
            self.update(weight, mean, square, rate * root / first, beta1, beta2, eps, decay, gradient)
        ops.assign(self.global_step, Tensor(np.array([step], np.int32)))

    def _decay(self, weight: Parameter) -> float:
        return 0.0 if len(weight.shape) == 1 or weight.name.endswith(".bias") else self.settings.weight_decay


def _states(prefix: str, parameters: Sequence[Parameter]) -> list[Parameter]:
    return [
        Parameter(ops.zeros(parameter.shape, mindspore.float32), name=prefix + parameter.name, requires_grad=False)
        for parameter in parameters
    ]
