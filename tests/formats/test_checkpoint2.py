"""Checkpoint 2.0 against MindFormers itself: it writes and we read, we plan and it loads; then every lie we know of."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategy.layout import Layout
from tests import support
from transform_ckpt import dtypes
from transform_ckpt.errors import InputError, PlanError, UsageError
from transform_ckpt.formats import checkpoint2, checkpoint2_write
from transform_ckpt.formats.checkpoint2_common import dump_common, encode_scalar, parse_iteration
from transform_ckpt.formats.checkpoint2_metadata import slice_box
from transform_ckpt.tensors import Logical, Source, Target
from transform_ckpt.views import Box, whole

RANKS = 8
COMMON = {"epoch_num": 2, "step_num": 12, "global_step": 11, "loss_scale": 65536.0, "global_batch_size": 32}


# ------------------------------------------------------------------------------------------------- a small model


def stages() -> list[dict[str, support.Layout]]:
    """Two stages of dp 2, mp 2: columns, rows, optimizer shards, nested maps, a parameter that both stages share."""
    column = support.Layout((2, 2), (0, -1))
    row = support.Layout((2, 2), (-1, 0), 2, 2)
    norm = support.Layout((2, 2), (-1,), 1, -1)
    bias = support.Layout((2, 2), (-1,))
    nested = support.Layout((2, 2), ((0, 1), -1))
    first = {"embed.weight": column, "l0.wq": column, "l0.wo": row, "l0.norm": norm, "l0.bias": bias}
    second = {"embed.weight": column, "l1.wq": nested, "l1.wo": row, "l1.norm": norm, "l1.bias": bias}
    return [{**held, **{f"adam_m.{name}": layout for name, layout in held.items()}} for held in (first, second)]


SHAPES = {
    "embed.weight": (16, 6),
    **{f"l{i}.wq": (8, 6) for i in range(2)},
    **{f"l{i}.wo": (6, 10) for i in range(2)},
    **{f"l{i}.norm": (12,) for i in range(2)},
    **{f"l{i}.bias": (5,) for i in range(2)},
}


def arrays() -> dict[str, support.Array]:
    """Distinct values; bfloat16 weights as their bits, float32 norms and states."""
    rng = np.random.default_rng(7)
    found: dict[str, support.Array] = {}
    for name, shape in SHAPES.items():
        values = rng.permutation(prod(shape)).reshape(shape)
        found[name] = values.astype(np.float32) if "norm" in name else (values.astype(np.uint16) + 0x3F80)
        found[f"adam_m.{name}"] = (values + 0.5).astype(np.float32)
    return found


def code(array: support.Array) -> str:
    return {"float32": "F32", "uint16": "BF16"}[array.dtype.name]


def placements(layouts: list[dict[str, support.Layout]]) -> list[tuple[int, str, Box]]:
    """Every rank's box of every parameter, by the tests' own slicer."""
    found: list[tuple[int, str, Box]] = []
    per = support.stage_devices(layouts)
    for number, held in enumerate(layouts):
        for name, layout in held.items():
            shape = SHAPES[name.removeprefix("adam_m.")]
            for device, index in enumerate(support.device_slices(shape, layout)):
                start, size = tuple(s.start for s in index), tuple(s.stop - s.start for s in index)
                found.append((number * per + device, name, Box(start, size)))
    return found


def plan(step: int = 12, prefix: str = "tiny", scalars: Any = None) -> Target:
    params = {name: (code(array), array.shape) for name, array in arrays().items()}
    return checkpoint2.plan_target(params, placements(stages()), COMMON if scalars is None else scalars, prefix, step)


def write(target: Target, root: Path, values: dict[str, support.Array]) -> Path:
    """The destination on disk: skeletons filled with NumPy slices."""
    for small in target.small:
        (root / small.relpath).parent.mkdir(parents=True, exist_ok=True)
        (root / small.relpath).write_bytes(small.data)
    for file in target.files:
        data = bytearray(file.skeleton.nbytes)
        for offset, chunk in file.skeleton.chunks:
            data[offset : offset + len(chunk)] = chunk
        for name, box in file.boxes.items():
            part = values[name][tuple(slice(a, b) for a, b in zip(box.start, box.stop(), strict=True))].tobytes()
            (extent,) = file.skeleton.places[name]
            assert extent.nbytes == len(part)
            data[extent.offset_bytes : extent.offset_bytes + extent.nbytes] = part
        (root / file.relpath).write_bytes(data)
    return root


def load(logical: Logical, dtype: Any) -> support.Array:
    """The whole parameter from its pieces' bytes: all of it covered, replicas equal."""
    out, seen = np.zeros(logical.shape, dtype), np.zeros(logical.shape, bool)
    for piece in logical.pieces:
        (extent,) = piece.tensor.extents
        with Path(piece.tensor.path).open("rb") as stream:
            stream.seek(extent.offset_bytes)
            part = np.frombuffer(stream.read(extent.nbytes), dtype).reshape(piece.box.size)
        at = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop(), strict=True))
        assert np.all(~seen[at] | (out[at] == part))
        out[at], seen[at] = part, True
    assert seen.all()
    return out


def assert_model(source: Source) -> None:
    expected = arrays()
    assert source.params.keys() == expected.keys()
    for name, array in expected.items():
        assert source.params[name].dtype == code(array)
        np.testing.assert_array_equal(load(source.params[name], array.dtype), array)


