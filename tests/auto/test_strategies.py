"""The job's own strategy: written by each rank, read from one file of each stage, compared with the rules'."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from strategy.generate import Generated
from strategy.generate_files import MERGED_FILE, RANK_FILE, write_rank_files
from strategy.layout import Layout, Stage, Strategy
from strategy.mindspore_file import read_strategy
from tests.strategy.generate_support import CASES, GOLDEN, is_unconfirmed, legacy, params, sharded
from transform_ckpt.auto.strategies import by_rule, differences, first_ranks, read_compiled, write_merged, write_own
from transform_ckpt.errors import InputError

needs_golden = pytest.mark.skipif(not CASES, reason="no golden strategies beside this checkout: ../shared/golden")
MESHES = {1: (2, 2, 1), 2: (2, 2, 2), 4: (1, 2, 4)}


def made(pp: int, **more: Any) -> Generated:
    dp, mp, _ = MESHES[pp]
    config = {"data_parallel": dp, "model_parallel": mp, "pipeline_stage": pp}
    return by_rule(legacy(parallel_config=config, parallel=sharded(), **more), "run.yaml")


def written(found: Strategy, folder: Path) -> Path:
    """As a job leaves it: each rank its own file."""
    for rank in range(found.world):
        write_own(found, str(folder), rank)
    return folder


# ------------------------------------------------------------------------------------------------ writing, reading


@pytest.mark.parametrize("pp", MESHES)
def test_each_rank_writes_what_one_process_would_have_written(tmp_path: Path, pp: int) -> None:
    strategy = made(pp).strategy
    written(strategy, tmp_path / "ranks")
    merged = write_merged(strategy, str(tmp_path / "ranks"))
    write_rank_files(strategy, str(tmp_path / "one"))
    assert (merged is None) == (pp == 1)
    names = {path.name for path in (tmp_path / "ranks").iterdir()}
    assert names == {RANK_FILE.format(rank=rank) for rank in range(strategy.world)} | (
        {MERGED_FILE} if merged else set()
    )
    for name in names:
        assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.parametrize("pp", MESHES)
def test_read_back_it_is_the_same(tmp_path: Path, pp: int) -> None:
    rules = made(pp)
    folder = written(rules.strategy, tmp_path)
    found = read_compiled(str(folder), rules.strategy.world, pp)
    assert [stage.devices for stage in found.stages] == [stage.devices for stage in rules.strategy.stages]
    assert differences(found, rules.strategy, rules.shapes) == []
    assert differences(read_strategy(str(folder)), rules.strategy, rules.shapes) == []
    for number, stage in enumerate(found.stages):
        assert set(stage.layouts) == set(rules.strategy.stages[number].layouts)


def test_only_one_file_of_each_stage_is_read(tmp_path: Path) -> None:
    strategy = made(2).strategy
    folder = written(strategy, tmp_path)
    for rank in set(range(strategy.world)) - set(first_ranks(strategy.world, 2)):
        (folder / RANK_FILE.format(rank=rank)).write_bytes(b"not yet written")
    assert len(read_compiled(str(folder), strategy.world, 2).stages) == 2


@pytest.mark.parametrize(
    ("world", "stages", "ranks"), [(8, 1, [0]), (8, 2, [0, 4]), (8, 4, [0, 2, 4, 6]), (4, 4, [0, 1, 2, 3])]
)
def test_first_ranks(world: int, stages: int, ranks: list[int]) -> None:
    assert first_ranks(world, stages) == ranks


@pytest.mark.parametrize("stages", [0, -1, 3, 16])
def test_stages_that_do_not_divide_the_ranks(stages: int) -> None:
    with pytest.raises(InputError, match=f"pipeline_stage {stages} does not divide the 8 ranks"):
        first_ranks(8, stages)


def test_files_of_another_job_are_refused(tmp_path: Path) -> None:
    small, large = made(1).strategy, made(2).strategy
    written(small, tmp_path / "small")
    written(large, tmp_path / "large")
    with pytest.raises(InputError, match=r"is for 4 devices a stage, the job has 8: it is of another job"):
        read_compiled(str(tmp_path / "small"), 8, 1)
    shutil.copy(tmp_path / "large" / RANK_FILE.format(rank=0), tmp_path / "large" / RANK_FILE.format(rank=4))
    with pytest.raises(InputError, match="is of stage 0, rank 4 of the job is in stage 1"):
        read_compiled(str(tmp_path / "large"), 8, 2)


@pytest.mark.parametrize("damage", ["gone", "cut", "merged"])
def test_files_that_are_no_ranks_are_refused(tmp_path: Path, damage: str) -> None:
    strategy = made(2).strategy
    folder = written(strategy, tmp_path)
    victim = folder / RANK_FILE.format(rank=4)
    if damage == "gone":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        path = write_merged(strategy, str(folder))
        assert path is not None
        shutil.copy(path, victim)
    with pytest.raises(InputError, match=victim.name):
        read_compiled(str(folder), strategy.world, 2)


# ------------------------------------------------------------------------------------------------ against the rules


def changed(strategy: Strategy, stage: int, name: str, layout: Layout | None) -> Strategy:
    """One parameter has another layout, or none."""
    layouts = {n: x for n, x in strategy.stages[stage].layouts.items() if n != name}
    if layout is not None:
        layouts[name] = layout
    stages = list(strategy.stages)
    stages[stage] = Stage(stages[stage].devices, layouts)
    return replace(strategy, stages=tuple(stages))


@pytest.mark.parametrize("pp", MESHES)
def test_a_disagreement_is_named_with_its_parameter(pp: int) -> None:
    rules = made(pp)
    name = "model.layers.3.attention.wq.weight"
    (stage,) = rules.strategy.names[name]
    layout = rules.strategy.stages[stage].layouts[name]
    turned = replace(layout, tensor_map=tuple(reversed(layout.tensor_map)))
    (text,) = differences(changed(rules.strategy, stage, name, turned), rules.strategy, rules.shapes)
    assert text.startswith(f"{name} (stage {stage}): the compiler says ")
    assert ", the rules " in text


@pytest.mark.parametrize("missing", [0, 1])
def test_a_parameter_that_one_does_not_list(missing: int) -> None:
    rules = made(2)
    name = "model.norm_out.weight"
    both = [rules.strategy, rules.strategy]
    both[missing] = changed(rules.strategy, 1, name, None)
    who = ("the compiler does", "the rules do")[missing]
    assert differences(both[0], both[1], rules.shapes) == [f"{name} (stage 1): {who} not list it"]


def test_another_world_or_another_pipeline() -> None:
    one, two, four = (made(pp) for pp in MESHES)
    (text,) = differences(one.strategy, two.strategy, two.shapes)
    assert text == "the compiler has 4 ranks in 1 stages, the rules 8 ranks in 2 stages"
    (text,) = differences(four.strategy, two.strategy, two.shapes)
    assert "8 ranks in 4 stages" in text


def test_the_same_slices_in_other_numbers_agree() -> None:
    """An axis of one device more or less means nothing."""
    rules = made(1)
    name = "model.layers.0.attention.wq.weight"
    layout = rules.strategy.stages[0].layouts[name]
    same = replace(layout, dev_matrix=(1, *layout.dev_matrix))
    assert differences(changed(rules.strategy, 0, name, same), rules.strategy, rules.shapes) == []


def test_a_layout_that_does_not_fit_is_told(tmp_path: Path) -> None:
    rules = made(1)
    name = "model.norm_out.weight"
    layout = Layout((3, 1), ((1,),), 0, 0)
    (text,) = differences(changed(rules.strategy, 0, name, layout), rules.strategy, rules.shapes)
    assert text.startswith(name)


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_the_real_compilers_files_agree_with_the_rules(case: str) -> None:
    document = yaml.safe_load((GOLDEN / case / "config.yaml").read_text())
    rules = by_rule(document, case)
    compiled = read_compiled(str(GOLDEN / case / "strategy"), rules.strategy.world, len(rules.strategy.stages))
    texts = differences(compiled, rules.strategy, params(GOLDEN / case))
    assert [text for text in texts if not is_unconfirmed(case, 1, text.split(" ")[0])] == []


def test_sizes_that_only_hugging_face_knows(tmp_path: Path) -> None:
    """pretrained_model_dir with a config.json; without one the YAML must say it all."""
    import json

    hf = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "intermediate_size": 96,
        "tie_word_embeddings": False,
    }  # fmt: skip
    document = {
        **legacy(), "use_legacy": False, "model": {"model_config": {"model_type": "qwen3"}},
        "pretrained_model_dir": str(tmp_path),
    }  # fmt: skip
    with pytest.raises(InputError):
        by_rule(document, "run.yaml")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    found = by_rule(document, "run.yaml")
    assert found.strategy.world == 4
    assert (64, 64) in found.shapes.values()
