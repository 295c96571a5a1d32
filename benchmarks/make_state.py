"""Write a Llama-like MindSpore training state of a given size, with the strategy files of a source and a destination.

    python -m benchmarks.make_state OUT --gb 1.6 --layers 8 --src dp=2,pp=4,opt=1 --dst mp=2,pp=2

OUT/src_{ckpt,safetensors}/rank_i/llama_rank_i-1_7.*   one file a rank, as MindSpore's callbacks name them
OUT/{src,dst}_strategy/ckpt_strategy_rank_i.ckpt       and OUT/{src,dst}_strategy_merged.ckpt

The files are written here, not by the product and not by mindspore.save_checkpoint: one tensor in memory at a time,
and with --sparse no tensor byte at all (holes), which is enough for planning a model that no disk here holds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tests.support import Array, Index, Layout, device_slices, write_merged_strategy, write_strategy

FORMATS = ("ckpt", "safetensors")
FINITE_MASK, FINITE_BASE = 0x83FF, 0x3800
"""Upper 16 bits of a bf16 or fp32: sign, 3 exponent bits and the mantissa random; magnitudes 2**-15 to 2**-7."""
CKPT_VALUE_NBYTES = 512 << 20
"""mindspore 2.9.0 serialization.py, SLICE_SIZE: a longer tensor becomes several values of one tag."""

CODES = {"BF16": ("BFloat16", 2), "F32": ("Float32", 4), "I32": ("Int32", 4), "I64": ("Int64", 8)}
"""safetensors code -> (.ckpt tensor_type, bytes an element)."""


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of the model; `mp_axis` is the dimension that tensor parallelism cuts."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mp_axis: int | None
    layer: int


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a Llama-like model."""

    hidden: int
    ffn: int
    kv: int
    vocab: int
    layers: int

    def params(self) -> Iterator[Param]:
        """Weights in the model's order, named as MindFormers' Llama names them."""
        last = self.layers - 1
        yield Param("model.tok_embeddings.embedding_weight", (self.vocab, self.hidden), "BF16", 0, 0)
        for layer in range(self.layers):
            yield from self._layer(layer)
        yield Param("model.norm_out.weight", (self.hidden,), "F32", None, last)
        yield Param("lm_head.weight", (self.vocab, self.hidden), "BF16", 0, last)

    def _layer(self, layer: int) -> Iterator[Param]:
        prefix = f"model.layers.{layer}"
        h, f, kv = self.hidden, self.ffn, self.kv
        for name, shape, axis in (
            ("attention.wq", (h, h), 0),
            ("attention.wk", (kv, h), 0),
            ("attention.wv", (kv, h), 0),
            ("attention.wo", (h, h), 1),
            ("feed_forward.w1", (f, h), 0),
            ("feed_forward.w2", (h, f), 1),
            ("feed_forward.w3", (f, h), 0),
        ):
            yield Param(f"{prefix}.{name}.weight", shape, "BF16", axis, layer)
        for name in ("attention_norm", "ffn_norm"):
            yield Param(f"{prefix}.{name}.weight", (h,), "F32", None, layer)

    def states(self) -> Iterator[Param]:
        """Every tensor of the training state that a strategy lists: weights, then both Adam moments in fp32."""
        for prefix, dtype in (("", ""), ("adam_m.", "F32"), ("adam_v.", "F32")):
            for p in self.params():
                yield Param(prefix + p.name, p.shape, dtype or p.dtype, p.mp_axis, p.layer)


LLAMA_70B = Model(hidden=8192, ffn=28672, kv=1024, vocab=32000, layers=80)
SCALARS: tuple[tuple[str, str, tuple[int, ...], Any], ...] = (
    ("global_step", "I32", (1,), 7),
    ("learning_rate", "F32", (), 3e-4),
    ("scale_sense", "F32", (), 65536.0),
    ("loss_scale", "F32", (), 65536.0),
    ("epoch_num", "I64", (), 1),
    ("step_num", "I64", (), 7),
    ("global_batch_size", "I64", (), 32),
)


