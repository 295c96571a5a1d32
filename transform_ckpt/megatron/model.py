"""The model part of model_optim_rng.pt: chunks of named tensors, whatever nesting the writer used.

Facts: Megatron-LM megatron/training/checkpointing.py (`model`, or `model0`, `model1`, ... with virtual stages);
megatron.legacy GPTModel nests language_model.{embedding, encoder, output_layer} and word_embeddings_for_head, mcore
GPTModel is flat.  Joined by dots the nested names are those of named_parameters, but for the tied head.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats.torch_values import DefaultDict, TensorRef
from transform_ckpt.formats.torch_zip import TorchFile
from transform_ckpt.megatron.names import without_wrappers
from transform_ckpt.tensors import Extent, Tensor

EXTRA_STATE = "_extra_state"
TIED_HEAD_ENTRY, TIED_HEAD = "word_embeddings_for_head.weight", "word_embeddings.weight"
_CHUNK = re.compile(r"model(\d{0,3})")
_LAYER = re.compile(r"((?:.*\.)?(?:decoder|encoder|transformer)\.layers\.)(\d+)(\..+)")
_BUFFERS = (
    ".router.expert_bias",
    ".router.local_tokens_per_expert",
    ".inv_freq",
    ".max_logit",
    ".router.global_tokens",
)
"""Suffixes of registered buffers: in a state dict, and no parameters."""
MAX_DEPTH = 8


@dataclass(slots=True)
class Chunk:
    """One model chunk: `tensors` and `others` (extra states) by stored name; `paths`: keys to each, in order."""

    nested: bool
    kind: type
    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def parameters(self) -> dict[str, Tensor]:
        """What named_parameters would give, in its order."""
        return {name: t for name, t in self.tensors.items() if not name.endswith(_BUFFERS)}


def chunks_of(file: TorchFile) -> list[Chunk]:
    """The chunks of a rank in order; InputError where there are none, or what is there is no model."""
    tree = file.tree
    if not isinstance(tree, dict):
        raise InputError(f"{file.path}: holds a {type(tree).__name__}, not a checkpoint of Megatron")
    numbered = {m[1]: k for k in tree if isinstance(k, str) and (m := _CHUNK.fullmatch(k))}
    keys = [numbered[""]] if "" in numbered else [numbered[n] for n in sorted(numbered, key=int)]
    if not keys or ("" not in numbered and sorted(map(int, numbered)) != list(range(len(numbered)))):
        raise InputError(f"{file.path}: has no model (keys: {', '.join(map(str, tree))!s:.200}): it is another file")
    return [_chunk(file, key, tree[key]) for key in keys]


def _chunk(file: TorchFile, key: str, model: Any) -> Chunk:
    if not isinstance(model, dict):
        raise InputError(f"{file.path}: {key!r} is a {type(model).__name__}, not a state dict")
    nested = any(isinstance(value, dict) for value in model.values())
    kind = OrderedDict if isinstance(model, OrderedDict) else DefaultDict if isinstance(model, DefaultDict) else dict
    found = Chunk(nested, kind)
    for path, value in _leaves(model, (), file.path):
        name = without_wrappers(".".join(path))
        name = TIED_HEAD if name == TIED_HEAD_ENTRY else name
        if name in found.tensors or name in found.others:
            raise InputError(f"{file.path}: {key!r} holds {name!r} twice")
        found.paths[name] = tuple(name.split(".", len([key for key in path if key != "module"]) - 1))
        if name.endswith(EXTRA_STATE):
            found.others[name] = value  # None, or what Transformer Engine keeps of fp8
        elif isinstance(value, TensorRef):
            found.tensors[name] = stored_tensor(file, name, value)
        else:
            raise InputError(f"{file.path}: {name!r} of {key!r} is a {type(value).__name__}, not a tensor")
    return found


def _leaves(model: Mapping[Any, Any], above: tuple[str, ...], where: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if len(above) > MAX_DEPTH:
        raise InputError(f"{where}: its model nests deeper than {MAX_DEPTH}")
    for key, value in model.items():
        if type(key) is not str:
            raise InputError(f"{where}: its model has the key {key!r:.80}, which is no name")
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key), where)
        else:
            yield (*above, key), value


def stored_tensor(file: TorchFile, name: str, ref: TensorRef) -> Tensor:
    """A tensor of a file with its bytes; only C-ordered ones lie in one run."""
    if not ref.is_contiguous:
        raise InputError(
            f"{file.path}: {name!r} is stored with strides {ref.strides} for shape {ref.shape}: "
            "load it and save it again with .contiguous()"
        )
    start = file.extents[ref.storage.key].offset_bytes + ref.offset * ref.itemsize
    return Tensor(name, ref.dtype, ref.shape, file.path, (Extent(start, ref.nbytes),))


def split_layer(name: str) -> tuple[str, int, str] | None:
    """("decoder.layers.", 3, ".mlp.linear_fc1.weight"), or None for a name outside of the layers."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def with_layer(name: str, layer: int) -> str:
    """The same name with another layer number."""
    parts = split_layer(name)
    return name if parts is None else f"{parts[0]}{layer}{parts[2]}"


def is_embedding(name: str) -> bool:
    """Does it belong before the layers, to the first stage?"""
    return name.removeprefix("language_model.").startswith("embedding.")


def is_tied_head(name: str) -> bool:
    """Is this what a last stage calls its copy of a tied embedding?"""
    return name in (TIED_HEAD, "output_layer.weight", "language_model.output_layer.weight")
