"""Strategy files: what is written is read, MindSpore reads what we write and we read what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategy.codec import Form
from strategy.document import written_tensor_map
from strategy.layout import Layout, Stage, Strategy
from strategy.mindspore_file import StageFile, read_stage_file, read_strategy, write_stage, write_strategy
from strategy.mindspore_proto import decode
from transform_ckpt.errors import InputError

REPO = Path(__file__).resolve().parents[2]
FORMS = get_args(Form)
SUFFIX = {"protobuf": "ckpt", "json": "json"}
check = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
each_form = pytest.mark.parametrize("form", FORMS)


def without_dashes(strategy: Strategy) -> Strategy:
    """The same with names that MindSpore's own reader can take: it fails on every second "-"."""

    def rename(name: str) -> str:
        return f"p.{list(strategy.names).index(name)}"

    stages = (Stage(s.devices, {rename(n): layout for n, layout in s.layouts.items()}) for s in strategy.stages)
    return Strategy(tuple(stages))


def write_stages(strategy: Strategy, directory: Path, form: Form = "protobuf") -> Path:
    """A directory as a training run leaves it: one file a rank, read-only."""
    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    for stage in range(len(strategy.stages)):
        for rank in strategy.ranks(stage):
            path = directory / f"ckpt_strategy_rank_{rank}.{SUFFIX[form]}"
            write_stage(strategy, stage, str(path), form)
            path.chmod(0o400)
    return directory


@each_form
@check
@given(strategy=st.from_type(Strategy))
def test_merged_file_reads_back(form: Form, strategy: Strategy, tmp_path: Path) -> None:
    path = tmp_path / "merged"
    write_strategy(strategy, str(path), form=form)
    found = read_strategy(str(path))
    assert (found.stages, found.origin) == (strategy.stages, str(path))
    assert list(found.names) == list(strategy.names)
    first = path.read_bytes()
    write_strategy(found, str(path), form=form)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["merged"]


@each_form
@check
@given(strategy=st.from_type(Strategy))
def test_per_rank_files_read_back(form: Form, strategy: Strategy, tmp_path: Path) -> None:
    directory = write_stages(strategy, tmp_path / "strategy", form)
    assert read_strategy(str(directory)).stages == strategy.stages
    for number, stage in enumerate(strategy.stages):
        path = str(directory / f"ckpt_strategy_rank_{strategy.ranks(number)[0]}.{SUFFIX[form]}")
        assert read_stage_file(path) == StageFile(path, number, stage)
        if number:
            with pytest.raises(InputError, match=f"strategy of stage {number} only.*directory"):
                read_strategy(path)
        else:
            assert read_strategy(path).stages == strategy.stages[:1]


