"""Our automatic transform in the place of MindFormers' own: `install()` before a job begins.

From a command line: `python -m transform_ckpt.auto.mindformers SCRIPT [ARGS...]`.
"""

from transform_ckpt.auto.mindformers.patch import install, uninstall

__all__ = ["install", "uninstall"]
