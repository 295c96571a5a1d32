"""transform_ckpt: any large-model training checkpoint to any other.

The names below are the public interface; they are imported on first use, so that `import transform_ckpt` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transform_ckpt.version import VERSION as __version__

if TYPE_CHECKING:
    from transform_ckpt.api import Plan, Result, RunOptions, convert, load, open_checkpoint, plan, read_strategy
    from transform_ckpt.errors import TransformError

__all__ = [
    "Plan",
    "Result",
    "RunOptions",
    "TransformError",
    "__version__",
    "convert",
    "load",
    "open_checkpoint",
    "plan",
    "read_strategy",
]


def __getattr__(name: str) -> Any:
    if name == "TransformError":
        from transform_ckpt import errors

        return errors.TransformError
    if name in __all__:
        from transform_ckpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'transform_ckpt' has no attribute {name!r}")
