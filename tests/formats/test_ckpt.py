"""MindSpore's .ckpt: ours and the real one read and write each other's files; then every lie we know of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import support
from tests.formats.conformance import ContainerConformance, content_of, filled, stored_bytes
from transform_ckpt import crc as checksums
from transform_ckpt import dtypes
from transform_ckpt.errors import InputError
from transform_ckpt.formats import ckpt
from transform_ckpt.tensors import FileHeader, Skeleton, TargetFile, TensorSpec

CODES = sorted(set(dtypes.BY_CODE) - {dtypes.STRING})
NUMPY_CODES = [code for code in CODES if not code.startswith(("F8", "I4"))]
SCALARS = {"epoch_num": 3, "loss_scale": 65536.0, "flag": True}
STRINGS = {"note": "héllo 层 \U0001f600", "void": "", "plain": "abc"}


def arrays(seed: int = 0) -> dict[str, support.Array]:
    """Random bits of every dtype that NumPy and MindSpore know, in file order."""
    rng = np.random.default_rng(seed)
    kinds = {
        code: np.dtype(ml_dtypes.bfloat16 if code == "BF16" else dtypes.BY_CODE[code].numpy) for code in NUMPY_CODES
    }
    shapes = [(3, 5), (), (7,)]
    return {
        f"{code}.{len(shape)}": support.random_bits(rng, kind, shape)
        for code, kind in kinds.items()
        for shape in shapes
    }


def specs_of(values: dict[str, support.Array]) -> list[TensorSpec]:
    return [TensorSpec(name, name.partition(".")[0], array.shape) for name, array in values.items()]


def string_spec(name: str, text: str) -> tuple[TensorSpec, bytes]:
    """A string as append_dict stores it: NumPy's empty string is one NUL."""
    data = (text or "\0").encode("utf-32-le")
    return TensorSpec(name, dtypes.STRING, (), len(data)), data


def write(path: Path, specs: Sequence[TensorSpec], values: dict[str, bytes], *, crc: bool = False) -> Path:
    """One of our files, its crc trailer filled as the executor does."""
    skeleton = ckpt.skeleton(specs, crc=crc)
    path.write_bytes(filled(skeleton, values))
    checksums.write_crc(str(path), TargetFile(path.name, ckpt.FORMAT, skeleton, tuple(specs), {}))
    return path


