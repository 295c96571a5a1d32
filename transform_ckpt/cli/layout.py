"""`transform-ckpt layout STRATEGY`: who holds what."""

from __future__ import annotations

import json
from typing import Any

import click

from transform_ckpt.cli.options import PATH, json_flag


@click.command("layout")
@click.argument("strategy", type=PATH)
@json_flag
def command(strategy: str, as_json: bool) -> None:
    """Print the strategy file or directory STRATEGY: stages, ranks, and how each parameter is cut."""
    from transform_ckpt import api

    found = api.read_strategy(strategy)
    stages: list[dict[str, Any]] = []
    for number, stage in enumerate(found.stages if found else ()):
        ranks = found.ranks(number) if found else range(0)
        rows = {
            name: {
                "dev_matrix": list(layout.dev_matrix),
                "tensor_map": [list(axes) or [-1] for axes in layout.tensor_map],
                "opt_shard": {"step": layout.opt_step, "size": layout.opt_size},
                "parts": list(layout.cuts(len(layout.tensor_map))),
            }
            for name, layout in stage.layouts.items()
        }
        stages.append({"stage": number, "ranks": [ranks.start, ranks.stop - 1], "params": rows})
    if as_json:
        print(json.dumps({"ok": True, "world": found.world if found else 1, "stages": stages}))
        return
    for entry in stages:
        print(
            f"stage {entry['stage']}: ranks {entry['ranks'][0]}-{entry['ranks'][1]}, {len(entry['params'])} parameters"
        )
        for name, row in entry["params"].items():
            shard = f" optimizer shard {row['opt_shard']['size']}" if row["opt_shard"]["size"] else ""
            print(f"  {name}  mesh {row['dev_matrix']} map {row['tensor_map']} parts {row['parts']}{shard}")
