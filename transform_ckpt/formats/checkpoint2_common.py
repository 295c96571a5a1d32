"""Checkpoint 2.0: file names, JSON files, and the numbers of common.json as states.

May import transform_ckpt.{errors,tensors,views} and formats.files.

Facts (MindFormers 1.9.0 checkpoint/utils.py `get_checkpoint_iter_dir`, `get_checkpoint_name`,
`get_checkpoint_tracker_filename`; checkpoint/checkpoint.py `CommonInfo`, `save_checkpoint`):
iteration directories are `iteration_{n:08d}`; tensor files `[{prefix}-]model|opt-{index:07d}-{total:07d}.safetensors`,
index from 0; the tracker holds the bare number.  common.json has exactly the fields of `CommonInfo` (the loader calls
`CommonInfo(**content)`, so a foreign field is a TypeError there), null where unknown.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, first_twice
from transform_ckpt.formats.files import storage_error, xxh3
from transform_ckpt.tensors import FileHeader, Logical, Piece, Tensor
from transform_ckpt.views import Shape, whole

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = "metadata.json"
COMMON = "common.json"
FILE_NAME = re.compile(r"(?:.+-)?(?P<kind>model|opt)-(?P<index>\d{7,})-(?P<total>\d{7,})\.safetensors")
COMMON_FIELDS = ("epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size", "ckpt_status")
"""Fields of `CommonInfo`, in its order."""

Scalar = bool | int | float | str
_ITERATION = re.compile(r"iteration_(\d+)")


def iteration_name(step: int) -> str:
    """Directory name of one iteration."""
    return f"iteration_{step:08d}"


def parse_iteration(name: str) -> int | None:
    """The step of a directory name, or None where the real writer would not have called it so."""
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match and len(match[1]) < 20 and iteration_name(int(match[1])) == name else None


def file_name(prefix: str, kind: str, index: int, total: int) -> str:
    """Name of one tensor file; `kind` is model or opt, an empty prefix is left out."""
    return f"{prefix}{'-' if prefix else ''}{kind}-{index:07d}-{total:07d}.safetensors"


def shard_id(name: str, number: int) -> str:
    """Key of storage_data (checkpoint/utils.py `get_sharded_tensor_shard_id`)."""
    return str((name, (number,)))


def _refuse_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InputError(f"{path}: {first_twice(key for key, _ in pairs)!r} is there twice: fetch it again")
    return found


def read_bytes(path: Path) -> bytes:
    """A small file as it is."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise storage_error(str(path), error, "reading it") from None


def load_json(path: Path) -> tuple[dict[str, Any], FileHeader]:
    """A JSON object and the header that stands for its file in the source's fingerprint."""
    raw = read_bytes(path)
    try:
        content = json.loads(raw, object_pairs_hook=lambda pairs: _refuse_duplicates(path, pairs))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); it is truncated or damaged: fetch or save it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}: fetch or save it again")
    return content, FileHeader(str(path), "json", len(raw), {}, xxh3(raw))


def encode_scalar(name: str, value: Scalar) -> tuple[str, Shape, bytes]:
    """Dtype code, shape and bytes that MindSpore gives this number in a rank's file.

    MindSpore 2.9.0 `append_dict` makes int Int64, float Float32, bool Bool, all 0-d; the optimizer's `global_step` is
    Int32 of shape (1,) (nn/optim/optimizer.py, and so does MindFormers 1.9.0 `load_checkpoint`).  OverflowError where
    the number does not fit.
    """
    if isinstance(value, str):
        return dtypes.STRING, (), value.encode("utf-32-le")
    try:
        if isinstance(value, bool):
            return "BOOL", (), struct.pack("<?", value)
        if name == "global_step" and isinstance(value, int):
            return "I32", (1,), struct.pack("<i", value)
        if isinstance(value, float) or name == "loss_scale":
            return "F32", (), struct.pack("<f", value)
        return "I64", (), struct.pack("<q", value)
    except struct.error as error:
        raise OverflowError(str(error)) from None


def read_common(path: Path) -> tuple[dict[str, Tensor], FileHeader]:
    """The values of common.json as small inline tensors; null is absence."""
    content, header = load_json(path)
    tensors: dict[str, Tensor] = {}
    for name, value in sorted(content.items()):
        if value is None:
            continue
        if not isinstance(value, (bool, int, float, str)):
            raise InputError(f"{path}: {name} is a {type(value).__name__}, expected a number or null: correct it")
        try:
            code, shape, data = encode_scalar(name, value)
        except OverflowError as error:
            raise InputError(f"{path}: {name} is {value}, which does not fit: {error}: correct it") from None
        tensors[name] = Tensor(name, code, shape, str(path), (), data)
    return tensors, FileHeader(header.path, header.format, header.nbytes, tensors, header.digest)


def states_of(tensors: Iterable[Tensor]) -> dict[str, Logical]:
    """Each tensor as a whole state that rank 0 holds."""
    return {t.name: Logical(t.name, t.dtype, t.shape, (Piece(t, whole(t.shape), 0),)) for t in tensors}


def dump_json(content: Mapping[str, Any]) -> bytes:
    """JSON as MindFormers writes it."""
    return json.dumps(content, ensure_ascii=False, indent=4).encode()


def dump_common(scalars: Mapping[str, Scalar], step: int) -> bytes:
    """common.json.  `step_num` and `global_step` default to the iteration: the writer names the directory by it."""
    values: dict[str, Scalar | None] = dict.fromkeys(COMMON_FIELDS)
    values.update(step_num=step, global_step=step)
    values.update((name, scalars[name]) for name in COMMON_FIELDS if name in scalars)
    return dump_json(values)
