"""Parameter maps of Megatron's distributed optimizer: `save` them inside a training script, read them anywhere.

    from transform_ckpt import param_map
    model, optimizer, scheduler = setup_model_and_optimizer(...)
    param_map.save(model, args.save)

Importing this module imports neither torch, megatron nor numpy.
"""

from __future__ import annotations

from transform_ckpt.megatron.live_maps import save
from transform_ckpt.megatron.map_files import (
    FileName,
    MapKey,
    dumps,
    file_name,
    find,
    parse_file_name,
    read,
    write,
)

__all__ = ["FileName", "MapKey", "dumps", "file_name", "find", "parse_file_name", "read", "save", "write"]