def assert_common(source: Source) -> None:
    states = {name: state.pieces[0].tensor for name, state in source.states.items()}
    assert states["global_step"].inline == struct.pack("<i", 11)
    assert (states["global_step"].dtype, states["global_step"].shape) == ("I32", (1,))
    assert states["step_num"].inline == struct.pack("<q", 12)
    assert (states["step_num"].dtype, states["step_num"].shape) == ("I64", ())
    assert states["loss_scale"].inline == struct.pack("<f", 65536.0)
    assert "ckpt_status" not in states


def layout_boxes(described: dict[str, Any], shape: Any) -> dict[int, Box]:
    """Rank -> its box, by a layout of metadata.json."""
    axes = tuple(() if d == -1 else tuple(d) if isinstance(d, list) else (d,) for d in described["tensor_map"])
    layout = Layout(tuple(described["device_matrix"]), axes)
    assert len(described["rank_list"]) == layout.devices
    return {rank: layout.box(position, tuple(shape)) for position, rank in enumerate(described["rank_list"])}


# ------------------------------------------------------------------------------------------------ real MindFormers


@pytest.fixture(scope="session")
def mf(ms, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """MindFormers' checkpoint package, its logs kept out of the working directory."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LOG_MF_PATH", str(tmp_path_factory.mktemp("mf_log")))
    patch.chdir(tmp_path_factory.mktemp("mf_cwd"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mindformers", reason="mindformers is not installed: make venv")
        from mindformers.checkpoint import checkpoint, fully_parallel, metadata, reshard, sharded_tensor, utils
    yield SimpleNamespace(
        checkpoint=checkpoint,
        metadata=metadata,
        reshard=reshard,
        sharded=sharded_tensor,
        utils=utils,
        balance=fully_parallel,
    )
    patch.undo()


def strategy_metadata(layouts: list[dict[str, support.Layout]]) -> dict[int, dict[str, list[Any]]]:
    """What mindspore.parallel.strategy.get_strategy_metadata returns, made by its own layout code from mesh and map."""
    from mindspore.parallel.strategy import _NetStrategyInfo

    make = _NetStrategyInfo(SimpleNamespace(compile_phase=""), {}, {})
    names = {"F32": "Float32", "BF16": "BFloat16"}
    values = arrays()
    found: dict[int, dict[str, list[Any]]] = {}
    per = support.stage_devices(layouts)
    for number, held in enumerate(layouts):
        for rank in range(number * per, (number + 1) * per):
            found[rank] = {}
            for name, layout in held.items():
                info = SimpleNamespace(
                    opt_weight_shard_size=layout.opt_size,
                    dev_matrix=list(layout.dev_matrix),
                    tensor_map=[list(m) if isinstance(m, tuple) else [m] for m in layout.tensor_map],
                    rank_list=list(range(number * per, (number + 1) * per)),
                    tensor_type=names[code(values[name])],
                    tensor_shape=list(values[name].shape),
                )
                found[rank][name] = make._layout_process(info)
    return found


@pytest.fixture
def as_rank(mf, monkeypatch) -> Callable[[int, int], None]:
    """Makes MindFormers believe that it is one rank of a world."""

    def become(rank: int, world: int) -> None:
        monkeypatch.setenv("RANK_ID", str(rank))
        monkeypatch.setenv("RANK_SIZE", str(world))
        monkeypatch.setattr(mf.metadata, "get_group_size", lambda: world)
        monkeypatch.setattr(mf.checkpoint, "barrier_world", lambda *_: None)
        assert (mf.checkpoint.get_real_rank(), mf.reshard.get_real_rank()) == (rank, rank)
        assert mf.checkpoint.get_real_group_size() == world

    return become


def cell(ms, values: dict[str, support.Array], skipped: frozenset[str] = frozenset()) -> Any:
    """A network of bare parameters; the `skipped` ones are known and not saved, as those of other stages are."""

    def parameter(name: str, array: support.Array) -> Any:
        array = np.ascontiguousarray(array).reshape(array.shape)
        wide = (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
        tensor = ms.Tensor(wide, ms.bfloat16) if array.dtype == np.uint16 else ms.Tensor(array)
        return ms.Parameter(tensor, name=name)

    class Net(ms.nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.all = ms.ParameterTuple([parameter(name, array) for name, array in values.items()])
            for param in self.all:
                param.param_info.is_pipeline_shared_param = param.name in skipped

    return Net()


def bits(value: Any) -> support.Array:
    """A loaded parameter as the tests' arrays have it."""
    array = value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def save_real(ms, mf, as_rank, monkeypatch, root: Path, *, balanced: bool, shared: bool = False) -> Path:
    """MindFormers' own save_checkpoint, once for each rank of a simulated world.

    `shared`: the second stage knows that the first one stores the embedding, as MindSpore marks it in a pipeline.
    """
    layouts, values = stages(), arrays()
    known = strategy_metadata(layouts)
    monkeypatch.setattr(mf.sharded, "get_strategy_metadata", lambda *_args, **_kwargs: known)
    for rank in range(RANKS):
        as_rank(rank, RANKS)
        held = support.slice_rank(values, layouts, rank)
        elsewhere = frozenset(values.keys() - held.keys())
        if shared and rank >= RANKS // 2:
            elsewhere |= {"embed.weight"}
        held = {name: held.get(name, array) for name, array in values.items()}
        weights = {n: a for n, a in held.items() if not n.startswith("adam_m")}
        states = {n: a for n, a in held.items() if n.startswith("adam_m")}
        states["global_step"] = np.array([11], np.int32)
        network = cell(ms, weights, elsewhere)
        mf.checkpoint.save_checkpoint(
            iteration=12,
            network=network,
            optimizer=cell(ms, states, elsewhere),
            common_info=mf.checkpoint.CommonInfo(**COMMON),
            user_prefix="tiny",
            save_checkpoint_path=str(root),
            sharded_tensor_metas=mf.sharded.get_all_sharded_tensor(network),
            remove_redundancy=balanced,
        )
    for path in root.rglob("*.safetensors"):
        path.chmod(0o644)
    return root


@pytest.fixture
def save(ms, mf, as_rank, monkeypatch) -> Callable[..., Path]:
    return partial(save_real, ms, mf, as_rank, monkeypatch)


@pytest.mark.filterwarnings("ignore")
class TestReal:
    """Both directions against MindFormers 1.9.0."""

    @pytest.mark.parametrize("balanced", [False, True])
    def test_reads_what_mindformers_saves(self, save, tmp_path, balanced):
        root = save(tmp_path / "ckpt", balanced=balanced, shared=not balanced)
        assert checkpoint2.detect(str(root))
        source = checkpoint2.read(str(root))
        assert_model(source)
        assert_common(source)
        assert source.step == 12
        assert len(source.headers) == len(list(root.rglob("*.safetensors"))) + 2
        copies = len(source.params["l0.bias"].pieces)
        assert copies == (1 if balanced else 4)
        assert any("global_step" in note for note in source.notes) != balanced
        assert any("not every listed copy of embed.weight is" in note for note in source.notes) != balanced

    def test_plan_is_what_mindformers_writes(self, save, tmp_path):
        real = save(tmp_path / "real", balanced=True)
        ours = write(plan(), tmp_path / "ours", arrays())
        names = sorted(str(p.relative_to(real)) for p in real.rglob("*") if p.is_file())
        assert names == sorted(str(p.relative_to(ours)) for p in ours.rglob("*") if p.is_file())
        for name in names:
            expected, found = (real / name).read_bytes(), (ours / name).read_bytes()
            if not name.endswith("metadata.json"):
                assert found == expected, name
                continue
            theirs, mine = json.loads(expected), json.loads(found)
            assert mine["storage_data"] == theirs["storage_data"]
            shared = {"embed.weight", "adam_m.embed.weight"}  # the real writer describes the first stage's ranks only
            for param, described in theirs["state_dict_metadata"].items():
                if param not in shared:
                    found = mine["state_dict_metadata"][param]
                    shape = described["global_shape"]
                    # neighbouring mesh axes that split one dimension may be one axis: what each rank holds is the same
                    assert layout_boxes(found.pop("layout"), shape) == layout_boxes(described.pop("layout"), shape)
                    assert found == described, param
            assert mine["state_dict_metadata"].keys() == theirs["state_dict_metadata"].keys()

    def test_mindformers_loads_what_we_plan(self, ms, mf, as_rank, tmp_path):
        root = write(plan(), tmp_path / "ckpt", arrays())
        target = [
            {
                name: support.Layout((4,), (0,) + (-1,) * (len(SHAPES[name.removeprefix("adam_m.")]) - 1))
                if SHAPES[name.removeprefix("adam_m.")][0] % 4 == 0
                else support.Layout((4,), (-1,) * len(SHAPES[name.removeprefix("adam_m.")]))
                for name in arrays()
            }
        ]
        self.check_reshard(mf, as_rank, root, target)

    def test_mindformers_loads_back_into_the_same_layout(self, ms, mf, as_rank, tmp_path):
        self.check_reshard(mf, as_rank, write(plan(), tmp_path / "ckpt", arrays()), stages())

    @staticmethod
    def check_reshard(mf, as_rank, root: Path, target: list[dict[str, support.Layout]]) -> None:
        folder = mf.checkpoint.get_checkpoint_path(str(root))
        known = strategy_metadata(target)
        for rank, infos in known.items():
            as_rank(rank, len(known))
            src, mappings = mf.metadata.get_metadata_of_checkpoint(folder)
            dst = mf.sharded.get_sharded_tensor_from_strategy_metadata(infos, rank)
            loaded = mf.reshard.ReshardLoader(folder, dst, src, mappings).load()
            expected = {n: a for n, a in support.slice_rank(arrays(), target, rank).items() if n in infos}
            assert loaded.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(bits(loaded[name]), array, err_msg=name)

    @pytest.mark.parametrize("scrambled", [False, True])
    def test_mindformers_loads_any_order_of_ranks(self, ms, mf, as_rank, tmp_path, scrambled):
        value = np.arange(48, dtype=np.float32).reshape(4, 12)
        order = [2, 0, 3, 1, 5, 4, 0, 1, 2] if scrambled else [0, 1, 2, 3, 4, 5]
        boxes = [(3 * i + 1, "w", slice_box(number, (4, 12), (2, 3))) for i, number in enumerate(order)]
        root = write(checkpoint2.plan_target({"w": ("F32", (4, 12))}, boxes, {}, "", 3), tmp_path, {"w": value})
        as_rank(0, 1)
        network = cell(ms, {"w": np.zeros_like(value)})
        mf.checkpoint.load_checkpoint(str(root), network)
        np.testing.assert_array_equal(network.all[0].asnumpy(), value)

    def test_whole_load_with_optimizer_takes_the_step_from_common(self, ms, mf, as_rank, tmp_path):
        root = write(plan(), tmp_path / "ckpt", arrays())
        as_rank(0, 1)
        blank = {name: np.zeros_like(array) for name, array in arrays().items()}
        network = cell(ms, {n: a for n, a in blank.items() if not n.startswith("adam_m")})
        states = {n: a for n, a in blank.items() if n.startswith("adam_m")}
        optimizer = cell(ms, {**states, "global_step": np.zeros(1, np.int32)})
        mf.checkpoint.load_checkpoint(str(root), network, optimizer)
        loaded = {p.name: bits(p) for p in (*network.all, *optimizer.all)}
        assert loaded.pop("global_step").tolist() == [11]
        support.assert_same(loaded, arrays())

    def test_one_card_without_metadata(self, ms, mf, as_rank, tmp_path):
        as_rank(0, 1)
        values = arrays()
        weights = {n: a for n, a in values.items() if not n.startswith("adam_m")}
        states = {n: a for n, a in values.items() if n.startswith("adam_m")}
        mf.checkpoint.save_checkpoint(
            iteration=3,
            network=cell(ms, weights),
            optimizer=cell(ms, {**states, "global_step": np.array([9], np.int32)}),
            common_info=mf.checkpoint.CommonInfo(**COMMON),
            save_checkpoint_path=str(tmp_path),
        )
        assert not (tmp_path / "iteration_00000003" / "metadata.json").exists()
        source = checkpoint2.read(str(tmp_path))
        assert_model(source)
        assert load(source.states["global_step"], np.int32).tolist() == [9]
        assert source.states["step_num"].pieces[0].tensor.inline == struct.pack("<q", 12)

    def test_scalars_load_and_empty_tensors_do_not(self, ms, mf, as_rank, tmp_path):
        values = {"scale": np.array(2.5, np.float32), "none": np.zeros((0, 4), np.float32)}
        boxes = [(rank, name, whole(a.shape)) for rank in range(2) for name, a in values.items()]
        target = checkpoint2.plan_target({n: ("F32", a.shape) for n, a in values.items()}, boxes, {}, "p", 1)
        assert any("none" in note for note in target.notes)
        root = write(target, tmp_path, values)
        as_rank(0, 1)
        folder = mf.checkpoint.get_checkpoint_path(str(root))
        dst = mf.sharded.get_sharded_tensor_from_cell(cell(ms, {"scale": values["scale"]}))
        src, mappings = mf.metadata.get_metadata_of_checkpoint(folder)
        dst["none"] = mf.sharded.build_sharded_tensor("none", None, (0, 4), (0, 4), (1, 1))
        loaded = mf.reshard.ReshardLoader(folder, dst, src, mappings).load()
        assert loaded.keys() == {"scale"}
        assert loaded["scale"].asnumpy() == np.float32(2.5)

    @pytest.mark.parametrize("dtype", sorted(set(dtypes.BY_CODE) - {dtypes.STRING}))
    def test_mindformers_knows_our_dtype_names(self, mf, tmp_path, dtype):
        target = checkpoint2.plan_target({"w": (dtype, (4,))}, [(0, "w", whole((4,)))], {}, "", 1)
        path = tmp_path / "metadata.json"
        path.write_bytes(next(s.data for s in target.small if s.relpath.endswith("metadata.json")))
        tensors, _ = mf.metadata.load_metadata(str(path))
        assert str(tensors["w"][0].dtype) == dtypes.BY_CODE[dtype].mindspore

    def test_distribution_is_mindformers(self, mf):
        rng = random.Random(3)  # noqa: S311 - test data
        for _ in range(50):
            params = {f"w{i}": (rng.choice(["F32", "BF16", "BOOL", "I4X2", "F8_E4M3"]), (4, 6)) for i in range(12)}
            held: list[tuple[int, str, Box]] = []
            for name in params:
                cuts = rng.choice([(1, 1), (2, 1), (2, 3), (4, 1)])
                numbers = [n % prod(cuts) for n in range(prod(cuts) * rng.choice([1, 2]))]
                held += [(rank, name, slice_box(n, (4, 6), cuts)) for rank, n in enumerate(numbers)]
            target = checkpoint2.plan_target(params, held, {}, "", 1)
            metadata = json.loads(next(s.data for s in target.small if s.relpath.endswith("metadata.json")))
            owners = {
                key: (e["storage_rank"], tuple(e["rank_group"])) for key, (e,) in metadata["storage_data"].items()
            }
            sizes, coverage = {}, {}
            for name, described in metadata["state_dict_metadata"].items():
                for chunk in described["chunk"]:
                    key = mf.utils.get_sharded_tensor_shard_id(name, chunk["global_offset"])
                    sizes[key] = mf.utils._get_shard_size(chunk["local_shape"], described["properties"]["dtype"])
                    coverage[key] = owners[key][1]
            assert owners == mf.balance.distribute_shards(coverage, sizes, 12)


# ------------------------------------------------------------------------------------------------- without MindFormers


def test_round_trip(tmp_path):
    source = checkpoint2.read(str(write(plan(), tmp_path, arrays())))
    assert_model(source)
    assert_common(source)
    assert source.format == checkpoint2.FORMAT == "mindspore-checkpoint-2.0"
    assert [h.format for h in source.headers].count("json") == 2


def test_plan_is_deterministic_whatever_the_order_of_placements():
    boxes = placements(stages())
    params = {name: (code(array), array.shape) for name, array in arrays().items()}
    random.Random(0).shuffle(boxes)  # noqa: S311 - test data
    assert checkpoint2.plan_target(params, boxes, COMMON, "tiny", 12) == plan()


@pytest.mark.parametrize("dtype", sorted(set(dtypes.BY_CODE) - {dtypes.STRING}))
@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (), (1,)])
def test_every_dtype_and_odd_shapes(tmp_path, dtype, shape):
    raw = np.arange(prod(shape) * dtypes.itemsize(dtype), dtype=np.uint8)
    value = raw.view(f"V{dtypes.itemsize(dtype)}").reshape(shape)
    boxes = [(0, "w", whole(shape)), (1, "w", whole(shape))]
    root = write(checkpoint2.plan_target({"w": (dtype, shape)}, boxes, {}, "x", 5), tmp_path, {"w": value})
    logical = checkpoint2.read(str(root)).params["w"]
    assert (logical.dtype, logical.shape) == (dtype, shape)
    (piece,) = logical.pieces
    (extent,) = piece.tensor.extents
    data = Path(piece.tensor.path).read_bytes()[extent.offset_bytes : extent.offset_bytes + extent.nbytes]
    assert data == raw.tobytes()
    assert piece.box == whole(shape)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    matrix = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    axes = draw(st.permutations(range(len(matrix))))
    ndim = draw(st.integers(1, 3))
    owner = [draw(st.integers(-1, ndim - 1)) for _ in axes]
    tensor_map = tuple(tuple(a for a, o in zip(axes, owner, strict=True) if o == dim) for dim in range(ndim))
    layout = Layout(matrix, tensor_map)
    sizes = [n for n in (-1, 0, 2, 3) if n <= 0 or layout.replicas % n == 0]
    layout = Layout(matrix, tensor_map, 1, draw(st.sampled_from(sizes)))
    return layout, tuple(cut * draw(st.integers(1, 3)) for cut in layout.cuts(ndim))


