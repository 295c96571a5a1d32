"""Megatron to Megatron: real megatron-core takes what the product made of another layout's checkpoint, bit for bit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from strategy.megatron import Sizes
from tests.megatron_real.case import Case
from tests.megatron_real.converting import (
    assert_same_files,
    assert_same_models,
    assert_same_optimizers,
    bits,
    buffers,
    models,
    reshard,
    target,
    through_mindspore,
)
from tests.megatron_real.drawing import drawn_pair
from tests.megatron_real.environments import Failed, Unavailable, environment
from tests.megatron_real.logical import bfloat16
from tests.megatron_real.oracle import generate, load_back, logical_truth
from tests.megatron_real.pairs import ACROSS, ELSEWHERE, OLD_PAIRS, PAIRS, WIDE, Layers
from tests.support import Arrays
from transform_ckpt.errors import InputError
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron_plans import MegatronTarget, target_facts

Checkpoint = Callable[[Case], Path]
MAPS = "maps_of_the_run"
SEEDS = int(os.environ.get("MEGATRON_SEEDS", "15"))
RANKS = 8 if "MEGATRON_SEEDS" in os.environ else 4
"""MEGATRON_SEEDS=200 draws so many pairs of layouts, and larger ones."""


def available(version: str) -> None:
    try:
        environment(version)
    except Unavailable as reason:
        pytest.skip(str(reason))


def without_map(directory: Path) -> Path:
    """The run's param_map put where the product does not look by itself: it has to rebuild it."""
    (directory / "param_map").rename(directory / MAPS)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Generates each case once."""
    made: dict[Case, Path] = {}

    def make(case: Case) -> Path:
        available(case.version)
        if case not in made:
            made[case] = without_map(generate(case, tmp_path_factory.mktemp("megatron")))
        return made[case]

    return make


def check(case: Case, found: Path, expected: Path) -> None:
    """The case's own loader takes it, and the files are as those that the case itself wrote."""
    assert load_back(case, found) == {}
    assert_same_files(found, expected)
    assert_same_models(found, expected)


def check_ways(first: Case, second: Case, checkpoint: Checkpoint, out: Path) -> None:
    """With the optimizer, directly and by MindSpore files; and weights alone."""
    source, expected, options = checkpoint(first), checkpoint(second), target(second, first)
    direct = reshard(source, options, out / "all")
    check(second, direct, expected)
    assert_same_models(reshard(source, options, out / "weights", optimizer=False), expected)
    assert_taken_by_mindspore(source, options, direct, out)


def assert_taken_by_mindspore(source: Path, options: MegatronTarget, direct: Path, out: Path) -> None:
    """MindSpore's files on the way change nothing."""
    found = through_mindspore(source, options, out, "ckpt")
    assert_same_files(found, direct)
    assert_same_models(found, direct)
    assert_same_optimizers(found, direct)


