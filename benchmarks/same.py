"""Compare two directories of rank files tensor by tensor: python -m benchmarks.same A B (exit 1: they differ).

Both sides are read by MindSpore's own loader, so that equality does not rest on the product's readers.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.support import Array, load_file, rank_files


def differences(a: dict[str, Array], b: dict[str, Array]) -> list[str]:
    """Names that only one side has, or whose dtype, shape or bytes differ."""
    found = [f"only on one side: {name}" for name in sorted(set(a) ^ set(b))]
    for name in sorted(set(a) & set(b)):
        x, y = a[name], b[name]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            found.append(f"{name}: {x.dtype}{x.shape} and {y.dtype}{y.shape}")
        elif x.tobytes() != y.tobytes():
            found.append(f"{name}: values differ")
    return found


def main(first: str, second: str) -> int:
    """Print every difference and the number of tensors compared."""
    ms = importlib.import_module("mindspore")
    files, others = rank_files(Path(first)), rank_files(Path(second))
    if files.keys() != others.keys() or not files:
        print(f"ranks {sorted(files)} and {sorted(others)}")
        return 1
    count, failed = 0, False
    for rank, path in files.items():
        mine = load_file(ms, path)
        for line in differences(mine, load_file(ms, others[rank])):
            failed = True
            print(f"rank {rank}: {line}")
        count += len(mine)
    print(f"{count} tensors of {len(files)} ranks compared: {'DIFFERENT' if failed else 'equal'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
