"""The safetensors container: byte-identical to the real writers, read by the real readers; then the lies we know of."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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
from transform_ckpt.formats import safetensors
from transform_ckpt.tensors import Skeleton, TensorSpec

CODES = [*safetensors.known(), "I4X2"]
NUMPY_CODES = [code for code in CODES if not code.startswith(("F8", "I4"))]
MINDSPORE = {"format": "ms"}


def arrays(seed: int = 0) -> dict[str, support.Array]:
    """Random bits of every dtype that NumPy, safetensors and MindSpore know; names that JSON escapes."""
    rng = np.random.default_rng(seed)
    kinds = {
        code: np.dtype(ml_dtypes.bfloat16 if code == "BF16" else dtypes.BY_CODE[code].numpy) for code in NUMPY_CODES
    }
    names = ["z", 'q"\\/', "a\x01\x1f\x7f\t", "层 \U0001f600"]
    return {
        f"{code}.{name}": support.random_bits(rng, kind, shape)
        for code, kind in kinds.items()
        for name, shape in zip(names, [(3, 5), (), (7,), (2, 0)], strict=True)
    }


def specs_of(values: dict[str, support.Array]) -> list[TensorSpec]:
    return [TensorSpec(name, name.partition(".")[0], array.shape) for name, array in values.items()]


def write(path: Path, values: dict[str, support.Array], metadata: dict[str, str]) -> bytes:
    """One of our files."""
    skeleton = safetensors.skeleton(specs_of(values), metadata)
    data = filled(skeleton, {name: array.tobytes() for name, array in values.items()})
    path.write_bytes(data)
    return data


def raw(header: Any, content: bytes = b"") -> bytes:
    """A file of any header: a value for JSON, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRY = json.dumps({"w": entry()}).encode()