@pytest.mark.megatron
@pytest.mark.parametrize("name", PAIRS)
def test_there_and_back(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    first, second = PAIRS[name]
    for directory in map(checkpoint, PAIRS[name]):
        assert buffers(directory, None) == buffers(directory, directory / MAPS)
    check_ways(first, second, checkpoint, tmp_path / "there")
    check_ways(second, first, checkpoint, tmp_path / "back")


@pytest.mark.megatron
@pytest.mark.parametrize("name", ["no_buckets", "tied_buckets", "experts_buckets", "latent_experts"])
def test_what_is_not_said_is_the_sources(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    for number, case in enumerate(PAIRS[name]):
        source = checkpoint(case)
        options = MegatronTarget(keep_step=True)
        direct = reshard(source, options, tmp_path / f"{number}" / "all")
        check(case, direct, source)
        assert_taken_by_mindspore(source, options, direct, tmp_path / f"{number}")


@pytest.mark.megatron_old
@pytest.mark.parametrize("name", OLD_PAIRS)
@pytest.mark.parametrize("version", ["0.6.0", "0.7.0"])
def test_older_versions(version: str, name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    first, second = (replace(case, version=version) for case in OLD_PAIRS[name])
    check_ways(first, second, checkpoint, tmp_path / "there")
    check_ways(second, first, checkpoint, tmp_path / "back")


@pytest.mark.megatron_old
def test_tied_embeddings_begin_where_dp_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """0.9 to 0.12: behind the padding of the bucket before, where dp does not divide its start."""
    first = Case(version="0.9.0", tied=True, pp=2, dp=3, gated=False, **WIDE)
    second = replace(first, dp=1)
    options = MegatronTarget(layout={"dp": 1}, keep_step=True)
    direct = reshard(checkpoint(first), options, tmp_path / "all")
    check(second, direct, checkpoint(second))
    assert_taken_by_mindspore(checkpoint(first), options, direct, tmp_path)


@pytest.mark.megatron_old
@pytest.mark.parametrize("name", ACROSS)
@pytest.mark.parametrize(("old", "new"), [("0.6.0", "0.16.1"), ("0.6.0", "0.7.0"), ("0.7.0", "0.16.1")])
def test_across_versions(old: str, new: str, name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = replace(ACROSS[name], version=old)
    second = replace(first, version=new, tp=2)
    check_ways(first, second, checkpoint, tmp_path / "there")
    check_ways(second, first, checkpoint, tmp_path / "back")
    same = replace(first, version=new)  # nothing but the version: other padding, or another container
    check_ways(first, same, checkpoint, tmp_path / "same")


@pytest.mark.megatron
@pytest.mark.parametrize("seed", range(SEEDS))
def test_drawn_layouts(seed: int, tmp_path: Path) -> None:
    available("0.16.1")
    first, second = drawn_pair(Random(seed), "0.16.1", RANKS)  # noqa: S311
    try:
        source, expected = (
            without_map(generate(case, tmp_path / name)) for name, case in (("a", first), ("b", second))
        )
    except Failed as error:  # what the model's own checks forbid
        pytest.skip(f"seed {seed}: {str(error).strip().splitlines()[-1]}")
    direct = reshard(source, target(second, first), tmp_path / "all")
    check(second, direct, expected)
    assert_taken_by_mindspore(source, target(second, first), direct, tmp_path)


@pytest.mark.megatron
@pytest.mark.parametrize("name", ELSEWHERE)
def test_layouts_of_mindspeed_and_back(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    case, layout, layers = ELSEWHERE[name]
    source = checkpoint(case)
    between = reshard(source, MegatronTarget(layout=layout), tmp_path / "between")
    assert layers_of(between, logical_truth(source)) == layers
    direct = reshard(between, target(case, case), tmp_path / "all")
    check(case, direct, source)
    assert_taken_by_mindspore(between, target(case, case), direct, tmp_path)


@pytest.mark.megatron
def test_a_stage_without_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    case = Case(layers=3)
    layout = MegatronTarget(layout={"pp": 4, "noop_layers": (1,)})
    between = reshard(checkpoint(case), layout, tmp_path / "between")
    check(case, reshard(between, target(case, case), tmp_path / "back"), checkpoint(case))
    with pytest.raises(InputError, match="stage 1 has no parameters, which no strategy file can say"):
        through_mindspore(between, target(case, case), tmp_path, "ckpt")


@pytest.mark.megatron
def test_places_of_ends(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """dualpipev folds the model: rank 0 has the embedding in its first chunk and the output layer in its second."""
    layout = MegatronTarget(layout={"pp": 2, "schedule": "dualpipev"})
    found = models(reshard(checkpoint(Case()), layout, tmp_path / "out"))
    outside = [name for name in found if ".layers." not in name and not name.endswith("_extra_state")]
    assert outside == [
        "mp_rank_00_000|model0|embedding.word_embeddings.weight",
        "mp_rank_00_000|model1|decoder.final_layernorm.weight",
        "mp_rank_00_000|model1|output_layer.weight",
    ]


def layers_of(directory: Path, truth: Arrays) -> Layers:
    """Which layer has which number in the chunks of TP rank 0: by a norm's weights, which are the layer's own."""
    whole = {bfloat16(a).tobytes(): name for name, a in truth.items() if name.endswith("input_layernorm.weight|param")}
    found: Layers = {}
    for name, tensor in models(directory).items():
        place = re.fullmatch(
            r"mp_rank_00_(\d+)(?:_000)?\|model(\d?)\|decoder\.layers\.(\d+)\.input_layernorm\.weight", name
        )
        if place:
            layer = int(whole[bits(tensor)[2]].split(".")[2])
            found.setdefault((int(place[1]), int(place[2] or 0)), {})[int(place[3])] = layer
    return found


def facts(**sizes: int) -> Facts:
    return Facts(Sizes(**sizes), 4)


@pytest.mark.parametrize(
    ("source", "given", "etp"),
    [
        ({"tp": 2}, {"tp": 4}, 4),
        ({"tp": 2, "etp": 2}, {"tp": 4}, 4),
        ({"tp": 2, "etp": 1}, {"tp": 4}, 1),
        ({"tp": 4, "etp": 2}, {"pp": 2}, 2),
        ({"tp": 2}, {"tp": 4, "etp": 2}, 2),
    ],
)
def test_expert_tensor_parallelism_goes_with_tp(source: dict[str, int], given: dict[str, int], etp: int) -> None:
    assert target_facts(facts(**source), given).etp == etp


def test_experts_cut_finer_than_directories_are_refused() -> None:
    with pytest.raises(InputError, match="size of 2 does not divide TP 1"):
        target_facts(facts(tp=4, etp=2), {"tp": 1})