# ------------------------------------------------------------------------------------------- a little protobuf


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def blob(number: int, data: bytes) -> bytes:
    """A field of wire type 2."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    """A field of wire type 0."""
    return varint(field << 3) + varint(value)


def dims(*shape: int) -> bytes:
    return b"".join(number(1, n) for n in shape)


def tensor(shape: Iterable[int], kind: str, content: bytes) -> bytes:
    return dims(*shape) + blob(2, kind.encode()) + blob(3, content)


def record(tag: str, body: bytes) -> bytes:
    """One value of one tensor."""
    return blob(1, blob(1, tag.encode()) + blob(2, body))


GOOD = record("good", tensor((2,), "Float32", b"12345678"))
UNKNOWN = number(15, 300) + varint(14 << 3 | 1) + b"8 bytes." + blob(13, b"xyz") + varint(12 << 3 | 5) + b"4by."


class TestCkpt(ContainerConformance):
    """The rules that all containers share, and those of this one."""

    module = ckpt
    codes = CODES

    def boundaries(self, skeleton: Skeleton) -> Iterable[int]:
        return [offset for offset, _ in skeleton.chunks if offset]

    # ---------------------------------------------------------------------------------------------- with a crc

    def test_truncated_with_a_crc_trailer(self, path: Path) -> None:
        specs = self.small_specs()
        values = {spec.name: content_of(spec) for spec in specs}
        data = write(path, specs, values, crc=True).read_bytes()
        header = ckpt.read_header(str(path))
        assert header.crc_nbytes == len(data) - ckpt.CRC_NBYTES
        checksums.check_crc(header)
        boundaries = set(self.boundaries(ckpt.skeleton(specs, crc=True)))
        for size in range(len(data)):
            if size in boundaries:
                cut = self.read(path, data[:size])
                assert cut.crc32 is None
                assert all(header.tensors[name] == tensor for name, tensor in cut.tensors.items())
            else:
                with pytest.raises(InputError):
                    self.read(path, data[:size])

    def test_any_flipped_bit_fails_the_crc(self, path: Path) -> None:
        specs = self.small_specs()
        data = write(path, specs, {spec.name: content_of(spec) for spec in specs}, crc=True).read_bytes()
        for at in range(len(data) - 10):
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            try:
                header = self.read(path, bytes(damaged))
            except InputError:
                continue
            with pytest.raises(InputError, match=r"crc_check value is \d+, its bytes give \d+: the file is damaged"):
                checksums.check_crc(header)

    # --------------------------------------------------------------------------------------------- wire format

    def test_packed_dims(self, path: Path) -> None:
        body = blob(1, varint(2) + varint(300)) + blob(2, b"Int8") + blob(3, bytes(600))
        mixed = number(1, 3) + blob(1, varint(4) + varint(5)) + blob(2, b"Int8") + blob(3, bytes(60))
        none = blob(1, b"") + blob(2, b"Int8") + blob(3, b"x")
        tensors = self.read(path, record("p", body) + record("m", mixed) + record("n", none)).tensors
        assert [t.shape for t in tensors.values()] == [(2, 300), (3, 4, 5), ()]

    def test_unknown_fields_are_stepped_over(self, path: Path) -> None:
        body = UNKNOWN + tensor((2,), "Float32", b"12345678") + UNKNOWN
        data = (
            GOOD + blob(1, UNKNOWN + blob(1, b"w") + UNKNOWN + blob(2, body) + UNKNOWN) + GOOD.replace(b"good", b"best")
        )
        header = self.read(path, data)
        assert list(header.tensors) == ["good", "w", "best"]
        assert stored_bytes(data, header.tensors["w"]) == b"12345678"

    def test_fields_in_another_order(self, path: Path) -> None:
        body = blob(3, b"12345678") + dims(2) + blob(2, b"Float32")
        data = blob(1, blob(2, body) + blob(1, b"w"))
        header = self.read(path, data)
        assert (header.tensors["w"].shape, stored_bytes(data, header.tensors["w"])) == ((2,), b"12345678")

    def test_numbers_longer_than_needed(self, path: Path) -> None:
        padded = b"\x08\x82\x80\x80\x00" + tensor((), "Int16", b"abcd")
        assert self.read(path, record("w", padded)).tensors["w"].shape == (2,)

    def test_old_scalars_have_dims_0(self, path: Path) -> None:
        header = self.read(
            path, record("s", tensor([0], "Float32", b"1234")) + record("e", tensor([0], "Float32", b""))
        )
        assert [t.shape for t in header.tensors.values()] == [(), (0,)]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (GOOD + GOOD, "'good' has 16 bytes, Float32.2. needs 8"),
            (GOOD + record("w", tensor((1,), "Int8", b"x")) + GOOD, "'good' is in the file twice"),
            (record("s", tensor([0], "str", b"a\0\0\0")) * 2, "'s'.* twice"),
            (record("w", tensor((2,), "Float32", b"1234567")), r"'w' has 7 bytes, Float32\[2\] needs 8"),
            (record("w", tensor((3,), "Float32", b"12345678")), "has 8 bytes.*needs 12"),
            (record("w", tensor((), "Float32", b"12345678")), "has 8 bytes.*needs 4"),
            (record("w", tensor((2,), "Float31", b"12345678")), "unknown type 'Float31'"),
            (record("w", tensor((1 << 63,), "Float32", b"")), "damaged"),
            (record("w", tensor((0, (1 << 64) - 1), "Float32", b"")), "damaged"),
            (record("w", tensor((1,) * 65, "Float32", b"1234")), "damaged"),
            (record("w", tensor((0,) + (1 << 62,) * 5000, "Float32", b"")), "damaged"),
            (record("w", tensor((1 << 62,) * 5000, "Float32", b"")), "damaged"),
            (record("s", tensor([0], "str", b"abcde")), "'s' is str .* with 5 bytes"),
            (record("", tensor((2,), "Float32", b"12345678")), "a value without"),
            (blob(1, blob(2, tensor((2,), "Float32", b"12345678"))), "a value without"),
            (blob(1, blob(1, b"w")), "a value without tensor_type"),
            (record("w", dims(2) + blob(3, b"12345678")), "a value without tensor_type"),
            (record("w", dims(2) + blob(2, b"Float32")), "a value without content"),
            (blob(1, b""), "a value without"),
            (blob(1, blob(1, b"\xff\xfe") + blob(2, b"")), "not UTF-8"),
            (record("n" * 1_100_000, tensor((1,), "Int8", b"x")), "a name of 1,100,000 bytes"),
            (blob(1, blob(1, b"map") + blob(3, blob(1, b"anything"))), "'map' is a map"),
            (blob(2, GOOD), "field 2 of wire type 2"),
            (b"PK\x03\x04" + bytes(100), "where a value should begin"),
            (blob(1, blob(1, b"w") + b"\x1b"), "wire type 3"),
            (b"\x0a" + b"\xff" * 11, "more than 10 bytes"),
            (record("w", tensor((2,), "Int8", b"ab") + b"\x79four") + GOOD, "8 bytes announced, 4 left"),
            (record("w", tensor((2,), "Int8", b"ab") + b"\x78\x80") + GOOD, "1 bytes announced, 0 left"),
            (blob(1, blob(1, b"w") + b"\x12\x7f" + tensor((2,), "Int8", b"ab")) + GOOD * 9, "127 bytes, 1. left"),
            (record("w", tensor((2, 2), "U8", b"ab")) + record("w", tensor((4,), "U8", b"cd")), "pieces of 'w' differ"),
            (record("w", tensor((4,), "Int8", b"ab")) + record("w", tensor((4,), "U8", b"cd")), "pieces of 'w' differ"),
            (record("w", tensor((6,), "Int8", b"ab")) * 2, "has 4 bytes.*needs 6"),
        ],
    )  # fmt: skip
    def test_lies_are_refused(self, path: Path, data: bytes, message: str) -> None:
        with pytest.raises(InputError, match=message):
            self.read(path, data)

    @pytest.mark.parametrize("claimed", [1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1])
    def test_huge_lengths_take_no_memory(self, path: Path, claimed: int) -> None:
        for data in (
            b"\x0a" + varint(claimed),
            blob(1, b"\x0a" + varint(claimed) + b"name"),
            blob(1, blob(1, b"w") + b"\x12" + varint(claimed)),
            record("w", dims(2) + b"\x12" + varint(claimed)),
            record("w", dims(2) + blob(2, b"Int8") + b"\x1a" + varint(claimed)),
            record("w", tensor((claimed,), "Int8", b"x")),
        ):
            self.assert_little_memory(path, data + bytes(100))
            self.assert_little_memory(path, data)

    def test_tensor_bytes_are_not_read(self, path: Path) -> None:
        """A file of 4 GiB that is a hole but for its headers."""
        specs = [TensorSpec(f"w{i}", "F32", (1 << 28,)) for i in range(4)]
        skeleton = ckpt.skeleton(specs)
        with path.open("wb") as stream:
            stream.truncate(skeleton.nbytes)
            for offset, chunk in skeleton.chunks:
                os.pwrite(stream.fileno(), chunk, offset)
        header = ckpt.read_header(str(path))
        assert {name: t.extents for name, t in header.tensors.items()} == skeleton.places
        assert [len(t.extents) for t in header.tensors.values()] == [2] * 4

    # -------------------------------------------------------------------------------------------------- slices

    def test_tensors_over_the_limit_are_several_values(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ckpt, "SLICE_NBYTES", 16)
        specs = [TensorSpec("big", "F32", (3, 5)), TensorSpec("even", "U8", (32,)), TensorSpec("one", "I64", (2,))]
        data = self.make(path, specs)
        tensors = ckpt.read_header(str(path)).tensors
        assert [[e.nbytes for e in t.extents] for t in tensors.values()] == [[16, 16, 16, 12], [16, 16], [16]]
        assert all(stored_bytes(data, tensors[spec.name]) == content_of(spec) for spec in specs)
        boundaries = {offset for offset, _ in ckpt.skeleton(specs).chunks}
        for size in range(1, len(data)):  # a tensor that lost its last slices is not a smaller tensor
            try:
                cut = self.read(path, data[:size]).tensors
            except InputError:
                continue
            assert size in boundaries
            assert all(tensors[name] == tensor for name, tensor in cut.items())

    # --------------------------------------------------------------------------------------- the real MindSpore

    @pytest.mark.parametrize("crc", [False, True])
    def test_mindspore_reads_ours(self, ms: ModuleType, path: Path, crc: bool) -> None:  # noqa: FBT001
        # MindSpore 2.9.0 writes complex64 but its reader's type table lacks it
        values = {name: array for name, array in arrays().items() if not name.startswith("C64")}
        strings = dict(string_spec(name, text) for name, text in STRINGS.items())
        specs = [*specs_of(values), *strings]
        content = {n: a.tobytes() for n, a in values.items()} | {spec.name: data for spec, data in strings.items()}
        write(path, specs, content, crc=crc)
        loaded = ms.load_checkpoint(str(path), crc_check=True)
        assert {name: loaded.pop(name) for name in STRINGS} == STRINGS
        support.assert_same({name: support._to_numpy(value) for name, value in loaded.items()}, values)
        if crc:
            damaged = bytearray(path.read_bytes())
            damaged[ckpt.read_header(str(path)).tensors["I64.2"].extents[0].offset_bytes] ^= 1
            path.write_bytes(damaged)
            assert ms.load_checkpoint(str(path))  # so it is the crc that the next line refuses
            with pytest.raises(ValueError, match="Failed to read the checkpoint file"):
                ms.load_checkpoint(str(path), crc_check=True)

    @pytest.mark.parametrize("crc", [False, True])
    def test_byte_identical_to_mindspore(self, ms: ModuleType, tmp_path: Path, crc: bool) -> None:  # noqa: FBT001
        values = arrays(1)
        strings = dict(string_spec(name, text) for name, text in STRINGS.items())
        parameters = [{"name": name, "data": ms.Tensor(a)} for name, a in values.items()]
        real = tmp_path / "real.ckpt"
        ms.save_checkpoint(parameters, str(real), append_dict={**SCALARS, **STRINGS}, crc_check=crc)
        scalars = {
            "epoch_num": ("I64", np.int64(3)),
            "loss_scale": ("F32", np.float32(65536)),
            "flag": ("BOOL", np.bool_(True)),
        }
        specs = [*specs_of(values), *(TensorSpec(n, code, ()) for n, (code, _) in scalars.items()), *strings]
        content = {n: a.tobytes() for n, a in values.items()} | {n: v.tobytes() for n, (_, v) in scalars.items()}
        ours = write(tmp_path / "ours.ckpt", specs, content | {s.name: d for s, d in strings.items()}, crc=crc)
        assert ours.read_bytes() == real.read_bytes()
        header = ckpt.read_header(str(real))
        assert [t.spec() for t in header.tensors.values()] == specs
        assert (header.crc32 is not None) == crc
        if crc:
            checksums.check_crc(header)

    def test_ours_reads_mindspore(self, ms: ModuleType, path: Path) -> None:
        values = arrays(2)
        support.save_file(ms, values, path, append={**SCALARS, **STRINGS})
        data = path.read_bytes()
        tensors = ckpt.read_header(str(path)).tensors
        for name, array in values.items():
            assert tensors[name].dtype == name.partition(".")[0]
            assert (tensors[name].shape, stored_bytes(data, tensors[name])) == (array.shape, array.tobytes())
        found = {name: dtypes.decode(tensors[name].dtype, stored_bytes(data, tensors[name])) for name in SCALARS}
        assert found == SCALARS
        for name, text in STRINGS.items():
            assert tensors[name].dtype == dtypes.STRING
            assert stored_bytes(data, tensors[name]).decode("utf-32-le").rstrip("\0") == text

    def test_packed_four_bit_values(self, ms: ModuleType, path: Path) -> None:
        packed = np.arange(6, dtype=np.int8).reshape(2, 3)
        ms.save_checkpoint([{"name": "q", "data": ms.Tensor(packed, dtype=ms.qint4x2)}], str(path))
        found = ckpt.read_header(str(path)).tensors["q"]
        assert (found.dtype, found.shape, stored_bytes(path.read_bytes(), found)) == ("I4X2", (2, 3), packed.tobytes())
        written = write(path.with_name("ours.ckpt"), [found.spec()], {"q": packed.tobytes()})
        assert written.read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("crc", [False, True])
    @pytest.mark.parametrize("asynchronous", [False, "thread"])
    def test_slices_that_mindspore_makes(
        self,
        ms: ModuleType,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        asynchronous: Any,
        crc: bool,  # noqa: FBT001
    ) -> None:
        """Two ways to cut: get_bytes in equal runs of bytes, NumPy's array_split in unequal rows."""
        serialization = ms.train.serialization
        monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KiB
        rng = np.random.default_rng(0)
        values = {
            "big": support.random_bits(rng, np.float32, (5, 300)),
            "one": support.random_bits(rng, np.int64, (3,)),
            "rows": support.random_bits(rng, np.float16, (7, 300)),
        }
        parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in values.items()]
        ms.save_checkpoint(parameters, str(path), async_save=asynchronous, crc_check=crc)
        serialization._wait_async_thread_save_ckpt()
        data = path.read_bytes()
        header = ckpt.read_header(str(path))
        assert [len(t.extents) for t in header.tensors.values()] == [6, 1, 5]
        for name, array in values.items():
            assert header.tensors[name].shape == array.shape
            assert stored_bytes(data, header.tensors[name]) == array.tobytes()
        if crc:
            checksums.check_crc(header)
        if not asynchronous:
            monkeypatch.setattr(ckpt, "SLICE_NBYTES", 1024)
            specs = [t.spec() for t in header.tensors.values()]
            ours = write(path.with_name("o.ckpt"), specs, {n: a.tobytes() for n, a in values.items()}, crc=crc)
            assert ours.read_bytes() == data

    @pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
    def test_encrypted_files_are_refused_with_the_reason(self, ms: ModuleType, path: Path, mode: str) -> None:
        parameters = [{"name": "w", "data": ms.Tensor(np.zeros(4, np.float32))}]
        ms.save_checkpoint(parameters, str(path), enc_key=b"0123456789abcdef", enc_mode=mode)
        with pytest.raises(InputError, match=rf"is encrypted \({mode}, .*save it without enc_key"):
            ckpt.read_header(str(path))

    def test_maps_are_refused(self, ms: ModuleType, path: Path) -> None:
        message = ms.train.checkpoint_pb2.Checkpoint()
        value = message.value.add()
        value.tag = "table"
        for _ in range(3):
            part = value.maptensor.tensor.add()
            part.dims.extend([2])
            part.tensor_type, part.tensor_content = "int32", bytes(8)
        with pytest.raises(InputError, match="'table' is a map"):
            self.read(path, GOOD + message.SerializeToString())

    def test_golden_files(self, golden: Path, ms: ModuleType) -> None:
        for path in sorted((golden / "mindspore" / "src_ckpt").rglob("*.ckpt"))[:4]:
            header: FileHeader = ckpt.read_header(str(path))
            data = path.read_bytes()
            for name, array in support.load_file(ms, path).items():
                assert (header.tensors[name].shape, stored_bytes(data, header.tensors[name])) == (
                    array.shape,
                    array.tobytes(),
                )
