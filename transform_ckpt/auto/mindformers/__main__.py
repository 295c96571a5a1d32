"""Run a script of MindFormers with our automatic transform: `python -m transform_ckpt.auto.mindformers SCRIPT [ARGS]`.

Under msrun: `msrun --worker_num 8 python -m transform_ckpt.auto.mindformers run_mindformer.py --config ...`; msrun of
MindSpore 2.9.0 starts what begins with `python` as it is (parallel/cluster/process_entity/_utils.py).
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from transform_ckpt.errors import TransformError, UsageError
from transform_ckpt.launcher import SCHEDULER

_USAGE = "usage: python -m transform_ckpt.auto.mindformers SCRIPT [ARGS...]"


def main(argv: Sequence[str]) -> None:
    """Install, then run the script as __main__; SystemExit and exceptions of the script go on."""
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"{_USAGE}: a script is missing")
    script = argv[0]
    if not os.path.isfile(script):
        raise UsageError(f"{_USAGE}: {script} is not a file")
    if os.environ.get("MS_ROLE") != SCHEDULER:  # the scheduler transforms nothing, and need not wait for an import
        from transform_ckpt.auto.mindformers import install

        install()
    sys.argv = list(argv)
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


def _run() -> int:
    try:
        main(sys.argv[1:])
    except TransformError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_run())
