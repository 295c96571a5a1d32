"""What became of every parameter: loaded, missing, unexpected, of another shape.  Pure; names and shapes only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from transform_ckpt.errors import InputError, name_some
from transform_ckpt.states import is_state, split_optimizer
from transform_ckpt.views import Shape

CACHES = ("*.key_cache", "*.value_cache")
"""Parameters of MindFormers 1.9.0 networks that no checkpoint holds: modules/paged_attention_mgr.py."""


@dataclass(frozen=True, slots=True)
class Account:
    """`missing`: the network's, not in the checkpoint.  `unexpected`: the checkpoint's, not in the network.
    `misshapen`: name -> (network's shape, checkpoint's).  `unused`: optimizer states and scalars nobody asked for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[Shape, Shape]]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """What a log says of it: always how many were loaded, and every kind of fault with names."""
        found = [f"{len(self.loaded)} parameters loaded"]
        if self.unused:
            found[0] += f", {len(self.unused)} states of the checkpoint not asked for"
        return [*found, *self.faults()]

    def faults(self) -> list[str]:
        """Empty when everything is as it should be."""
        found = []
        if self.missing:
            found.append(f"{len(self.missing)} network parameters are not in the checkpoint: {name_some(self.missing)}")
        if self.unexpected:
            found.append(
                f"{len(self.unexpected)} tensors of the checkpoint are not in the network: {name_some(self.unexpected)}"
            )
        for name, (wanted, held) in list(self.misshapen.items())[:5]:
            found.append(f"{name}: the network has {list(wanted)}, the checkpoint {list(held)}")
        if len(self.misshapen) > 5:
            found.append(f"... and {len(self.misshapen) - 5} more parameters of another shape")
        return found

    def check(self, *, strict: bool) -> None:
        """InputError with all faults; not strict, only shapes count, since such a parameter cannot be loaded."""
        if not self.misshapen and not (strict and (self.missing or self.unexpected)):
            return
        raise InputError(
            "\n".join([*self.faults(), "check model_config and load_checkpoint, or set load_strict: False to go on"])
        )


def account(
    network: Mapping[str, Shape],
    held: Mapping[str, Shape],
    *,
    elsewhere: Iterable[str] = (),
    carried: Iterable[str] = (),
) -> Account:
    """Compare a network's parameters with what a checkpoint holds for this rank.

    `elsewhere` are parameters of other pipeline stages, which this rank's network object may list; `carried` are names
    of the checkpoint that are not for the network (step, loss scale ...), beside those known as states.
    """
    others, extra = set(elsewhere), set(carried)
    both = [name for name in network if name in held]
    misshapen = {n: (tuple(network[n]), tuple(held[n])) for n in both if tuple(network[n]) != tuple(held[n])}
    missing = [n for n in network if n not in held and n not in others and not _is_cache(n)]
    rest = [name for name in held if name not in network]
    unused = [n for n in rest if n in extra or split_optimizer(n)[0] or is_state(n, "F32", held[n])]
    known = set(unused)
    return Account(
        tuple(n for n in both if n not in misshapen),
        tuple(missing),
        tuple(n for n in rest if n not in known),
        misshapen,
        tuple(unused),
    )


def _is_cache(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in CACHES)
