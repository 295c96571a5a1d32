"""Values that become another floating type while they are moved, and stored tensors that must equal what is written."""

from __future__ import annotations

import importlib
import os
import struct
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import synthetic
from tests.synthetic import Held, source_of, target_of, window
from transform_ckpt import casts, dtypes, execute, manifest, planner
from transform_ckpt.digests import part_ranges
from transform_ckpt.errors import InputError, PlanError
from transform_ckpt.execute import RunOptions, run
from transform_ckpt.formats import safetensors
from transform_ckpt.kernels import Mover
from transform_ckpt.planner import Plan, build
from transform_ckpt.store import MemoryWriter
from transform_ckpt.tensors import Extent, Logical, Piece, Source, Target, TargetFile, Tensor, TensorSpec, Witness
from transform_ckpt.verify import check_tree
from transform_ckpt.views import Box, whole

Array = np.ndarray[Any, np.dtype[Any]]
QUICK = settings(max_examples=30, derandomize=True, deadline=None, database=None)
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BITS = {"F64": (52, 11), "F32": (23, 8), "F16": (10, 5), "BF16": (7, 8)}
"""Bits of the mantissa and the exponent."""
PAIRS = [(one, two) for one in FLOATS for two in FLOATS if one != two]


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """The real torch, imported once in a session."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: make venv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch")


# ---------------------------------------------------------------------------------------------------- drawn values


@st.composite
def values(draw: st.DrawFn, code: str, count: int) -> bytes:
    """Elements of a type: any bits, and often what rounding makes hard, a half behind the last bit that remains."""
    mantissa, exponent = BITS[code]
    width = dtypes.itemsize(code)
    any_bits = st.integers(0, (1 << 8 * width) - 1)
    ends = [0, 1, (1 << exponent) - 1, (1 << exponent) - 2, *(1 << exponent - 1) + np.arange(-150, 150)]
    fields = st.tuples(
        st.integers(0, 1),
        st.sampled_from([int(e) for e in ends if 0 <= e < 1 << exponent]),
        st.sampled_from(sorted({0, 1, (1 << mantissa) - 1})) | st.integers(0, mantissa).map(lambda n: 1 << n),
        st.sampled_from([0, 1, -1]) | st.integers(0, mantissa).map(lambda n: 1 << n),
    )
    hard = fields.map(lambda f: f[0] << mantissa + exponent | f[1] << mantissa | (f[2] + f[3]) % (1 << mantissa))
    drawn = draw(st.lists(any_bits | hard, min_size=count, max_size=count))
    return b"".join(value.to_bytes(width, "little") for value in drawn)


def array_of(data: bytes, code: str) -> Array:
    """Bytes as numbers."""
    return np.frombuffer(data, FLOATS[code])


def assert_same_numbers(found: bytes, wanted: bytes, code: str) -> None:
    """The same bits, but that a NaN is a NaN."""
    one, two = array_of(found, code), array_of(wanted, code)
    assert one.shape == two.shape
    bits = np.dtype(f"u{one.itemsize}")
    with np.errstate(invalid="ignore"):
        unlike = (one.view(bits) != two.view(bits)) & ~(np.isnan(one) & np.isnan(two))
    assert not unlike.any(), (one[unlike][:5], two[unlike][:5], np.flatnonzero(unlike)[:5])


def by_torch(torch: ModuleType, data: bytes, source: str, target: str) -> bytes:
    """What torch makes of the numbers."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if not data:
        return b""
    found = torch.frombuffer(bytearray(data), dtype=kinds[source]).to(kinds[target])
    return bytes(found.view(torch.uint8).numpy().tobytes())


def half_of(value: float) -> bytes:
    """A double as half precision, rounded once by Python."""
    try:
        return struct.pack("<e", value)
    except OverflowError:
        return struct.pack("<e", float("inf") if value > 0 else float("-inf"))


