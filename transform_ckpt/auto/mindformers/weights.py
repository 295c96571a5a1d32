"""Hugging Face weights in a MindFormers job: which of them are a change of names only."""

from __future__ import annotations

from typing import Any

from transform_ckpt import api
from transform_ckpt.auto import hf_names
from transform_ckpt.auto.mindformers import places
from transform_ckpt.auto.mindformers.config import Call
from transform_ckpt.errors import InputError


def needs_conversion(call: Call) -> str:
    """Why these Hugging Face weights are left to MindFormers; "" for all others.

    MindFormers 1.9.0 renames with the network's `convert_name` and, with qkv_concat, joins tensors
    (utils/load_checkpoint_utils.py `get_load_path_after_hf_convert`, `load_safetensors_checkpoint`).
    """
    path = call.path
    cell, named = _naming_cell(call.network)
    if path is None or call.rank_directories or not named:
        return ""
    if not places.function(places.IS_HUGGING_FACE)(path, cell):
        return ""
    if call.option("qkv_concat"):
        return "qkv_concat joins tensors of Hugging Face weights"
    source = api.open_checkpoint(path)
    try:
        ours = set(hf_names.renamed(source).params)
    except InputError as error:
        return str(error)
    theirs = {cell.convert_name(name) for name in source.params if not hf_names.DROPPED.fullmatch(name)}
    return "" if ours == theirs else f"{type(cell).__name__} has other names for Hugging Face weights"


def _naming_cell(network: Any) -> tuple[Any, bool]:
    """The model itself inside of wrappers, and whether it can rename."""
    found: Any = places.function(places.NAMING_CELL)(network)
    cell, named = found
    return cell, bool(named)
