"""Names and slices of the embedded Llama are those of the generated strategy."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from strategy.generate import generate
from tests.embedded.documents import document, sharded
from tests.strategy.generate_support import held
from transform_ckpt.embedded.config import read_embedded
from transform_ckpt.embedded.layout import check_world, parameter_shapes, slices
from transform_ckpt.errors import InputError

JOBS = {
    "one": {},
    "dp2": {"dp": 2},
    "mp2": {"mp": 2},
    "dp2mp2": {"dp": 2, "mp": 2},
    "dp2mp2, whole vocabulary": {"dp": 2, "mp": 2, "parallel": {"vocab_emb_dp": True}},
    "mp2, tied": {"mp": 2, "tie_word_embeddings": True},
    "mp2, odd vocabulary": {"mp": 2, "vocab_size": 63},
    "dp2mp2, sharded": {"dp": 2, "mp": 2, "shard": True},
    "dp4, ffn by multiple": {"dp": 4, "intermediate_size": None, "multiple_of": 16, "shard": True},
}


def config_of(name):
    changes = dict(JOBS[name])
    shard = changes.pop("shard", False)
    found = document(**changes)
    if shard:
        found["parallel"] = sharded()
    return read_embedded(found, "job.yaml")


@pytest.mark.parametrize("name", JOBS)
def test_slices_are_those_of_the_strategy(name):
    config = config_of(name)
    generated = generate(config.job)
    world = config.dp * config.mp
    for rank in range(world):
        found = parameter_shapes(config, rank, world, optimizer=True)
        assert found.pop("global_step") == (1,)
        assert sorted(found) == sorted(generated.strategy.names)
        boxes = slices(config, rank)
        for parameter, shape in found.items():
            layout = generated.strategy.stages[0].layouts[parameter]
            wanted = held(layout, generated.shapes[parameter])[rank]
            assert shape == tuple(stop - start for start, stop in wanted), parameter
            box = boxes[parameter.removeprefix("adam_m.").removeprefix("adam_v.")].box
            assert list(zip(box.start, box.stop(), strict=True)) == wanted, parameter


def test_a_sharded_slice_knows_its_group():
    config = config_of("dp2mp2, sharded")
    found = slices(config, 3)
    cut = found["model.layers.0.attention.wq.weight"]
    assert (cut.shape, cut.used, cut.parts, cut.copies, cut.replicas) == ((8, 32), (16, 32), 2, 1, 2)
    norm = found["model.norm_out.weight"]
    assert (norm.shape, norm.parts, norm.copies) == ((32,), 1, 4)


def test_weights_only():
    assert not [n for n in parameter_shapes(config_of("one"), 0, 1, optimizer=False) if n.startswith(("adam", "glob"))]


@pytest.mark.parametrize(("rank", "world", "message"), [(0, 3, "need 4 workers, found 3"), (4, 4, "rank 4 of 4")])
def test_another_number_of_workers_is_refused(rank, world, message):
    with pytest.raises(InputError, match=message):
        check_world(config_of("dp2mp2"), rank, world)


@pytest.mark.parametrize("name", JOBS)
def test_first_weights_are_slices_of_the_same_tensors(ms, name):
    first_values = importlib.import_module("transform_ckpt.embedded.state").first_values
    config = config_of(name)
    whole_job = {key: value for key, value in JOBS[name].items() if key not in {"dp", "mp", "parallel", "shard"}}
    alone = read_embedded(document(**whole_job), "job.yaml")
    whole = {key: first_values(alone)(found) for key, found in slices(alone, 0).items()}
    drawn = set()
    for rank in range(config.dp * config.mp):
        for key, found in slices(config, rank).items():
            index = tuple(slice(a, b) for a, b in zip(found.box.start, found.box.stop(), strict=True))
            np.testing.assert_array_equal(first_values(config)(found), whole[key][index], key)
    drawn = {values.tobytes() for key, values in whole.items() if len(values.shape) == 2}
    assert len(drawn) == sum(len(values.shape) == 2 for values in whole.values())
