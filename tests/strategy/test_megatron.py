"""Megatron's layers, directories and ranks against its own offsets, against the formulas of its documents, by hand."""

from __future__ import annotations

import warnings
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from strategy.megatron import (
    LayerMap,
    MegatronError,
    Sizes,
    directory_name,
    global_rank,
    layer_map,
    parse_directory,
)

check = settings(deadline=None, max_examples=200)
few = st.integers(1, 4)


@pytest.fixture(scope="session")
def offset() -> Any:
    """megatron-core's own get_transformer_layer_offset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = pytest.importorskip("megatron.core.transformer.transformer_layer")
    return layer.get_transformer_layer_offset


@pytest.mark.parametrize(
    ("layers", "options", "chunks"),
    [
        (3, {}, [[[0, 1, 2]]]),
        (4, {"pp": 2}, [[[0, 1]], [[2, 3]]]),
        (4, {"pp": 2, "num_layer_list": [1, 3]}, [[[0]], [[1, 2, 3]]]),
        (8, {"pp": 2, "layers_per_virtual_stage": 2}, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        (8, {"pp": 2, "vpp": 2}, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        (8, {"pp": 2, "vpp": 2, "layers_per_virtual_stage": 2}, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        (4, {"pp": 2, "layers_per_virtual_stage": 2}, [[[0, 1]], [[2, 3]]]),
        (4, {"vpp": 2}, [[[0, 1], [2, 3]]]),
        (6, {"pp": 2, "noop_layers": [2, 5]}, [[[0, 1, None]], [[2, 3, None]]]),
        (6, {"pp": 2, "noop_layers": [3, 0]}, [[[None, 0, 1]], [[None, 2, 3]]]),
        (8, {"pp": 2, "vpp": 2, "noop_layers": [4, 5]}, [[[0, 1], [None, None]], [[2, 3], [4, 5]]]),
        (7, {"pp": 3, "first_stage_layers": 1}, [[[0]], [[1, 2, 3]], [[4, 5, 6]]]),
        (7, {"pp": 3, "last_stage_layers": 3}, [[[0, 1]], [[2, 3]], [[4, 5, 6]]]),
        (7, {"pp": 3, "first_stage_layers": 1, "last_stage_layers": 2}, [[[0]], [[1, 2, 3, 4]], [[5, 6]]]),
        (5, {"pp": 2, "first_stage_layers": 4, "last_stage_layers": 1}, [[[0, 1, 2, 3]], [[4]]]),
        (8, {"pp": 2, "vpp": 2, "first_stage_layers": 2}, [[[0], [4]], [[1, 2, 3], [5, 6, 7]]]),
        (4, {"pp": 2, "schedule": "dualpipev"}, [[[0], [3]], [[1], [2]]]),
        (8, {"pp": 2, "schedule": "dualpipev"}, [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]),
        (4, {"schedule": "dualpipev"}, [[[0, 1], [2, 3]]]),
        (8, {"pp": 2, "schedule": "dualpipev", "noop_layers": [2, 7]}, [[[0, 1], [5, None]], [[None, 2], [3, 4]]]),
    ],
)
def test_layers_by_hand(layers: int, options: dict[str, Any], chunks: list[Any]) -> None:
    found = layer_map(layers, **options)
    assert [[list(chunk) for chunk in stage] for stage in found.chunks] == chunks
    assert found.num_layers == layers - len(options.get("noop_layers", ()))
    assert found.first == (0, 0)
    assert found.last == ((0, 1) if "schedule" in options else (len(chunks) - 1, len(chunks[0]) - 1))


@check
@given(pp=few, vpp=few, per_chunk=few, data=st.data())
def test_noop_layers_are_where_mindspeed_puts_them(pp: int, vpp: int, per_chunk: int, data: st.DataObject) -> None:
    total = pp * vpp * per_chunk
    noops = data.draw(st.lists(st.integers(0, total - 1), unique=True))
    found = layer_map(total, pp=pp, layers_per_virtual_stage=per_chunk, noop_layers=noops)
    k, real = per_chunk, 0
    for number in range(total):
        place = number % (pp * k) // k, number // k // pp, number % (total // pp) % k
        if number in noops:
            assert found.chunks[place[0]][place[1]][place[2]] is None
            with pytest.raises(MegatronError, match="has no layer"):
                found.global_layer(*place)
        else:
            assert found.place_of(real) == place
            assert found.global_layer(*place) == real
            real += 1
    assert found.num_layers == real


@check
@given(pp=few, vpp=few, middle=few, first=st.none() | few, last=st.none() | few)
def test_layers_start_where_megatron_starts_them(
    pp: int, vpp: int, middle: int, first: int | None, last: int | None, offset: Any
) -> None:
    assume(pp > (first is not None) + (last is not None))
    first, last = (None if n is None else n * vpp for n in (first, last))
    others = pp - (first is not None) - (last is not None)
    layers = (first or 0) + (last or 0) + middle * vpp * others
    config = SimpleNamespace(
        pipeline_model_parallel_size=pp,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        num_layers=layers,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    if pp == 1:  # Megatron interleaves over several stages only
        vpp = 1
    found = layer_map(layers, pp=pp, vpp=vpp, first_stage_layers=first, last_stage_layers=last)
    for p, v in product(range(pp), range(vpp)):
        start = offset(config, v if vpp > 1 else None, p)
        assert found.chunks[p][v] == tuple(range(start, start + len(found.chunks[p][v])))
    assert sorted(n for stage in found.chunks for chunk in stage for n in chunk if n is not None) == [*range(layers)]


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (0, {}, "num_layers is 0"),
        (4, {"pp": 0}, "pp is 0"),
        (4, {"layers_per_virtual_stage": 0}, "layers_per_virtual_stage is 0"),
        (7, {"pp": 2}, "7 layers do not divide over 2 pipeline stages"),
        (7, {"pp": 4, "first_stage_layers": 2}, "5 of 7 layers do not divide over 3"),
        (7, {"pp": 2, "first_stage_layers": 2, "last_stage_layers": 4}, "1 of 7 layers do not divide over 0"),
        (7, {"pp": 3, "first_stage_layers": 8}, "-1 of 7 layers"),
        (7, {"pp": 3, "first_stage_layers": 0}, r"\[0\] layers, expected 1"),
        (7, {"first_stage_layers": 7}, "need pp 2"),
        (4, {"pp": 2, "num_layer_list": [1, 2]}, "2 stages of 3 layers together, expected 2 stages of 4"),
        (4, {"pp": 2, "num_layer_list": [1, 1, 2]}, "3 stages of 4 layers together, expected 2 stages of 4"),
        (4, {"pp": 2, "num_layer_list": [-1, 5]}, r"num_layer_list \[-1, 5\]"),
        (6, {"pp": 2, "vpp": 2}, "3 layers of stage 0 do not divide into 2 chunks"),
        (6, {"pp": 2, "layers_per_virtual_stage": 2}, "3 layers of a stage do not divide into chunks of 2"),
        (8, {"pp": 2, "vpp": 4, "layers_per_virtual_stage": 2}, "4 layers in chunks of 2 are not 4 chunks"),
        (8, {"pp": 3, "vpp": 2, "first_stage_layers": 2, "last_stage_layers": 3}, "3 layers of stage 1 do not"),
        (6, {"pp": 2, "schedule": "dualpipev"}, "3 layers of stage 0 do not divide into 2 chunks"),
        (4, {"schedule": "1f1b"}, "schedule '1f1b' is not known"),
        (4, {"noop_layers": [1, 4]}, r"\[1, 4\] among 4 layers: not 0 to 3"),
        (4, {"noop_layers": [-1]}, "among 4 layers"),
        (4, {"noop_layers": [1, 1]}, "twice"),
        (4, {"num_layer_list": [4], "vpp": 2}, "num_layer_list together with vpp"),
        (4, {"num_layer_list": [4], "layers_per_virtual_stage": 4}, "num_layer_list together with layers_per_virtual"),
        (4, {"num_layer_list": [4], "noop_layers": [1]}, "num_layer_list together with noop_layers"),
        (4, {"num_layer_list": [2, 2], "pp": 2, "first_stage_layers": 2}, "num_layer_list together with first_stage"),
        (4, {"num_layer_list": [2, 2], "pp": 2, "last_stage_layers": 2}, "num_layer_list together with first_stage"),
        (4, {"num_layer_list": [4], "schedule": "dualpipev"}, "num_layer_list together with dualpipev"),
        (4, {"noop_layers": [1], "pp": 2, "last_stage_layers": 2}, "noop_layers together with first_stage"),
        (4, {"layers_per_virtual_stage": 1, "pp": 2, "last_stage_layers": 2}, "layers_per_virtual_stage together with"),
        (8, {"schedule": "dualpipev", "vpp": 2}, "dualpipev together with vpp"),
        (8, {"schedule": "dualpipev", "layers_per_virtual_stage": 4}, "dualpipev together with layers_per_virtual"),
        (8, {"schedule": "dualpipev", "pp": 2, "first_stage_layers": 4}, "dualpipev together with first_stage"),
    ],
)
def test_options_that_cannot_be_are_refused(layers: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MegatronError, match=message):
        layer_map(layers, **options)


@pytest.mark.parametrize("place", [(2, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 2), (0, 0, -1)])
def test_a_place_without_a_layer_is_refused(place: tuple[int, int, int]) -> None:
    with pytest.raises(MegatronError, match=r"pp -?\d, chunk"):
        layer_map(4, pp=2).global_layer(*place)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(MegatronError, match=f"layer {layer} of 3 layers"):
        layer_map(4, noop_layers=[0]).place_of(layer)


def test_maps_are_values() -> None:
    assert layer_map(4, pp=2) == LayerMap((((0, 1),), ((2, 3),)))
    assert layer_map(4, schedule="dualpipev") != layer_map(4, vpp=2)


@pytest.mark.parametrize(
    ("pp_size", "ep_size", "rank", "name"),
    [
        (1, 1, (3, 0, 0), "mp_rank_03"),
        (2, 1, (0, 1, 0), "mp_rank_00_001"),
        (1, 2, (0, 0, 1), "mp_rank_00_001"),
        (4, 16, (12, 3, 10), "mp_rank_12_003_010"),
        (2000, 1, (100, 1234, 0), "mp_rank_100_1234"),
    ],
)
def test_directories(pp_size: int, ep_size: int, rank: tuple[int, int, int], name: str) -> None:
    assert directory_name(*rank, pp_size=pp_size, ep_size=ep_size) == name
    assert parse_directory(name, pp_size=pp_size, ep_size=ep_size) == rank


@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_0",
        "mp_rank_00",
        "mp_rank_00_002",
        "mp_rank_00_01",
        "mp_rank_00_000_000",
        "mp_rank_00_001.bak",
        "rank_0",
    ],
)
def test_other_directories_are_none_of_a_rank(name: str) -> None:
    assert parse_directory(name, pp_size=2, ep_size=1) is None


@check
@given(tp=few, cp=few, dp=few, pp=few)
def test_global_ranks_count_tp_first_then_cp_dp_pp(tp: int, cp: int, dp: int, pp: int) -> None:
    sizes = Sizes(tp=tp, cp=cp, dp=dp, pp=pp)
    mesh = np.arange(tp * cp * dp * pp).reshape(pp, dp, cp, tp)
    for (p, d, c, t), rank in np.ndenumerate(mesh):
        assert global_rank(t, p, d, c, sizes) == rank


def test_sizes_and_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(MegatronError, match="etp is 0"):
        Sizes(etp=0)
    with pytest.raises(MegatronError, match="cp is -1"):
        Sizes(cp=-1)
    for bad in ((2, 0, 0, 0), (0, 1, 0, 0), (0, 0, 3, 0), (0, 0, 0, -1)):
        with pytest.raises(MegatronError, match=r"rank -?\d of"):
            global_rank(*bad, Sizes(tp=2, dp=3, cp=2))
