"""MindFormers' hccl_tools.py, same flags: a thin door to transform_ckpt.cli.rank_table."""

import os
import sys

# this script's own directory comes first on sys.path and would hide the package transform_ckpt
sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from transform_ckpt.cli import leave, rank_table  # noqa: E402

if __name__ == "__main__":
    leave(rank_table.hccl_tools())
