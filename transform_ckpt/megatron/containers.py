"""distrib_optim.pt: the distributed optimizer's buffers, in every container that Megatron wrote.

Facts (megatron-core 0.6.0 and 0.7.0 to 0.16.1, optimizer/distrib_optimizer.py, run): 0.6 keeps a list of buckets with
their padding, later versions one tensor of all buckets without the padding at their ends (`buckets_coalesced`).  A file
of a mixture-of-experts model is the list [dense, experts]; None stands where another rank has the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats.torch_values import Global, TensorRef
from transform_ckpt.formats.torch_zip import TorchFile
from transform_ckpt.megatron.buckets import BufferMap, Range
from transform_ckpt.megatron.model import stored_tensor
from transform_ckpt.tensors import Tensor, part_of

STATES = ("param", "exp_avg", "exp_avg_sq")
PREFIX = "optimizer.state."
"""Of an optimizer state's logical name, as Megatron's own fully reshardable checkpoints have it."""
_STATE_KEYS = ("buckets_coalesced", "per_bucket_numel")
"""Of a state without buffers, too: a stage of noop layers has no parameters."""
SHORT_OF_FP32 = "shard_main_param_res"
"""MindSpeed's --reuse-fp32-param: `param` alone is not the whole fp32 value."""


def state_name(name: str, state: str = STATES[0]) -> str:
    """Logical name of a weight's optimizer state; by default of its master weight."""
    return f"{PREFIX}{state}.{name}"


def split_state(name: str) -> tuple[str | None, str]:
    """("exp_avg", "decoder...") of an optimizer state's logical name, (None, name) of a weight's."""
    for state in STATES:
        head = state_name("", state)
        if name.startswith(head):
            return state, name.removeprefix(head)
    return None, name


@dataclass(frozen=True, slots=True)
class Buffer:
    """One gradient buffer: dtypes of parameters and gradients, and per state its tensors (one for each bucket)."""

    where: str
    dtypes: tuple[str, ...]
    coalesced: bool
    tensors: dict[str, tuple[Tensor, ...]]
    unpadded: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of each state, all buckets together."""
        return sum(tensor.shape[0] for tensor in self.tensors[STATES[0]])

    def fitted(self, found: BufferMap) -> BufferMap:
        """The map, checked against sizes; InputError where the two are not of one run."""
        if self.coalesced:
            fits = found.fitted(self.numel)
            if fits is None:
                raise InputError(
                    f"{self.where}: holds {self.numel:,} elements, its parameters need {found.coalesced_numel:,}: the "
                    "param_map or the flags are those of another run, or of another parallel size"
                )
            return fits
        held = [tensor.shape[0] for tensor in self.tensors[STATES[0]]]
        if len(held) != len(found.unpadded) or any(h < n for h, n in zip(held, found.unpadded, strict=True)):
            raise InputError(
                f"{self.where}: has buckets of {held} elements, its parameters need {list(found.unpadded)}: the "
                "param_map or the flags are those of another run, or of another parallel size"
            )
        return found

    def tensor(self, found: BufferMap, param: Range, state: str) -> Tensor:
        """Where one state of a parameter lies."""
        if self.coalesced:
            bucket, (first, numel) = 0, found.coalesced_slice(param)
        else:
            bucket, first, numel = found.list_slice(param)
        held = self.tensors[state][bucket]
        width = held.nbytes // max(held.shape[0], 1)
        extents = part_of(held.extents, first * width, numel * width)
        return Tensor(f"{state}.{param.name}", held.dtype, param.shape, held.path, extents)


@dataclass(frozen=True, slots=True)
class State:
    """The state of one optimizer (dense or experts) on one rank."""

    buffers: tuple[Buffer, ...]
    short_of_fp32: bool


def states_of(file: TorchFile) -> list[State | None]:
    """[dense] or [dense, experts]; None where another rank's file has it."""
    tree = file.tree
    entries = tree if isinstance(tree, list) else [tree]
    if not entries or not all(entry is None or isinstance(entry, dict) for entry in entries):
        raise InputError(f"{file.path}: holds no optimizer state ({type(tree).__name__}): it is another file")
    return [None if entry is None else _state(file, entry) for entry in entries]


