"""Parameter maps as files: hostile ones, those of a run, and those that `save` writes from real Megatron buffers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transform_ckpt import param_map
from transform_ckpt.errors import InputError, StorageError, UsageError
from transform_ckpt.megatron import buckets, live_maps
from transform_ckpt.param_map import FileName, MapKey

GOOD = {
    "module.b.bias": ["torch.bfloat16", [], 0, 1, 0],
    "module.b.weight": ["torch.bfloat16", [2, 3], 64, 70, 0],
    "module.a": ["torch.float32", [4], 128, 132, 1],
}
NAME = "param_map_buffer0_dp0tp0pp0vpp0.json"


def put(directory: Path, content: Any, name: str = NAME) -> str:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


# ------------------------------------------------------------------------------------------------------------ names


def test_names_of_files() -> None:
    assert param_map.file_name(0, 1, 2, 3, 4) == "param_map_buffer0_dp1tp2pp3vpp4.json"
    assert param_map.file_name(10, 1, 2, 3, 4, 50) == "param_map_buffer10_dp1tp2pp3vpp4ep50.json"


@given(st.tuples(*[st.integers(0, 999_999)] * 5), st.none() | st.integers(0, 999_999))
def test_names_parse_to_what_they_were_made_of(numbers: tuple[int, int, int, int, int], ep: int | None) -> None:
    assert param_map.parse_file_name(param_map.file_name(*numbers, ep)) == FileName(*numbers, ep)


@pytest.mark.parametrize(
    "name",
    [
        "bufmeta_buffer0_dp0tp0pp0vpp0.json",
        "param_map_sizes_tp0pp0.json",
        "param_map_sizes_tp0pp0ep0.json",
        "param_map_buffer0_dp0tp0pp0vpp0.json.tmp",
        "xparam_map_buffer0_dp0tp0pp0vpp0.json",
        "param_map_buffer0_dp0tp0pp0vpp0ep.json",
        "param_map_buffer0_dp00tp0pp0vpp0.json",
        "param_map_buffer0_dp-1tp0pp0vpp0.json",
        "param_map_buffer0_dp٣tp0pp0vpp0.json",
        "param_map_buffer0_dp0tp0pp0vpp0.json\n",
        "param_map_buffer0_dp9999999999tp0pp0vpp0.json",
    ],
)
def test_other_names_are_no_maps(name: str) -> None:
    assert param_map.parse_file_name(name) is None


# ---------------------------------------------------------------------------------------------------------- reading


def test_reads_a_map_and_writes_the_same_bytes(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD)
    found = param_map.read(path)
    assert [r.name for r in found.ranges] == ["b.bias", "b.weight", "a"]
    assert (found.ranges[1].shape, found.ranges[1].dtype, found.ranges[0].shape) == ((2, 3), "torch.bfloat16", ())
    assert (found.unpadded, found.padded) == ((70, 4), ())
    assert param_map.dumps(found) == Path(path).read_bytes()
    param_map.write(str(tmp_path / "again.json"), found)
    assert (tmp_path / "again.json").read_bytes() == Path(path).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.json", NAME]


def test_golden_maps_are_written_again_byte_for_byte(golden: Path) -> None:
    paths = sorted((golden / "dist_opt").glob("*/*/param_map*/param_map_*.json"))
    assert len(paths) == 48
    for path in paths:
        assert param_map.dumps(param_map.read(str(path))) == path.read_bytes()


def test_order_in_the_file_means_nothing(tmp_path: Path) -> None:
    turned = put(tmp_path, dict(reversed(GOOD.items())), "turned.json")
    assert param_map.read(turned) == param_map.read(put(tmp_path, GOOD))


def test_names_without_module(tmp_path: Path) -> None:
    plain = {name.removeprefix("module."): entry for name, entry in GOOD.items()}
    assert param_map.read(put(tmp_path, plain, "plain.json")) == param_map.read(put(tmp_path, GOOD))


ENTRY = ["torch.bfloat16", [2], 0, 2, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "no JSON of a parameter map"),
        (b"{", "no JSON of a parameter map"),
        (b"[" * 200_000, "no JSON of a parameter map"),
        (
            b'{"module.a": ["torch.bfloat16", [2], 0, 2, 0], "module.a": ["torch.bfloat16", [2], 2, 4, 0]}',
            "there twice",
        ),
        (b'{"a": ["torch.bfloat16", [' + b"9" * 5000 + b"], 0, 2, 0]}", "no JSON of a parameter map"),
        ([ENTRY], "holds a list"),
        ("text", "holds a str"),
        ({}, "without parameters"),
        ({"module.": ENTRY}, "no name of a parameter"),
        ({"module." + "a" * 1001: ENTRY}, "no name of a parameter"),
        ({"module.a\x1b[2J": ENTRY}, "no name of a parameter"),
        ({"module.\udc80": ENTRY}, "no name of a parameter"),
        ({"a": {"x": 1}}, "is not \\[dtype, shape"),
        ({"a": ENTRY[:4]}, "is not \\[dtype, shape"),
        ({"a": [*ENTRY, 0]}, "is not \\[dtype, shape"),
        ({"a": [7, [2], 0, 2, 0]}, "has the dtype 7"),
        ({"a": ["bfloat16", [2], 0, 2, 0]}, "has the dtype 'bfloat16'"),
        ({"a": ["torch.bfloat16", 2, 0, 2, 0]}, "has the shape 2"),
        ({"a": ["torch.bfloat16", [2.0], 0, 2, 0]}, "has the shape"),
        ({"a": ["torch.bfloat16", [True, 2], 0, 2, 0]}, "has the shape"),
        ({"a": ["torch.bfloat16", [-1, -2], 0, 2, 0]}, "has the shape"),
        ({"a": ["torch.bfloat16", [1] * 65, 0, 1, 0]}, "has the shape"),
        ({"a": ["torch.bfloat16", [2], 0, "2", 0]}, "has start, end, bucket 0, '2', 0"),
        ({"a": ["torch.bfloat16", [2], -2, 0, 0]}, "has start, end, bucket -2, 0, 0"),
        ({"a": ["torch.bfloat16", [1 << 63], 0, 1 << 63, 0]}, "has the shape"),
        ({"a": ["torch.bfloat16", [2], 0, 2, None]}, "has start, end, bucket"),
        ({"a": ["torch.bfloat16", [2], 2, 2, 0]}, "0 <= start < end"),
        ({"a": ["torch.bfloat16", [2, 2], 0, 2, 0]}, "4 elements, but 2"),
        ({"a": ["torch.bfloat16", [2], 0, 2, 1]}, "is in bucket 1, not 0"),
        ({"a": ENTRY, "b": ["torch.bfloat16", [2], 1, 3, 0]}, "before 'a' ends"),
        ({"a": ENTRY, "b": ["torch.bfloat16", [2], 2, 4, 2]}, "count up one by one"),
        ({"a": ENTRY, "b": ["torch.bfloat16", [2], 2, 4, 1], "c": ["torch.bfloat16", [1], 5, 6, 0]}, "count up"),
        ({"a": ENTRY, "module.a": ["torch.bfloat16", [2], 2, 4, 0]}, "'a' is there twice"),
    ],
)
def test_hostile_maps(tmp_path: Path, content: Any, message: str) -> None:
    path = put(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        param_map.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 1500


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        param_map.read(put(tmp_path, {"a": ENTRY, "b": [], "c": ["x", [], 0, 1, 0]}))
    assert "'b'" in str(caught.value)
    assert "'c'" in str(caught.value)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with path.open("wb") as stream:
        stream.truncate((1 << 28) + 1)
    with pytest.raises(InputError, match="268,435,457 bytes, more than any parameter map"):
        param_map.read(str(path))


def test_a_map_that_is_not_there_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        param_map.read(str(tmp_path / NAME))
    with pytest.raises(InputError, match="not a regular file"):
        param_map.read(str(tmp_path))
    with pytest.raises((InputError, StorageError), match="writing it"):
        param_map.write(str(tmp_path / "none" / NAME), param_map.read(put(tmp_path, GOOD)))


def sizes(unpadded: Any, padded: Any) -> dict[str, Any]:
    return {"buffers": {"buffer0vpp0": {"numel_unpadded": unpadded, "numel": padded}}}


def test_sizes_beside_a_map(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD)
    put(tmp_path, sizes([100, 4], [128, 128]), "param_map_sizes_tp0pp0.json")
    found = param_map.read(path)
    assert (found.unpadded, found.padded) == ((100, 4), (128, 128))
    assert found.coalesced_slice(found.ranges[2]) == (100, 4)
    put(tmp_path, sizes([99, 4], [128, 128]), "param_map_sizes_tp0pp0ep0.json")
    assert param_map.read(path) == found
    expert = put(tmp_path, GOOD, "param_map_buffer0_dp3tp0pp0vpp0ep0.json")
    assert param_map.read(expert).unpadded == (99, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list"),
        ({}, "does not say the sizes"),
        ({"buffers": [1]}, "does not say the sizes"),
        ({"buffers": {"buffer0vpp1": {}}}, "does not say the sizes"),
        (sizes([100, 4], None), "does not say the sizes"),
        (sizes([100, "4"], [128, 128]), "does not say the sizes"),
        (sizes([], []), "does not say the sizes"),
        (sizes([100, 4], [120, 128]), "bucket 0 ends at 120, bucket 1 starts at 128"),
    ],
)
def test_sizes_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    put(tmp_path, content, "param_map_sizes_tp0pp0.json")
    with pytest.raises(InputError, match=message):
        param_map.read(put(tmp_path, GOOD))


# ---------------------------------------------------------------------------------------------------- maps of a run


def test_finds_golden_maps_in_either_directory(golden: Path) -> None:
    case = golden / "dist_opt" / "mcore060" / "mcore_moe_tp1_pp1_ep2_dp2"
    found = param_map.find(str(case))
    assert list(found) == [MapKey(0, 0, 0, None, 0), MapKey(0, 0, 0, 0, 0), MapKey(0, 0, 0, 1, 0)]
    assert found[MapKey(0, 0, 0, 1, 0)].endswith("param_map_expert/param_map_buffer0_dp1tp0pp0vpp0ep1.json")
    assert list(param_map.find(str(case / "param_map"))) == list(found)


@pytest.mark.parametrize(
    ("dense", "expert", "given"),
    [
        (".", ".", "."),
        ("param_map", "param_map", "."),
        ("param_map", "param_map_expert", "."),
        ("maps", "maps_expert", "maps"),
        ("maps", "param_map_expert", "maps"),
        ("maps", "param_map_expert", "maps/"),
    ],
)
def test_layouts_of_a_run(tmp_path: Path, dense: str, expert: str, given: str) -> None:
    put(tmp_path / dense, GOOD, "param_map_buffer0_dp0tp1pp2vpp3.json")
    put(tmp_path / dense, b"not ours", "bufmeta_buffer0_dp0tp1pp2vpp3.json")
    put(tmp_path / expert, GOOD, "param_map_buffer1_dp0tp1pp2vpp3ep4.json")
    found = param_map.find(os.path.join(tmp_path, given))
    assert list(found) == [MapKey(1, 2, 3, None, 0), MapKey(1, 2, 3, 4, 1)]
    assert all(os.path.isfile(path) for path in found.values())


def test_dense_maps_of_another_directory_are_not_taken(tmp_path: Path) -> None:
    put(tmp_path / "param_map", GOOD)
    put(tmp_path / "param_map_expert", GOOD, "param_map_buffer1_dp0tp0pp0vpp0.json")
    assert list(param_map.find(str(tmp_path))) == [MapKey(0, 0, 0, None, 0)]


def test_ranks_that_say_the_same_and_that_do_not(tmp_path: Path) -> None:
    first = put(tmp_path, GOOD)
    put(tmp_path, json.dumps(GOOD, indent=1).encode(), "param_map_buffer0_dp1tp0pp0vpp0.json")
    other = {**GOOD, "module.a": ["torch.float32", [4], 192, 196, 1]}
    put(tmp_path, other, "param_map_buffer0_dp0tp1pp0vpp0.json")  # other tensor ranks may differ
    assert param_map.find(str(tmp_path)) == {
        MapKey(0, 0, 0, None, 0): first,
        MapKey(1, 0, 0, None, 0): str(tmp_path / "param_map_buffer0_dp0tp1pp0vpp0.json"),
    }
    second = put(tmp_path, other, "param_map_buffer0_dp10tp0pp0vpp0.json")
    with pytest.raises(InputError, match="they are of two runs") as caught:
        param_map.find(str(tmp_path))
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_no_maps(tmp_path: Path) -> None:
    put(tmp_path, GOOD, "other.json")
    with pytest.raises(InputError, match="holds no param_map_buffer"):
        param_map.find(str(tmp_path))
    with pytest.raises(InputError, match="not found"):
        param_map.find(str(tmp_path / "none"))


# -------------------------------------------------------------------------------------------------- inside Megatron

MEGATRON = r'''
"""python -c MEGATRON out layouts rank world port: buffers of the installed megatron-core on the CPU, saved."""
import json, os, sys
import torch
import torch.distributed as dist

out, layouts, rank, world, port = sys.argv[1], sys.argv[2].split(","), *map(int, sys.argv[3:])
torch.set_num_threads(1)
torch.cuda.current_device = lambda: torch.device("cpu")

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from transform_ckpt import param_map
from transform_ckpt.megatron import live_maps
from transform_ckpt.errors import UsageError

dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)


class Net(torch.nn.Module):
    def __init__(self, config, chunk):
        super().__init__()
        self.config = config
        if chunk == 0:
            self.word_embeddings = torch.nn.Embedding(19, 8)
            self.word_embeddings.weight.shared_embedding = config.pipeline_model_parallel_size > 1
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8 + chunk, 9) for _ in range(3))
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 5, bias=False) for _ in range(2))
        for param in self.experts.parameters():
            param.allreduce = False
        self.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def set_input_tensor(self, tensor):
        pass


def wrap(config, chunk):
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True, bucket_size=200
    )
    net = Float16Module(config, Net(config, chunk))
    return DistributedDataParallel(config, ddp, net, disable_bucketing=chunk > 0)


def run(out, tp, pp, ep):
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep, num_moe_experts=4 if ep > 1 else None, use_cpu_initialization=True,
        add_bias_linear=False,
    )
    chunks = [wrap(config, 0), wrap(config, 1)]
    param_map.save(chunks, os.path.join(out, "first"))
    param_map.save(chunks[0], os.path.join(out, f"alone{rank}"))
    param_map.save(chunks, os.path.join(out, "again"), every_rank=True)
    dist.barrier()
    param_map.save(chunks, os.path.join(out, "again"))
    dist.barrier()
    if rank == 0:
        maps = os.path.join(out, "stale", "param_map")
        os.makedirs(maps)
        for name in json.loads(os.environ["STALE"]):
            open(os.path.join(maps, name), "w").close()
    dist.barrier()
    param_map.save(chunks, os.path.join(out, "stale"), every_rank=True)
    dist.barrier()
    real = {}
    for v, chunk in enumerate(chunks):
        names = dict((param, name) for name, param in chunk.module.named_parameters())
        for kind in ("buffers", "expert_parallel_buffers"):
            for b, buffer in enumerate(getattr(chunk, kind)):
                real[f"{kind} {b} {v}"] = dict(
                    index={names[p]: [str(p.dtype), list(p.shape), *i] for p, i in buffer.param_index_map.items()},
                    starts=[bucket.offset for bucket in buffer.buckets],
                    unpadded=[bucket.numel_unpadded for bucket in buffer.buckets],
                    numel=buffer.numel,
                    dp=[dist.get_rank(buffer.data_parallel_group), dist.get_world_size(buffer.data_parallel_group)],
                )
    ranks = [parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(),
             parallel_state.get_expert_model_parallel_rank()]
    json.dump({"ranks": ranks, "buffers": real}, open(os.path.join(out, f"real{rank}.json"), "w"))
    try:
        param_map.save(chunks[0].module, os.path.join(out, "first"))
    except UsageError as error:
        assert "Float16Module has no parameter buffers" in str(error), error
    else:
        raise SystemExit("saved what has no buffers")
    dist.barrier()
    parallel_state.destroy_model_parallel()


for layout in layouts:
    run(os.path.join(out, layout), *{"dp": (1, 1, 1), "tp": (2, 1, 1), "ep": (1, 1, 2), "pp": (1, 2, 1)}[layout])
'''

STALE = [
    "param_map_buffer0_dp0tp0pp0vpp2.json",
    "param_map_buffer1_dp0tp0pp0vpp0.json",
    "param_map_buffer0_dp2tp0pp0vpp0.json",
    "param_map_buffer0_dp0tp2pp0vpp0.json",
    "param_map_buffer0_dp0tp0pp2vpp0.json",
    "param_map_buffer0_dp0tp0pp0vpp0ep2.json",
]


def run_megatron(out: Path, world: int, layouts: str) -> Path:
    """Directory of a run of `world` processes; in {layout}/real{rank}.json each says what its buffers are."""
    try:
        importlib.metadata.version("megatron-core")  # other tests put modules of that name into this process
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("megatron-core is not installed: make venv")
    for layout in layouts.split(","):
        (out / layout).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", MEGATRON, str(out), layouts]
    env = {**os.environ, "STALE": json.dumps([*STALE, "notes.json"]), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port)],
            env=env,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)
    return out


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_megatron(tmp_path_factory.mktemp("one"), 1, "dp")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_megatron(tmp_path_factory.mktemp("two"), 2, "dp,tp,ep,pp")


def test_saves_the_buffers_of_one_process(one_process: Path) -> None:
    check_run(one_process / "dp", "dp", 1)


@pytest.mark.parametrize("layout", ["dp", "tp", "ep", "pp"])
def test_saves_the_buffers_of_two_processes(two_processes: Path, layout: str) -> None:
    check_run(two_processes / layout, layout, 2)


def check_run(out: Path, layout: str, world: int) -> None:
    """What was saved is what the live buffers say, and nothing else is there."""
    ranks = [json.loads((out / f"real{rank}.json").read_text()) for rank in range(world)]
    found = param_map.find(str(out / "first"))
    expected: set[MapKey] = set()
    files: dict[str, set[str]] = {"first": set(), "stale": {"notes.json"}}
    for number, rank in enumerate(ranks):
        tp, pp, ep = rank["ranks"]
        alone = files.setdefault(f"alone{number}", set())
        for where, real in rank["buffers"].items():
            kind, buffer, vpp = where.split()
            key = MapKey(tp, pp, int(vpp), None if kind == "buffers" else ep, int(buffer))
            expected.add(key)
            check_against_buffer(param_map.read(found[key]), real)
            name = param_map.file_name(key.buffer, real["dp"][0], tp, pp, key.vpp, key.ep)
            ending = "" if key.ep is None else f"ep{ep}"
            together = {name, f"param_map_sizes_tp{tp}pp{pp}{ending}.json"}
            files["stale"] |= together
            if real["dp"][0] == 0:
                files["first"] |= together
                alone |= together if key.vpp == 0 else set()
    files["again"] = files["first"]
    assert set(found) == expected
    for directory, names in files.items():
        assert set(os.listdir(out / directory / "param_map")) == names
    assert len({key.ep for key in expected}) == (3 if layout == "ep" else 2)
    assert any(len(real["starts"]) > 1 for real in ranks[0]["buffers"].values())
    notes = json.loads((out / "first" / "param_map" / "param_map_sizes_tp0pp0.json").read_text())
    first, second = (notes["buffers"][f"buffer0vpp{vpp}"] for vpp in range(2))
    assert (first["bucket_size"], second["bucket_size"]) == (200, None)
    assert first["data_parallel_size"] == world // (2 if layout in {"tp", "pp"} else 1)
    assert notes["megatron_core"] == importlib.metadata.version("megatron-core")
    for key, path in found.items():
        kind = "buffers" if key.ep is None else "expert_parallel_buffers"
        rebuild(key, param_map.read(path), ranks[0]["buffers"][f"{kind} 0 0"]["dp"][1], notes["megatron_core"], layout)


def check_against_buffer(found: buckets.BufferMap, real: dict[str, Any]) -> None:
    """A map that was read is the live buffer's own index."""
    assert {f"module.{r.name}": [r.dtype, list(r.shape), r.start, r.end, r.bucket] for r in found.ranges} == real[
        "index"
    ]
    assert list(found.bases) == real["starts"]
    assert list(found.unpadded) == real["unpadded"]
    assert sum(found.padded) == real["numel"]


def rebuild(key: MapKey, found: buckets.BufferMap, dp: int, version: str, layout: str) -> None:
    """`buckets.build` gives the same map from the names and shapes alone."""
    tied = layout == "pp" and key.vpp == 0
    params = [(r.name, r.dtype, r.shape, tied and "embeddings" in r.name) for r in reversed(found.ranges)]
    size = 200 if key.pp == 0 and key.vpp == 0 else None
    assert buckets.build(params, version=buckets.parse_version(version), dp=dp, bucket_size=size) == found


def test_importing_is_light() -> None:
    code = "import sys, transform_ckpt.param_map; print({'torch', 'numpy', 'megatron', 'mindspore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_has_no_buffers_and_a_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="object has no parameter buffers"):
        live_maps._names(object())
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises((InputError, StorageError), match="writing it"):
        param_map.write(str(path / NAME), param_map.read(put(tmp_path, GOOD)))
