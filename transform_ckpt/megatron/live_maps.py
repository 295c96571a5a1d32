"""Writes parameter maps inside a Megatron training script, from the live buffers of megatron-core 0.6 to 0.16.

torch and megatron are imported when `save` is called: there they are loaded already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transform_ckpt.errors import InputError, UsageError
from transform_ckpt.formats.files import listing
from transform_ckpt.megatron.buckets import BucketError, BufferMap, Range
from transform_ckpt.megatron.map_files import (
    DIRECTORY,
    PREFIX,
    MapKey,
    file_name,
    parse_file_name,
    replace_file,
    sizes_name,
    storage,
    write,
)


def save(model_chunks: Any, path: str | os.PathLike[str], *, every_rank: bool = False) -> None:
    """Write the maps of this rank's buffers to `{path}/param_map`; call it on every rank, once the model is built.

    `model_chunks`: the DistributedDataParallel chunk or list of chunks of megatron-core 0.6 to 0.16; chunk i is vpp i.
    Only the first data parallel rank of each buffer writes, unless `every_rank`.  A path holds the maps of one run:
    maps that this one has no buffer for (an earlier run with more chunks or ranks) are deleted.
    """
    from megatron.core import parallel_state
    from megatron.core.package_info import __version__
    from torch.distributed import get_rank, get_world_size

    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    directory = os.path.join(path, DIRECTORY)
    with storage(directory, "creating it"):
        os.makedirs(directory, exist_ok=True)
    writers: dict[MapKey, int] = {}
    sizes: dict[int | None, dict[str, Any]] = {}
    for vpp, chunk in enumerate(model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]):
        names = _names(chunk)
        for ep_here, buffers in ((None, chunk.buffers), (ep, chunk.expert_parallel_buffers)):
            for number, buffer in enumerate(buffers):
                dp, dp_size = get_rank(buffer.data_parallel_group), get_world_size(buffer.data_parallel_group)
                writers[MapKey(tp, pp, vpp, ep_here, number)] = dp_size if every_rank else 1
                if dp and not every_rank:
                    continue
                found = _live_map(buffer, names)
                write(os.path.join(directory, file_name(number, dp, tp, pp, vpp, ep_here)), found)
                sizes.setdefault(ep_here, {})[f"buffer{number}vpp{vpp}"] = {
                    "data_parallel_size": dp_size,
                    "bucket_size": chunk.bucket_size,
                    "numel": found.padded,
                    "numel_unpadded": found.unpadded,
                }
    for ep_here, entries in sizes.items():
        content = json.dumps({"megatron_core": __version__, "buffers": entries}, indent=1)
        replace_file(os.path.join(directory, sizes_name(tp, pp, ep_here)), content.encode())
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        _delete_stale(directory, (tp, pp, ep), writers)


def _delete_stale(directory: str, rank: tuple[int, int, int], writers: Mapping[MapKey, int]) -> None:
    """Delete the maps of this (tp, pp) that are not of `writers` (buffer -> number of dp ranks that write its map);
    rank (0, 0) also those of ranks that the run does not have.
    """
    from megatron.core import parallel_state

    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    pp_size = parallel_state.get_pipeline_model_parallel_world_size()
    ep_size = parallel_state.get_expert_model_parallel_world_size()
    tp, pp, ep = rank
    for name in listing(directory):
        old = parse_file_name(name)
        if old is None:
            continue
        key = old.key if old.ep is None else old.key._replace(ep=ep)
        unknown = old.dp >= writers.get(key, 0) or (old.ep or 0) >= ep_size
        outside = old.tp >= tp_size or old.pp >= pp_size
        if ((old.tp, old.pp) == (tp, pp) and unknown) or ((tp, pp) == (0, 0) and outside):
            with storage(os.path.join(directory, name), "deleting it"), suppress(FileNotFoundError):
                os.remove(os.path.join(directory, name))


def _names(chunk: Any) -> dict[Any, str]:
    """Parameter -> name, of one chunk that DistributedDataParallel wraps."""
    if not isinstance(getattr(chunk, "expert_parallel_buffers", None), list):
        raise UsageError(
            f"param_map.save: {type(chunk).__name__} has no parameter buffers; expected the chunks that "
            "megatron.core.distributed.DistributedDataParallel (0.6 and later) wraps: pass what get_model returned"
        )
    return {param: name for name, param in chunk.module.named_parameters()}


def _live_map(buffer: Any, names: Mapping[Any, str]) -> BufferMap:
    """The map of a buffer in use."""
    ranges = [
        Range(names[param].removeprefix(PREFIX), str(param.dtype), tuple(param.shape), *index)
        for param, index in buffer.param_index_map.items()
    ]
    ranges.sort(key=lambda found: found.start)
    unpadded = tuple(bucket.numel_unpadded for bucket in buffer.buckets)
    try:
        return BufferMap(tuple(ranges), unpadded, tuple(end - start for start, end in buffer.bucket_indices))
    except BucketError as error:
        raise InputError(
            f"param_map.save: {error}: this version of megatron-core does not save the buffer whole: use 0.13 or later"
        ) from None