@given(meshes(), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_any_mesh_is_found_again(mesh, first):
    layout, shape = mesh
    cuts = layout.cuts(len(shape))
    cells = [layout.index(device) for device in range(layout.devices)]
    found = checkpoint2_write.infer_mesh(cells, cuts)
    # a shard of some of the replicas may fall across mesh axes (2 parts of 3 x 2 replicas): no mesh in rank order
    assert found is not None or layout.opt_parts not in {1, layout.replicas}
    assert found is None or [found.index(device) for device in range(found.devices)] == cells
    held = [(first + device, "w", layout.box(device, shape)) for device in range(layout.devices)]
    target = checkpoint2.plan_target({"w": ("F32", shape)}, held, {}, "", 1)
    metadata = json.loads(next(s.data for s in target.small if s.relpath.endswith("metadata.json")))
    described = metadata["state_dict_metadata"]["w"]["layout"]
    assert layout_boxes(described, shape) == {rank: box for rank, _, box in held}
    stored = sorted(box for file in target.files for box in file.boxes.values())
    assert stored == sorted({box for _, _, box in held})


@given(st.lists(st.integers(0, 5), min_size=6, max_size=18))
@settings(max_examples=100, deadline=None)
def test_any_placement_gets_a_true_layout(numbers):
    cuts, shape = (2, 3), (4, 9)
    numbers = [*range(6), *numbers]
    random.Random(len(numbers)).shuffle(numbers)  # noqa: S311 - test data
    described, replica_id = checkpoint2_write._layout(tuple(range(len(numbers))), tuple(numbers), cuts)
    assert len(described["rank_list"]) == len(replica_id)
    for rank, box in layout_boxes(described, shape).items():
        assert box == slice_box(numbers[rank], shape, cuts)


def test_shared_parameter_cut_in_two_ways_keeps_the_first():
    held = [(0, "w", Box((0,), (4,))), (1, "w", Box((4,), (4,))), (2, "w", whole((8,))), (3, "w", whole((8,)))]
    target = checkpoint2.plan_target({"w": ("F32", (8,))}, held, {}, "", 1)
    assert [box for file in target.files for box in file.boxes.values()] == [Box((0,), (4,)), Box((4,), (4,))]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], "no rank holds it"),
        ([(0, "w", Box((0, 0), (2, 6)))], "no rank holds slices 1 of 2"),
        ([(0, "w", Box((1, 0), (2, 6)))], "not an equal slice"),
        ([(0, "w", Box((0, 0), (3, 6)))], "not an equal slice|no rank holds"),
        ([(0, "w", Box((0, 0), (2, 6))), (0, "w", Box((2, 0), (2, 6)))], "rank 0 holds two slices"),
        ([(0, "w", whole((4, 6))), (0, "v", whole((4,)))], "v: placed on rank 0, but not a parameter"),
        ([(0, "w", whole((4,)))], r"holds \[4\] of shape \[4, 6\]"),
    ],
)
def test_plan_refuses(held, message):
    with pytest.raises(PlanError, match=message):
        checkpoint2.plan_target({"w": ("F32", (4, 6))}, held, {}, "", 1)


