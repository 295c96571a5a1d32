"""Checksums that are joined, not computed again, and files of torch that are sealed with them."""

from __future__ import annotations

import argparse
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.megatron.support import load, torch
from transform_ckpt import execute, manifest, planner
from transform_ckpt.crc import joined_crc32, storage_crcs, zeros_crc32
from transform_ckpt.execute import RunOptions, run
from transform_ckpt.formats.torch_values import Namespace
from transform_ckpt.megatron.torch_target import Part, TorchBuilder
from transform_ckpt.planner import Plan, build
from transform_ckpt.tensors import Extent, Logical, Piece, Source, Target, Tensor
from transform_ckpt.verify import check_tree
from transform_ckpt.views import Box, whole

QUICK = settings(max_examples=200, derandomize=True, deadline=None, database=None)
Array = np.ndarray[Any, np.dtype[Any]]


@QUICK
@given(st.binary(max_size=300), st.binary(max_size=300))
@example(b"", b"")
@example(b"", b"x")
@example(b"x", b"")
def test_joined(first: bytes, second: bytes) -> None:
    assert joined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@QUICK
@given(st.lists(st.binary(max_size=70), max_size=8))
def test_joined_one_after_the_other(parts: list[bytes]) -> None:
    crc = 0
    for part in parts:
        crc = joined_crc32(crc, zlib.crc32(part), len(part))
    assert crc == zlib.crc32(b"".join(parts))


@pytest.mark.parametrize("nbytes", [0, 1, 2, 3, 4, 5, 63, 64, 65, 1000, 1 << 16, (1 << 20) + 7])
def test_zeros(nbytes: int) -> None:
    assert zeros_crc32(nbytes) == zlib.crc32(bytes(nbytes))


def test_more_bytes_than_memory_has() -> None:
    """The length enters by its bits: 2**40 zeros are 2**20 times 2**20 of them."""
    crc, size = zeros_crc32(1 << 20), 1 << 20
    for _ in range(20):
        crc, size = joined_crc32(crc, crc, size), 2 * size
    assert crc == zeros_crc32(1 << 40)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, dict[str, Extent], list[tuple[int, int, int]]]:
    """A file's bytes, its storages, and the parts of them that are written, in any order; the rest is zero."""
    data, storages, parts = bytearray(), {}, []
    for number in range(draw(st.integers(0, 4))):
        data += b"header" * draw(st.integers(0, 2))
        start = len(data)
        for _ in range(draw(st.integers(0, 4))):
            data += bytes(draw(st.integers(0, 5)))
            part = draw(st.binary(min_size=1, max_size=20))
            parts.append((len(data), len(part), zlib.crc32(part)))
            data += part
        data += bytes(draw(st.integers(0, 5)))
        storages[str(number)] = Extent(start, len(data) - start)
    order = draw(st.permutations(list(storages)))
    return bytes(data), {key: storages[key] for key in order}, draw(st.permutations(parts))


@QUICK
@given(files())
def test_storages_with_gaps(case: tuple[bytes, dict[str, Extent], list[tuple[int, int, int]]]) -> None:
    data, storages, parts = case
    wanted = {k: zlib.crc32(data[e.offset_bytes : e.offset_bytes + e.nbytes]) for k, e in storages.items()}
    assert storage_crcs(storages, parts) == wanted


# ------------------------------------------------------------------------------------------------------ sealed files


def sealed(folder: Path, arrays: dict[str, Array], parts: dict[str, tuple[str, tuple[int, ...], list[Part]]]) -> Plan:
    """A plan of one .pt file with tensors of (dtype, shape, parts) from raw arrays of single precision."""
    path, data, params = folder / "source.bin", b"", {}
    for name, array in arrays.items():
        tensor = Tensor(name, "F32", array.shape, str(path), (Extent(len(data), array.nbytes),))
        params[name] = Logical(name, "F32", array.shape, (Piece(tensor, whole(array.shape), 0),))
        data += array.tobytes()
    path.write_bytes(data)
    builder = TorchBuilder()
    tree = {
        "args": Namespace({"lr": 0.5, "name": "x"}),
        "model": {name: builder.tensor(dtype, shape, found) for name, (dtype, shape, found) in parts.items()},
    }
    file = builder.file("iter_0000001/mp_rank_00/model_optim_rng.pt", tree)
    return build(Source("raw", str(path), (), params, {}), Target("megatron", (file,)))