def test_writing_keeps_to_the_umask(tmp_path: Path) -> None:
    strategy = Strategy((Stage(2, {"w": Layout((2,), ((0,),))}),))
    old = os.umask(0o027)
    try:
        write_strategy(strategy, str(tmp_path / "new" / "merged.ckpt"))
    finally:
        os.umask(old)
    assert (tmp_path / "new" / "merged.ckpt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(2, {}), "stage 0 has no parameters"),
        (Stage(4, {"w": Layout((2,), ((0,),))}), "has 4 devices"),
        (Stage(2, {"w": Layout((2,), ((0,),)), "v": Layout((4,), ((0,),))}), "'v' is laid out over 4 devices"),
        (Stage(2, {"0-w": Layout((2,), ((0,),))}), "merged"),
    ],
)
def test_what_no_file_can_say_is_not_written(stage: Stage, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_strategy(Strategy((stage,)), str(tmp_path / "merged.ckpt"))
    with pytest.raises(InputError, match=message):
        write_stage(Strategy((stage,)), 0, str(tmp_path / "rank_0.ckpt"))
    assert not os.listdir(tmp_path)


def stored(dev: Iterable[int], tensor_map: Any, step: int = 0, size: int = 0) -> bytes:
    item = {"dev_matrix": dev, "field": 0, "opt_weight_shard_size": size, "opt_weight_shard_step": step}
    return json.dumps({"current_stage": 2, "parallel_layout_item": {"w": item | {"tensor_map": tensor_map}}}).encode()


@pytest.mark.parametrize(
    ("tensor_map", "expected"),
    [
        ([1, -1], ((1,), ())),
        ([[1, 0], [-1]], ((1, 0), ())),
        ([[1, 0], -1], ((1, 0), ())),
        ([[1, 0], []], ((1, 0), ())),
        ([[-1, 0], [1]], ((0,), (1,))),
        ([[1, 0]], ((1, 0),)),
        ([], ()),
    ],
)
def test_json_maps_are_flat_nested_or_both(tensor_map: Any, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"  # the content tells the form, not the suffix
    for text in (stored([2, 2], tensor_map), b"\xef\xbb\xbf \n" + stored([2, 2], tensor_map)):
        path.write_bytes(text)
        assert read_strategy(str(path)).stages[0].layouts["w"].tensor_map == expected


def test_nested_map_is_written_as_lists_in_json(tmp_path: Path) -> None:
    strategy = Strategy((Stage(4, {"w": Layout((2, 2), ((1, 0), ())), "v": Layout((2, 2), ((), (1,)))}),))
    write_strategy(strategy, str(tmp_path / "a.json"), form="json")
    items = json.loads((tmp_path / "a.json").read_text())["parallel_layout_item"]
    assert {name: item["tensor_map"] for name, item in items.items()} == {"0-w": [[1, 0], [-1]], "0-v": [-1, 1]}


def varint(value: int) -> bytes:
    """A wire-format integer; negative ones take ten bytes."""
    value &= (1 << 64) - 1
    head = b""
    while value > 0x7F:
        head += bytes([value & 0x7F | 0x80])
        value >>= 7
    return head + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def packed(values: Iterable[int]) -> bytes:
    return field(1, b"".join(map(varint, values)))


def unpacked(values: Iterable[int]) -> bytes:
    return b"".join(field(1, value) for value in values)


@pytest.mark.parametrize("dims", [packed, unpacked])
@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ([[1, -1]], ((1,), ())),
        ([[1, 0], [-1]], ((1, 0), ())),
        ([[1, 0], [-1], []], ((1, 0), ())),
        ([[1, 0], []], ((1, 0),)),
        ([[0, -1], [1]], ((0,), (1,))),
        ([[]], ()),
    ],
)
def test_wire_encodings(dims: Any, maps: list[list[int]], expected: Any) -> None:
    layout = field(1, dims([2, 2])) + b"".join(field(2, dims(m) if m else b"") for m in maps)
    layout += field(3, b"") + field(5, 0) + field(6, 0) + field(7, -1)
    item = field(1, b"w") + field(2, layout)
    node = field(1, b"MatMul_w") + field(2, field(1, 3) + field(2, dims([2, 1])))
    document = decode(field(1, 2) + field(2, node) + field(3, item), "x")
    assert document.layouts == {"w": Layout((2, 2), expected, 0, -1)}
    assert [(n.stage, n.dims) for n in document.nodes] == [(3, ((2, 1),))]


def as_mindspore_lists(layout: Layout) -> list[Any]:
    return [list(layout.dev_matrix), written_tensor_map(layout), [], 0, layout.opt_step, layout.opt_size]


def is_nested(layout: Layout) -> bool:
    return any(len(dim) > 1 for dim in layout.tensor_map)


@each_form
@check
@given(strategy=st.from_type(Strategy).map(without_dashes))
def test_mindspore_reads_what_we_write(form: Form, strategy: Strategy, mindspore: Any, tmp_path: Path) -> None:
    serialization = mindspore.parallel._parallel_serialization
    path = str(tmp_path / f"merged.{SUFFIX[form]}")
    if form == "json" and any(is_nested(layout) for s in strategy.stages for layout in s.layouts.values()):
        return  # MindSpore cannot read a nested map in JSON
    write_strategy(strategy, path, form=form)
    found = serialization._build_searched_strategy(path)
    expected = {f"{n}-{p}": (n, lay) for n, s in enumerate(strategy.stages) for p, lay in s.layouts.items()}
    assert found.keys() == expected.keys()
    for name, (stage, layout) in expected.items():
        (lists,) = serialization._convert_to_list({name: found[name]}).values()
        assert lists == [*as_mindspore_lists(layout), [stage]]
    assert serialization._extract_pipeline_stage_num(path) == len(strategy.stages)