def model_of(gigabytes: float, layers: int) -> Model:
    """A model whose state (10 bytes a parameter) is about `gigabytes` long; hidden is a multiple of 64."""
    per_hidden_squared = 2 * 32 + layers * (2.5 + 3 * 2.75)
    hidden = max(1, round(sqrt(gigabytes * 1e8 / per_hidden_squared) / 64)) * 64
    return Model(hidden=hidden, ffn=hidden * 11 // 4, kv=hidden // 4, vocab=hidden * 32, layers=layers)


@dataclass(frozen=True, slots=True)
class Parallel:
    """A parallel layout: `dp=2,mp=1,pp=4,opt=1` (opt: the optimizer's weight shard over dp)."""

    dp: int = 1
    mp: int = 1
    pp: int = 1
    opt: int = 0

    @classmethod
    def parse(cls, text: str) -> Parallel:
        """Read `dp=2,pp=4,opt=1`."""
        return cls(**{key: int(value) for key, _, value in (part.partition("=") for part in text.split(","))})

    @property
    def devices(self) -> int:
        """Devices of one stage."""
        return self.dp * self.mp

    @property
    def world(self) -> int:
        """All ranks."""
        return self.devices * self.pp

    def layout(self, param: Param) -> Layout:
        """The conventions of MindSpore's compiler: dev_matrix [dp, mp]; what mp does not cut is sharded over both."""
        split = param.mp_axis is not None and self.mp > 1
        tensor_map = tuple(0 if split and axis == param.mp_axis else -1 for axis in range(len(param.shape)))
        step, size = (self.mp, self.dp) if split else (1, self.devices)
        rows = param.shape[0] // (self.mp if split and param.mp_axis == 0 else 1)
        if not self.opt or size == 1 or rows % size:
            return Layout((self.dp, self.mp), tensor_map)
        return Layout((self.dp, self.mp), tensor_map, step, size)

    def stages(self, model: Model) -> list[list[Param]]:
        """Consecutive layers per stage, as evenly as they go."""
        stages: list[list[Param]] = [[] for _ in range(self.pp)]
        for param in model.states():
            stages[param.layer * self.pp // model.layers].append(param)
        return stages


# ---------------------------------------------------------------------------------------------- values


def values(seed: int, name: str, nbytes: int, itemsize: int) -> Array:
    """`nbytes` pseudo-random bytes, finite as bf16 (itemsize 2) or fp32 (4); Adam's second moment is not negative."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    words = rng.integers(0, 1 << 64, -(-nbytes // 8), dtype=np.uint64)
    mask, base = FINITE_MASK, FINITE_BASE
    if name.startswith("adam_v."):
        mask &= 0x7FFF
    if itemsize == 4:
        mask, base = mask << 16 | 0xFFFF, base << 16
    repeats = sum(1 << (8 * itemsize * i) for i in range(8 // itemsize))
    words &= np.uint64(mask * repeats)
    words |= np.uint64(base * repeats)
    return words.view(np.uint8)[:nbytes]


def scalar_bytes(dtype: str, shape: tuple[int, ...], value: object) -> bytes:
    """A scalar of the training state as little-endian bytes."""
    return np.full(shape, value, {"I32": "<i4", "I64": "<i8", "F32": "<f4"}[dtype]).tobytes()


# ---------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one rank's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return prod(self.shape) * CODES[self.dtype][1]


def varint(value: int) -> bytes:
    """Protobuf's base-128 integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, nbytes: int) -> bytes:
    return varint(number << 3 | 2) + varint(nbytes)


def ckpt_value_header(entry: Entry, nbytes: int) -> bytes:
    """Everything of a one-value Checkpoint message but the last `nbytes`, the content."""
    kind, name = CODES[entry.dtype][0].encode(), entry.name.encode()
    dims = b"".join(b"\x08" + varint(d) for d in entry.shape)
    tensor = dims + _field(2, len(kind)) + kind + _field(3, nbytes)
    value = _field(1, len(name)) + name + _field(2, len(tensor) + nbytes) + tensor
    return _field(1, len(value) + nbytes) + value


class Writer:
    """Appends tensors to one file, in the order given at birth; `None` leaves a hole."""

    def __init__(self, file: BinaryIO, fmt: str, entries: Sequence[Entry]) -> None:
        self.file, self.fmt, self.entries = file, fmt, iter(entries)
        if fmt == "safetensors":
            file.write(safetensors_header(entries))

    def add(self, data: memoryview | bytes | None) -> None:
        """Write the next tensor."""
        entry = next(self.entries)
        step = CKPT_VALUE_NBYTES if self.fmt == "ckpt" else max(entry.nbytes, 1)
        for start in range(0, entry.nbytes, step):
            nbytes = min(step, entry.nbytes - start)
            if self.fmt == "ckpt":
                self.file.write(ckpt_value_header(entry, nbytes))
            if data is None:
                self.file.seek(nbytes, os.SEEK_CUR)
            else:
                self.file.write(data[start : start + nbytes])

    def finish(self) -> None:
        """Give the file its size where it ends in a hole."""
        self.file.truncate()


def safetensors_header(entries: Iterable[Entry]) -> bytes:
    """Length and JSON, padded to 8 bytes, with the metadata that MindSpore writes."""
    header: dict[str, Any] = {"__metadata__": {"format": "ms"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _cut(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in index) if shape else ()


def write_stage(
    out: Path, fmt: str, stage: int, params: Sequence[Param], *, parallel: Parallel, seed: int | None
) -> None:
    """The rank files of one pipeline stage; each tensor is generated once and cut for every rank.  seed None: holes."""
    itemsizes = {dtype: size for dtype, (_, size) in CODES.items()}
    slices = [device_slices(p.shape, parallel.layout(p)) for p in params]
    with ExitStack() as stack:
        writers = []
        for device in range(parallel.devices):
            rank = stage * parallel.devices + device
            path = out / f"rank_{rank}" / f"llama_rank_{rank}-1_7.{fmt}"
            path.parent.mkdir(parents=True)
            entries = [Entry(p.name, p.dtype, _cut(p.shape, s[device])) for p, s in zip(params, slices, strict=True)]
            entries += [Entry(name, dtype, shape) for name, dtype, shape, _ in SCALARS]
            writers.append(Writer(stack.enter_context(path.open("wb")), fmt, entries))
        for param, index in zip(params, slices, strict=True):
            itemsize = itemsizes[param.dtype]
            whole = None if seed is None else values(seed, param.name, prod(param.shape) * itemsize, itemsize)
            _write_param(writers, param, index, whole, itemsize)
        for _, dtype, shape, value in SCALARS:
            for writer in writers:
                writer.add(scalar_bytes(dtype, shape, value))
        for writer in writers:
            writer.finish()


def _write_param(
    writers: Sequence[Writer], param: Param, index: Sequence[Index], whole: Array | None, itemsize: int
) -> None:
    if whole is None:
        for writer in writers:
            writer.add(None)
        return
    tensor = whole.view(f"V{itemsize}").reshape(param.shape)
    for writer, held in zip(writers, index, strict=True):
        writer.add(np.ascontiguousarray(tensor[held]).reshape(-1).view(np.uint8).data)


def write_layouts(out: Path, role: str, model: Model, parallel: Parallel) -> None:
    """Strategy files of one side, per rank and merged, with MindSpore's own protobuf classes."""
    ms = importlib.import_module("mindspore")
    stages = [{p.name: parallel.layout(p) for p in params} for params in parallel.stages(model)]
    write_strategy(ms, stages, out / f"{role}_strategy")
    write_merged_strategy(ms, stages, out / f"{role}_strategy_merged.ckpt")


def make_state(
    out: Path, model: Model, src: Parallel, dst: Parallel, *, formats: Sequence[str] = FORMATS, seed: int | None = 1
) -> None:
    """Write checkpoints and strategies below `out`, which must not hold them yet.  seed None: sparse files."""
    for fmt in formats:
        for stage, params in enumerate(src.stages(model)):
            write_stage(out / f"src_{fmt}", fmt, stage, params, parallel=src, seed=seed)
    write_layouts(out, "src", model, src)
    write_layouts(out, "dst", model, dst)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_state", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gb", type=float, default=1.6, help="size of the complete state in 10**9 bytes")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model", choices=["llama70b"], help="this model's sizes in place of --gb and --layers")
    parser.add_argument("--src", type=Parallel.parse, default=Parallel(dp=2, pp=4, opt=1), metavar="dp=2,pp=4,opt=1")
    parser.add_argument("--dst", type=Parallel.parse, default=Parallel(mp=2, pp=2), metavar="mp=2,pp=2")
    parser.add_argument("--format", action="append", choices=FORMATS, help="repeat for more than one; default both")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sparse", action="store_true", help="headers only, holes for tensor bytes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_args(argv)
    model = LLAMA_70B if args.model else model_of(args.gb, args.layers)
    seed = None if args.sparse else args.seed
    make_state(args.out, model, args.src, args.dst, formats=args.format or FORMATS, seed=seed)


if __name__ == "__main__":
    main()