def numbers(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


ARRAYS = {"one": numbers(700), "two": numbers(30, 24), "three": numbers(2, 3, 4)}
GAPS = {
    "whole": ("F32", (700,), [Part("one", whole((700,)))]),
    "cast": ("BF16", (30, 24), [Part("two", whole((30, 24)))]),
    "gap in front": ("F32", (24,), [Part("three", Box((1, 0, 0), (1, 3, 4)), 12)]),
    "gap between": ("BF16", (30,), [Part("three", Box((1, 0, 0), (1, 3, 4)), 18), Part("one", Box((5,), (3,)), 0)]),
    "gap behind": ("F16", (100,), [Part("one", Box((100,), (99,)))]),
    "columns": ("F32", (30, 5), [Part("two", Box((0, 7), (30, 5)))]),
    "two columns": ("BF16", (60, 4), [Part("two", Box((0, 20), (30, 4))), Part("two", Box((0, 0), (30, 4)), 120)]),
    "nothing": ("F32", (17,), []),
    "empty": ("F32", (0, 3), []),
    "scalar": ("F64", (), [Part("one", Box((699,), (1,)))]),
}


def wanted_of(dtype: str, shape: tuple[int, ...], parts: list[Part]) -> Any:
    """The tensor, by torch."""
    kinds = {"F32": torch().float32, "BF16": torch().bfloat16, "F16": torch().float16, "F64": torch().float64}
    flat = torch().zeros(int(np.prod(shape)), dtype=kinds[dtype])
    for part in parts:
        index = tuple(slice(s, e) for s, e in zip(part.box.start, part.box.stop(), strict=True))
        values = torch().from_numpy(ARRAYS[part.logical][index].copy()).reshape(-1)
        flat[part.first : part.first + part.box.numel] = values.to(kinds[dtype])
    return flat.reshape(shape)


def assert_sealed(out: Path) -> None:
    """Python's zipfile finds every CRC right; torch loads what was meant; the manifest agrees."""
    path = out / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    found = load(path)
    assert found["args"] == argparse.Namespace(lr=0.5, name="x")
    for name, case in GAPS.items():
        wanted = wanted_of(*case)
        assert (found["model"][name].dtype, found["model"][name].shape) == (wanted.dtype, wanted.shape)
        assert torch().equal(found["model"][name], wanted), name
    written = manifest.read(str(out))
    assert written is not None
    assert check_tree(str(out), written) == []


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units of work, for as many processes as are asked for."""
    monkeypatch.setattr(planner, "UNIT_NBYTES", 256)
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)


def test_a_sealed_file(tmp_path: Path) -> None:
    run(sealed(tmp_path, ARRAYS, GAPS), str(tmp_path / "out"), RunOptions(workers=1))
    assert_sealed(tmp_path / "out")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("memory", [1 << 30, 1 << 20])
def test_sealed_by_several(workers: int, memory: int, tmp_path: Path) -> None:
    plan = sealed(tmp_path, ARRAYS, GAPS)
    assert len(plan.units) > 10
    run(plan, str(tmp_path / "out"), RunOptions(workers=workers, memory_nbytes=memory))
    assert_sealed(tmp_path / "out")
    again = tmp_path / "again"
    again.mkdir()
    run(sealed(again, ARRAYS, GAPS), str(again / "out"), RunOptions(workers=3 - workers))
    names = ["transform_ckpt.json", "iter_0000001/mp_rank_00/model_optim_rng.pt"]
    assert all((tmp_path / "out" / n).read_bytes() == (again / "out" / n).read_bytes() for n in names)


class _InterruptedError(Exception):
    """What a progress callback raises."""


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_sealed_after_an_interruption(part: float, tmp_path: Path) -> None:
    """Checksums of what the first run wrote are in its journal."""
    plan = sealed(tmp_path, ARRAYS, GAPS)

    def progress(done: int, total: int) -> None:
        if done >= part * total:
            raise _InterruptedError

    with pytest.raises(_InterruptedError):
        run(plan, str(tmp_path / "out"), RunOptions(workers=1, progress=progress))
    job = run(plan, str(tmp_path / "out"), RunOptions(workers=1))
    assert job.resumed_units > 0
    assert_sealed(tmp_path / "out")


@pytest.mark.usefixtures("small_units")
def test_what_was_damaged_in_between_is_done_again(tmp_path: Path) -> None:
    plan = sealed(tmp_path, ARRAYS, GAPS)

    def progress(done: int, total: int) -> None:
        if done >= 0.9 * total:
            raise _InterruptedError

    with pytest.raises(_InterruptedError):
        run(plan, str(tmp_path / "out"), RunOptions(workers=1, progress=progress))
    file = plan.target.files[0]
    place = file.storages[next(iter(file.storages))].offset_bytes
    with (tmp_path / "out.partial" / file.relpath).open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\x55")
    run(plan, str(tmp_path / "out"), RunOptions(workers=1))
    assert_sealed(tmp_path / "out")


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    """By the manifest where a part was written, and by the seal everywhere."""
    plan = sealed(tmp_path, ARRAYS, GAPS)
    run(plan, str(tmp_path / "out"), RunOptions(workers=1))
    file = plan.target.files[0]
    path = tmp_path / "out" / file.relpath
    written = manifest.read(str(tmp_path / "out"))
    assert written is not None
    whole_file = path.read_bytes()
    rng = random.Random(0)  # noqa: S311
    for extent in (e for e in file.storages.values() if e.nbytes):
        at = extent.offset_bytes + rng.randrange(extent.nbytes)
        path.write_bytes(whole_file[:at] + bytes([whole_file[at] ^ 4]) + whole_file[at + 1 :])
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is not None
        parts = [part for places in file.skeleton.places.values() for part in places if part.nbytes]
        inside = any(part.offset_bytes <= at < part.offset_bytes + part.nbytes for part in parts)
        assert bool(check_tree(str(tmp_path / "out"), written)) == inside
