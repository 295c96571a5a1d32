"""MindSpeed-Core-MS's convert_ckpt2pt.py, same flags: a thin door to transform_ckpt.cli.megatron_tools."""

import os
import sys

# this script's own directory comes first on sys.path and would hide the package transform_ckpt
sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from transform_ckpt.cli import leave, megatron_tools  # noqa: E402

if __name__ == "__main__":
    leave(megatron_tools.convert_ckpt2pt())
