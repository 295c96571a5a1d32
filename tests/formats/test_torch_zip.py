"""torch.save files without torch: what the real torch writes is read, what is written is the real torch's bytes."""

from __future__ import annotations

import argparse
import collections
import enum
import importlib
import io
import itertools
import os
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats import torch_support
from tests.formats.conformance import QUICK, ContainerConformance, content_of, stored_bytes
from tests.formats.torch_support import Inert, assert_read, element_bytes, read_elements
from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, PlanError
from transform_ckpt.formats import TORCH, TORCH_SUFFIX, torch_legacy, torch_zip
from transform_ckpt.formats.torch_values import BY_CODE, BY_NAME, Global, Instance, TensorRef, new_tensor
from transform_ckpt.formats.torch_zip_write import root_of, skeleton
from transform_ckpt.tensors import Extent, FileHeader, Skeleton, Tensor, TensorSpec

CODES = [code for code in BY_CODE if code in dtypes.BY_CODE]


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """The real torch, imported once in a session."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch")


class ModelType(enum.Enum):
    """As megatron.core.enums has it."""

    encoder_or_decoder = 1


@pytest.fixture(scope="session", autouse=True)
def _megatron() -> Any:
    """A module for the enum to be found in when the real pickle writes and reads it."""
    ModelType.__module__ = "megatron.core.enums"
    parts = [types.ModuleType(part) for part in ("megatron", "megatron.core", "megatron.core.enums")]
    parts[2].ModelType = ModelType  # type: ignore[attr-defined]
    kept = {part.__name__: sys.modules.get(part.__name__) for part in parts}
    sys.modules.update({part.__name__: part for part in parts})
    yield
    for part, module in kept.items():
        del sys.modules[part]
        if module is not None:
            sys.modules[part] = module


def read_header(path: str) -> FileHeader:
    """A flat state dict as the other containers are read, for the rules that all share."""
    file = torch_zip.read(path)
    tensors = {}
    for stored in file.tensors():
        ref, name = stored.ref, stored.keys[0] if stored.keys else ""
        if isinstance(name, str) and ref.is_contiguous and ref.dtype in dtypes.BY_CODE:
            extent = Extent(stored.extent.offset_bytes + ref.offset * ref.itemsize, ref.nbytes)
            name = name.encode(errors="replace").decode()
            tensors[name] = Tensor(name, ref.dtype, ref.shape, path, (extent,))
    return FileHeader(path, TORCH, file.nbytes, tensors, file.digest)


def flat_skeleton(specs: Sequence[TensorSpec]) -> Skeleton:
    return skeleton({spec.name: new_tensor(spec.name, spec.dtype, spec.shape) for spec in specs}).skeleton


class TestTorch(ContainerConformance):
    """The rules that all containers share."""

    module = SimpleNamespace(FORMAT=TORCH, SUFFIX=TORCH_SUFFIX, read_header=read_header, skeleton=flat_skeleton)
    codes = CODES

    def test_every_dtype(self, path: Path) -> None:
        specs = [TensorSpec(f"{code}.{len(shape)}", code, shape) for code in self.codes for shape in ((), (3,), (2, 3))]
        data = self.make(path, specs)
        header = read_header(str(path))
        for spec in specs:
            assert (header.tensors[spec.name].dtype, header.tensors[spec.name].shape) == (spec.dtype, spec.shape)
            assert stored_bytes(data, header.tensors[spec.name]) == content_of(spec)


# ------------------------------------------------------------------------------------------------------- real torch


def random_tensor(torch: ModuleType, name: str, shape: Sequence[int], seed: int = 0) -> Any:
    """Random bits; a storage of its own."""
    dtype = getattr(torch, name)
    rng = np.random.default_rng(seed)
    nbytes = int(np.prod(shape, dtype=int)) * BY_NAME[name].itemsize
    raw = rng.integers(0, 2 if name == "bool" else 256, nbytes, dtype=np.uint8)
    if not nbytes:
        return torch.empty(tuple(shape), dtype=dtype)
    made = torch.empty(tuple(shape), dtype=dtype)
    made.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return made


def save(torch: ModuleType, value: Any, path: Path, **options: Any) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, str(path), **options)
    return path.read_bytes()


def check(torch: ModuleType, value: Any, path: Path, **options: Any) -> torch_zip.TorchFile:
    """Saved by torch, read here, compared with what torch gives."""
    data = save(torch, value, path, **options)
    file = torch_zip.read(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_read(torch, torch.load(str(path), weights_only=False), file.tree, data, file.extents)
    return file


def rewritten(file: torch_zip.TorchFile, data: bytes) -> bytes:
    """The file again, laid out from what was read of it."""
    values = {key: data[e.offset_bytes : e.offset_bytes + e.nbytes] for key, e in file.extents.items()}
    return torch_support.filled(skeleton(file.tree, root=file.root), values)


def written(torch: ModuleType, value: Any, root: str) -> bytes:
    """The file of a tree that was built, not read."""
    inert = Inert(torch)
    return torch_support.filled(skeleton(inert(value), root=root), inert.values)


def assert_both_ways(torch: ModuleType, value: Any, path: Path) -> None:
    """Read as torch reads it; written from what was read, and from scratch, as torch writes it."""
    file = check(torch, value, path)
    data = path.read_bytes()
    assert file.root == root_of(path.name)
    assert rewritten(file, data) == data
    assert written(torch, value, file.root) == data


@pytest.mark.parametrize("name", BY_NAME)
def test_every_dtype_both_ways(torch: ModuleType, tmp_path: Path, name: str) -> None:
    tree = {str(shape): random_tensor(torch, name, shape) for shape in [(), (1,), (0,), (3, 0, 2), (2, 3), (1, 1, 5)]}
    tree["dtype"] = getattr(torch, name)
    assert_both_ways(torch, tree, tmp_path / "a.pt")


def megatron_args(torch: ModuleType) -> argparse.Namespace:
    return argparse.Namespace(
        num_layers=4, lr=1.5e-4, swiglu=True, load=None, save="/x/层", params_dtype=torch.bfloat16, data_path=["a", 1],
        model_type=ModelType.encoder_or_decoder, again=ModelType.encoder_or_decoder, betas=(0.9, 0.95),
        shape=torch.Size([2, 3]), seed=1 << 40, nested=argparse.Namespace(x=-1),
    )  # fmt: skip


def megatron_tree(torch: ModuleType) -> dict[str, Any]:
    """What Megatron's model_optim_rng.pt and distrib_optim.pt hold."""
    bucket = random_tensor(torch, "float32", (64,), 7)
    tied = random_tensor(torch, "bfloat16", (8, 4), 8)
    return {
        "args": megatron_args(torch),
        "checkpoint_version": 3.0,
        "iteration": 2,
        "model": collections.OrderedDict(
            [
                ("a.weight", random_tensor(torch, "bfloat16", (4, 6))),
                ("a._extra_state", None),
                ("tied", tied),
                ("t2", tied),
            ]
        ),
        "model1": collections.defaultdict(dict, {"x": {"weight": tied[2:4]}}),
        "extra": io.BytesIO(b"abc"),
        "views": [bucket, bucket[3:9], bucket.view(8, 8).t(), bucket[::2], bucket[5:6].expand(4), bucket[2]],
        "parameter": torch.nn.Parameter(random_tensor(torch, "float32", (3,), 9)),
        "grad": torch.zeros(2, requires_grad=True),
        0: {(torch.bfloat16, torch.float32): {"param": [bucket[:8], bucket[8:16]], "numel_unpadded": 7}},
        "rng": (3, tuple(range(700)), None),
        "bytes": [b"", b"%", b"\xff" * 300],
    }