def reference(torch: ModuleType, data: bytes, source: str, target: str) -> bytes:
    """Torch rounds a double to single precision on its way to half, NumPy does not."""
    if (source, target) == ("F64", "F16"):
        return b"".join(half_of(float(value)) for value in array_of(data, source))
    return by_torch(torch, data, source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@QUICK
@given(data=st.data())
def test_cast(torch: ModuleType, source: str, target: str, data: st.DataObject) -> None:
    raw = data.draw(values(source, data.draw(st.integers(0, 40))))
    assert_same_numbers(
        bytes(casts.cast(memoryview(raw), source, target)), reference(torch, raw, source, target), target
    )


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] in {"F16", "BF16"}])
def test_cast_of_every_half(torch: ModuleType, source: str, target: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16).tobytes()
    assert_same_numbers(
        bytes(casts.cast(memoryview(raw), source, target)), reference(torch, raw, source, target), target
    )


def test_cast_of_every_exponent_and_rounding(torch: ModuleType) -> None:
    """Single precision to bfloat16: all upper halves, with the lower ones that decide."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        raw = (upper | lower).astype(np.uint32).tobytes()
        assert_same_numbers(
            bytes(casts.cast(memoryview(raw), "F32", "BF16")), by_torch(torch, raw, "F32", "BF16"), "BF16"
        )


# ------------------------------------------------------------------------------------------------------------ moving


class _Bytes:
    """A stored tensor in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= len(self.data)
        buffer[:] = self.data[offset : offset + len(buffer)]


class _Once(MemoryWriter):
    """Notes that every byte is written, once and in order."""

    def __init__(self, nbytes: int) -> None:
        self.data, self.counts, self.at = bytearray(nbytes), np.zeros(nbytes, np.int64), -1
        super().__init__(memoryview(self.data))

    def write(self, offset: int, data: memoryview) -> None:
        assert offset > self.at
        self.at = offset
        self.counts[offset : offset + len(data)] += 1
        super().write(offset, data)


class _Seen:
    """Gathers what the observer is given, by write side."""

    def __init__(self, found: list[bytearray]) -> None:
        self.found = found

    def __call__(self, index: int, data: memoryview) -> None:
        self.found[index].extend(data)


@st.composite
def reshards(draw: st.DrawFn, *, least: int = 0) -> tuple[Held, list[Held]]:
    """A tensor as source ranks hold it, and as target ranks want it in several types."""
    source = draw(st.sampled_from(list(FLOATS)))
    shape = tuple(draw(st.integers(1, 6)) for _ in range(draw(st.integers(least, 4))))
    held = Held(source, shape, draw(synthetic.layouts(shape, complete=True)))
    kinds = draw(st.lists(st.sampled_from(list(FLOATS)), min_size=1, max_size=3, unique=True))
    return held, [Held(kind, shape, draw(synthetic.layouts(shape, complete=False))) for kind in kinds]


def several(wanted: Sequence[Held]) -> Target:
    """One parameter in several types, each in files of its own."""
    files: list[TargetFile] = []
    for held in wanted:
        files += target_of({"w": held}).files
    return Target("memory", tuple(files))


@settings(QUICK, max_examples=100)
@given(reshards(), st.sampled_from([8, 16, 24, 40, 64, 104, 1000]), st.lists(st.floats(0, 1), max_size=3), st.data())
def test_moved_and_cast(
    torch: ModuleType, case: tuple[Held, list[Held]], block_nbytes: int, cuts: list[float], data: st.DataObject
) -> None:
    held, wanted = case
    raw = data.draw(values(held.dtype, whole(held.shape).numel))
    whole_array = np.frombuffer(raw, f"V{dtypes.itemsize(held.dtype)}").reshape(held.shape)
    plan = build(source_of({"w": held}), several(wanted))
    found = {(i, s.name): _Once(s.nbytes) for i, file in enumerate(plan.target.files) for s in file.specs}
    stored = {f"rank_{rank}": whole_array[window(box)].tobytes() for rank, box in held.boxes}
    mover = Mover(block_nbytes)
    for group in plan.groups:
        rows = group.component.shape[0]
        readers = [_Bytes(stored[t.path]) for t in group.reads]
        writers = [_Once(side.view.numel) for side in group.component.writes]
        seen = [bytearray() for _ in writers]
        for start, stop in pairwise(sorted({0, rows, *(_whole_elements(group, cut) for cut in cuts)})):
            mover.move(group.component, (start, stop), readers, writers, _Seen(seen))
        for index, (writer, places) in enumerate(zip(writers, group.writes, strict=True)):
            assert seen[index] == writer.data, "the observer sees what is written: bytes of the target's type"
            for place in places:
                found[place.file, place.name].write(0, memoryview(writer.data))
                found[place.file, place.name].counts += writer.counts - 1
    for number, file in enumerate(plan.target.files):
        for spec in file.specs:
            writer = found[number, spec.name]
            assert (writer.counts == 1).all()
            part = whole_array[window(file.boxes[spec.name])].tobytes()
            if spec.dtype == held.dtype:
                assert writer.data == part, "not cast: NaNs keep their bits"
            else:
                assert_same_numbers(bytes(writer.data), reference(torch, part, held.dtype, spec.dtype), spec.dtype)