def _state(file: TorchFile, entry: dict[Any, Any]) -> State:
    numbers = sorted(key for key in entry if type(key) is int)
    if not numbers and not any(key in entry for key in _STATE_KEYS):
        raise InputError(f"{file.path}: has no buffers (keys {', '.join(map(str, entry))!s:.200}): it is another file")
    if numbers != list(range(len(numbers))):
        raise InputError(f"{file.path}: has the buffers {numbers}: some are missing")
    coalesced = entry.get("buckets_coalesced", False) is True
    buffers = [
        _buffer(file, number, dtypes, content, _unpadded(file, entry, number, dtypes), coalesced=coalesced)
        for number in numbers
        for dtypes, content in _items(file, entry[number])
    ]
    return State(tuple(buffers), SHORT_OF_FP32 in entry)


def _items(file: TorchFile, content: Any) -> Sequence[tuple[Any, Any]]:
    if not isinstance(content, dict) or not content:
        raise InputError(f"{file.path}: a buffer is a {type(content).__name__}, expected its dtypes and states")
    return list(content.items())


def _unpadded(file: TorchFile, entry: dict[Any, Any], number: int, dtypes: Any) -> tuple[int, ...]:
    """per_bucket_numel_unpadded of a buffer, where the container says it."""
    sizes = entry.get("per_bucket_numel_unpadded")
    if sizes is None:
        return ()
    try:
        found = sizes[number][dtypes]
    except (LookupError, TypeError):
        raise InputError(f"{file.path}: per_bucket_numel_unpadded does not know buffer {number}") from None
    if not isinstance(found, list) or not all(type(n) is int and n >= 0 for n in found):
        raise InputError(f"{file.path}: per_bucket_numel_unpadded of buffer {number} is {found!r:.80}")
    return tuple(found)


def _buffer(
    file: TorchFile, number: int, dtypes: Any, content: Any, unpadded: tuple[int, ...], *, coalesced: bool
) -> Buffer:
    where = f"{file.path}: buffer {number}"
    if not isinstance(dtypes, tuple) or not all(type(d) is Global and d.module == "torch" for d in dtypes):
        raise InputError(f"{where} is of {dtypes!r:.80}, which are no dtypes")
    if not isinstance(content, dict):
        raise InputError(f"{where} is a {type(content).__name__}, expected its states")
    missing = [state for state in STATES if state not in content]
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}: it was saved by another optimizer, or is damaged")
    tensors = {state: _bucket_tensors(file, where, state, content[state]) for state in STATES}
    shapes = {state: [t.shape for t in found] for state, found in tensors.items()}
    if any(shape != shapes[STATES[0]] for shape in shapes.values()):
        raise InputError(f"{where}: its states have different sizes ({shapes!s:.300}): the file is damaged")
    claimed = content.get("numel_unpadded")
    found = Buffer(where, tuple(d.name for d in dtypes), coalesced, tensors, unpadded)
    if coalesced and claimed != found.numel:
        raise InputError(f"{where} holds {found.numel:,} elements, and says numel_unpadded {claimed!r:.80}")
    if unpadded and (len(unpadded) != len(tensors[STATES[0]]) or sum(unpadded) > found.numel):
        raise InputError(f"{where}: its buckets are not as per_bucket_numel_unpadded says ({list(unpadded)!s:.80})")
    return found


def _bucket_tensors(file: TorchFile, where: str, state: str, value: Any) -> tuple[Tensor, ...]:
    """One tensor for each bucket; a bare tensor is one (or, coalesced, all of them)."""
    refs = value if isinstance(value, list) else [value]
    if not refs or not all(isinstance(ref, TensorRef) and len(ref.shape) == 1 for ref in refs):
        raise InputError(f"{where}: {state} is no list of flat tensors")
    return tuple(stored_tensor(file, state, ref) for ref in refs)
