"""What tests and benchmarks compare with: real MindSpore, and a slicer of a few NumPy lines.

Imports nothing of the product, so that an error there cannot be repeated here.  `ms` is always the imported mindspore
module (fixture `ms`), because importing it costs seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the devices of one stage hold one parameter; terms of MindSpore's strategy file.

    An entry of `tensor_map` is an axis of `dev_matrix` counted from the right, -1 for not split, or a tuple of axes,
    the most significant first.  `opt_size` -1 is "as large as possible", 0 no optimizer shard.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[int | tuple[int, ...], ...]
    opt_step: int = 0
    opt_size: int = 0

    @property
    def devices(self) -> int:
        """Devices of the stage."""
        return prod(self.dev_matrix)

    def axes(self, dim: int) -> tuple[int, ...]:
        """Axes that split one dimension, counted from the right."""
        entry = self.tensor_map[dim]
        return tuple(axis for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis >= 0)


Stages = Sequence[Mapping[str, Layout]]
"""Per pipeline stage: parameter name -> layout."""


def even(shape: Sequence[int], index: Sequence[int], count: Sequence[int]) -> Index:
    """Part `index[d]` of `count[d]` equal parts, per dimension."""
    for length, parts in zip(shape, count, strict=True):
        if length % parts:
            raise ValueError(f"shape {tuple(shape)} does not divide by {tuple(count)}")
    return tuple(slice(i * n // c, (i + 1) * n // c) for n, i, c in zip(shape, index, count, strict=True))


def device_slices(shape: Sequence[int], layout: Layout) -> list[Index]:
    """What each device of a stage holds of a whole tensor, optimizer shard included, by local rank."""
    splits, places = [], []
    for device in range(layout.devices):
        coordinates = np.unravel_index(device, layout.dev_matrix)
        split, place = [1] * len(shape), [0] * len(shape)
        for dim in range(len(shape)):
            for axis in layout.axes(dim):
                size = layout.dev_matrix[-1 - axis]
                split[dim] *= size
                place[dim] = place[dim] * size + int(coordinates[-1 - axis])
        splits.append(tuple(split))
        places.append(tuple(place))
    plain = [even(shape, place, split) for place, split in zip(places, splits, strict=True)]
    if not layout.opt_size:
        return plain
    return [_optimizer_part(index, device, plain, layout.opt_size) for device, index in enumerate(plain)]


def _optimizer_part(index: Index, device: int, plain: list[Index], size: int) -> Index:
    """Cut dimension 0 again: the part's number is the position among the devices with the same slice, modulo size."""
    holders = [other for other, held in enumerate(plain) if held == index]
    parts = len(holders) if size == -1 else size
    first = index[0]
    ((start, stop),) = [
        (s.start, s.stop) for s in even([first.stop - first.start], [holders.index(device) % parts], [parts])
    ]
    return (slice(first.start + start, first.start + stop), *index[1:])


def world_size(stages: Stages) -> int:
    """Ranks of all stages; each stage has the same number."""
    return len(stages) * stage_devices(stages)


def stage_devices(stages: Stages) -> int:
    """Devices of one stage."""
    return next(iter(stages[0].values())).devices


def slice_rank(whole: Arrays, stages: Stages, rank: int) -> dict[str, Array]:
    """What `rank` holds of a complete state: slices of what its stage lists, and a copy of what no strategy lists."""
    stage, device = divmod(rank, stage_devices(stages))
    listed = {name for layouts in stages for name in layouts}
    held = {name: array for name, array in whole.items() if name not in listed}
    for name, layout in stages[stage].items():
        if name in whole:
            held[name] = whole[name][device_slices(whole[name].shape, layout)[device]]
    return held


def assert_same(actual: Arrays, expected: Arrays, where: str = "") -> None:
    """Equal names, dtypes, shapes and bytes (so that NaNs and signs of zero count)."""
    assert sorted(actual) == sorted(expected), f"{where}: names differ: {sorted(set(actual) ^ set(expected))}"
    for name, wanted in expected.items():
        found = actual[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), f"{where}: {name}"
        assert found.tobytes() == wanted.tobytes(), f"{where}: values of {name}"


# ---------------------------------------------------------------------------------------------- strategy files


def _fill_item(item: Any, name: str, layout: Layout) -> None:
    item.param_name = name
    layouts = item.parallel_layouts
    layouts.dev_matrix.add().dim.extend(layout.dev_matrix)
    if any(isinstance(entry, tuple) for entry in layout.tensor_map):
        if len(layout.tensor_map) == 1:
            raise ValueError("a strategy file has no way to say that several axes split the one dimension of a vector")
        for entry in layout.tensor_map:
            layouts.tensor_map.add().dim.extend(entry if isinstance(entry, tuple) else [entry])
    else:
        layouts.tensor_map.add().dim.extend(layout.tensor_map)
    layouts.param_split_shape.add()
    layouts.indices_offset.add()
    layouts.field = 0
    layouts.opt_weight_shard_step = layout.opt_step
    layouts.opt_weight_shard_size = layout.opt_size


