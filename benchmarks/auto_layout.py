"""A strategy for another number of ranks, and what each of them needs: python -m benchmarks.auto_layout OUT ...

OUT/{name}_strategy_merged.ckpt     the target's strategy, of the same model as the state's
OUT/{name}_bytes.json               bytes of each rank's own slices, and the most that looking at the source may cost

Sizes come from the generator of the state and the independent slicer of the tests, not from the product's plan.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.make_state import CKPT_VALUE_NBYTES, CODES, SCALARS, Model, Parallel, Param, model_of
from tests.support import device_slices, write_merged_strategy
from transform_ckpt.samples import SAMPLE_NBYTES, SAMPLED_TENSORS

CKPT_WINDOW_NBYTES = 4096
"""What the .ckpt reader takes at a time: a header is a few dozen bytes between contents that are skipped."""
CKPT_ENDS_NBYTES = 4 + 17
"""The magic number of an encrypted file, and the place of a crc."""


def _nbytes(param: Param, parallel: Parallel, device: int) -> int:
    index = device_slices(param.shape, parallel.layout(param))[device]
    return prod([int(s.stop - s.start) for s in index]) * CODES[param.dtype][1]


def rank_sizes(model: Model, parallel: Parallel) -> list[list[int]]:
    """For each rank the bytes of each of its tensors."""
    scalars = [prod(shape) * CODES[dtype][1] for _, dtype, shape, _ in SCALARS]
    return [
        [_nbytes(param, parallel, device) for param in params] + scalars
        for params in parallel.stages(model)
        for device in range(parallel.devices)
    ]


def header_nbytes(src: Path) -> dict[str, int]:
    """The most that reading the headers of all files may take; a safetensors file says it in its first 8 bytes."""
    found = {}
    for path in src.rglob("*.safetensors"):
        with path.open("rb") as file:
            found[path.name] = 8 + int.from_bytes(file.read(8), "little")
    return found


def looking_nbytes(model: Model, parallel: Parallel, state: Path) -> Mapping[str, Mapping[str, int]]:
    """By format: headers, samples (docs/architecture.md: 1 KiB of a few weights of each stage and rank), states."""
    ranks = rank_sizes(model, parallel)
    values = sum(-(-nbytes // CKPT_VALUE_NBYTES) for sizes in ranks for nbytes in sizes)
    scalars = sum(prod(shape) * CODES[dtype][1] for _, dtype, shape, _ in SCALARS)
    common = {"samples": SAMPLED_TENSORS * SAMPLE_NBYTES * parallel.world, "states": scalars * parallel.world}
    headers = {
        "ckpt": values * CKPT_WINDOW_NBYTES + parallel.world * CKPT_ENDS_NBYTES,
        "safetensors": sum(header_nbytes(state / "src_safetensors").values()),
    }
    return {fmt: {"headers": nbytes, **common} for fmt, nbytes in headers.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto_layout")
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--gb", type=float, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--src", type=Parallel.parse, required=True)
    parser.add_argument("--dst", type=Parallel.parse, required=True)
    args = parser.parse_args()
    model = model_of(args.gb, args.layers)
    stages = [{p.name: args.dst.layout(p) for p in params} for params in args.dst.stages(model)]
    write_merged_strategy(importlib.import_module("mindspore"), stages, args.out / f"{args.name}_strategy_merged.ckpt")
    sizes: dict[str, Any] = {
        "own": [sum(tensors) for tensors in rank_sizes(model, args.dst)],
        "looking": looking_nbytes(model, args.src, args.out),
    }
    (args.out / f"{args.name}_bytes.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main()