def test_a_megatron_checkpoint_both_ways(torch: ModuleType, tmp_path: Path) -> None:
    tree = megatron_tree(torch)
    buffer = tree.pop("extra")
    assert_both_ways(torch, tree, tmp_path / "model.optim.rng.pt")
    path = tmp_path / "b.pt"
    data = save(torch, {"_extra_state": buffer}, path)
    file = torch_zip.read(str(path))
    assert file.tree["_extra_state"].data == b"abc"
    assert rewritten(file, data) == data == written(torch, {"_extra_state": buffer}, "b")


def test_numpy_values_of_random_states(torch: ModuleType, tmp_path: Path) -> None:
    state = np.random.default_rng(0).integers(0, 1 << 32, 624, dtype=np.uint32)
    tree = {
        "rng": ("MT19937", state, 5, 0, 0.0),
        "again": state.copy(),
        "f": np.asfortranarray(state[:6].reshape(2, 3)),
    }
    file = check(torch, {**tree, "scalar": np.float64(2.5), "step": np.int64(3)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    assert rewritten(file, data) == data
    assert {type(v).__name__ for v in file.tree.values()} == {"tuple", "NumpyArray", "NumpyScalar"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(torch: ModuleType, tmp_path: Path, protocol: int) -> None:
    tree = megatron_tree(torch)
    del tree["extra"]
    check(torch, tree, tmp_path / "a.pt", pickle_protocol=protocol)


@pytest.mark.parametrize("length", [0, 1, 2, 999, 1000, 1001, 2000, 2001])
def test_batches_of_a_thousand(torch: ModuleType, tmp_path: Path, length: int) -> None:
    pairs = [(f"k{n}", n) for n in range(length)]
    tree = [
        dict(pairs),
        collections.OrderedDict(pairs),
        list(range(length)),
        tuple(range(length)),
        collections.defaultdict(int, pairs),
    ]
    assert_both_ways(torch, tree, tmp_path / "a.pt")


@pytest.mark.parametrize("count", [8, 9, 22, 23, 53, 200, 252, 300, 1200])
def test_the_serialization_id_of_many_records(torch: ModuleType, tmp_path: Path, count: int) -> None:
    """Its hash walks a table that grows at 13, 29, 59, 127, 257, 541, 1109 names."""
    assert_both_ways(torch, [torch.full((1,), n, dtype=torch.int16) for n in range(count)], tmp_path / "a.pt")


def test_every_size_of_integers(torch: ModuleType, tmp_path: Path) -> None:
    edges = [1 << bits for bits in (7, 8, 15, 16, 31, 32, 39, 40, 63, 64, 2039, 2040, 2047, 2048)]
    assert_both_ways(torch, [s * edge + d for edge in edges for s in (-1, 1) for d in (-1, 0, 1)], tmp_path / "a.pt")


NUMBERS = st.integers(-(1 << 300), 1 << 300) | st.sampled_from(
    [0, 255, 256, 65535, 65536, 1 << 31, -(1 << 31), -128, -32768, -(1 << 63)]
)
LEAVES = (
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=5) | st.binary(max_size=4)
    | st.complex_numbers(allow_nan=False) | st.tuples(
        st.just("tensor"), st.sampled_from(sorted(BY_NAME)), st.lists(st.integers(0, 3), max_size=3)
    )
)  # fmt: skip
KEYS = st.text(max_size=4) | st.integers(-300, 70000) | st.tuples(st.integers(0, 9), st.text(max_size=2))
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(st.sampled_from(["lr", "x", "层"]), inner, max_size=3).map(lambda d: argparse.Namespace(**d))
    ),
    max_leaves=12,
)