@pytest.mark.parametrize(("prefix", "step"), [("../x", 1), ("a/b", 1), ("x", -1)])
def test_plan_refuses_names(prefix, step):
    with pytest.raises(UsageError):
        checkpoint2.plan_target({}, [], {}, prefix, step)


def test_strings_are_refused():
    with pytest.raises(PlanError, match="cannot store a string"):
        checkpoint2.plan_target({"note": (dtypes.STRING, ())}, [(0, "note", whole(()))], {}, "", 1)


class TestScalars:
    def test_written_as_the_real_writer_does(self):
        common = json.loads(dump_common({"epoch_num": 2, "loss_scale": 1024.0}, 7))
        assert list(common) == [
            "epoch_num",
            "step_num",
            "global_step",
            "loss_scale",
            "global_batch_size",
            "ckpt_status",
        ]
        assert common["global_step"] == common["step_num"] == 7
        assert common["global_batch_size"] is None

    def test_a_scalar_without_field_is_named(self):
        target = plan(scalars={**COMMON, "scale_sense": 1.0, "learning_rate": 0.1})
        assert target.dropped == ("learning_rate", "scale_sense")
        assert any("learning_rate" in note for note in target.notes)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("epoch_num", 3, ("I64", (), struct.pack("<q", 3))),
            ("global_step", 3, ("I32", (1,), struct.pack("<i", 3))),
            ("loss_scale", 4, ("F32", (), struct.pack("<f", 4))),
            ("other", True, ("BOOL", (), b"\1")),
            ("other", "ab", (dtypes.STRING, (), "ab".encode("utf-32-le"))),
        ],
    )
    def test_encoding(self, name, value, expected):
        assert encode_scalar(name, value) == expected

    @pytest.mark.parametrize(("name", "value"), [("global_step", 2**31), ("epoch_num", 2**63), ("loss_scale", 1e39)])
    def test_what_does_not_fit_is_said(self, tmp_path, name, value):
        root = write(plan(), tmp_path, arrays())
        edit(root, "common.json", lambda common: common.update({name: value}))
        with pytest.raises(InputError, match=f"common.json: {name} is .* does not fit"):
            checkpoint2.read(str(root))

    def test_special_floats_survive(self, tmp_path):
        root = write(plan(scalars={"loss_scale": float("inf")}), tmp_path, arrays())
        inline = checkpoint2.read(str(root)).states["loss_scale"].pieces[0].tensor.inline
        assert inline == struct.pack("<f", float("inf"))