def _whole_elements(group: planner.Group, cut: float) -> int:
    """A row of a component where a task may begin: not inside an element, where rows are bytes."""
    rows = group.component.shape[0]
    at = int(cut * rows)
    return at if len(group.component.shape) > 1 else at // 8 * 8


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (7,)])
def test_few_elements(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.arange(0.25, whole(shape).numel, dtype=np.float32).reshape(shape)
    plan = build(_file_source(tmp_path, {"w": array}), _file_target({"w": ("BF16", shape)}))
    run(plan, str(tmp_path / "out"), RunOptions(workers=1))
    found = _stored(tmp_path / "out")["w"]
    assert found == array.astype(ml_dtypes.bfloat16).tobytes()
    assert not _faults(tmp_path / "out")


@pytest.mark.parametrize(("source", "target"), [("I64", "F32"), ("F32", "I32"), ("BF16", "U16"), ("BOOL", "F32")])
def test_a_cast_that_is_none(source: str, target: str) -> None:
    held = Held(source, (4,), ((0, whole((4,))),))
    with pytest.raises(PlanError, match=rf"'w' is {source} and cannot become {target}"):
        build(source_of({"w": held}), target_of({"w": Held(target, (4,), held.boxes)}))


# -------------------------------------------------------------------------------------------------- whole small runs


def _file_source(folder: Path, arrays: dict[str, Array], witnesses: dict[str, Array] | None = None) -> Source:
    """One raw file of every array behind the other, of single precision."""
    params = {}
    for tensor in _raw_file(folder / "source.bin", "F32", arrays):
        piece = Piece(tensor, whole(tensor.shape), 0)
        params[tensor.name] = Logical(tensor.name, tensor.dtype, tensor.shape, (piece,))
    return Source("raw", str(folder / "source.bin"), (), params, {})


def _raw_file(path: Path, dtype: str, arrays: dict[str, Array]) -> list[Tensor]:
    """Tensors of a file without a header: a few bytes lie before each."""
    data, found = b"", []
    for name, array in arrays.items():
        data += b"?" * 3
        found.append(Tensor(name, dtype, array.shape, str(path), (Extent(len(data), array.nbytes),)))
        data += array.tobytes()
    path.write_bytes(data)
    return found


def _file_target(wanted: dict[str, tuple[str, tuple[int, ...]]], witnesses: Sequence[Witness] = ()) -> Target:
    """One safetensors file of whole tensors."""
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in wanted.items()]
    boxes = {spec.name: whole(spec.shape) for spec in specs}
    skeleton = safetensors.skeleton(specs, {})
    file = TargetFile("model.safetensors", "safetensors", skeleton, tuple(specs), boxes)
    return Target("raw", (file,), witnesses=tuple(witnesses))


def _stored(folder: Path) -> dict[str, bytes]:
    """The tensors of the output, by name."""
    path = folder / "model.safetensors"
    header, data = safetensors.read_header(str(path)), path.read_bytes()
    extents = {name: tensor.extents[0] for name, tensor in header.tensors.items()}
    return {name: data[e.offset_bytes : e.offset_bytes + e.nbytes] for name, e in extents.items()}