STRINGS = safetensors.STRINGS_KEY
LIES: list[tuple[Any, str]] = [
    ({"w": entry(offsets=[0, 7])}, r"header gives 7 bytes for 'w', F32\[2\] needs 8"),
    ({"w": entry(shape=[3])}, "needs 12"),
    ({"w": entry("I64")}, "needs 16"),
    ({"w": entry(offsets=[1, 9])}, "a hole before 'w'"),
    ({"w": entry(), "v": entry()}, "an overlap at"),
    ({"w": entry(), "v": entry(offsets=[4, 12])}, "an overlap at"),
    ({"w": entry(), "v": entry(offsets=[12, 20])}, "a hole before 'v'"),
    ({"w": entry(), "v": entry(offsets=[8, 16])}, "expected 1.. bytes, found .*: the file is truncated"),
    ({"w": entry("U8", [4], [0, 4])}, "4 bytes behind the last tensor"),
    ({}, "8 bytes behind the last tensor"),
    ({"w": entry(offsets=[8, 0])}, "header gives -8 bytes"),
    ({"w": entry(offsets=[0])}, "data_offsets"),
    ({"w": entry(offsets=[0, 8, 16])}, "data_offsets"),
    ({"w": entry(offsets=[-8, 0])}, "data_offsets"),
    ({"w": entry(offsets=[0, 8.0])}, "data_offsets"),
    ({"w": entry(offsets=None)}, "data_offsets"),
    ({"w": entry(offsets=["0", "8"])}, "data_offsets"),
    ({"w": entry(shape=[-2])}, "shape"),
    ({"w": entry(shape=[True, 2])}, "shape"),
    ({"w": entry(shape=2)}, "shape"),
    ({"w": entry(shape=[2.0])}, "shape"),
    ({"w": entry(shape=[[2]])}, "shape"),
    ({"w": entry(shape=[1 << 63, 0], offsets=[0, 0])}, "shape"),
    ({"w": entry(shape=[0] + [1] * 64, offsets=[0, 0])}, "shape"),
    ({"w": entry(shape=[1 << 62] * 64)}, "needs"),
    ({"w": entry(shape=[10**4000, 10**4000, 0], offsets=[0, 0])}, "shape"),
    ({"w": entry(shape=[10**4000] * 3)}, "shape"),
    ({"w": entry("F33")}, "'w' has dtype 'F33', which is unknown here"),
    ({"w": entry("STR")}, "unknown"),
    ({"w": entry("I4X2")}, "unknown|needs"),
    ({"w": entry(None)}, "unknown"),
    ({"w": entry([])}, "unknown"),
    ({"w": entry({})}, "unknown"),
    ({"w": None}, "'w' has no description"),
    ({"w": [1, 2]}, "'w' has no description"),
    ({"w": {}}, "unknown"),
    ([], "not a JSON object"),
    (None, "not a JSON object"),
    (3, "not a JSON object"),
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b'{"w": }', "not JSON"),
    (b"\xff\xfe{}", "not JSON"),
    (json.dumps({"w": entry()}).encode("utf-16"), "not JSON"),
    (json.dumps({"w": entry()}).encode("utf-32-le"), "not JSON"),
    (b'{"w":' + b"[" * 100_000, "not JSON"),
    (b'{"w":' * 100_000, "not JSON"),
    (b'{"w": ' + b"9" * 5000 + b"}", "not JSON"),
    (ENTRY.replace(b"w", b"\\ud800"), "UTF-8"),
    (ENTRY[:-1] + b"," + ENTRY[1:], "names 'w' twice"),
    (b'{"w":{"dtype":"F32","dtype":"F64","shape":[2],"data_offsets":[0,8]}}', "names 'dtype' twice"),
    ({"__metadata__": [], "w": entry()}, "__metadata__"),
    ({"__metadata__": {"a": 1}, "w": entry()}, "__metadata__"),
    ({"__metadata__": {"a": None}, "w": entry()}, "__metadata__"),
    ({"__metadata__": {"crc_num": "x"}, "w": entry()}, "crc_num"),
    ({"__metadata__": {"crc_num": "-1"}, "w": entry()}, "crc_num"),
    ({"__metadata__": {"crc_num": ""}, "w": entry()}, "crc_num"),
    ({"__metadata__": {"crc_num": "²"}, "w": entry()}, "crc_num"),
    ({"__metadata__": {"crc_num": "٣"}, "w": entry()}, "crc_num"),
    ({"__metadata__": {"crc_num": "9" * 5000}, "w": entry()}, "crc_num"),
    ({"__metadata__": {STRINGS: "["}, "w": entry()}, "not a JSON map"),
    ({"__metadata__": {STRINGS: "[]"}, "w": entry()}, "not a JSON map"),
    ({"__metadata__": {STRINGS: '{"a": 1}'}, "w": entry()}, "not a JSON map"),
    ({"__metadata__": {STRINGS: '{"a": "\\ud800"}'}, "w": entry()}, "not a JSON map"),
    ({"__metadata__": {STRINGS: "[" * 100_000}, "w": entry()}, "not a JSON map"),
    ({"__metadata__": {STRINGS: '{"w": "a"}'}, "w": entry()}, "names a tensor of the file"),
]  # fmt: skip


