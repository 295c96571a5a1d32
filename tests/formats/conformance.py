"""What every single-file container must do, as one class: a format's test is a subclass with a few attributes.

A container module has FORMAT, SUFFIX, read_header(path) and skeleton(specs, ...).  See transform_ckpt/formats.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, TransformError
from transform_ckpt.formats import container_of, read_header
from transform_ckpt.tensors import FileHeader, Skeleton, Tensor, TensorSpec
from transform_ckpt.views import Shape

QUICK = settings(max_examples=60, derandomize=True, deadline=None, database=None)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
shapes: st.SearchStrategy[Shape] = st.lists(st.integers(0, 5), max_size=4).map(tuple)

MAX_NDIM = 64


def content_of(spec: TensorSpec, seed: int = 0) -> bytes:
    """Bytes that differ between tensors."""
    return random.Random(f"{spec.name} {seed}").randbytes(spec.nbytes)  # noqa: S311


def filled(skeleton: Skeleton, values: Mapping[str, bytes]) -> bytes:
    """The file of a skeleton with its tensors' bytes; everything must be written exactly once."""
    data, marks = bytearray(skeleton.nbytes), bytearray(skeleton.nbytes)

    def put(at: int, part: bytes) -> None:
        assert not any(marks[at : at + len(part)])
        marks[at : at + len(part)] = b"\1" * len(part)
        data[at : at + len(part)] = part

    for offset, chunk in skeleton.chunks:
        put(offset, chunk)
    for name, extents in skeleton.places.items():
        done = 0
        for extent in extents:
            put(extent.offset_bytes, values[name][done : done + extent.nbytes])
            done += extent.nbytes
        assert done == len(values[name])
    assert all(marks)
    return bytes(data)


def stored_bytes(data: bytes, tensor: Tensor) -> bytes:
    """What a file holds of a tensor, by its header."""
    if tensor.inline is not None:
        return tensor.inline
    return b"".join(data[e.offset_bytes : e.offset_bytes + e.nbytes] for e in tensor.extents)


def assert_sane(header: FileHeader) -> None:
    """Whatever a file says, what comes out of its header can be used without looking again."""
    for name, tensor in header.tensors.items():
        assert name == tensor.name
        name.encode()
        if tensor.inline is None:
            assert all(0 <= e.offset_bytes <= e.offset_bytes + e.nbytes <= header.nbytes for e in tensor.extents)
        if tensor.dtype == dtypes.STRING:
            assert tensor.nbytes % 4 == 0
            continue
        assert tensor.nbytes == prod(tensor.shape) * dtypes.itemsize(tensor.dtype)
        assert len(tensor.shape) <= MAX_NDIM
        assert all(0 <= n < 1 << 63 for n in tensor.shape)