def _faults(folder: Path) -> list[str]:
    found = manifest.read(str(folder))
    assert found is not None
    return check_tree(str(folder), found)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units of work, for as many processes as are asked for."""
    monkeypatch.setattr(planner, "UNIT_NBYTES", 64)
    monkeypatch.setattr(execute, "SMALL_NBYTES", 0)


def _numbers(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
@pytest.mark.usefixtures("small_units")
def test_digests_of_casts(dtype: str, workers: int, tmp_path: Path) -> None:
    """In the manifest they are those of the bytes that were written, part by part."""
    arrays = {"a": _numbers((300,)), "b": _numbers((7, 9), 1), "c": _numbers((2, 3, 40), 2)}
    plan = build(_file_source(tmp_path, arrays), _file_target({n: (dtype, a.shape) for n, a in arrays.items()}))
    assert len(plan.units) > 10
    out = tmp_path / "out"
    run(plan, str(out), RunOptions(workers=workers))
    assert _stored(out) == {name: array.astype(FLOATS[dtype]).tobytes() for name, array in arrays.items()}
    assert not _faults(out)
    path = out / "model.safetensors"
    with path.open("r+b") as stream:
        stream.seek(-20, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-20, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    assert len(_faults(out)) == 1


@settings(QUICK, max_examples=150)
@given(reshards(least=1), st.sampled_from([64, 128, 1000]))
def test_part_ranges(case: tuple[Held, list[Held]], unit_nbytes: int) -> None:
    """Each write's parts follow each other without a gap, to its last byte, in bytes of the target's type."""
    held, wanted = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "UNIT_NBYTES", unit_nbytes)
        plan = build(source_of({"w": held}), several(wanted))
    ends: dict[tuple[int, int], int] = {}
    for unit in range(len(plan.units)):
        for group, write, at, nbytes in part_ranges(plan, unit):
            assert at == ends.get((group, write), 0)
            ends[group, write] = at + nbytes
    for number, whole_group in enumerate(plan.groups):
        for write, places in enumerate(whole_group.writes):
            specs = {_spec(plan, place.file, place.name) for place in places}
            assert {ends[number, write]} == {spec.nbytes for spec in specs}


def _spec(plan: Plan, file: int, name: str) -> TensorSpec:
    return next(spec for spec in plan.target.files[file].specs if spec.name == name)


# --------------------------------------------------------------------------------------------------------- witnesses


def witnessed(folder: Path, held: Array, dtype: str, boxes: Sequence[Box], *, wrong: int | None = None) -> Plan:
    """A plan of "w", and stored tensors of another type that must equal boxes of it; element `wrong` of them does not.

    Elements are counted over all boxes.
    """
    source = _file_source(folder, {"w": held, "v": held})
    parts = {f"w{n}": held[window(box)].astype(FLOATS[dtype]) for n, box in enumerate(boxes)}
    if wrong is not None:
        for part in parts.values():
            if wrong < part.size:
                part.reshape(-1).view(f"u{part.itemsize}")[wrong] ^= 1
                break
            wrong -= part.size
    tensors = _raw_file(folder / "witness.bin", dtype, parts)
    witnesses = [Witness("w", box, tensor) for box, tensor in zip(boxes, tensors, strict=True)]
    return build(source, _file_target({"w": ("F32", held.shape), "v": ("F32", held.shape)}, witnesses))


ROWS = [Box((0, 0), (6, 10)), Box((6, 0), (2, 10)), Box((8, 0), (4, 10))]
COLUMNS = [Box((0, 0), (12, 3)), Box((0, 3), (12, 7))]
SOME = [Box((3, 2), (5, 4))]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("boxes", [ROWS, COLUMNS, SOME], ids=["rows", "columns", "some"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_units")
def test_witnesses_that_agree(dtype: str, boxes: list[Box], workers: int, tmp_path: Path) -> None:
    held = _numbers((12, 10))
    held[0, 0], held[5, 5] = np.nan, np.inf
    plan = witnessed(tmp_path, held, dtype, boxes)
    run(plan, str(tmp_path / "out"), RunOptions(workers=workers))
    assert _stored(tmp_path / "out") == {"w": held.tobytes(), "v": held.tobytes()}
    assert not _faults(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("boxes", [ROWS, COLUMNS, SOME], ids=["rows", "columns", "some"])
@pytest.mark.parametrize("where", [0.0, 0.37, 0.62, 1.0])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_units")
def test_a_witness_that_does_not(dtype: str, boxes: list[Box], where: float, workers: int, tmp_path: Path) -> None:
    """The first element that differs is named by its place in the stored tensor; nothing of the output stays."""
    wrong = int(where * (sum(box.numel for box in boxes) - 1))
    plan = witnessed(tmp_path, _numbers((12, 10)), dtype, boxes, wrong=wrong)
    with pytest.raises(InputError) as caught:
        run(plan, str(tmp_path / "out"), RunOptions(workers=workers))
    for number, box in enumerate(boxes):
        if wrong < box.numel:
            assert f"'w{number}'" in str(caught.value)
            break
        wrong -= box.numel
    assert re_element(str(caught.value)) == wrong
    assert str(tmp_path / "witness.bin") in str(caught.value)
    assert "'w'" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.bin", "witness.bin"]


def re_element(message: str) -> int:
    """The element that a message names."""
    (found,) = (part for part in message.replace("(", "").replace(")", "").split("element ")[1:])
    return int(found.split()[0].rstrip(":;,"))


def test_every_nan_is_a_nan(tmp_path: Path) -> None:
    held = _numbers((12, 10))
    held.view(np.uint32)[1, 1] = 0x7FC12345
    plan = witnessed(tmp_path, held, "BF16", ROWS)
    data = bytearray((tmp_path / "witness.bin").read_bytes())
    data[3 + 22 : 3 + 24] = b"\xff\xff"
    (tmp_path / "witness.bin").write_bytes(data)
    run(plan, str(tmp_path / "out"), RunOptions(workers=1))
    assert _stored(tmp_path / "out")["w"] == held.tobytes()


def test_a_nan_is_no_number(tmp_path: Path) -> None:
    plan = witnessed(tmp_path, _numbers((12, 10)), "BF16", ROWS)
    data = bytearray((tmp_path / "witness.bin").read_bytes())
    data[3 + 22 : 3 + 24] = b"\xff\xff"
    (tmp_path / "witness.bin").write_bytes(data)
    with pytest.raises(InputError, match="element 11"):
        run(plan, str(tmp_path / "out"), RunOptions(workers=1))


def test_zeros_have_a_sign(tmp_path: Path) -> None:
    held = np.zeros((12, 10), np.float32)
    plan = witnessed(tmp_path, held, "BF16", ROWS)
    data = bytearray((tmp_path / "witness.bin").read_bytes())
    data[3 + 1] = 0x80
    (tmp_path / "witness.bin").write_bytes(data)
    with pytest.raises(InputError, match="element 0"):
        run(plan, str(tmp_path / "out"), RunOptions(workers=1))


def test_a_witness_of_what_nobody_wants(tmp_path: Path) -> None:
    """Only what is written is compared."""
    held = _numbers((12, 10))
    source = _file_source(tmp_path, {"w": held, "v": held})
    (tensor,) = _raw_file(tmp_path / "witness.bin", "BF16", {"w0": np.zeros((12, 10), ml_dtypes.bfloat16)})
    plan = build(source, _file_target({"v": ("F32", held.shape)}, [Witness("w", whole(held.shape), tensor)]))
    run(plan, str(tmp_path / "out"), RunOptions(workers=1))


@QUICK
@given(st.binary(min_size=0, max_size=64), st.data(), st.sampled_from(list(FLOATS)))
def test_first_difference(raw: bytes, data: st.DataObject, code: str) -> None:
    width = dtypes.itemsize(code)
    raw = raw[: len(raw) // width * width]
    other = bytearray(raw)
    for at in data.draw(st.lists(st.integers(0, max(len(raw) - 1, 0)), max_size=3)) if raw else ():
        other[at] ^= data.draw(st.integers(0, 255))
    pairs = zip(array_of(raw, code), array_of(bytes(other), code), strict=True)
    with np.errstate(invalid="ignore"):
        unlike = [a.tobytes() != b.tobytes() and not (np.isnan(a) and np.isnan(b)) for a, b in pairs]
    wanted = unlike.index(True) if any(unlike) else None
    assert casts.first_difference(bytearray(raw), memoryview(other), code) == wanted


@pytest.mark.parametrize("code", FLOATS)
def test_signalling_nans_warn_nobody(code: str) -> None:
    """NumPy's warnings are errors here; a damaged file may hold any bits."""
    mantissa, exponent = BITS[code]
    width = dtypes.itemsize(code)
    nan = ((1 << exponent) - 1 << mantissa | 1).to_bytes(width, "little")
    assert casts.first_difference(bytearray(nan), memoryview(bytes(width)), code) == 0
    assert casts.first_difference(bytearray(nan), memoryview(nan[:-1] + bytes([nan[-1] | 0x80])), code) is None
