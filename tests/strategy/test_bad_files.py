"""Files that are no strategy, or damaged ones: always an InputError that names the file, never a guess."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategy.layout import Layout, Stage, Strategy
from strategy.merge import merge_directory
from strategy.mindspore_file import read_stage_file, read_strategy, write_strategy
from strategy.mindspore_proto import SCHEMA
from strategy.wire import encode
from transform_ckpt.errors import InputError

check = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSOR = struct.pack("<ffff", 1, 2, 3, 4)
ITEM: dict[str, Any] = {
    "dev_matrix": [2, 2],
    "field": 0,
    "opt_weight_shard_size": 0,
    "opt_weight_shard_step": 0,
    "tensor_map": [0, -1],
}


def text_of(item: Any, **top: Any) -> bytes:
    return json.dumps({"current_stage": 1, "parallel_layout_item": {"w.x": item}} | top).encode()


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ITEM.items() if name != key}


def item_of(name: str = "w.x", **changes: Any) -> bytes:
    """A layout item whose layout is changed; None leaves a field out."""
    content: dict[str, Any] = {"dev_matrix": [2, 2], "tensor_map": [0, -1], "field": 0}
    content |= {"opt_weight_shard_step": 0, "opt_weight_shard_size": 0} | changes
    stored = {
        key: [{"dim": value}] if isinstance(value, list) else value
        for key, value in content.items()
        if value is not None
    }
    layouts = encode(SCHEMA, "ParallelLayouts", stored)
    return encode(SCHEMA, "ParallelLayoutItem", {"param_name": name, "parallel_layouts": layouts})


def file_of(*items: bytes) -> bytes:
    return encode(SCHEMA, "ParallelStrategyMap", {"current_stage": 1, "parallel_layout_item": items})


def proto(**changes: Any) -> bytes:
    return file_of(item_of(**changes))


PROTOBUF = {
    "empty": (b"", "is empty"),
    "damaged": (proto()[:-3], "not a strategy file, or a damaged one"),
    "no layouts": (b"\x08\x01", "no parameter layouts"),
    "no current_stage": (proto()[2:], "current_stage is missing"),
    "no field": (proto(field=None), "parameter 'w.x': ParallelLayouts.field is missing"),
    "unknown field": (proto() + b"\x22\x02hi", "ParallelStrategyMap has no field 4"),
    "field twice": (proto() + b"\x08\x01", "current_stage is there twice"),
    "fixed64": (proto() + b"\x21" + bytes(8), "wire type 1 of field 4"),
    "not an integer": (b"\x0a\x02hi" + proto()[2:], "current_stage is 2 bytes; expected an integer"),
    "not a message": (proto() + b"\x18\x07", "parallel_layout_item is the integer 7; expected ParallelLayoutItem"),
    "too long a number": (b"\x08" + b"\xff" * 10 + b"\x01", "longer than 64 bits"),
    "out of range": (b"\x08\xff\xff\xff\xff\x1f" + proto()[2:], "which is no uint32"),
    "zeros after it": (proto() + bytes(8), "damaged"),
    "name not UTF-8": (proto().replace(b"w.x", b"w\xff\xfe"), "damaged"),
    "tensor checkpoint": (b"\x0a\x24\x0a\x03w.x\x12\x1d\x08\x04\x12\x07Float32\x1a\x10" + TENSOR, "tensor checkpoint"),
    "safetensors": (struct.pack("<Q", 40) + b'{"w.x":{"dtype":"F32"}}', "safetensors checkpoint"),
    "torch zip": (b"PK\x03\x04" + bytes(30), "zip archive"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "no dev_matrix": (proto(dev_matrix=None), "parameter 'w.x': has 0 dev_matrix"),
    "no tensor_map": (proto(tensor_map=None), "parameter 'w.x': has 1 dev_matrix and 0 tensor_map"),
    "axis too high": (proto(tensor_map=[2, 0]), "parameter 'w.x': tensor_map names axis 2"),
    "axis -2": (proto(tensor_map=[-2, 0]), "parameter 'w.x': tensor_map names axis -2"),
    "axis 0 devices": (proto(dev_matrix=[2, 0]), "parameter 'w.x': .* no devices"),
    "huge mesh": (proto(dev_matrix=[2**31, 2]), "parameter 'w.x': .* devices"),
    "uneven": (proto(param_split_shape=[3, 1]), "parameter 'w.x': is split unevenly"),
    "field 2": (proto(field=2), "parameter 'w.x': is split unevenly"),
    "listed twice": (file_of(item_of(), item_of(tensor_map=[-1, 0])), "parameter 'w.x': is listed twice"),
}
JSON = {
    "cut off": (text_of(ITEM)[:-5], "does not parse"),
    "not UTF-8": (b'{"a": "\xff"}', "does not parse"),
    "deep": (b"[" * 100_000, "does not parse"),
    "a list": (b"[1, 2]", "top level is"),
    "another JSON": (b'{"weight_map": {}}', "no key parallel_layout_item"),
    "unknown key": (text_of(ITEM, version=3), "unknown key version"),
    "no layouts": (b'{"parallel_layout_item": {}}', "no parameter layouts"),
    "key twice": (b'{"parallel_layout_item": {"w.x": 1, "w.x": 2}}', "'w.x' is there twice"),
    "items a list": (text_of(ITEM, parallel_strategy_item=[]), "parallel_strategy_item is"),
    "no stage": (text_of(ITEM, parallel_strategy_item={"op": {}}), "'op' has no key stage"),
    "NaN": (text_of(ITEM | {"field": float("nan")}), "NaN"),
    "item a number": (text_of(7), "parameter 'w.x': the item is 7"),
    "bool": (text_of(ITEM | {"opt_weight_shard_step": True}), "opt_weight_shard_step is true; expected an integer"),
    "float": (text_of(ITEM | {"dev_matrix": [2.0, 2]}), r"dev_matrix\[0\] is 2.0"),
    "map a number": (text_of(ITEM | {"tensor_map": 0}), "tensor_map is 0; expected a list"),
    "map too deep": (text_of(ITEM | {"tensor_map": [[[0]], -1]}), r"tensor_map\[0\]\[0\] is \[0\]"),
    "unknown item key": (text_of(ITEM | {"x": 0}), "parameter 'w.x': the item has the unknown key x"),
    "axis twice": (text_of(ITEM | {"tensor_map": [0, 0]}), "parameter 'w.x': .* axis twice"),
    "opt too wide": (
        text_of(ITEM | {"opt_weight_shard_size": 4, "opt_weight_shard_step": 2}),
        "parameter 'w.x': optimizer shard in 4 parts over 2 replicas",
    ),
    **{f"no {key}": (text_of(without(key)), f"parameter 'w.x': the item has no key {key}") for key in ITEM},
    "uneven": (text_of(ITEM | {"param_split_shape": [1, 3]}), "split unevenly"),
}


@pytest.mark.parametrize("case", [*PROTOBUF.values(), *JSON.values()], ids=[*PROTOBUF, *(f"json {k}" for k in JSON)])
def test_bad_content(case: tuple[bytes, str], tmp_path: Path) -> None:
    path = tmp_path / "ckpt_strategy_rank_0.ckpt"
    path.write_bytes(case[0])
    for read in (read_strategy, read_stage_file, lambda _: read_strategy(str(tmp_path))):
        with pytest.raises(InputError, match=case[1]) as caught:
            read(str(path))
        assert str(path) in str(caught.value)


def test_the_cases_above_are_bad_for_their_own_reason(tmp_path: Path) -> None:
    path = tmp_path / "good"
    for data in (proto(), text_of(ITEM)):
        path.write_bytes(data)
        assert read_strategy(str(path)).stages == (Stage(4, {"w.x": Layout((2, 2), ((0,), ()))}),)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory"):
        read_strategy(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"no strategy files \(\*.ckpt or \*.json\)"):
        read_strategy(str(tmp_path))
    with pytest.raises(InputError, match="no such directory"):
        merge_directory(str(tmp_path / "nothing"), str(tmp_path / "merged.ckpt"))
    with pytest.raises(InputError, match="is a directory"):
        read_stage_file(str(tmp_path))


def merged(names: dict[str, Layout], tmp_path: Path) -> str:
    """A file of any names."""
    items = (item_of(name, dev_matrix=list(layout.dev_matrix)) for name, layout in names.items())
    (tmp_path / "merged.ckpt").write_bytes(file_of(*items))
    return str(tmp_path / "merged.ckpt")


TWO, FOUR = Layout((2,), ()), Layout((2, 2), ())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"0-a": TWO, "2-b": TWO, "5-c": TWO}, "stage 1, 3-4 is missing, only stage 0, 2, 5 is here"),
        ({"1-a": TWO}, "stage 0 is missing"),
        ({"999999999-a": TWO}, "stage 0-999999998 is missing"),
        ({"0-a": FOUR, "0-b": FOUR, "0-c": TWO}, r"'c' is laid out over 2 devices .*'a' over 4; 1 of 3"),
        ({"a": FOUR, "b": TWO}, "'b' is laid out over 2 devices"),
        ({"0-0-a": TWO, "0-1-b": TWO, "1-c": TWO}, "stage 0: .*merged twice"),
        ({"0-a": TWO, "00-a": FOUR}, "'a' of stage 0 is listed twice"),
    ],
)
def test_bad_stages(names: dict[str, Layout], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_strategy(merged(names, tmp_path))


def test_items_of_two_stages_in_a_per_rank_file(tmp_path: Path) -> None:
    items = {"x": {"stage": 0}, "y": {"stage": 1}}
    (tmp_path / "a.json").write_bytes(text_of(ITEM, parallel_strategy_item=items))
    with pytest.raises(InputError, match="stages 0-1, but its parameter names have no stage prefix"):
        read_strategy(str(tmp_path / "a.json"))


def test_a_merged_file_is_no_stage_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a merged strategy file"):
        read_stage_file(merged({"0-a": TWO}, tmp_path))


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    items = {"a": ITEM | {"tensor_map": [9]}, "b": without("field"), "c": ITEM}
    (tmp_path / "a.json").write_bytes(text_of(ITEM, parallel_layout_item=items))
    with pytest.raises(InputError, match=r"(?s)parameter 'a': .*\n.*parameter 'b': "):
        read_strategy(str(tmp_path / "a.json"))


@check
@given(strategy=st.from_type(Strategy), form=st.sampled_from(["protobuf", "json"]), data=st.data())
def test_damage_is_found_or_harmless(strategy: Strategy, form: Any, data: st.DataObject, tmp_path: Path) -> None:
    """Whatever happens to the bytes, nothing but InputError comes; a cut is found unless it is between two items."""
    path = tmp_path / "merged"
    write_strategy(strategy, str(path), form=form)
    good = path.read_bytes()
    at = data.draw(st.integers(1, len(good) - 1))
    flipped = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    for damaged in (good[:at], flipped, data.draw(st.binary(min_size=1, max_size=40))):
        path.write_bytes(damaged)
        found = read_or_none(str(path))
        if found is not None and damaged is not flipped:
            assert form == "protobuf"
            assert count(found) < count(strategy)


def read_or_none(path: str) -> Strategy | None:
    try:
        return read_strategy(path)
    except InputError:
        return None


def count(strategy: Strategy) -> int:
    return sum(len(stage.layouts) for stage in strategy.stages)