def with_tensors(torch: ModuleType, value: Any) -> Any:
    """Tensors in place of their descriptions."""
    match value:
        case ("tensor", str(name), list(shape)):
            return random_tensor(torch, name, shape, 5)
        case argparse.Namespace():
            return argparse.Namespace(**with_tensors(torch, vars(value)))
        case dict():
            return type(value)((key, with_tensors(torch, item)) for key, item in value.items())
        case list() | tuple():
            return type(value)(with_tensors(torch, item) for item in value)
    return value


def test_drawn_trees_both_ways(torch: ModuleType, tmp_path: Path) -> None:
    @settings(QUICK, max_examples=300)
    @given(TREES)
    def drawn(tree: Any) -> None:
        assert_both_ways(torch, with_tensors(torch, tree), tmp_path / "a.pt")

    drawn()


def test_what_is_written_is_loaded_by_torch(torch: ModuleType, tmp_path: Path) -> None:
    tree = {f"{name}": random_tensor(torch, name, (2, 3)) for name in BY_NAME}
    path = tmp_path / "a.pt"
    path.write_bytes(written(torch, tree, "other"))
    for options in ({"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}):
        loaded = torch.load(str(path), **options)
        assert {key: element_bytes(torch, t) for key, t in loaded.items()} == {
            key: element_bytes(torch, t) for key, t in tree.items()
        }
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_an_unsealed_file_is_loaded_by_torch(torch: ModuleType, tmp_path: Path) -> None:
    made = skeleton({"a": new_tensor("k", "F32", (2,)), "s": {3, 1, 2}, "f": frozenset({"b", "a"})})
    data = bytearray(made.skeleton.nbytes)
    for offset, chunk in made.skeleton.chunks:
        data[offset : offset + len(chunk)] = chunk
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    loaded = torch.load(str(path), weights_only=False)
    assert loaded["a"].tolist() == [0, 0]
    assert (loaded["s"], loaded["f"]) == ({1, 2, 3}, frozenset({"a", "b"}))


def test_over_4_gib(torch: ModuleType, tmp_path: Path) -> None:
    """Sizes and offsets of 64 bits; sparse files, so that only headers are on the disk."""
    path = tmp_path / "big.pt"
    big = (1 << 32) + 5
    tree = [torch.zeros(3), torch.empty(big, dtype=torch.uint8), torch.ones(5), torch.zeros(0)]
    with torch.serialization.skip_data():
        torch.save(tree, str(path))
    shapes = [("F32", (3,)), ("U8", (big,)), ("F32", (5,)), ("F32", (0,))]
    made = skeleton([new_tensor(str(n), *shape) for n, shape in enumerate(shapes)], root="big")
    assert path.stat().st_size == made.skeleton.nbytes
    checksums = [(at, len(patch)) for at, patch in made.seal(dict.fromkeys("0123", 0))]
    with path.open("rb") as file:
        for offset, chunk in made.skeleton.chunks:
            file.seek(offset)
            real, ours = bytearray(file.read(len(chunk))), bytearray(chunk)
            for at, nbytes in checksums:
                if offset <= at < offset + len(chunk):
                    real[at - offset : at - offset + nbytes] = ours[at - offset : at - offset + nbytes] = bytes(nbytes)
            assert real == ours
    found = torch_zip.read(str(path))
    assert found.extents == {key: extent for key, (extent,) in made.skeleton.places.items()}


# --------------------------------------------------------------------------------------------------- legacy format


def test_the_format_before_zip(torch: ModuleType, tmp_path: Path) -> None:
    tree = megatron_tree(torch)
    del tree["extra"]
    file = check(torch, tree, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert file.root == ""


def test_the_format_before_zip_in_small_reads(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in range(20, 400, 7):
        monkeypatch.setattr(torch_legacy, "FIRST_NBYTES", size)
        check(torch, {"a": torch.arange(5), "b": b"x" * 300}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)


def test_the_format_before_zip_truncated(torch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    data = save(torch, {"a": torch.arange(5), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"a\.pt: "):
            torch_zip.read(str(path))
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match="1 bytes behind the last storage"):
        torch_zip.read(str(path))
    data = save(torch, {"b": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    wrong = data[:-16] + b"\3" + data[-15:]
    path.write_bytes(wrong)
    with pytest.raises(InputError, match="its data others"):
        torch_zip.read(str(path))


def test_a_big_endian_file_before_zip(torch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    data = save(torch, {}, path, _use_new_zipfile_serialization=False)
    at = data.index(b"little_endian")
    path.write_bytes(data[:at] + data[at:].replace(b"\x88", b"\x89", 1))
    with pytest.raises(InputError, match="not written on a little-endian machine"):
        torch_zip.read(str(path))


# ---------------------------------------------------------------------------------------------------- golden files


def test_golden_files(torch: ModuleType, golden: Path) -> None:
    files = sorted(
        path for kind in ("mcore_legacy", "dist_opt", "torch_dist", "hf") for path in (golden / kind).rglob("*.pt")
    )
    assert len(files) >= 100
    tensors = again = 0
    for path in files:
        data = path.read_bytes()
        file = torch_zip.read(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_read(torch, torch.load(str(path), weights_only=False), file.tree, data, file.extents)
        tensors += len(list(file.tensors()))
        if data[64 + data[64:].index(b"\x80") :][1] == 2:
            assert rewritten(file, data) == data, path
            again += 1
    assert (tensors, again) >= (1_400, 60)


# ------------------------------------------------------------------------------------------------- the tree's tensors


def test_the_way_to_every_tensor(torch: ModuleType, tmp_path: Path) -> None:
    tree = megatron_tree(torch)
    path = tmp_path / "a.pt"
    data = save(torch, tree, path)
    found = {stored.name: stored for stored in torch_zip.read(str(path)).tensors()}
    assert list(found)[:4] == ["model.a.weight", "model.tied", "model.t2", "model1.x.weight"]
    view = found["views[2]"]
    assert view.keys == ("views", 2)
    assert (view.ref.view.offset, view.ref.view.shape, view.ref.view.strides) == (0, (8, 8), (1, 8))
    assert not view.ref.is_contiguous
    assert read_elements(data, view.ref, view.extent) == element_bytes(torch, tree["views"][2])
    assert found["views[1]"].ref.is_contiguous
    assert found["views[4]"].ref.strides == (0,)
    assert found["views[1]"].ref.storage is view.ref.storage
    assert found["model.tied"].ref is found["model.t2"].ref
    assert found["model1.x.weight"].ref.storage is found["model.tied"].ref.storage
    bucket = found["[0][(torch.bfloat16, torch.float32)].param[1]"]
    assert bucket.keys == (0, (Global("torch", "bfloat16"), Global("torch", "float32")), "param", 1)
    assert bucket.ref.offset == 8


def test_a_lone_tensor(torch: ModuleType, tmp_path: Path) -> None:
    file = check(torch, torch.arange(3), tmp_path / "a.pt")
    (only,) = file.tensors()
    assert (only.keys, only.name, only.ref.shape) == ((), "", (3,))


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["conj", "neg", "sparse", "meta", "quantized", "module"])
def test_tensors_that_are_not_plain(torch: ModuleType, tmp_path: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        complex_one = torch.tensor([1j])
        value, message = {
            "conj": lambda: (complex_one.conj(), "pending conjugation"),
            "neg": lambda: (complex_one.conj().imag, "pending conjugation or negation"),
            "sparse": lambda: (torch.eye(2).to_sparse(), r"refuses to build torch\._utils\._rebuild_sparse_tensor"),
            "meta": lambda: (torch.empty(2, device="meta"), "refuses to build torch"),
            "quantized": lambda: (
                torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
                "refuses to build torch",
            ),
            "module": lambda: (torch.nn.Linear(2, 2), r"refuses to build torch\.nn\.modules\.linear\.Linear"),
        }[kind]()
    path = tmp_path / "x.pt"
    save(torch, {"a": value}, path)
    with pytest.raises(InputError, match=rf"x\.pt: .*{message}"):
        torch_zip.read(str(path))


def repacked(data: bytes, change: Any = None, **options: Any) -> bytes:
    """A torch file packed again by zipfile; `change` maps name and content to others, or to None to leave it out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", **options) as target:
        for info in source.infolist():
            entry = (info.filename, source.read(info))
            entry = change(*entry) if change else entry
            if entry is not None:
                target.writestr(*entry)
    return out.getvalue()


@pytest.fixture
def plain() -> bytes:
    return torch_support.filled(skeleton({"a": new_tensor("k", "F32", (2,))}), {"k": b"12345678"})


def refusal(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        torch_zip.read(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def swap(old: str, new: str | None = None, content: bytes | None = None) -> Any:
    return lambda name, data: (
        (name, data)
        if not name.endswith(old)
        else None
        if new is None and content is None
        else (new or name, content or data)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap("byteorder", content=b"big"), "byte order is b'big'"),
        (swap("byteorder", content=b"little" * 9), "has 54 bytes, more than 16"),
        (swap("data/0"), "no entry for storage 0"),
        (swap("data/0", content=b"1234567"), "gives 8 bytes for storage 0, its entry has 7"),
        (swap("data/0", content=b"123456789"), "its entry has 9"),
        (swap("data/0", "archive/data/../0"), "leaves the archive"),
        (swap("data/0", "/archive/data/0"), "leaves the archive"),
        (swap("data/0", "other/data/0"), "no data.pkl in one directory that holds all"),
        (swap("data.pkl"), "no data.pkl"),
        (swap("/version", "archive/constants.pkl", b"x"), "TorchScript"),
        (lambda name, data: (name, data + b"." if name.endswith("pkl") else data), "1 bytes behind its end"),
        (lambda name, data: (name, data.replace(b"X\1\0\0\0000", b"X\1\0\0\0/")), "names a storage '/'"),
    ],
)
def test_archives_that_lie(tmp_path: Path, plain: bytes, change: Any, message: str) -> None:
    assert message in refusal(tmp_path, repacked(plain, change))


def test_archives_packed_by_others(tmp_path: Path, plain: bytes) -> None:
    """Other alignment, root, order; no byteorder, no id: as old torch and other tools leave them."""
    path = tmp_path / "x.pt"
    for change in (
        None,
        swap("byteorder"),
        swap("serialization_id"),
        lambda n, d: (n.replace("archive", "any root"), d),
    ):
        data = repacked(plain, change)
        path.write_bytes(data)
        (only,) = torch_zip.read(str(path)).tensors()
        assert read_elements(data, only.ref, only.extent) == b"12345678"


def test_compressed_entries_comments_and_twins(tmp_path: Path, plain: bytes) -> None:
    assert "is compressed (method 8)" in refusal(tmp_path, repacked(plain, compression=zipfile.ZIP_DEFLATED))
    out = io.BytesIO(plain)
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = b"hello"
    assert "does not end as a torch file ends" in refusal(tmp_path, out.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = repacked(plain, swap("/version", "archive/data/0", b"87654321"))
    assert "holds 'archive/data/0' twice" in refusal(tmp_path, twice)


def test_overlapping_entries(tmp_path: Path, plain: bytes) -> None:
    """The directory says that one entry is as long as to reach into the next; its own header says nothing."""
    data = bytearray(plain)
    entry = data.rindex(b"archive/.storage_alignment") - 46
    assert data[entry:].startswith(b"PK\1\2")
    data[entry + 20 : entry + 28] = (200).to_bytes(4, "little") * 2
    assert "'archive/byteorder' overlaps 'archive/.storage_alignment'" in refusal(tmp_path, bytes(data))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (6, b"\1\0", "several disks or a comment"),
        (8, b"\1\0", "several disks or a comment"),
        (12, b"\1\0\0\0", "the two ends of its directory differ"),
        (16, b"\1\0\0\0", "the two ends of its directory differ"),
        (20, b"\1\0", "several disks or a comment"),
        (-20, b"PK\6\0", "does not end where it should"),
        (-12, b"\1", "the two ends of its directory differ"),
        (-20 - 56 + 24, b"\1", "the two ends of its directory differ"),
        (-20 - 56 + 32, b"\xff" * 8, "the two ends of its directory differ"),
        (-20 - 56 + 40, b"\xff" * 8, "the two ends of its directory differ"),
    ],
)
def test_ends_that_lie(tmp_path: Path, plain: bytes, at: int, value: bytes, message: str) -> None:
    data = bytearray(plain)
    end = len(data) - 22 + at
    data[end : end + len(value)] = value
    assert message in refusal(tmp_path, bytes(data))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, b"\1\x08", "is encrypted"),
        (10, b"\x08", "is compressed (method 8)"),
        (20, b"\7", "is compressed"),
        (34, b"\1", "no list of entries"),
        (42, b"\1", "there is no entry at byte"),
        (42, b"\xff\xff\xff\x7f", "behind the directory"),
        (42, b"\xff\xff\xff\xff", "has no zip64 sizes"),
        (46, b"b", "differs from the directory"),
    ],
)
def test_directory_entries_that_lie(tmp_path: Path, plain: bytes, at: int, value: bytes, message: str) -> None:
    data = bytearray(plain)
    entry = data.rindex(b"archive/data/0") - 46
    data[entry + at : entry + at + len(value)] = value
    assert message in refusal(tmp_path, bytes(data))


def test_the_pickles_checksum(tmp_path: Path, plain: bytes) -> None:
    at = plain.index(b"\x80\x02}") + 2
    assert "the checksum of 'archive/data.pkl' is wrong" in refusal(tmp_path, plain[:at] + b"]" + plain[at + 1 :])


def test_neither_zip_nor_pickle(tmp_path: Path) -> None:
    assert "begins neither as a zip archive" in refusal(tmp_path, b"\x80\x04N.")


def tuple_in_itself() -> Any:
    inner: list[Any] = []
    inner.append((inner,))
    return inner[0]


def nested_lists(depth: int) -> Any:
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": object()}, "holds a object, and values of that class are never written"),
        ({"a": Instance(Global("megatron.x", "Y"), ())}, r"holds a megatron\.x\.Y"),
        ({"a": np.float32(1)}, "holds a float32"),
        ([new_tensor("k", "F32", (1,)), new_tensor("k", "F32", (1,))], "same key"),
        ([replace(new_tensor("k", "F32", (1,)), state={"x": 1})], "Python attributes"),
        ([replace(new_tensor("k", "F32", (1,)), dtype="I32")], "storage of another type"),
        (tuple_in_itself(), "contains itself"),
        (nested_lists(300), "nests 100 deep"),
    ],
)
def test_trees_that_are_not_written(tree: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        skeleton(tree)


# ------------------------------------------------------------------------------------------------------------- cost


def test_five_thousand_tensors_in_small_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {f"model.layers.{n}.linear_qkv.weight": new_tensor(str(n), "F32", (64, 16)) for n in range(5_000)}
    made = skeleton(tree)
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.truncate(made.skeleton.nbytes)
        for offset, chunk in made.skeleton.chunks:
            file.seek(offset)
            file.write(chunk)
    reads: list[Extent] = []
    real = os.pread

    def pread(fd: int, nbytes: int, offset: int) -> bytes:
        reads.append(Extent(offset, nbytes))
        return real(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", pread)
    found = torch_zip.read(str(path))
    assert len(list(found.tensors())) == 5_000
    assert sum(r.nbytes for r in reads) < 2_000_000
    assert sum(r.nbytes > 200 for r in reads) == 2
    starts = sorted((e.offset_bytes, e.nbytes) for e in found.extents.values())
    headers = sorted((r.offset_bytes, r.nbytes) for r in reads)
    merged = sorted([*((a, n, "data") for a, n in starts), *((a, n, "read") for a, n in headers)])
    for (a, n, kind), (b, _, other) in itertools.pairwise(merged):
        assert kind == other or a + n <= b


def test_neither_torch_nor_numpy_is_imported(tmp_path: Path, plain: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(plain)
    code = (
        "import sys; from transform_ckpt.formats import torch_zip, torch_zip_write; "
        f"f = torch_zip.read({str(path)!r}); list(f.tensors()); torch_zip_write.skeleton(f.tree); "
        "print(sorted({'torch', 'numpy', 'pickle', 'mindspore'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


def test_new_tensors_are_as_torch_makes_them(torch: ModuleType) -> None:
    for shape in [(), (3,), (2, 3), (0,), (3, 0), (0, 4), (2, 0, 3), (1, 5, 1)]:
        made = new_tensor("k", "F32", shape)
        assert type(made) is TensorRef
        assert made.strides == torch.empty(shape).stride()
        assert made.is_contiguous