@check
@given(strategy=st.from_type(Strategy))
def test_bytes_are_those_of_the_real_protobuf_message(strategy: Strategy, mindspore: Any, tmp_path: Path) -> None:
    write_strategy(strategy, str(tmp_path / "merged.ckpt"))
    data = (tmp_path / "merged.ckpt").read_bytes()
    message = mindspore.train.node_strategy_pb2.ParallelStrategyMap()
    message.ParseFromString(data)
    assert message.SerializeToString() == data
    assert message.ByteSize() == len(data)
    message.DiscardUnknownFields()
    assert message.ByteSize() == len(data)


@each_form
@check
@given(strategy=st.from_type(Strategy))
def test_we_read_what_mindspore_merges(form: Form, strategy: Strategy, mindspore: Any, tmp_path: Path) -> None:
    directory = write_stages(strategy, tmp_path / "strategy", form)
    merged = str(tmp_path / f"merged.{SUFFIX[form]}")
    mindspore.merge_pipeline_strategys(str(directory), merged)
    assert read_strategy(merged).stages == strategy.stages


@each_form
def test_mindspore_finds_the_stage_of_our_per_rank_file(form: Form, mindspore: Any, tmp_path: Path) -> None:
    layout = Layout((2,), ((0,),))
    strategy = Strategy((Stage(2, {"w": layout}), Stage(2, {"v": layout})))
    path = str(tmp_path / f"rank_2.{SUFFIX[form]}")
    write_stage(strategy, 1, path, form)
    maps = mindspore.parallel._parallel_serialization._extract_src_dst_layout_map_by_src(path, path)
    assert maps[2] == 1


@each_form
def test_tied_parameter_has_a_layout_a_stage(form: Form, tmp_path: Path) -> None:
    first, last = Layout((2, 2), ((0,), ())), Layout((2, 2), ((), ()), 1, -1)
    strategy = Strategy((Stage(4, {"tied": first}), Stage(4, {"b-c": last}), Stage(4, {"tied": last})))
    write_strategy(strategy, str(tmp_path / "merged"), form=form)
    found = read_strategy(str(tmp_path / "merged"))
    assert found.names == {"tied": (0, 2), "b-c": (1,)}
    assert [stage.layouts for stage in found.stages] == [stage.layouts for stage in strategy.stages]


PROBE = """
import sys, time
import strategy.mindspore_file as module
for path in sys.argv[1:]:
    module.read_strategy(path)
    start = time.perf_counter()
    assert sum(len(stage.layouts) for stage in module.read_strategy(path).stages) == 10_000
    print(time.perf_counter() - start)
assert not {"numpy", "mindspore", "google.protobuf"} & sys.modules.keys(), "MindSpore could not be imported any more"
"""


def test_import_is_light_and_ten_thousand_entries_are_quick(tmp_path: Path) -> None:
    layouts = {f"layers.{i}.weight": Layout((2, 4), ((0,), ()), 4, -1 if i % 2 else 2) for i in range(2500)}
    strategy = Strategy((Stage(8, layouts),) * 4)
    paths = [str(tmp_path / form) for form in FORMS]
    for form, path in zip(FORMS, paths, strict=True):
        write_strategy(strategy, path, form=form)
    environment = {k: v for k, v in os.environ.items() if k != "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *paths], cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert all(float(seconds) < 1 for seconds in run.stdout.split()), run.stdout


def test_files_of_mindformers_that_name_the_shape(tmp_path: Path) -> None:
    """save_strategy_file (MindFormers 1.9.0, STAND_ALONE) puts the shape into param_split_shape: no uneven split."""
    from tests.strategy.test_bad_files import proto

    path = tmp_path / "ckpt_strategy_rank_0.ckpt"
    path.write_bytes(proto(dev_matrix=[2, 2], tensor_map=[1, 0], param_split_shape=[8, 6]))
    (stage,) = read_strategy(str(path)).stages
    assert stage.layouts["w.x"] == Layout((2, 2), ((1,), (0,)))
    path.write_bytes(proto(dev_matrix=[2, 2], tensor_map=[1, 0], param_split_shape=[8, 5]))
    with pytest.raises(InputError, match="split unevenly"):
        read_strategy(str(path))