# ------------------------------------------------------------------------------------------------- finding it


def several(root: Path) -> Path:
    for step in (5, 12, 100):
        write(plan(step), root, arrays())
    (root / "latest_checkpointed_iteration.txt").write_text("12\n")
    return root


def test_tracker_chooses_and_step_overrides(tmp_path):
    root = several(tmp_path)
    assert checkpoint2.read(str(root)).step == 12
    assert checkpoint2.read(str(root), step=100).step == 100
    assert checkpoint2.read(str(root / "iteration_00000005")).step == 5
    assert checkpoint2.read(str(root / "iteration_00000005") + "/", step=5).step == 5


def test_without_tracker_the_highest_with_a_note(tmp_path):
    root = several(tmp_path)
    (root / "latest_checkpointed_iteration.txt").unlink()
    source = checkpoint2.read(str(root))
    assert source.step == 100
    assert "cut short" in source.notes[0]


@pytest.mark.parametrize("step", [0, 13])
def test_unknown_step(tmp_path, step):
    with pytest.raises(InputError, match=rf"iteration {step}, found: 5, 12, 100"):
        checkpoint2.read(str(several(tmp_path)), step=step)


def test_wrong_step_of_an_iteration_directory(tmp_path):
    with pytest.raises(InputError, match="asked for step 12, this directory is 5's"):
        checkpoint2.read(str(several(tmp_path) / "iteration_00000005"), step=12)


