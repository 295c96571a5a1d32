"""What a Hugging Face config.json tells of a model, under the names that Megatron's args have.

Both spellings of expert counts and of heads: transformers 4.57 and 5 configuration classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from transform_ckpt.errors import InputError
from transform_ckpt.formats.files import open_binary

_MAX_NBYTES = 1 << 24
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd"),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_query_groups": ("num_key_value_heads",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "vocab_size": ("vocab_size",),
}


def args_of_config(path: str) -> Mapping[str, Any]:
    """Args by Megatron's names, of a config.json or of the directory that holds one."""
    path = os.path.join(path, "config.json") if os.path.isdir(path) else path
    with open_binary(path, "reading the model's configuration") as (fd, nbytes):
        raw = os.pread(fd, min(nbytes, _MAX_NBYTES), 0)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({error!s:.100}): give the model's config.json") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no configuration of a model: give its config.json")
    found: dict[str, Any] = {}
    for name, spellings in _NAMES.items():
        value = next((content[s] for s in spellings if type(content.get(s)) is int), None)
        if value is not None:
            found[name] = value
    if type(content.get("tie_word_embeddings")) is bool:
        found["untie_embeddings_and_output_weights"] = not content["tie_word_embeddings"]
    return found
