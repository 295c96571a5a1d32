"""What a Megatron source gives beside tensors of the model: args, scheduler, parameter groups, generators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transform_ckpt.formats.torch_values import Namespace, TensorRef
from transform_ckpt.megatron.arguments import is_plain
from transform_ckpt.megatron.containers import PREFIX, STATES
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.groups import Group, groups_of, marks_of
from transform_ckpt.megatron.model import stored_tensor
from transform_ckpt.megatron.read import Megatron, Rank
from transform_ckpt.megatron.write import Model, Opaque
from transform_ckpt.tensors import Logical, Piece, Source
from transform_ckpt.views import whole

_COMMON = ("num_floating_point_operations_so_far", "opt_param_scheduler", "checkpoint_version")
_OWN = ("rng_state", "rerun_state_machine")
_ELSEWHERE = ("args", "iteration", "optimizer", *_COMMON, *_OWN)


@dataclass(slots=True)
class _Opaques:
    """Tensors that are carried as they are, as logical tensors of one piece."""

    found: dict[str, Logical] = field(default_factory=dict)

    def carried(self, value: Any, rank: Rank, number: int) -> Any:
        """The value with an Opaque for every tensor."""
        if isinstance(value, TensorRef):
            name = f"opaque.{number}.{len(self.found)}"
            tensor = stored_tensor(rank.file, name, value)
            self.found[name] = Logical(name, tensor.dtype, tensor.shape, (Piece(tensor, whole(tensor.shape), number),))
            return Opaque(name, tensor.dtype, tensor.shape)
        if type(value) in (list, tuple):
            return type(value)(self.carried(item, rank, number) for item in value)
        if isinstance(value, dict):
            return {key: self.carried(item, rank, number) for key, item in value.items()}
        return value


def model_of(found: Megatron, target: Facts, *, optimizer: bool) -> tuple[Model, Source]:
    """The source as a writer wants it, and with the tensors of generators and extra states among its own."""
    opaques = _Opaques()
    numbers = {place: number for number, place in enumerate(found.ranks)}
    first = found.first()
    notes: list[str] = []
    same = _same_places(found.facts, target)
    own = {
        place: {key: opaques.carried(rank.rest[key], rank, numbers[place]) for key in _OWN if _carries(rank, key)}
        for place, rank in (found.ranks.items() if same and optimizer else ())
    }
    if optimizer and not same and any("rng_state" in rank.rest for rank in found.ranks.values()):
        notes.append("rng_state belongs to ranks of the old layout and is left out: resume with --no-load-rng")
    unknown = [str(key) for key in first.rest if key not in _ELSEWHERE]
    if unknown:
        notes.append(f"not carried over, of no known meaning: {', '.join(unknown)}")
    params = {
        name: logical for name, logical in found.source.params.items() if optimizer or not name.startswith(PREFIX)
    }
    others = {name: opaques.carried(value, rank, numbers[rank.place]) for name, (value, rank) in found.others.items()}
    source = replace(
        found.source,
        params=params,
        states={**found.source.states, **opaques.found},
        notes=(*found.source.notes, *notes),
    )
    args = first.rest.get("args")
    chunk = first.chunks[0]
    model = Model(
        logicals=source.params,
        rules=found.rules,
        outline=found.outline,
        tied=bool(found.facts.tied),
        where=found.iteration.path,
        others=others,
        kind=chunk.kind if not chunk.nested else dict,
        args=args if isinstance(args, Namespace) else Namespace({}),
        rest={
            key: first.rest[key] for key in _COMMON if key in first.rest and (optimizer or key == "checkpoint_version")
        },
        own=own,
        groups=list(_groups(found)) if optimizer else (),
    )
    return model, source


def _carries(rank: Rank, key: str) -> bool:
    return key in rank.rest and is_plain(rank.rest[key])


def _same_places(source: Facts, target: Facts) -> bool:
    one, two = source.sizes, target.sizes
    return (one.tp, one.pp, one.ep) == (two.tp, two.pp, two.ep)


def _groups(found: Megatron) -> Iterator[Group]:
    """Parameter groups of every rank, each once."""
    if not any(name.startswith(f"{PREFIX}{STATES[0]}.") for name in found.source.params):
        return
    seen: set[Any] = set()
    for rank in found.ranks.values():
        for group in groups_of(rank.rest.get("optimizer"), rank.file.path):
            if marks_of(group) not in seen:
                seen.add(marks_of(group))
                yield group