def _strategy_message(ms: ModuleType, stages: Mapping[int, Mapping[str, Layout]], *, merged: bool) -> bytes:
    message = ms.train.node_strategy_pb2.ParallelStrategyMap()
    message.current_stage = 1 if merged else 2  # as MindSpore's compiler writes it: not the stage
    for stage, layouts in stages.items():
        for name, layout in layouts.items():
            node = message.parallel_strategy_item.add()
            node.node_name = f"MatMul_{name}"
            node.parallel_strategys.stage = stage
            splits = [
                prod(layout.dev_matrix[-1 - axis] for axis in layout.axes(d)) for d in range(len(layout.tensor_map))
            ]
            node.parallel_strategys.parallel_strategy.add().dim.extend(splits)
            _fill_item(message.parallel_layout_item.add(), f"{stage}-{name}" if merged else name, layout)
    return bytes(message.SerializeToString())


def write_strategy(ms: ModuleType, stages: Stages, directory: Path) -> Path:
    """One file a rank, as MindSpore's compiler leaves them: `ckpt_strategy_rank_{rank}.ckpt`.  Returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for rank in range(world_size(stages)):
        stage = rank // stage_devices(stages)
        data = _strategy_message(ms, {stage: stages[stage]}, merged=False)
        (directory / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(data)
    return directory


def write_merged_strategy(ms: ModuleType, stages: Stages, path: Path) -> Path:
    """One file for all stages, as mindspore.merge_pipeline_strategys leaves it.  Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_strategy_message(ms, dict(enumerate(stages)), merged=True))
    return path


# ---------------------------------------------------------------------------------------------- checkpoints


def save_file(ms: ModuleType, arrays: Arrays, path: Path, *, append: Mapping[str, Any] | None = None) -> Path:
    """One checkpoint file by mindspore.save_checkpoint; the suffix says the format.  `append` is its append_dict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = [
        {"name": name, "data": ms.Tensor(np.ascontiguousarray(a).reshape(a.shape))} for name, a in arrays.items()
    ]
    ms.save_checkpoint(parameters, str(path), append_dict=dict(append or {}), format=path.suffix[1:])
    path.chmod(0o644)
    return path


def save_ranks(
    ms: ModuleType, whole: Arrays, stages: Stages, directory: Path, fmt: str, *, prefix: str = "net_"
) -> Path:
    """`rank_{r}/{prefix}{r}.{fmt}` of a complete state under a strategy.  Returns the directory."""
    for rank in range(world_size(stages)):
        save_file(ms, slice_rank(whole, stages, rank), directory / f"rank_{rank}" / f"{prefix}{rank}.{fmt}")
    return directory


def load_file(ms: ModuleType, path: Path) -> dict[str, Array]:
    """One checkpoint file by mindspore.load_checkpoint, as NumPy arrays (bfloat16 as ml_dtypes has it)."""
    loaded = ms.load_checkpoint(str(path), format=path.suffix[1:])
    return {name: _to_numpy(value) for name, value in loaded.items()}


def _to_numpy(value: Any) -> Array:
    """A loaded parameter, or an append_dict string; MindSpore's bfloat16 is another dtype than that of ml_dtypes."""
    array = np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value)
    return array.view(ml_dtypes.bfloat16) if array.dtype.name == "bfloat16" else array


def rank_files(directory: Path) -> dict[int, Path]:
    """The one tensor file of each `rank_*` directory, by rank."""
    files: dict[int, Path] = {}
    for rank_dir in sorted(directory.glob("rank_*")):
        (files[int(rank_dir.name.removeprefix("rank_"))],) = [
            path for path in rank_dir.iterdir() if path.suffix in {".ckpt", ".safetensors"}
        ]
    return dict(sorted(files.items()))


def load_ranks(ms: ModuleType, directory: Path) -> dict[int, dict[str, Array]]:
    """All ranks of a directory, by rank."""
    return {rank: load_file(ms, path) for rank, path in rank_files(directory).items()}


def transform(
    ms: ModuleType,
    src: Path,
    dst: Path,
    src_strategy: Path | None,
    dst_strategy: Path | None,
    *,
    prefix: str = "checkpoint_",
    process_num: int = 1,
) -> Path:
    """The real mindspore.transform_checkpoints, output in the source's format.  Returns `dst`."""
    (fmt,) = {path.suffix[1:] for path in rank_files(src).values()}
    dst.mkdir(parents=True, exist_ok=True)
    ms.transform_checkpoints(
        str(src),
        str(dst),
        prefix,
        str(src_strategy) if src_strategy else None,
        str(dst_strategy) if dst_strategy else None,
        process_num=process_num,
        output_format=fmt,
    )
    return dst


def random_bits(rng: np.random.Generator, dtype: Any, shape: Sequence[int]) -> Array:
    """Arbitrary bit patterns of a dtype (NaNs included), except that bool is 0 or 1."""
    dtype = np.dtype(dtype)
    data = rng.bytes(prod(shape) * dtype.itemsize)
    if dtype == np.bool_:
        return (np.frombuffer(data, np.uint8) & 1).astype(np.bool_).reshape(shape)
    return np.frombuffer(data, np.uint8).view(dtype).reshape(shape)
