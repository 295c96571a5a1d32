"""Train, evaluate or predict from a MindFormers YAML; the checkpoint is transformed by the way (auto_trans_ckpt).

    python run_mindformer.py --config configs/llama/tiny_llama_cpu.yaml --run_mode train --auto_trans_ckpt True ...

Flags: python run_mindformer.py --help.  On Ascend with MindFormers this is MindFormers' own trainer with our transform
in the place of its; without an accelerator a small Llama runs on the CPU.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if HERE not in sys.path:
    sys.path.insert(0, HERE)

from transform_ckpt.cli.run_mindformer import run_mindformer  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_mindformer(HERE))