class ContainerConformance:
    """The tests; `module` is the format."""

    module: ClassVar[Any]
    codes: ClassVar[Sequence[str]]
    """Dtypes that the format can hold."""

    # ------------------------------------------------------------------------------------------------- helpers

    def skeleton(self, specs: Sequence[TensorSpec]) -> Skeleton:
        """The format's skeleton with its usual options."""
        found: Skeleton = self.module.skeleton(specs)
        return found

    def make(self, path: Path, specs: Sequence[TensorSpec]) -> bytes:
        """A whole file."""
        data = filled(self.skeleton(specs), {spec.name: content_of(spec) for spec in specs})
        path.write_bytes(data)
        return data

    def read(self, path: Path, data: bytes) -> FileHeader:
        """The header of these bytes."""
        path.write_bytes(data)
        found: FileHeader = self.module.read_header(str(path))
        return found

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """A file of this format, to be."""
        return tmp_path / f"x{self.module.SUFFIX}"

    def small_specs(self) -> list[TensorSpec]:
        """A small file: a matrix, an empty tensor, a scalar, odd names."""
        return [
            TensorSpec("层.weight", "F32", (2, 3)),
            TensorSpec("e", "F32", (3, 0)),
            TensorSpec("step", "I64", ()),
            TensorSpec('a"\\/b', "BOOL", (5,)),
        ]

    def boundaries(self, skeleton: Skeleton) -> Iterable[int]:
        """Sizes at which a truncated file is a whole file of fewer tensors."""
        return ()

    def header_bytes(self, skeleton: Skeleton) -> list[int]:
        """Offsets of every byte that is no tensor byte."""
        return [offset + i for offset, chunk in skeleton.chunks for i in range(len(chunk))]

    def assert_error_or_sane(self, path: Path, data: bytes) -> bool:
        """A damaged file is refused with an error that names it, or gives values that hold; True when refused."""
        try:
            assert_sane(self.read(path, data))
        except TransformError as error:
            found = error
        else:
            return False
        assert found.exit_code == InputError.exit_code
        assert str(found).startswith(f"{path}: ")
        return True

    # ----------------------------------------------------------------------------------------------- the tests

    def test_what_is_written_is_read(self, path: Path) -> None:
        wishes = st.dictionaries(names, st.tuples(st.sampled_from(self.codes), shapes), min_size=1, max_size=5)

        @QUICK
        @given(wishes)
        def check(drawn: dict[str, tuple[str, Shape]]) -> None:
            wished = {name: TensorSpec(name, code, shape) for name, (code, shape) in drawn.items()}
            skeleton = self.skeleton(list(wished.values()))
            data = self.make(path, list(wished.values()))
            header = self.module.read_header(str(path))
            assert {name: tensor.spec() for name, tensor in header.tensors.items()} == wished
            assert {name: tensor.extents for name, tensor in header.tensors.items()} == skeleton.places
            for name, spec in wished.items():
                assert stored_bytes(data, header.tensors[name]) == content_of(spec)
            assert (header.path, header.format, header.nbytes) == (str(path), self.module.FORMAT, len(data))
            assert header.digest == self.module.read_header(str(path)).digest
            assert_sane(header)

        check()

    def test_every_dtype(self, path: Path) -> None:
        specs = [TensorSpec(f"{code}.{len(shape)}", code, shape) for code in self.codes for shape in ((), (3,), (2, 3))]
        data = self.make(path, specs)
        header = read_header(str(path))
        for spec in specs:
            tensor = header.tensors[spec.name]
            assert (tensor.dtype, tensor.shape) == (spec.dtype, spec.shape)
            assert stored_bytes(data, tensor) == content_of(spec)
        assert container_of(str(path)) == self.module.FORMAT

    @pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0), (1, 0, 3)])
    def test_empty_tensors(self, path: Path, shape: Shape) -> None:
        specs = [TensorSpec("a", "F32", shape), TensorSpec("b", "F32", (2,)), TensorSpec("c", "BF16", shape)]
        data = self.make(path, specs)
        tensors = self.module.read_header(str(path)).tensors
        assert [tensors[s.name].shape for s in specs] == [shape, (2,), shape]
        assert stored_bytes(data, tensors["b"]) == content_of(specs[1])

    def test_a_digest_is_of_everything_but_tensor_bytes(self, path: Path) -> None:
        specs = self.small_specs()
        data = bytearray(self.make(path, specs))
        skeleton = self.skeleton(specs)
        first = self.read(path, bytes(data)).digest
        at = skeleton.places[specs[0].name][0].offset_bytes
        data[at] ^= 1
        assert self.read(path, bytes(data)).digest == first
        other = [TensorSpec("other", "F32", (2, 3)), *specs[1:]]
        assert self.read(path, self.make(path, other)).digest != first

    def test_a_layout_depends_on_nothing_but_the_wish(self) -> None:
        specs = self.small_specs()
        assert self.skeleton(specs) == self.skeleton(specs)

    def test_truncated_at_every_byte(self, path: Path) -> None:
        specs = self.small_specs()
        data = self.make(path, specs)
        whole = self.module.read_header(str(path)).tensors
        boundaries = set(self.boundaries(self.skeleton(specs)))
        for size in range(len(data)):
            if size in boundaries:
                tensors = self.read(path, data[:size]).tensors
                assert len(tensors) < len(whole)
                assert all(whole[name] == tensor for name, tensor in tensors.items())
            else:
                with pytest.raises(InputError, match=r"x\..*"):
                    self.read(path, data[:size])

    def test_bytes_behind_the_end(self, path: Path) -> None:
        data = self.make(path, self.small_specs())
        for more in (b"\0", b"\0" * 17, b"more", b"\n"):
            with pytest.raises(InputError):
                self.read(path, data + more)

    def test_every_bit_of_the_header_flipped(self, path: Path) -> None:
        specs = self.small_specs()
        data = self.make(path, specs)
        refused = 0
        for at in self.header_bytes(self.skeleton(specs)):
            for bit in range(8):
                damaged = bytearray(data)
                damaged[at] ^= 1 << bit
                refused += self.assert_error_or_sane(path, bytes(damaged))
        assert refused > 0

    def test_every_byte_of_the_header_set_to_extremes(self, path: Path) -> None:
        specs = self.small_specs()
        data = self.make(path, specs)
        for at in self.header_bytes(self.skeleton(specs)):
            for value in (b"\x00", b"\xff", b"\x7f", b"\x80" * 9, b"\xff" * 9 + b"\x01", b""):
                self.assert_error_or_sane(path, data[:at] + value + data[at + 1 :])

    def test_random_bytes(self, path: Path) -> None:
        rng = random.Random(0)  # noqa: S311
        for size in (*range(1, 40), *range(40, 400, 7)):
            self.assert_error_or_sane(path, rng.randbytes(size))
            self.assert_error_or_sane(path, bytes(size))

    def test_random_splices(self, path: Path) -> None:
        rng = random.Random(1)  # noqa: S311
        data = self.make(path, self.small_specs())
        for _ in range(500):
            a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
            c = rng.randrange(len(data))
            self.assert_error_or_sane(
                path, rng.choice([data[:a] + data[b:], data[:b] + data[a:], data[:c] + data[a:b]])
            )

    def test_an_empty_file(self, path: Path) -> None:
        with pytest.raises(InputError):
            self.read(path, b"")

    def test_a_missing_file_and_a_directory(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="not found"):
            self.module.read_header(str(path))
        with pytest.raises(InputError, match="directory"):
            self.module.read_header(str(tmp_path))

    def assert_little_memory(self, path: Path, data: bytes, limit: int = 1 << 20) -> None:
        """Reading a small file that lies about lengths takes no memory, whatever it says."""
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with pytest.raises(InputError):
                self.module.read_header(str(path))
            assert tracemalloc.get_traced_memory()[1] < limit
        finally:
            tracemalloc.stop()
