"""Sums over ranks inside a network: the one collective of MindSpore 2.9.0's CPU back-end that serves all groups.

Measured there: AllReduce has only sum, of float32; AllGather takes the world's group alone, so gathering is a sum of
what every rank writes into its own slot of zeros, which is exact.  A sum has the same bits on every rank.  A failing
collective leaves its group unusable: nothing here is retried.
"""

# ruff: noqa: D102 - construct and bprop do what their class says

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from transform_ckpt.embedded.config import EmbeddedConfig
from transform_ckpt.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]


class Cell(nn.Cell):  # type: ignore[misc]  # mindspore has no types
    """The one untyped base."""


class Group:
    """Ranks that sum together; a group of one does nothing."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int) -> None:
        self.size = len(ranks)
        self.index = ranks.index(rank)
        self._reduce = ops.AllReduce(ops.ReduceOp.SUM, name) if self.size > 1 else None

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks; no gradient of its own (see `Leave`)."""
        return value if self._reduce is None else self._reduce(value)

    def gather(self, value: Tensor, parts: int | None = None) -> Tensor:
        """[parts, ...]: the values of the ranks 0 to `parts` - 1 of the group (default: of all)."""
        parts = self.size if parts is None else parts
        own = value.expand_dims(0)  # of a parameter, too, no longer a reference, which concat takes no mixture of
        empty = ops.zeros_like(own)
        return self.sum(ops.concat([own if part == self.index else empty for part in range(parts)]))


class Enter(Cell):
    """The input of a cut operator: as it is; backward the sum of what every part of the operator gives."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def construct(self, value: Tensor) -> Tensor:
        return value

    def bprop(self, _value: Tensor, _out: Tensor, gradient: Tensor) -> tuple[Tensor]:
        return (self.group.sum(gradient),)


class Leave(Cell):
    """The output of a cut operator: the sum of its parts; backward as it is."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def construct(self, value: Tensor) -> Tensor:
        return self.group.sum(value)

    def bprop(self, _value: Tensor, _out: Tensor, gradient: Tensor) -> tuple[Tensor]:
        return (gradient,)


class Whole(Cell):
    """A weight of the optimizer shard, from its parts on `group`.

    Backward is this rank's part of the sum over the data-parallel ranks; ranks of the group that see the same samples
    (`same` of them) have equal gradients.
    """

    def __init__(self, group: Group, parts: int, same: int) -> None:
        super().__init__()
        self.group = group
        self.parts = parts
        self.same = same

    def construct(self, part: Tensor) -> Tensor:
        return self.group.gather(part, self.parts).reshape((-1, *part.shape[1:]))

    def bprop(self, part: Tensor, _out: Tensor, gradient: Tensor) -> tuple[Tensor]:
        total = self.group.sum(gradient) / self.same
        first = self.group.index % self.parts * part.shape[0]
        return (total[first : first + part.shape[0]],)


class Ranks:
    """The groups of one rank: `world`, `mp` (consecutive ranks) and `dp` (ranks mp apart)."""

    def __init__(self, config: EmbeddedConfig, rank: int) -> None:
        dp, mp = config.dp, config.mp
        self.dp_index, self.mp_index = divmod(rank, mp)
        every = range(dp * mp)
        self.world = Group(_group_of(tuple(every), dp * mp), every, rank)
        ranks = range(self.dp_index * mp, (self.dp_index + 1) * mp)
        self.mp = Group(_group_of(tuple(ranks), dp * mp), ranks, rank)
        ranks = range(self.mp_index, dp * mp, mp)
        self.dp = Group(_group_of(tuple(ranks), dp * mp), ranks, rank)


@functools.cache
def _group_of(ranks: tuple[int, ...], world: int) -> str:
    """The name of a group, which only its members create; one of all ranks or of a single one needs no creating."""
    if len(ranks) == 1:
        return ""
    if len(ranks) == world:
        return str(mindspore.communication.GlobalComm.WORLD_COMM_GROUP)
    name = "transform_ckpt-" + "-".join(map(str, ranks))
    mindspore.communication.create_group(name, list(ranks))
    return name


def start(config: EmbeddedConfig, rank: int) -> Ranks:
    """Choose the CPU and PyNative mode, and meet the other ranks (once in a process; one rank meets nobody)."""
    _settle()
    if config.dp * config.mp > 1:
        _meet()
        met = (mindspore.communication.get_rank(), mindspore.communication.get_group_size())
        if met != (rank, config.dp * config.mp):
            raise InputError(
                f"MindSpore's launcher gave rank {met[0]} of {met[1]}; expected {rank} of {config.dp * config.mp}"
            )
    return Ranks(config, rank)


@functools.cache
def _settle() -> None:
    mindspore.set_device("CPU")
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)


@functools.cache
def _meet() -> None:
    mindspore.communication.init()