class TestSafetensors(ContainerConformance):
    """The rules that all containers share, and those of this one."""

    module = safetensors
    codes = CODES

    def skeleton(self, specs: Sequence[TensorSpec]) -> Skeleton:
        return safetensors.skeleton(specs, MINDSPORE)

    # ---------------------------------------------------------------------------------------------------- lies

    @pytest.mark.parametrize(("header", "message"), LIES, ids=range(len(LIES)))
    def test_lies_are_refused(self, path: Path, header: Any, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            self.read(path, raw(header, b"12345678"))
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value)) < 4000

    @pytest.mark.parametrize("length", [1, 7, 9, 1 << 20, 100_000_000, 100_000_001, 1 << 31, 1 << 62, (1 << 64) - 1])
    def test_huge_lengths_take_no_memory(self, path: Path, length: int) -> None:
        self.assert_little_memory(path, length.to_bytes(8, "little") + b"{}")
        self.assert_little_memory(path, length.to_bytes(8, "little") + b'{"w":{"dtype"')

    def test_huge_tensors_take_no_memory(self, path: Path) -> None:
        self.assert_little_memory(path, raw({"w": entry("U8", [1 << 62], [0, 1 << 62])}))

    def test_a_header_longer_than_the_limit(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(safetensors, "MAX_HEADER_NBYTES", 64)
        with pytest.raises(InputError, match="the header claims 65 bytes"):
            self.read(path, raw(b"{}" + b" " * 63))
        assert self.read(path, raw(b"{}" + b" " * 62)).tensors == {}

    def test_tensor_bytes_are_not_read(self, path: Path) -> None:
        skeleton = self.skeleton([TensorSpec(f"w{i}", "F32", (1 << 28,)) for i in range(4)])
        with path.open("wb") as stream:
            stream.truncate(skeleton.nbytes)
            for offset, chunk in skeleton.chunks:
                os.pwrite(stream.fileno(), chunk, offset)
        header = safetensors.read_header(str(path))
        assert {name: t.extents for name, t in header.tensors.items()} == skeleton.places

    def test_a_header_that_nobody_would_read_is_not_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        specs = [TensorSpec(f"w{i}", "F32", (2,)) for i in range(40)]
        assert self.skeleton(specs)
        monkeypatch.setattr(safetensors, "MAX_HEADER_NBYTES", 1000)
        with pytest.raises(InputError, match="40 tensors need a safetensors header"):
            self.skeleton(specs)

    # ----------------------------------------------------------------------------------------- legal variations

    def test_any_order_and_unknown_keys(self, path: Path) -> None:
        header = {
            "b": {**entry("U8", [3], [4, 7]), "more": 1},
            "a": entry("I32", [1], [0, 4]),
            "e": entry("F32", [0], [4, 4]),
        }
        data = raw(header, b"aaaabbb")
        tensors = self.read(path, data).tensors
        assert [stored_bytes(data, tensors[name]) for name in "abe"] == [b"aaaa", b"bbb", b""]

    def test_tensors_start_aligned(self) -> None:
        """Widest dtypes first, data at a multiple of 8: readers map them without a copy."""
        specs = [TensorSpec(f"{code}{n}", code, (n,)) for code in CODES for n in (1, 3)]
        skeleton = self.skeleton(specs)
        for spec in specs:
            assert skeleton.places[spec.name][0].offset_bytes % dtypes.itemsize(spec.dtype) == 0

    def test_strings_lie_in_the_metadata(self, path: Path) -> None:
        strings = {"note": "héllo 层 \U0001f600", "void": "", 'odd"\\': "\x00\n"}
        skeleton = safetensors.skeleton([TensorSpec("w", "U8", (3,))], MINDSPORE, strings)
        header = self.read(path, filled(skeleton, {"w": b"abc"}))
        found = {n: t.inline.decode("utf-32-le") for n, t in header.tensors.items() if t.inline is not None}
        assert found == strings
        assert all(header.tensors[name].dtype == dtypes.STRING for name in strings)
        assert skeleton == safetensors.skeleton(
            [TensorSpec("w", "U8", (3,))], MINDSPORE, dict(reversed(list(strings.items())))
        )

    # ----------------------------------------------------------------------------------- the real safetensors

    def test_the_real_library_reads_ours(self, path: Path) -> None:
        real = pytest.importorskip("safetensors.numpy")
        values = arrays()
        write(path, values, MINDSPORE)
        loaded = {name: support._to_numpy(array) for name, array in real.load_file(path).items()}
        support.assert_same(loaded, values)
        with pytest.importorskip("safetensors").safe_open(path, "numpy") as opened:
            assert opened.metadata() == MINDSPORE
            names = opened.keys()
            support.assert_same({name: support._to_numpy(opened.get_tensor(name)) for name in names}, values)

    def test_torch_reads_every_dtype_of_ours(self, path: Path) -> None:
        torch, real = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
        specs = [TensorSpec(f"{code}.{n}", code, (n, 2)) for code in safetensors.known() for n in (0, 3)]
        content = {s.name: bytes(n % 2 for n in content_of(s)) for s in specs}
        path.write_bytes(filled(self.skeleton(specs), content))
        loaded = real.load_file(path)
        for spec in specs:
            tensor = loaded[spec.name]
            assert (tuple(tensor.shape), tensor.element_size()) == (spec.shape, dtypes.itemsize(spec.dtype))
            assert tensor.view(torch.uint8).numpy().tobytes() == content[spec.name]
            assert str(tensor.dtype).removeprefix("torch.") == dtypes.BY_CODE[spec.dtype].numpy

    def test_byte_identical_to_the_real_library(self, path: Path, tmp_path: Path) -> None:
        real = pytest.importorskip("safetensors.numpy")
        values = arrays(1)
        for metadata in (MINDSPORE, {}):
            real.save_file(values, tmp_path / "real", metadata=metadata or None)
            assert write(path, values, metadata) == (tmp_path / "real").read_bytes()
        assert {t.name: t.spec() for t in safetensors.read_header(str(path)).tensors.values()} == {
            spec.name: spec for spec in specs_of(values)
        }

    def test_byte_identical_to_torch_with_float8(self, path: Path, tmp_path: Path) -> None:
        torch, real = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
        codes = ["F8_E4M3", "F8_E5M2", "U8", "I8", "BOOL", "I16", "U16"]
        specs = [TensorSpec(f"{code}.{n}", code, (n,)) for code in codes for n in (5, 2)]
        content = {s.name: bytes(n % 2 for n in content_of(s)) for s in specs}
        tensors = {
            s.name: torch.frombuffer(bytearray(content[s.name]), dtype=getattr(torch, dtypes.BY_CODE[s.dtype].numpy))
            for s in specs
        }
        real.save_file(tensors, tmp_path / "real")
        assert filled(safetensors.skeleton(specs, {}), content) == (tmp_path / "real").read_bytes()

    def test_the_real_library_refuses_what_we_refuse(self, path: Path) -> None:
        """Nobody else's reader takes our headers' faults for good ones, nor we theirs."""
        real = pytest.importorskip("safetensors")
        data = self.make(path, self.small_specs())
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(real.SafetensorError):
                real.safe_open(path, "numpy")

    # --------------------------------------------------------------------------------------- the real MindSpore

    def test_mindspore_reads_ours(self, ms: ModuleType, path: Path) -> None:
        # MindSpore 2.9.0 writes complex64 but its reader's type table lacks it
        values = {name: array for name, array in arrays(2).items() if not name.startswith("C64")}
        write(path, values, MINDSPORE)
        support.assert_same(support.load_file(ms, path), values)

    def test_byte_identical_to_mindspore(self, ms: ModuleType, tmp_path: Path) -> None:
        values = arrays(3)
        support.save_file(ms, values, tmp_path / "real.safetensors")
        ours = write(tmp_path / "ours.safetensors", values, MINDSPORE)
        assert ours == (tmp_path / "real.safetensors").read_bytes()

    def test_ours_reads_mindspore(self, ms: ModuleType, path: Path) -> None:
        values = arrays(4)
        support.save_file(ms, values, path, append={"epoch_num": 3, "loss_scale": 65536.0, "flag": True})
        data, header = path.read_bytes(), safetensors.read_header(str(path))
        for name, array in values.items():
            tensor = header.tensors[name]
            assert (tensor.dtype, tensor.shape) == (name.partition(".")[0], array.shape)
            assert stored_bytes(data, tensor) == array.tobytes()
        found = {n: dtypes.decode(t.dtype, stored_bytes(data, t)) for n, t in header.tensors.items() if n not in values}
        assert found == {"epoch_num": 3, "loss_scale": 65536.0, "flag": True}

    @pytest.mark.parametrize("redundancy", [None, True, False])
    @pytest.mark.parametrize("crc", [False, True])
    def test_crc_and_redundancy_of_mindspore(
        self,
        ms: ModuleType,
        path: Path,
        redundancy: bool | None,  # noqa: FBT001
        crc: bool,  # noqa: FBT001
    ) -> None:
        rng = np.random.default_rng(0)
        kinds = {"f": np.float32, "h": np.float16, "i": np.int64, "b": np.bool_, "u": np.uint8}
        values = {name: support.random_bits(rng, kind, (5, 3)) for name, kind in kinds.items()}
        values |= {"s": np.array(3, np.int32), "e": np.zeros((0, 2), np.float32)}
        parameters = [{"name": name, "data": ms.Tensor(a)} for name, a in values.items()]
        ms.save_checkpoint(parameters, str(path), crc_check=crc, format="safetensors", remove_redundancy=redundancy)
        path.chmod(0o644)
        header = safetensors.read_header(str(path))
        assert header.metadata.get("remove_redundancy") == (None if redundancy is None else str(redundancy))
        assert (header.crc32 is not None) == crc
        assert {n: stored_bytes(path.read_bytes(), t) for n, t in header.tensors.items()} == {
            name: array.tobytes() for name, array in values.items()
        }
        if crc:
            checksums.check_crc(header)
            for name in ("f", "b", "s"):
                damaged = bytearray(path.read_bytes())
                damaged[header.tensors[name].extents[0].offset_bytes] ^= 1
                path.write_bytes(damaged)
                with pytest.raises(InputError, match="crc_check value"):
                    checksums.check_crc(safetensors.read_header(str(path)))

    @pytest.mark.parametrize("value", [0, 1, 5, 1_048_577, 3_000_000])
    def test_crc_of_integers_of_no_dimension(self, ms: ModuleType, path: Path, value: int) -> None:
        """MindSpore's crc of the step n is that of n zeros: Python's bytes(array) of such an array."""
        parameters = [
            {"name": kind, "data": ms.Tensor(np.array(value % 100 if kind in {"int8", "uint8"} else value, kind))}
            for kind in ("int8", "uint8", "int32", "int64", "uint32", "uint64", "float32", "float64", "bool")
        ]
        ms.save_checkpoint(parameters, str(path), crc_check=True, format="safetensors", append_dict={"epoch": 7})
        ms.load_checkpoint(str(path), crc_check=True, format="safetensors")
        checksums.check_crc(safetensors.read_header(str(path)))

    def test_crc_of_an_absurd_step(self, path: Path) -> None:
        """A damaged step must not make us count to 2**63."""
        header = {"__metadata__": {"crc_num": "1"}, "step": entry("I64", [], [0, 8])}
        with pytest.raises(InputError, match="crc_check value is 1"):
            checksums.check_crc(self.read(path, raw(header, b"\xff" * 8)))

    def test_packed_four_bit_values(self, ms: ModuleType, path: Path) -> None:
        packed = np.arange(6, dtype=np.int8).reshape(2, 3)
        parameters = [
            {"name": "q", "data": ms.Tensor(packed, dtype=ms.qint4x2)},
            {"name": "w", "data": ms.Tensor(packed)},
        ]
        ms.save_checkpoint(parameters, str(path), format="safetensors")
        tensors = safetensors.read_header(str(path)).tensors
        assert [(t.name, t.dtype, t.shape) for t in tensors.values()] == [("q", "I4X2", (2, 3)), ("w", "I8", (2, 3))]
        skeleton = self.skeleton([t.spec() for t in tensors.values()])
        ours = path.with_name("ours.safetensors")
        ours.write_bytes(filled(skeleton, {"q": packed.tobytes(), "w": packed.tobytes()}))
        # MindSpore's metadata has two keys here, and the real writer's order of those is any
        assert safetensors.read_header(str(ours)).tensors.keys() == tensors.keys()
        assert ms.load_checkpoint(str(ours), format="safetensors")["q"].dtype == ms.qint4x2

    def test_golden_files(self, golden: Path, ms: ModuleType) -> None:
        for path in sorted((golden / "mindspore" / "src_safetensors").rglob("*.safetensors"))[:4]:
            header, data = safetensors.read_header(str(path)), path.read_bytes()
            for name, array in support.load_file(ms, path).items():
                tensor = header.tensors[name]
                assert (tensor.shape, stored_bytes(data, tensor)) == (array.shape, array.tobytes())
            skeleton = safetensors.skeleton([t.spec() for t in header.tensors.values()], header.metadata)
            content = {name: stored_bytes(data, tensor) for name, tensor in header.tensors.items()}
            assert filled(skeleton, content) == data
