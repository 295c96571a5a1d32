"""Compare two converted checkpoints tensor by tensor: python -m benchmarks.dist_opt_same A B (exit 1: they differ).

Rank directories of MindSpore files by mindspore.load_checkpoint (without scalars, which only a converter's habit
decides), those of Megatron by torch.load; nothing of the product reads here.  How the elements of an optimizer state
are cut into buckets is no difference.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.make_dist_opt import ADAM, KEY, model_type
from tests.support import load_file, rank_files

Digests = dict[str, str]


def digest(kind: object, parts: Iterable[Any]) -> str:
    """Of NumPy arrays one behind the other, with what their type is."""
    found = hashlib.blake2b(str(kind).encode())
    for part in parts:
        found.update(part.reshape(-1).view("uint8").data)
    return found.hexdigest()


def weights(model: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a state dict that nests or not."""
    for name, value in model.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from weights(value, f"{prefix}{name}.")


def megatron_digests(folder: Path) -> Digests:
    """Weights and optimizer states of one rank."""
    model_type()  # its class is looked up by name
    files = [
        torch.load(folder / name, map_location="cpu", mmap=True, weights_only=False)  # our own files
        for name in ("model_optim_rng.pt", "distrib_optim.pt")
    ]
    found = {}
    for name, tensor in weights(files[0]["model"]):
        found[name] = digest((tensor.dtype, tensor.shape), [tensor.contiguous().view(torch.uint8).numpy()])
    for state in ADAM:
        held = files[1][0][KEY][state]
        buckets = held if isinstance(held, list) else [held]
        found[f"optimizer {state}"] = digest(held[0].dtype, [bucket.numpy() for bucket in buckets])
    return found


def mindspore_digests(path: Path) -> Digests:
    """Parameters of one rank's file."""
    ms = importlib.import_module("mindspore")
    loaded = load_file(ms, path)
    return {name: digest((a.dtype, a.shape), [a]) for name, a in loaded.items() if a.size > 1}


def digests(directory: Path) -> dict[str, Digests]:
    """Of every rank, by its directory's name."""
    megatron = {folder.name: megatron_digests(folder) for folder in sorted(directory.glob("iter_*/mp_rank_*"))}
    return megatron or {path.parent.name: mindspore_digests(path) for path in rank_files(directory).values()}


def main(first: str, second: str) -> int:
    """Print every difference and the number of tensors compared."""
    mine, theirs = digests(Path(first)), digests(Path(second))
    if mine.keys() != theirs.keys() or not mine:
        print(f"ranks {sorted(mine)} and {sorted(theirs)}: DIFFERENT")
        return 1
    unlike = [
        f"{rank}: {name}"
        for rank, found in mine.items()
        for name in sorted({*found, *theirs[rank]})
        if found.get(name) != theirs[rank].get(name)
    ]
    print("\n".join(unlike))
    count = sum(map(len, mine.values()))
    print(f"{count} tensors of {len(mine)} ranks compared: {'DIFFERENT' if unlike else 'equal'}")
    return int(bool(unlike))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
