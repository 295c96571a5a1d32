"""Hugging Face Llama weights under MindFormers' legacy names: a change of names, no tensor is cut or joined.

Source: MindFormers 1.9.0 models/llama/llama.py (`LlamaForCausalLM.convert_name`); Qwen2 uses the same.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

from transform_ckpt.errors import InputError, name_some
from transform_ckpt.tensors import Logical, Source

NAMES = (
    (r"model\.embed_tokens\.weight", "model.tok_embeddings.embedding_weight"),
    (r"(model\.layers\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"\1.attention.w\2.\3"),
    (r"(model\.layers\.\d+)\.self_attn\.o_proj\.(weight|bias)", r"\1.attention.wo.\2"),
    (r"(model\.layers\.\d+)\.mlp\.gate_proj\.weight", r"\1.feed_forward.w1.weight"),
    (r"(model\.layers\.\d+)\.mlp\.down_proj\.weight", r"\1.feed_forward.w2.weight"),
    (r"(model\.layers\.\d+)\.mlp\.up_proj\.weight", r"\1.feed_forward.w3.weight"),
    (r"(model\.layers\.\d+)\.input_layernorm\.weight", r"\1.attention_norm.weight"),
    (r"(model\.layers\.\d+)\.post_attention_layernorm\.weight", r"\1.ffn_norm.weight"),
    (r"model\.norm\.weight", "model.norm_out.weight"),
    (r"lm_head\.weight", "lm_head.weight"),
)
"""(pattern of the whole Hugging Face name, MindFormers' name)."""

DROPPED = re.compile(r".*\.rotary_emb\.inv_freq")
"""A constant that old transformers saved; computed from the configuration."""

_MARKS = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
_INDEX = "model.safetensors.index.json"


def is_hugging_face(source: Source) -> bool:
    """Do the tensors have the names of a Hugging Face model?"""
    return any(mark in source.params for mark in _MARKS)


def renamed(source: Source) -> Source:
    """The same tensors under MindFormers' legacy names; InputError when one has no such name."""
    _check_index(source)
    params: dict[str, Logical] = {}
    unknown: list[str] = []
    dropped: list[str] = []
    for name, logical in source.params.items():
        if DROPPED.fullmatch(name):
            dropped.append(name)
            continue
        found = _rename(name)
        if found is None:
            unknown.append(name)
        else:
            params[found] = replace(logical, name=found)
    if unknown:
        raise InputError(
            f"{source.root}: Hugging Face weights of a model that is not a Llama: {name_some(unknown)} have no name in "
            "MindFormers' legacy naming: convert them to MindFormers' weights first"
        )
    notes = [f"Hugging Face names read as MindFormers' ({len(params)} tensors)"]
    notes += [f"left out, computed from the configuration: {name_some(dropped)}"] if dropped else []
    return replace(source, params=params, notes=(*source.notes, *notes))


def _rename(name: str) -> str | None:
    for pattern, wanted in NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(wanted)
    return None


def _check_index(source: Source) -> None:
    """Every file and tensor that the index names must be there."""
    path = os.path.join(source.root, _INDEX)
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as stream:
            wanted = dict(json.load(stream)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as an index ({error}): fetch it again") from None
    lost = [name for name in wanted if name not in source.params]
    if lost:
        files = {str(wanted[name]) for name in lost}
        raise InputError(
            f"{path}: {len(lost)} tensors it names are not there ({name_some(lost)}), of {name_some(files)}: fetch "
            "the missing files"
        )
