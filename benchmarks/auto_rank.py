"""One rank of a job that starts from a checkpoint of another layout: python -m benchmarks.auto_rank SPEC_JSON

Loads all of this rank's parameters in one of `WAYS`, says so on stdout with the time (CLOCK_MONOTONIC, which all
processes share) and its peak memory, waits for a line on stdin, then prints a digest of every tensor.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.auto_count import Counter

Spec = Mapping[str, Any]
"""way, rank, world, src, src_strategy, dst_strategy, out, format, count."""
POLL_SECONDS = 0.05
"""MindFormers 1.9.0 looks every 5 s (tools/ckpt_transform/transform_checkpoint.py, wait_transform): its own ranks lose
up to that much more."""


def peak_rss() -> int:
    """Highest resident bytes of this program so far, or of the largest process that it started and that has ended."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    own = int(lines["VmHWM"].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def wait_for(directory: Path, world: int) -> None:
    """Until that many marks are there."""
    while len(list(directory.glob("succeed_*"))) < world:
        time.sleep(POLL_SECONDS)


# ---------------------------------------------------------------------------------------------- ours


def import_ours() -> None:
    """All that the automatic transform uses, NumPy included."""
    for name in ("ml_dtypes", "numpy", "transform_ckpt.auto.transform", "transform_ckpt.memory", "xxhash"):
        importlib.import_module(name)


def ours(spec: Spec, counter: Counter | None, *, in_memory: bool) -> dict[str, Any]:
    """The steps of a trainer with auto_trans_ckpt."""
    from transform_ckpt import api
    from transform_ckpt.auto.request import Request
    from transform_ckpt.auto.transform import AutoTransform
    from transform_ckpt.launcher import Launcher

    request = Request(spec["src"], spec["out"], spec["src_strategy"], in_memory=in_memory, timeout=600.0)
    launcher = Launcher(spec["rank"], spec["world"], "benchmark", local_world=spec["world"])
    job = AutoTransform(request, launcher, lambda line: print(line, file=sys.stderr))
    with job.together():
        _enter(counter, "plan")
        job.resolve()
        job.use_strategy(api.read_strategy(spec["dst_strategy"]))
        job.plan()
        _enter(counter, "load")
        job.transform()
        job.wait()
        return dict(job.load())


def _enter(counter: Counter | None, phase: str) -> None:
    if counter is not None:
        counter.phase = phase


# ---------------------------------------------------------------------------------------------- MindSpore


def import_mindspore() -> None:
    """MindSpore alone; MindFormers would come on top."""
    importlib.import_module("mindspore")


def _load_own(spec: Spec, directory: Path) -> dict[str, Any]:
    """MindFormers 1.9.0, trainer/utils.py, load_distributed_checkpoint: each rank its own file."""
    ms = importlib.import_module("mindspore")
    (path,) = (directory / f"rank_{spec['rank']}").glob(f"*.{spec['format']}")
    return dict(ms.load_checkpoint(str(path), format=spec["format"]))


def mindspore_one(spec: Spec, _: Counter | None) -> dict[str, Any]:
    """MindFormers 1.9.0 with transform_process_num 1 (TransformCkpt.transform_ckpt): rank 0 transforms for all."""
    ms = importlib.import_module("mindspore")
    out = Path(spec["out"])
    if spec["rank"] == 0:
        strategies = (spec["src_strategy"], spec["dst_strategy"])
        ms.transform_checkpoints(spec["src"], str(out), "checkpoint_", *strategies, output_format=spec["format"])
        (out / "succeed_0").touch()
    wait_for(out, 1)
    return _load_own(spec, out)


def mindspore_each(spec: Spec, _: Counter | None) -> dict[str, Any]:
    """With transform_process_num = world size (TransformCkpt.transform_checkpoint_by_rank): every rank its own file."""
    ms = importlib.import_module("mindspore")
    out, rank = Path(spec["out"]), spec["rank"]
    strategies = (spec["src_strategy"], spec["dst_strategy"])
    needed = ms.rank_list_for_transform(rank, *strategies)
    files = {r: str(*(Path(spec["src"]) / f"rank_{r}").glob(f"*.{spec['format']}")) for r in needed}
    (out / f"rank_{rank}").mkdir(parents=True)
    ms.transform_checkpoint_by_rank(rank, files, str(out / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"), *strategies)
    (out / f"succeed_{rank}").touch()
    wait_for(out, spec["world"])
    return _load_own(spec, out)


def mindspore_unified(spec: Spec, _: Counter | None) -> dict[str, Any]:
    """MindFormers 1.9.0 for safetensors (utils/load_checkpoint_utils.py, load_checkpoint_with_safetensors): rank 0
    merges all into complete weights, then every rank takes its slices of them.

    The network that it gives is compiled for an accelerator; here it is an empty one and the parameters are returned,
    and get_rank is answered, since no communication is set up.
    """
    ms = importlib.import_module("mindspore")
    module = importlib.import_module("mindspore.parallel.checkpoint_transform")
    out, rank = Path(spec["out"]), spec["rank"]
    if rank == 0:
        out.mkdir()
        ms.unified_safetensors(spec["src"], spec["src_strategy"], str(out / "unified"))
        (out / "succeed_0").touch()
    wait_for(out, 1)
    vars(module)["get_rank"] = lambda: rank
    found = module.load_distributed_checkpoint(
        network=ms.nn.Cell(),
        predict_strategy=spec["dst_strategy"],
        unified_safetensors_dir=str(out / "unified"),
        format="safetensors",
        return_param_dict=True,
    )
    return dict(found)


# ---------------------------------------------------------------------------------------------- this process

Way = tuple[Callable[[], None], Callable[[Spec, Counter | None], dict[str, Any]]]
WAYS: dict[str, Way] = {
    "memory": (import_ours, lambda spec, counter: ours(spec, counter, in_memory=True)),
    "disk": (import_ours, lambda spec, counter: ours(spec, counter, in_memory=False)),
    "mindspore_one": (import_mindspore, mindspore_one),
    "mindspore_each": (import_mindspore, mindspore_each),
    "mindspore_unified": (import_mindspore, mindspore_unified),
}


def digests(held: Mapping[str, Any]) -> dict[str, str]:
    """Type, shape and a digest of the bytes of NumPy arrays or MindSpore parameters."""
    import numpy as np

    found = {}
    for name, value in held.items():
        array = np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        found[name] = f"{array.dtype.name}{list(array.shape)} {hashlib.sha256(data.data).hexdigest()[:24]}"
    return found


def main(argument: str) -> None:
    """Load, report, wait, report."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # progress bars of MindSpore belong in the log
    spec = json.loads(argument)
    prepare, load = WAYS[spec["way"]]
    prepare()
    imported, imported_rss = time.monotonic(), peak_rss()
    counter = Counter(spec["src"]) if spec["count"] else None
    held = load(spec, counter)
    loaded = time.monotonic()
    report = {"imported": imported, "loaded": loaded, "peak": peak_rss(), "imported_peak": imported_rss}
    print(json.dumps({**report, "counted": counter.report() if counter else None}), file=reports, flush=True)
    sys.stdin.readline()  # digests of a quick rank must not slow down the others
    print(json.dumps(digests(held)), file=reports, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
