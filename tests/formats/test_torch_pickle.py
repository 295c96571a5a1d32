"""Pickles that want something run: nothing is, nothing is written, and what was wanted is named."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from transform_ckpt.errors import InputError
from transform_ckpt.formats import torch_machine, torch_pickle, torch_tree
from transform_ckpt.formats.torch_pickle import loads
from transform_ckpt.formats.torch_storages import Storages
from transform_ckpt.formats.torch_values import (
    Buffer,
    Call,
    EnumValue,
    Global,
    Instance,
    Namespace,
    NumpyArray,
    Storage,
    TensorRef,
)

PROTOCOLS = (0, 1, 2, 3, 4, 5)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str = "0", cls: str = "torch FloatStorage", numel: int = 6) -> bytes:
    """The persistent id of a storage, protocol 2."""
    return (
        b"(" + text("storage") + name(*cls.split()) + text(key) + text("cpu") + b"J" + struct.pack("<i", numel) + b"tQ"
    )


def tensor(
    shape: bytes = b"K\2K\3\x86",
    strides: bytes = b"K\3K\1\x86",
    offset: bytes = b"K\0",
    function: str = "torch._utils _rebuild_tensor_v2",
    more: bytes = b"",
    of: bytes = b"",
) -> bytes:
    """A rebuilt tensor."""
    hooks = name("collections", "OrderedDict") + b")R"
    return (
        name(*function.split()) + b"(" + (of or storage()) + offset + shape + strides + b"\x89" + hooks + more + b"tR"
    )


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def read(data: bytes) -> Any:
    return loads(data, "x.pt", persistent=Storages("x.pt").load)[0]


def refused(data: bytes) -> str:
    """What a pickle is refused with."""
    with pytest.raises(InputError) as caught:
        read(data)
    assert str(caught.value).startswith("x.pt: ")
    return str(caught.value)


# ------------------------------------------------------------------------------------------- what is run: nothing


class Reduced:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "nest", [lambda x: x, lambda x: {"model": [x]}, lambda x: (1, (x,)), lambda x: {"a": {"b": x}}]
)
def test_reduce_of_a_command_writes_no_file(tmp_path: Path, protocol: int, nest: Callable[[Any], Any]) -> None:
    marker = tmp_path / "marker"
    data = pickle.dumps(nest(Reduced(os.system, f"touch {marker}")), protocol)
    assert "refuses to build posix.system" in refused(data) or "refuses to build nt.system" in refused(data)
    assert not marker.exists()
    pickle.loads(data)  # noqa: S301 - the pickle is one that works
    assert marker.exists()


DANGEROUS = (
    "os system,posix system,subprocess Popen,subprocess check_output,builtins eval,builtins exec,"
    "builtins __import__,builtins open,builtins compile,builtins globals,builtins setattr,builtins type,"
    "builtins print,builtins input,__builtin__ eval,__builtin__ execfile,io open,_io open,_io FileIO,"
    "importlib import_module,functools partial,functools reduce,operator attrgetter,operator itemgetter,"
    "operator methodcaller,types FunctionType,types CodeType,pickle loads,_pickle loads,marshal loads,"
    "shutil rmtree,socket socket,sys exit,ctypes CDLL,runpy run_path,code interact,pty spawn,webbrowser open,"
    "timeit timeit,bdb Bdb,logging.config listen,torch load,torch.serialization load,torch save,torch.hub load,"
    "torch.jit load,torch.utils.cpp_extension load,torch._dynamo.guards getattr,torch os.system,numpy load,"
    "numpy.core.multiarray fromfile,numpy.testing._private.utils runstring,numpy fromfile,numpy memmap,"
    "argparse ArgumentParser,argparse FileType,collections namedtuple,collections _sys.exit,"
    "collections OrderedDict.fromkeys,pathlib Path.unlink,pathlib Path.write_text,pathlib os.system,"
    "datetime sys.exit,_codecs decode,_codecs lookup,copyreg __newobj__,copy_reg add_extension,"
    "copyreg _reconstructor.__globals__,enum Enum,uuid UUID,multiprocessing.util spawnv_passfds,"
    "antigravity geohash,this s,__main__ evil,transform_ckpt.api convert,megatronx evil,xmegatron.core evil,"
    "torch.nn.modules.linear Linear,torch.ops load_library,torch.classes load_library"
).split(",")


@pytest.mark.parametrize("wanted", DANGEROUS)
def test_a_name_that_is_not_known_is_refused_by_name(wanted: str) -> None:
    module, attribute = wanted.split()
    real = {"__builtin__": "builtins", "_io": "io", "copy_reg": "copyreg"}.get(module, module)
    message = f"x.pt: refuses to build {real}.{attribute} ("
    before = set(sys.modules)
    called = text("x") + b"\x85"
    ways = {
        "reduce": name(module, attribute) + called + b"R",
        "stack": text(module) + text(attribute) + b"\x93" + called + b"R",
        "new": name(module, attribute) + called + b"\x81",
        "new with keywords": name(module, attribute) + called + b"}\x92",
        "object": b"(" + name(module, attribute) + text("x") + b"o",
        "instance": b"(" + text("x") + f"i{module}\n{attribute}\n".encode(),
        "a value": name(module, attribute),
        "state": name(module, attribute) + b"}b",
        "thrown away": name(module, attribute) + called + b"R0N",
        "a key": b"}" + name(module, attribute) + b"Ns",
    }
    for way, body in ways.items():
        assert message in refused(whole(body)), way
    assert set(sys.modules) == before


def test_no_module_is_imported() -> None:
    for module in ("this", "antigravity", "turtle"):
        assert module not in sys.modules
        refused(whole(name(module, "x")))
        assert module not in sys.modules


@pytest.mark.parametrize("code", [b"\x82\1", b"\x83\1\0", b"\x84\1\0\0\0"])
def test_extension_codes_are_refused(code: bytes) -> None:
    assert "an extension code" in refused(whole(code))


@pytest.mark.parametrize("code", [b"\x97", b"N\x98"])
def test_out_of_band_buffers_are_refused(code: bytes) -> None:
    assert "out-of-band" in refused(whole(code))


def test_text_persistent_ids_are_refused() -> None:
    assert "text persistent id" in refused(whole(b"Pstorage\n"))


CALLS = [
    (b"K\1)R", "calls a value of type int"),
    (text("os.system") + b")R", "calls a value of type str"),
    (name("torch", "float32") + b")R", "refuses to call torch.float32"),
    (name("torch", "FloatStorage") + b")\x81", "refuses to call torch.FloatStorage"),
    (name("builtins", "object") + b")\x81", "refuses to call builtins.object"),
    (name("builtins", "set") + b")\x81", "refuses to call builtins.set"),
    (name("builtins", "set") + b"]R", "calls a value of type Global with a list"),
    (name("builtins", "set") + b"NR", "with a NoneType"),
    (name("builtins", "dict") + b"]\x85R", "arguments that it never has"),
    (name("builtins", "complex") + text("1") + text("2") + b"\x86R", "arguments that it never has"),
    (
        name("builtins", "getattr") + name("builtins", "object") + text("__subclasses__") + b"\x86R",
        "refuses to build getattr",
    ),
    (name("builtins", "getattr") + name("torch", "Tensor") + text("x") + b"\x86R", "refuses to build getattr"),
    (name("builtins", "getattr") + text("x") + text("upper") + b"\x86R", "arguments that it never has"),
    (name("_codecs", "encode") + text("x") + text("rot13") + b"\x86R", "arguments that it never has"),
    (name("_codecs", "encode") + text("x") + b"\x85R", "arguments that it never has"),
    (
        name("copyreg", "_reconstructor") + name("torch", "Tensor") + name("builtins", "object") + b"N\x87R",
        "refuses to call",
    ),
    (
        name("copyreg", "_reconstructor") + name("argparse", "Namespace") + name("builtins", "float") + b"N\x87R",
        "arguments",
    ),
    (name("argparse", "Namespace") + b")}" + text("a") + b"K\1s\x92", "keyword arguments"),
    (
        name("megatron.training", "f") + text("x") + text("y") + b"\x86R",
        "refuses to call megatron.training.f: it is no enum",
    ),
    (name("megatron.core", "F") + b"]\x85R", "it is no enum"),
    (name("argparse", "Namespace") + b"}b", "sets the state of a Global"),
    (name("megatron.core", "F") + b"N}" + text("__call__") + b"K\1s\x86b", "sets the state of a Global"),
    (b"]}b", "sets the state of a list"),
    (b"}}b", "sets the state of a dict"),
    (b"K\1}b", "sets the state of a int"),
    (name("argparse", "Namespace") + b")\x81K\1b", "attributes that are none"),
    (name("argparse", "Namespace") + b")\x81}K\1K\1sb", "attributes that are none"),
    (name("argparse", "Namespace") + b")\x81N}\x86b", "attributes that are none"),
    (name("collections", "OrderedDict") + b")R}" + text("items") + b"K\1sb", "overwrites methods"),
    (name("collections", "OrderedDict") + b")R}" + text("__class__") + b"K\1sb", "overwrites methods"),
    (name("collections", "OrderedDict") + b")R(" + text("x") + b"\x90", "adds members to a OrderedDict"),
    (b"}K\1a", "appends to a dict"),
    (name("io", "BytesIO") + b")\x81K\1a", "appends to a Buffer"),
    (b"]K\1K\2s", "sets items of a list"),
    (b"}(K\1K\2K\3u", "sets items of a dict"),
    (b"}(]K\1u", "dictionary key or set member of type list"),
    (b"}(}K\1u", "of type dict"),
    (b"\x8f(]\x90", "of type list"),
    (b"(]\x91", "of type list"),
    (b"}(]\x85K\1u", "of type tuple"),
    (name("numpy", "dtype") + text("O8") + b"\x89\x88\x87R", "numpy array of Python objects"),
    (
        name("numpy", "dtype")
        + text("f4")
        + b"\x89\x88\x87R(K\3"
        + text(">")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
        "byte order",
    ),
    (name("numpy", "ndarray") + b")\x81", "refuses to call numpy.ndarray"),
    (storage(key="0") + storage(key="0", numel=7) + b"\x86", "names storage 0 as 24 bytes of F32 and as others"),
    (storage(cls="torch float32"), "storage of class torch.float32"),
    (storage(cls="torch QInt8Storage"), "refuses to build torch.QInt8Storage"),
    (storage(numel=-1), "persistent id that is no storage"),
    (b"K\1Q", "persistent id that is no storage"),
    (b"(" + text("module") + name("torch", "Tensor") + b"NNNtQ", "persistent id that is no storage"),
]


@pytest.mark.parametrize(("body", "message"), CALLS)
def test_calls_and_states_that_no_writer_makes(body: bytes, message: str) -> None:
    assert message in refused(whole(body))


@pytest.mark.parametrize("function", ["_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_nested_tensor"])
def test_tensors_that_are_not_plain_are_refused_by_name(function: str) -> None:
    message = refused(whole(tensor(function=f"torch._utils {function}")))
    assert f"refuses to build torch._utils.{function} (" in message
    assert "tensors are not read here" in message


# ------------------------------------------------------------------------------------------------------- tensors

TENSORS = [
    ({"shape": b"K\2K\4\x86"}, "last element is number 6 of a storage of 24 bytes"),
    ({"offset": b"K\1"}, "last element is number 6"),
    ({"strides": b"K\x04K\1\x86"}, "last element is number 6"),
    ({"strides": b"K\1\x85"}, "2 dimensions has 1 strides"),
    ({"shape": b"J\xff\xff\xff\xffK\3\x86"}, "no natural numbers"),
    ({"strides": b"J\xff\xff\xff\xffK\1\x86"}, "no natural numbers"),
    ({"offset": b"J\xff\xff\xff\xff"}, "no natural numbers"),
    ({"offset": b"\x88"}, "no natural numbers"),
    ({"shape": b"K\2\x88\x86"}, "no natural numbers"),
    ({"shape": b"K\2G?\xf0\0\0\0\0\0\0\x86"}, "no natural numbers"),
    ({"shape": b"K\2\x8a\x09\0\0\0\0\0\0\0\0\1\x86"}, "no natural numbers"),
    ({"shape": b"K\6", "strides": b"K\1"}, "arguments that it never has"),
    ({"shape": b"(" + b"K\1" * 65 + b"t", "strides": b"(" + b"K\1" * 65 + b"t"}, "65 dimensions"),
    ({"of": b"N"}, "arguments that it never has"),
    ({"of": storage(cls="torch.storage UntypedStorage", numel=24)}, "arguments that it never has"),
    ({"more": b"}" + text("conj") + b"\x88s"}, "pending conjugation or negation"),
    ({"more": b"}" + text("neg") + b"\x88s"}, "pending conjugation or negation"),
    ({"function": "torch._utils _rebuild_tensor_v3"}, "arguments that it never has"),
    ({"function": "torch._utils _rebuild_tensor_v3", "more": name("torch", "qint8")}, "whose elements are not known"),
    ({"function": "torch._utils _rebuild_tensor_v3", "more": name("torch", "float64")}, "last element is number 5"),
    ({"function": "torch._utils _rebuild_tensor_v3", "more": text("float64")}, "arguments that it never has"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_outside_their_storage(change: dict[str, Any], message: str) -> None:
    assert message in refused(whole(tensor(**change)))


def test_a_tensor() -> None:
    found = read(whole(tensor()))
    assert type(found) is TensorRef
    assert (found.dtype, found.shape, found.strides, found.offset) == ("F32", (2, 3), (3, 1), 0)
    assert (found.storage.key, found.storage.nbytes, found.storage.location) == ("0", 24, "cpu")
    assert not found.requires_grad
    npu = read(whole(tensor(function="torch_npu.utils.storage _rebuild_npu_tensor", more=b"K\2")))
    assert (npu.dtype, npu.shape) == ("F32", (2, 3))
    old = read(whole(name("torch._utils", "_rebuild_tensor") + b"(" + storage() + b"K\0K\2K\3\x86K\3K\1\x86tR"))
    assert (old.dtype, old.shape) == ("F32", (2, 3))
    no_flags = read(whole(tensor(more=b"}" + text("conj") + b"\x89s")))
    assert no_flags.shape == (2, 3)


def test_tensors_with_attributes() -> None:
    state = b"}" + text("partition_dim") + b"K\1s"
    hooks = name("collections", "OrderedDict") + b")R"
    found = read(
        whole(name("torch._utils", "_rebuild_parameter_with_state") + b"(" + tensor() + b"\x88" + hooks + state + b"tR")
    )
    assert (found.parameter, found.requires_grad, found.state) == (True, True, {"partition_dim": 1})
    args = b"(" + storage() + b"K\0K\2K\3\x86K\3K\1\x86\x89" + hooks + b"t"
    kind = name("torch._utils", "_rebuild_tensor_v2")
    body = name("torch._tensor", "_rebuild_from_type_v2") + b"(" + kind + name("torch", "Tensor") + args + state + b"tR"
    found = read(whole(body))
    assert (found.parameter, found.shape, found.state) == (False, (2, 3), {"partition_dim": 1})
    other = (
        name("torch._tensor", "_rebuild_from_type_v2") + b"(" + kind + name("megatron.core", "T") + args + state + b"tR"
    )
    assert "tensor of class megatron.core.T, which is not plain" in refused(whole(other))


# ------------------------------------------------------------------------------------------------- filling memory


def bounded(data: bytes, limit: int = 8 << 20) -> str:
    """Refused, with little memory."""
    tracemalloc.start()
    try:
        message = refused(data)
        assert tracemalloc.get_traced_memory()[1] < limit + 2 * len(data)
    finally:
        tracemalloc.stop()
    return message


BIG = "x" * 100_000
COPIED = {
    "bytes": text(BIG) + b"q\0(" + (name("_codecs", "encode") + b"h\0" + text("latin1") + b"\x86R") * 1_000 + b"t",
    "sets": b"](" + b"K\1" * 10_000 + b"eq\0(" + (name("builtins", "set") + b"h\0\x85R") * 1_000 + b"t",
    "lists": b"](" + b"K\1" * 10_000 + b"eq\0(" + (name("builtins", "list") + b"h\0\x85R") * 1_000 + b"t",
    "tuples": b"](" + b"K\1" * 10_000 + b"eq\0(" + (name("builtins", "tuple") + b"h\0\x85R") * 1_000 + b"t",
    "bytearrays": b"B" + struct.pack("<I", 100_000) + bytes(100_000)
    + b"q\0(" + (name("builtins", "bytearray") + b"h\0\x85R") * 1_000 + b"t",
    "namespaces": b"}(" + b"".join(text(str(n)) + b"N" for n in range(10_000)) + b"uq\0("
    + (name("argparse", "Namespace") + b")\x81h\0b") * 10_000 + b"t",
}  # fmt: skip


@pytest.mark.parametrize("what", COPIED)
def test_copies_over_and_over(what: str) -> None:
    assert "made to fill memory" in bounded(whole(COPIED[what]))


LYING = {
    b"X" + struct.pack("<I", 0xFFFFFFFF): "ends within a value",
    b"\x8d" + struct.pack("<Q", 1 << 62): "ends within a value",
    b"\x8e" + struct.pack("<Q", (1 << 64) - 1): "ends within a value",
    b"B" + struct.pack("<I", 0xFFFFFFFF): "ends within a value",
    b"\x96" + struct.pack("<Q", 1 << 60): "ends within a value",
    b"\x95" + struct.pack("<Q", 1 << 60): "ends within a value",
    b"\x8b" + struct.pack("<I", 1 << 20) + b"\1" * (1 << 20): "integer of 1,048,576 bytes",
    b"\x8b" + struct.pack("<i", -1): "integer of",
    b"I" + b"9" * 100_000 + b"\n": "more than 1,024 bytes",
    b"(" * 100_000: "more than 1,000 deep",
    b"}\x8a\x09" + b"\xff" * 8 + b"\0Ns": "a very large one",
    b"}" + b"(" + b"K\1" * 65 + b"tNs": "of type tuple",
}


@pytest.mark.parametrize(("body", "message"), LYING.items(), ids=list(LYING.values()))
def test_lengths_that_lie(body: bytes, message: str) -> None:
    assert message in bounded(whole(body))


def test_a_memo_of_huge_numbers_costs_nothing() -> None:
    tracemalloc.start()
    assert read(whole(b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x86")) == (None, None)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_key_that_takes_for_ever_to_hash() -> None:
    """A tuple of twice a tuple of twice ...: 2**40 hashes, were it one."""
    body = b"K\1\x85q\0" + b"".join(b"0h%ch%c\x86q%c" % (n, n, n + 1) for n in range(40))
    assert "of type tuple" in refused(whole(b"}" + body + b"Ns"))


def test_lists_that_never_end_are_read_and_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"]q\0K\1a" + b"".join(b"0](h%ch%ceq%c" % (n, n, n + 1) for n in range(40))
    tree = read(whole(body))
    monkeypatch.setattr(torch_tree, "MAX_NODES", 10_000)
    with pytest.raises(InputError, match=r"x\.pt: holds more than 10,000 values"):
        list(torch_tree.tensors_of(tree, {}, "x.pt"))


def test_values_in_themselves_and_too_deep_are_not_walked() -> None:
    for body in (b"]q\0h\0a", b"}q\0" + text("a") + b"h\0s", b"](" * 500 + b"e" * 500, b"]" * 50_000 + b"a" * 49_999):
        tree = read(whole(body))
        with pytest.raises(InputError, match="contains itself or nests 100 deep"):
            list(torch_tree.tensors_of(tree, {}, "x.pt"))


def test_too_many_opcodes_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 100)
    assert read(whole(b"N0" * 40 + b"N")) is None
    assert "more than 100 opcodes" in refused(whole(b"N0" * 60 + b"N"))
    monkeypatch.setattr(torch_pickle, "MAX_NBYTES", 10)
    assert "more than 10" in refused(whole(b"N0" * 60 + b"N"))


# ---------------------------------------------------------------------------------------------- damage, and no damage

DAMAGED = [
    b"",
    b"\x80",
    b"\x80\x06N.",
    b"\x80\xff",
    b"N",
    b"NN.",
    b".",
    b"0.",
    b"R.",
    b"a.",
    b"b.",
    b"s.",
    b"u.",
    b"e.",
    b"t.",
    b"(.",
    b"((N.",
    b"(N0.",
    b"\x85.",
    b"h\0.",
    b"j\0\0\0\0.",
    b"q\0.",
    b"g1\n.",
    b"\xff.",
    b"\0.",
    b"cos\n",
    b"c\n\n.",
    b"c\xff\n\xff\n.",
    b"G\0.",
    b"Fx\n.",
    b"Ix\n.",
    b"I\n.",
    b"1.",
    b"2.",
    b"X\1\0\0\0\xff.",
    b"\x93.",
    b"NN\x93.",
    b"(o.",
    b"(No.",
    b"\x90.",
    b"\x81.",
]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_pickles(data: bytes) -> None:
    refused(data)


def test_every_truncation_and_flip() -> None:
    data = whole(
        b"}(" + text("a") + tensor() + text("b") + name("argparse", "Namespace") + b")\x81}" + text("c") + b"K\1sbu"
    )
    for size in range(len(data)):
        with pytest.raises(torch_machine.TruncatedError):
            read(data[:size])
    outcomes = set()
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            try:
                read(bytes(flipped))
            except InputError as error:
                assert str(error).startswith("x.pt: ")  # noqa: PT017 - either is right
                outcomes.add("refused")
            else:
                outcomes.add("read")
    assert outcomes == {"refused", "read"}


class Color(__import__("enum").Enum):  # type: ignore[misc]
    """An enum as a framework has it."""

    RED = 1
    NAMED = "blue"


Color.__module__ = "megatron.core.enums"

VALUES: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (-1, -1),
    (1 << 40, 1 << 40),
    (-(1 << 200), -(1 << 200)),
    (1.5, 1.5),
    ("é\n\0", "é\n\0"),
    ("\ud800", "\ud800"),
    (b"", b""),
    (b"\0\xff" * 200, b"\0\xff" * 200),
    (bytearray(b"ab"), bytearray(b"ab")),
    (bytearray(), bytearray()),
    (1 + 2j, 1 + 2j),
    (range(1, 9, 2), range(1, 9, 2)),
    (slice(1, None, 2), slice(1, None, 2)),
    ({1, "a", (2, 3)}, {1, "a", (2, 3)}),
    (frozenset({1}), frozenset({1})),
    (list(range(3000)), list(range(3000))),
    ({n: n for n in range(2001)}, {n: n for n in range(2001)}),
    ((), ()),
    ((1,), (1,)),
    ((1, 2, 3, 4), (1, 2, 3, 4)),
    (collections.OrderedDict(a=1), collections.OrderedDict(a=1)),
    (PurePosixPath("/a/b"), Call(Global("pathlib", "PurePosixPath"), ("/", "a", "b"))),
    (int, Global("builtins", "int")),
    (Color.RED, EnumValue("megatron.core.enums", "Color", 1)),
    ({Color.NAMED: Color.NAMED}, {(e := EnumValue("megatron.core.enums", "Color", "blue")): e}),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_of_every_protocol(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    for part in ("megatron", "megatron.core", "megatron.core.enums"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(sys.modules["megatron.core.enums"], "Color", Color, raising=False)
    for value, expected in VALUES:
        if protocol == 0 and value in ("é\n\0", "\ud800"):
            continue
        found = read(pickle.dumps(value, protocol))
        assert type(found) is type(expected)
        assert found == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects(protocol: int) -> None:
    import argparse

    args = argparse.Namespace(a=1, nested=argparse.Namespace(b=[2]))
    found = read(pickle.dumps({"args": args, "again": args}, protocol))
    assert type(found["args"]) is Namespace
    assert found["args"] is found["again"]
    assert found["args"].fields["nested"].fields == {"b": [2]}
    buffer = read(pickle.dumps(io.BytesIO(b"abc"), protocol))
    assert type(buffer) is Buffer
    assert buffer.data == b"abc"
    array = np.arange(6, dtype="u4").reshape(2, 3)
    for value in (array, np.asfortranarray(array)):
        got = read(pickle.dumps(value, protocol))
        assert type(got) is NumpyArray
        again = np.frombuffer(got.data, got.dtype.args[0]).reshape(got.shape, order="F" if got.fortran else "C")
        assert (again == value).all()
    scalar = read(pickle.dumps(np.float32(2.5), protocol))
    assert np.frombuffer(scalar.data, scalar.dtype.args[0])[0] == 2.5
    default = collections.defaultdict(dict, {"a": 1})
    got = read(pickle.dumps(default, protocol))
    assert got == {"a": 1}
    assert got.factory == Global("builtins", "dict")
    with pytest.raises(KeyError):
        got["b"]
    metadata = collections.OrderedDict(a=1)
    metadata._metadata = {"version": 2}  # type: ignore[attr-defined]
    assert read(pickle.dumps(metadata, protocol))._metadata == {"version": 2}
    with pytest.raises(InputError, match=r"refuses to build functools\.partial"):
        read(pickle.dumps(__import__("functools").partial(print), protocol))


def test_objects_of_a_framework_keep_their_state() -> None:
    body = name("megatron.core.rerun", "Machine") + b")\x81}" + text("x") + b"K\1sb"
    found = read(whole(body))
    assert type(found) is Instance
    assert (found.kind, found.args, found.state) == (Global("megatron.core.rerun", "Machine"), (), {"x": 1})
    member = read(whole(name("__builtin__", "getattr") + name("megatron.core.enums", "A") + text("RED") + b"\x86R"))
    assert member == Global("megatron.core.enums", "A.RED")
    inside = read(whole(name("megatron.core.rerun", "Machine") + b")\x81}" + text("x") + tensor() + b"sb"))
    (only,) = torch_tree.tensors_of(inside, {"0": None}, "x.pt")  # type: ignore[dict-item]
    assert only.keys == ("state", "x")


def test_one_object_stays_one() -> None:
    shared = [1]
    found = read(pickle.dumps([shared, shared, (shared,)]))
    assert found[0] is found[1] is found[2][0]


def test_storages_are_one_by_key() -> None:
    found = read(whole(tensor() + tensor() + b"\x86"))
    assert found[0].storage is found[1].storage
    assert type(found[0].storage) is Storage
