"""`transform-ckpt formats`: what is read and written."""

from __future__ import annotations

import json

import click

from transform_ckpt.cli.options import json_flag

TABLE = (
    ("mindspore", "rank_i/*.ckpt", "read, write", "strategy file or directory", "--format ckpt"),
    ("mindspore", "rank_i/*.safetensors", "read, write", "strategy file or directory", "--format safetensors"),
    ("mindspore", "one .ckpt or .safetensors file", "read", "complete weights", "rank_0 alone is written"),
    ("mindspore", "complete safetensors directory", "read, write", "complete weights", "--unified"),
    ("mindspore", "remove_redundancy rank directories", "read", "strategy file or directory", ""),
    ("mindspore", "MindFormers Checkpoint 2.0", "read, write", "describes itself", "--checkpoint-2"),
    ("mindspore", "rank_i/ of Megatron's shards", "read, write", "pt_meta/", "--naming mindspeed --megatron-shards"),
    ("megatron", "iter_*/mp_rank_*/model_optim_rng.pt", "read, write", "args", "--to megatron --tp --pp --ep ..."),
    ("megatron", "distrib_optim.pt, list of buckets", "read, write", "param_map/, or rebuilt", "--container list"),
    ("megatron", "distrib_optim.pt, coalesced", "read, write", "param_map/, or rebuilt", "--container coalesced"),
)


@click.command("formats")
@json_flag
def command(as_json: bool) -> None:
    """List the checkpoint formats that are read and written."""
    fields = ("format", "what", "can", "layout", "flag")
    if as_json:
        print(json.dumps({"ok": True, "formats": [dict(zip(fields, row, strict=True)) for row in TABLE]}))
        return
    widths = [max(len(row[i]) for row in (fields, *TABLE)) for i in range(len(fields))]
    for row in (fields, *TABLE):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
