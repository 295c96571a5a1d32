"""Which slice of each parameter a rank of the embedded Llama holds: exactly that of the generated strategy.

Rank order is that of the strategy's stage: rank = data-parallel index * mp + model-parallel index.
May import only transform_ckpt.{errors,views}, strategy.generate and transform_ckpt.embedded.config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from strategy.generate import generate
from transform_ckpt.embedded.config import EmbeddedConfig
from transform_ckpt.errors import InputError
from transform_ckpt.views import Box, Shape

STEP = "global_step"
"""The optimizer's count of finished steps, Int32 of shape (1,) (MindSpore 2.9.0 nn/optim/optimizer.py)."""

STATE_PREFIXES = ("adam_m.", "adam_v.")
"""MindFormers 1.9.0 core/optim/adamw.py and MindSpore 2.9.0 nn/optim/adam.py."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One rank's part of a parameter: `parts` of the optimizer shard lie on the ranks of one group of replicas."""

    name: str
    full: Shape
    box: Box
    cuts: Shape
    parts: int
    world: int

    @property
    def shape(self) -> Shape:
        """What the rank stores."""
        return self.box.size

    @property
    def used(self) -> Shape:
        """What the rank computes with: its slice before the optimizer shard."""
        return (self.shape[0] * self.parts, *self.shape[1:])

    @property
    def copies(self) -> int:
        """How many ranks store the same slice."""
        return self.world // prod(self.cuts)

    @property
    def replicas(self) -> int:
        """How many ranks compute with the same slice."""
        return self.copies * self.parts


def slices(config: EmbeddedConfig, rank: int) -> dict[str, Slice]:
    """Every weight of the network by name, tied weights once."""
    generated = generate(replace(config.job, states=()))
    (stage,) = generated.strategy.stages
    found: dict[str, Slice] = {}
    for name, layout in stage.layouts.items():
        full = generated.shapes[name]
        box = layout.box(rank, full)
        found[name] = Slice(name, full, box, layout.cuts(len(full)), layout.opt_parts, stage.devices)
    return found


def parameter_shapes(config: EmbeddedConfig, rank: int, world: int, *, optimizer: bool) -> dict[str, Shape]:
    """Name -> shape of what `rank` of `world` stores; with `optimizer` also its states and `global_step`."""
    check_world(config, rank, world)
    weights = {name: found.shape for name, found in slices(config, rank).items()}
    if not optimizer:
        return weights
    states = {prefix + name: shape for prefix in STATE_PREFIXES for name, shape in weights.items()}
    return weights | states | {STEP: (1,)}


def check_world(config: EmbeddedConfig, rank: int, world: int) -> None:
    """InputError unless `world` workers are what the configuration lays out."""
    wanted = config.dp * config.mp
    if world != wanted:
        raise InputError(
            f"{config.where}: data_parallel {config.dp} and model_parallel {config.mp} need {wanted} workers, found "
            f"{world}; start {wanted} workers, or change parallel_config (use_parallel: False is one worker)"
        )
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world} workers; expected 0 to {world - 1}")
