"""Which parameters the optimizer shard cuts further, and into how many parts.

Sources: MindSpore 2.9.0 frontend/parallel (opt_param_mgr, operator_info `CreateGroupForOptShard`, tensor_layout
`GenerateOptShardSliceShape`): the library's machine code for a size larger than the number of replicas, and
compiler-written files for the rest.
Pure integers; may import only strategy.generate_types and transform_ckpt.{dtypes,views}.
"""

from __future__ import annotations

from math import prod

from strategy.generate_types import OptimizerShard
from transform_ckpt import dtypes
from transform_ckpt.views import Shape

NOT_SHARDED = (0, 0)


def optimizer_shard(
    config: OptimizerShard | None, shape: Shape, dtype: str, *, devices: int, rows: int, splits: int
) -> tuple[int, int]:
    """(`opt_weight_shard_step`, `opt_weight_shard_size`) of a parameter that may take part.

    `rows` is the number of parts of dimension 0, `splits` of the whole tensor; the split axis is the mesh's last one.
    A parameter of exactly the threshold is cut; one whose rows do not divide, or whose replicas are no multiple of the
    size, is left whole without a word, as MindSpore does.
    """
    replicas = devices // splits
    if config is None or not shape or replicas < 2:
        return NOT_SHARDED
    if prod(shape) * dtypes.itemsize(dtype) < config.threshold_kb * 1024:
        return NOT_SHARDED
    size = config.size if config.size > 1 else -1
    parts = replicas if size == -1 else min(size, replicas)
    if replicas % parts or shape[0] % (rows * parts):
        return NOT_SHARDED
    return splits, size if size == -1 else parts
