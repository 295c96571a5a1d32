"""A Megatron checkpoint with its distributed optimizer as MindSpore files, by torch.load and mindspore.save_checkpoint.

    python -m benchmarks.torch_loop SRC DST

Works as MindSpeed-Core-MS's convert_pt2ckpt.py does, written anew: four processes at a time, each with the whole
distrib_optim.pt of a rank in memory, cut into parameters by the param_map and saved as fp32 parameters of MindSpore.
Only for what make_dist_opt writes as `list`: TP and PP, equal stages.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

PROCESSES = 4
"""convert_pt2ckpt.py's --process-limit."""
PREFIXES = {"param": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}
COMPONENTS = {
    "dense_h_to_4h": "mapping",
    "dense_4h_to_h": "projection",
    "self_attention": "attention",
    "query_key_value": "qkv_proj",
    "dense": "out_proj",
}


def mindspore_name(name: str, first_layer: int) -> str:
    """Of a parameter, with its global layer number."""
    parts = [COMPONENTS.get(part, part) for part in name.split(".") if part != "module"]
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(first_layer + int(parts[at]))
    return ".".join(parts)


def convert(job: tuple[str, str, int, int, int]) -> None:
    """One rank directory: (directory, destination file, TP rank, stage, layers of a stage)."""
    folder, dst, tp, stage, each = job
    torch, ms = importlib.import_module("torch"), importlib.import_module("mindspore")
    source = Path(folder)
    ranges = json.loads((source.parents[1] / f"param_map/param_map_buffer0_dp0tp{tp}pp{stage}vpp0.json").read_text())
    buffer = torch.load(source / "distrib_optim.pt", map_location="cpu", weights_only=True)[0]
    (states,) = buffer.values()
    saved: list[dict[str, Any]] = []
    for state, prefix in PREFIXES.items():
        bases: dict[int, int] = {}
        for name, (_, shape, start, end, bucket) in ranges.items():
            base = bases.setdefault(bucket, start)
            data = states[state][bucket][start - base : end - base].reshape(shape).float().numpy()
            own = prefix + mindspore_name(name, stage * each)
            saved.append({"name": own, "data": ms.Parameter(ms.Tensor(data), name=own)})
    Path(dst).parent.mkdir(parents=True)
    ms.save_checkpoint(saved, dst)


def jobs(src: Path, dst: Path) -> list[tuple[str, str, int, int, int]]:
    """Every rank directory; the destination's rank is that of the first of two data-parallel ones."""
    folders = sorted(src.glob("iter_*/mp_rank_*_*"))
    places = [tuple(map(int, folder.name.split("_")[2:])) for folder in folders]
    tp_size, dp_size = max(tp for tp, _ in places) + 1, 2
    names = [path.read_text() for path in (src / "param_map").glob("*dp0tp0pp0vpp0.json")]
    each = max(int(number) for number in re.findall(r"layers\.(\d+)\.", names[0])) + 1
    found = []
    for folder, (tp, stage) in zip(folders, places, strict=True):
        rank = stage * dp_size * tp_size + tp
        found.append((str(folder), str(dst / f"rank_{rank}" / "network.ckpt"), tp, stage, each))
    return found


def main(src: str, dst: str) -> None:
    """All ranks."""
    with multiprocessing.get_context("spawn").Pool(PROCESSES, maxtasksperchild=1) as pool:
        pool.map(convert, jobs(Path(src), Path(dst)), chunksize=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