@pytest.mark.parametrize("text", ["", "release", "-3", "9" * 30, "\xff"])
def test_damaged_tracker(tmp_path, text):
    root = several(tmp_path)
    (root / "latest_checkpointed_iteration.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not an iteration number"):
        checkpoint2.read(str(root))


def test_tracker_of_a_missing_iteration(tmp_path):
    root = several(tmp_path)
    (root / "latest_checkpointed_iteration.txt").write_text("13")
    with pytest.raises(InputError, match="the tracker names iteration 13, found: 5, 12, 100"):
        checkpoint2.read(str(root))


def test_renamed_iteration_directory(tmp_path):
    root = several(tmp_path)
    (root / "iteration_00000005").rename(tmp_path / "kept")
    assert checkpoint2.detect(str(tmp_path / "kept"))
    source = checkpoint2.read(str(tmp_path / "kept"))
    assert source.step is None
    assert_model(source)


@pytest.mark.parametrize(
    ("name", "step"),
    [("iteration_00000005", 5), ("iteration_123456789", 123456789), ("iteration_5", None), ("iter_0000005", None)],
)
def test_iteration_names(name, step):
    assert parse_iteration(name) == step


def test_detect_knows_its_own_only(tmp_path):
    assert not checkpoint2.detect(str(tmp_path))
    assert not checkpoint2.detect(str(tmp_path / "absent"))
    for name in ("iter_0000001", "rank_0", "iteration_00000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "rank_0" / "net_0.safetensors").touch()
    assert not checkpoint2.detect(str(tmp_path))
    assert not checkpoint2.detect(str(tmp_path / "rank_0"))
    with pytest.raises(InputError):
        checkpoint2.read(str(tmp_path / "rank_0"))
    (tmp_path / "iteration_00000001" / "model-0000000-0000001.safetensors").touch()
    assert checkpoint2.detect(str(tmp_path))


# ------------------------------------------------------------------------------------------------- lies


def edit(root: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change one JSON file of the only iteration."""
    path = root / "iteration_00000012" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def entry(metadata: Any, name: str = "l0.wq") -> Any:
    return metadata["state_dict_metadata"][name]


def stored(metadata: Any) -> Any:
    return metadata["storage_data"]["('l0.wq', (0,))"][0]


LIES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: entry(m)["chunk"][0].update(global_offset=[9]), r"l0\.wq.*global_offset 9 lies outside"),
    (lambda m: entry(m)["chunk"][0].update(global_offset=[0, 0]), "2 numbers, expected 1"),
    (lambda m: entry(m)["chunk"][0].update(global_offset=[-1]), "expected a list of whole numbers"),
    (lambda m: entry(m)["chunk"][0].update(global_offset=[True]), "expected a list of whole numbers"),
    (lambda m: entry(m)["chunk"][0].update(global_offset=[2**70]), "expected a list of whole numbers"),
    (lambda m: entry(m)["chunk"][0].update(local_shape=[8, 6]), r"is \[8, 6\], expected \[4, 6\]"),
    (lambda m: entry(m).update(global_shape=[9, 6]), "does not divide"),
    (lambda m: entry(m).update(global_shape=[16, 6]), r"local_shape of slice 0 is \[4, 6\], expected \[8, 6\]"),
    (lambda m: entry(m).update(axis_fragmentations=[2]), "do not fit global_shape"),
    (lambda m: entry(m).update(axis_fragmentations=[0, 1]), "do not fit global_shape"),
    (lambda m: entry(m).update(chunk=[]), "has no chunk"),
    (lambda m: entry(m)["chunk"].append(entry(m)["chunk"][0]), "lists a chunk twice"),
    (lambda m: entry(m)["properties"].update(dtype="Float99"), "dtype 'Float99' is unknown"),
    (lambda m: entry(m)["properties"].update(dtype="Float32"), "is BF16, metadata.json expects F32"),
    (lambda m: entry(m)["layout"].update(rank_list=[1, 0, 3, 2]), "rank 0 stores slice 0, its layout says 1"),
    (lambda m: entry(m)["layout"].update(rank_list=[0, 1]), "rank_list has 2 ranks"),
    (lambda m: entry(m)["layout"].update(tensor_map=[7, -1]), "no such axis"),
    (lambda m: entry(m)["layout"].update(tensor_map=["a", -1]), "expected an axis"),
    (lambda m: entry(m)["layout"].update(tensor_map=[-1, -1]), "axis_fragmentations in"),
    (lambda m: entry(m)["layout"].update(device_matrix=[10**30, 1]), "device_matrix"),
    (lambda m: entry(m)["layout"].update(interleaved_parallel=True), "interleaved_parallel"),
    (lambda m: entry(m).update(layout=3), "layout is not an object"),
    (
        lambda m: stored(m).update(file_name="../tiny-model-0000000-0000008.safetensors"),
        "leaves the directory: refused",
    ),
    (lambda m: stored(m).update(file_name="/etc/x.safetensors"), "leaves the directory: refused"),
    (lambda m: stored(m).update(file_name="a/b.safetensors"), "leaves the directory: refused"),
    (lambda m: stored(m).update(file_name=".."), "expected the name of a .safetensors file"),
    (lambda m: stored(m).update(file_name=None), "expected the name of a .safetensors file"),
    (lambda m: stored(m).update(file_name="tiny-model-0000099-0000100.safetensors"), "0000099.*is not there"),
    (lambda m: stored(m).update(storage_rank=-1), "expected a rank"),
    (lambda m: stored(m).update(storage_rank=6), "file at once"),
    (lambda m: m["storage_data"].pop("('l0.wq', (0,))"), "storage_data has no"),
    (lambda m: m["state_dict_metadata"].update(ghost=dict(entry(m))), "'ghost'.*storage_data has no"),
    (lambda m: m["state_dict_metadata"].update(ghost=3), "'ghost': has no description"),
    (lambda m: m.pop("storage_data"), "expected the objects"),
]


@pytest.mark.parametrize(("change", "message"), LIES)
def test_lying_metadata(tmp_path, change, message):
    root = write(plan(), tmp_path, arrays())
    edit(root, "metadata.json", change)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint2.read(str(root))
    assert str(root) in str(caught.value)


def test_all_problems_are_said_at_once(tmp_path):
    root = write(plan(), tmp_path, arrays())

    def change(metadata: Any) -> None:
        entry(metadata)["chunk"][0].update(global_offset=[9])
        entry(metadata, "l1.wq")["chunk"][0].update(local_shape=[1])

    edit(root, "metadata.json", change)
    with pytest.raises(InputError) as caught:
        checkpoint2.read(str(root))
    assert len(str(caught.value).splitlines()) == 2


def files(root: Path) -> list[Path]:
    return sorted((root / "iteration_00000012").glob("*.safetensors"))


def test_missing_file(tmp_path):
    root = write(plan(), tmp_path, arrays())
    files(root)[0].unlink()
    with pytest.raises(InputError, match=rf"names {files(tmp_path)[0].name[:10]}.* which is not there"):
        checkpoint2.read(str(root))


def test_files_of_another_save(tmp_path):
    """Two files swapped: names, shapes and dtypes no longer fit."""
    root = write(plan(), tmp_path, arrays())
    first, second = files(root)[0], files(root)[-1]
    shutil.copy(second, first)
    with pytest.raises(InputError, match=r"save the checkpoint again|fetch both again"):
        checkpoint2.read(str(root))


def test_wrong_shape_in_the_file(tmp_path):
    root = write(plan(), tmp_path, arrays())
    held = next(f for f in files(root) if b'"l0.wq"' in f.read_bytes())
    data = held.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    changed = header.replace(b'"l0.wq":{"dtype":"BF16","shape":[4,6]', b'"l0.wq":{"dtype":"BF16","shape":[6,4]')
    assert changed != header
    held.write_bytes(data[:8] + changed + data[8 + len(header) :])
    with pytest.raises(InputError, match=r"'l0.wq' has shape \[6, 4\], metadata.json expects \[4, 6\] for slice"):
        checkpoint2.read(str(root))


@pytest.mark.parametrize("name", ["metadata.json", "common.json"])
@pytest.mark.parametrize("cut", [0, 1, 40, -3])
def test_truncated_json(tmp_path, name, cut):
    root = write(plan(), tmp_path, arrays())
    path = root / "iteration_00000012" / name
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=rf"{name}: not JSON .* truncated or damaged"):
        checkpoint2.read(str(root))


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, '{"a": 1, "a": 2}', "\xff\xfe"])
@pytest.mark.parametrize("name", ["metadata.json", "common.json"])
def test_hostile_json(tmp_path, name, text):
    root = write(plan(), tmp_path, arrays())
    (root / "iteration_00000012" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=name):
        checkpoint2.read(str(root))


@pytest.mark.parametrize("value", [[1], {"a": 1}])
def test_common_with_other_than_numbers(tmp_path, value):
    root = write(plan(), tmp_path, arrays())
    edit(root, "common.json", lambda common: common.update(step_num=value))
    with pytest.raises(InputError, match=r"step_num is a .* expected a number"):
        checkpoint2.read(str(root))


def test_truncated_tensor_file(tmp_path):
    root = write(plan(), tmp_path, arrays())
    os.truncate(files(root)[0], files(root)[0].stat().st_size - 1)
    with pytest.raises(InputError, match="truncated"):
        checkpoint2.read(str(root))


def test_metadata_lost_of_several_ranks(tmp_path):
    root = write(plan(), tmp_path, arrays())
    (root / "iteration_00000012" / "metadata.json").unlink()
    with pytest.raises(InputError, match=r"one of several ranks' files, but there is no metadata.json"):
        checkpoint2.read(str(root))


def test_one_card_with_a_name_twice(tmp_path):
    folder = tmp_path / "iteration_00000001"
    target = checkpoint2.plan_target({"w": ("F32", (4,))}, [(0, "w", whole((4,)))], {}, "", 1)
    write(target, tmp_path, {"w": np.zeros(4, np.float32)})
    (folder / "metadata.json").unlink()
    assert checkpoint2.read(str(tmp_path)).params.keys() == {"w"}
    shutil.copy(folder / "model-0000000-0000001.safetensors", folder / "opt-0000000-0000001.safetensors")
    with pytest.raises(InputError, match="w is in another file, too"):
        checkpoint2.read(str(tmp_path))


# ------------------------------------------------------------------------------------------ what real ones have


def add_listed(metadata: Any, name: str, *, like: str = "l0.bias") -> None:
    metadata["state_dict_metadata"][name] = metadata["state_dict_metadata"][like]
    metadata["storage_data"][f"('{name}', (0,))"] = metadata["storage_data"][f"('{like}', (0,))"]


def test_accumulated_gradients_are_listed_and_not_stored(tmp_path):
    root = write(plan(), tmp_path, arrays())
    edit(root, "metadata.json", lambda m: add_listed(m, "accu_grads.l0.bias"))
    source = checkpoint2.read(str(root))
    assert_model(source)
    assert any("accumulated gradients of 1 " in note for note in source.notes)


def test_another_listed_name_must_be_stored(tmp_path):
    root = write(plan(), tmp_path, arrays())
    edit(root, "metadata.json", lambda m: add_listed(m, "l0.other"))
    with pytest.raises(InputError, match=r"lists l0\.other, which no file holds"):
        checkpoint2.read(str(root))


def test_a_listed_copy_may_be_missing(tmp_path):
    """A shared embedding: listed for both stages, stored by the first."""
    root = write(plan(), tmp_path, arrays())

    def change(metadata: Any) -> None:
        key = "('l0.bias', (0,))"
        have = metadata["storage_data"][key][0]["storage_rank"]
        other = next(e for (e,) in metadata["storage_data"].values() if e["storage_rank"] != have)
        metadata["storage_data"][key].append(dict(other))

    edit(root, "metadata.json", change)
    source = checkpoint2.read(str(root))
    assert_model(source)
    assert any("not every listed copy of l0.bias" in note for note in source.notes)


def test_older_metadata_without_rank_group_and_known_dtype(tmp_path):
    root = write(plan(), tmp_path, arrays())

    def change(metadata: Any) -> None:
        for entries in metadata["storage_data"].values():
            entries[0].pop("rank_group")
        entry(metadata)["properties"]["dtype"] = "None"

    edit(root, "metadata.json", change)
    assert_model(checkpoint2.read(str(root)))


def test_leftovers_are_noted(tmp_path):
    root = write(plan(), tmp_path, arrays())
    shutil.copy(files(root)[0], files(root)[0].with_name("tiny-model-0000042-0000043.safetensors"))
    edit(root, "metadata.json", lambda m: m["storage_data"].update({"('gone', (0,))": []}))
    (root / "iteration_00000012" / "common.json").unlink()
    source = checkpoint2.read(str(root))
    assert_model(source)
    assert not source.states
    assert [any(word in note for note in source.notes) for word in ("0000042", "gone", "no common.json")] == [True] * 3


def unlisted(root: Path, ranks: int) -> Path:
    """Two parameters, each cut over the ranks; metadata.json no longer lists the second."""
    shape = (ranks, 2)
    held = [(rank, name, slice_box(rank, shape, (ranks, 1))) for rank in range(ranks) for name in ("w", "v")]
    target = checkpoint2.plan_target({"w": ("F32", shape), "v": ("F32", shape)}, held, {}, "", 12)
    write(target, root, dict.fromkeys("wv", np.ones(shape, np.float32)))
    edit(root, "metadata.json", lambda m: m["state_dict_metadata"].pop("v"))
    return root


def test_unlisted_tensors_are_states(tmp_path):
    source = checkpoint2.read(str(unlisted(tmp_path, 2)))
    assert source.params.keys() == {"w"}
    assert [piece.rank for piece in source.states["v"].pieces] == [0, 1]
    assert source.states["v"].shape == (1, 2)
    assert any("no parameter has" in note for note in source.notes)


def test_unlisted_tensors_must_agree(tmp_path):
    root = unlisted(tmp_path, 2)
    held = files(root)[1]
    held.write_bytes(
        held.read_bytes().replace(b'"v":{"dtype":"F32","shape":[1,2]', b'"v":{"dtype":"F32","shape":[2,1]')
    )
    with pytest.raises(InputError, match=r"'v' is F32\[2, 1\], F32\[1, 2\] in .* does not say which part"):
        checkpoint2.read(str(root))
