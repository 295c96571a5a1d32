"""`transform-ckpt inspect PATH`: what a checkpoint holds, from its headers."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from transform_ckpt import dtypes
from transform_ckpt.cli.options import PATH, human, json_flag

SHOWN = 20


@click.command("inspect")
@click.argument("path", type=PATH)
@click.option("--strategy", "--src-strategy", metavar="FILE|DIR", help="Its strategy: shows whole tensors.")
@click.option("--step", type=int, help="Which step, where the directory holds several.")
@click.option("--all", "show_all", is_flag=True, help="List every tensor.")
@json_flag
def command(path: str, strategy: str | None, step: int | None, show_all: bool, as_json: bool) -> None:
    """List format, files, tensors and values of the checkpoint PATH."""
    found = describe(path, strategy, step)
    if as_json:
        print(json.dumps({"ok": True, **found}))
        return
    for note in found["notes"]:
        print(f"note: {note}", file=sys.stderr)
    step_text = "" if found["step"] is None else f", step {found['step']}"
    print(f"{path}: {found['format']}, {len(found['files'])} files, {human(found['nbytes'])}{step_text}")
    for name, value in found["values"].items():
        print(f"  {name} = {value}")
    tensors = found["tensors"]
    for item in tensors if show_all else tensors[:SHOWN]:
        print(f"  {item['dtype']:>8} {item['shape']!s:<20} {item['name']}  {item['where']}")
    if not show_all and len(tensors) > SHOWN:
        print(f"  ... and {len(tensors) - SHOWN} more tensors (--all lists them)")


def describe(path: str, strategy: str | None, step: int | None) -> dict[str, Any]:
    """The whole answer as plain data."""
    from transform_ckpt import api
    from transform_ckpt.formats import mindspore_dir, read_header
    from transform_ckpt.megatron.directory import is_converted
    from transform_ckpt.source import MINDSPORE

    ranked = api.detect(path) == MINDSPORE and strategy is None and not is_converted(path)
    files = mindspore_dir.find(path, step) if ranked else None
    if files is not None and len(files.ranks) > 1:
        headers = {r: [read_header(p) for p in paths] for r, paths in files.ranks.items()}
        tensors = [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "nbytes": t.nbytes, "where": f"rank_{rank}"}
            for rank, found in headers.items()
            for h in found
            for t in h.tensors.values()
        ]
        every = [h for found in headers.values() for h in found]
        return _answer(
            "mindspore", files.step, every, tensors, {}, [*files.notes, "parts of ranks; --strategy shows them whole"]
        )
    source = api.open_checkpoint(path, strategy, step)
    tensors, values = [], {}
    for logical in (*source.params.values(), *source.states.values()):
        value = _value(logical)
        if value is not None:
            values[logical.name] = value
        boxes = {piece.box for piece in logical.pieces}
        where = f"{len(boxes)} parts on {len(logical.pieces)} ranks" if len(boxes) > 1 else _replicated(logical)
        tensors.append(
            {
                "name": logical.name,
                "dtype": logical.dtype,
                "shape": list(logical.shape),
                "nbytes": sum(p.tensor.nbytes for p in logical.pieces),
                "where": where,
            }
        )
    return _answer(source.format, source.step, list(source.headers), tensors, values, list(source.notes))


def _replicated(logical: Any) -> str:
    return f"whole on {len(logical.pieces)} ranks" if len(logical.pieces) > 1 else ""


def _answer(
    kind: str, step: int | None, headers: list[Any], tensors: list[Any], values: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    files = [
        {"path": h.path, "nbytes": h.nbytes, "tensors": len(h.tensors), "crc": h.crc32 is not None} for h in headers
    ]
    return {
        "format": kind,
        "step": step,
        "nbytes": sum(h.nbytes for h in headers),
        "files": files,
        "values": values,
        "tensors": tensors,
        "notes": notes,
    }


def _value(logical: Any) -> Any:
    from transform_ckpt.store import FileTable, read_tensor

    tensor = logical.pieces[0].tensor
    if tensor.nbytes > 64 and tensor.inline is None:
        return None
    table = FileTable(os.O_RDONLY)
    try:
        decoded = dtypes.decode(logical.dtype, read_tensor(table, tensor))
    finally:
        table.close()
    return None if isinstance(decoded, bytes) else decoded
