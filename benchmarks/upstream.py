"""One whole process of the real mindspore.transform_checkpoints: what the benchmark compares with.

python -m benchmarks.upstream SRC DST SRC_STRATEGY DST_STRATEGY FORMAT PROCESS_NUM
"""

from __future__ import annotations

import importlib
import sys


def main(argv: list[str]) -> None:
    """Transform, output in the source's format."""
    src, dst, src_strategy, dst_strategy, fmt, process_num = argv
    ms = importlib.import_module("mindspore")
    ms.transform_checkpoints(
        src,
        dst,
        "checkpoint_",
        src_strategy,
        dst_strategy,
        process_num=int(process_num),
        output_format=fmt,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
