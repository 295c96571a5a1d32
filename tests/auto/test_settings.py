"""Settings of a job: flags over YAML, types, spelling, and one case for each rule that two keys can break."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transform_ckpt.auto import settings_flags
from transform_ckpt.auto.settings import (
    JobSettings,
    check_source,
    check_world,
    read_settings,
    settings_from_document,
)
from transform_ckpt.auto.settings_rules import NOTES, RULES
from transform_ckpt.auto.settings_values import FIELDS
from transform_ckpt.auto.settings_world import SOURCE_RULES
from transform_ckpt.errors import InputError, UsageError

JOB: dict[str, Any] = {
    "run_mode": "train",
    "use_parallel": True,
    "load_checkpoint": "ckpt",
    "parallel": {"parallel_mode": 1},
    "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2},
    "train_dataset": {"data_loader": {"type": "MindDataset"}},
    "model": {"model_config": {"type": "LlamaConfig"}},
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """JOB with values by dotted key; None removes the key."""
    document = copy.deepcopy(JOB)
    for key, value in changes.items():
        *above, last = key.split(".")
        section = document
        for name in above:
            section = section.setdefault(name, {})
        section[last] = value
        if value is None:
            del section[last]
    return document


def of(changes: dict[str, Any], environ: dict[str, str] | None = None) -> JobSettings:
    """Settings as the command line reads them, from a file."""
    path = Path("job.yaml")
    path.write_text(yaml.safe_dump(changed(changes)))
    return read_settings(["--config", str(path)], environ or {})


def flags(*argv: str, environ: dict[str, str] | None = None, **changes: Any) -> JobSettings:
    """Settings of a command line over JOB."""
    Path("job.yaml").write_text(yaml.safe_dump(changed(changes)))
    return read_settings(["--config", "job.yaml", *argv], environ or {})


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------ rules

AUTO = {"auto_trans_ckpt": True}
IN_MEMORY = {"transform_in_memory": True, **AUTO}
NEW = {"use_legacy_format": False}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name of the rule: (what breaks it, what is changed to mend it)
    "transform nothing": ({"auto_trans_ckpt": True, "load_checkpoint": ""}, {"load_checkpoint": "x"}),
    "resume from nothing": ({"resume_training": "a-1_2.ckpt", "load_checkpoint": ""}, {"load_checkpoint": "x"}),
    "strategy of one device": ({"only_save_strategy": True, "use_parallel": False}, {"use_parallel": True}),
    "strategy of whole weights": (
        {"only_save_strategy": True, "parallel.parallel_mode": 0},
        {"parallel.parallel_mode": "STAND_ALONE"},
    ),
    "transform to whole weights": (
        {"auto_trans_ckpt": True, "parallel.parallel_mode": "data_parallel"},
        {"parallel.parallel_mode": 1},
    ),
    "resume without training": ({"resume_training": True, "run_mode": "predict"}, {"run_mode": "finetune"}),
    "resume by name in the new format": ({"resume_training": "a.ckpt", **NEW}, {"resume_training": True}),
    "strategy in the new format": ({"only_save_strategy": True, **NEW}, {"only_save_strategy": False}),
    "transform in the new format": ({"auto_trans_ckpt": True, **NEW}, {"use_legacy_format": True}),
    "strategy only, in memory": ({**IN_MEMORY, "only_save_strategy": True}, {"only_save_strategy": False}),
    "some processes, in memory": ({**IN_MEMORY, "transform_process_num": 1}, {"transform_process_num": None}),
    "no transform, in memory": ({"transform_in_memory": True}, {"auto_trans_ckpt": True}),
    "micro batches and stages": ({"parallel_config.micro_batch_num": None}, {"parallel_config.micro_batch_num": 2}),
    "rank of the world": ({"rank_id": 8, "world_size": 8}, {"rank_id": 7}),
}


def test_every_rule_has_a_case() -> None:
    assert sorted(BROKEN) == sorted(rule.name for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_names_both_keys_and_can_be_mended(rule: Any) -> None:
    broken, mended = BROKEN[rule.name]
    with pytest.raises(InputError) as error:
        of(broken)
    first, second = rule.keys
    assert [
        line for line in str(error.value).splitlines() if f"job.yaml: {first}: " in line and f" and {second}: " in line
    ]
    assert rule.advice in str(error.value)
    assert of({**broken, **mended}).config == "job.yaml"


def test_all_broken_rules_are_said_at_once() -> None:
    with pytest.raises(InputError) as error:
        of({"auto_trans_ckpt": True, "load_checkpoint": None, "use_legacy_format": False, "use_parallel": False})
    assert "auto_trans_ckpt: True and load_checkpoint: '' disagree" in str(error.value)
    assert "auto_trans_ckpt: True and use_legacy_format: False disagree" in str(error.value)


def test_micro_batches_matter_only_when_a_pipeline_trains() -> None:
    few = {"parallel_config.micro_batch_num": 1}
    assert of({**few, "run_mode": "eval"}).run_mode == "eval"
    assert of({**few, "use_parallel": False}).world == 1
    assert of({**few, "parallel_config.pipeline_stage": 1}).world == 4
    ignored = {"use_parallel": False, "parallel_config.micro_batch_num": "x", "parallel_config.data_parallel": 0}
    assert of(ignored).world == 1


NOTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strategy unused": ({"src_strategy_path_or_dir": "s"}, {"auto_trans_ckpt": True}),
    "processes unused": ({"transform_process_num": 2}, {"auto_trans_ckpt": True}),
    "transform put off": ({"auto_trans_ckpt": True, "only_save_strategy": True}, {"only_save_strategy": False}),
    "one device": ({"auto_trans_ckpt": True, "use_parallel": False}, {"use_parallel": True}),
    "asynchronous loading unused": ({"auto_trans_ckpt": True, "load_ckpt_async": True}, {"load_ckpt_async": False}),
    "prompt unused": ({"input_data": "hello"}, {"run_mode": "predict"}),
    "random weights": ({"run_mode": "predict", "load_checkpoint": ""}, {"load_checkpoint": "x"}),
    "nothing to upload": ({**IN_MEMORY, "remote_save_url": "obs://b/c"}, {"remote_save_url": ""}),
}


def test_every_note_has_a_case() -> None:
    assert sorted(NOTED) == sorted(note.name for note in NOTES)


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.name)
def test_note_is_said_when_it_applies_only(note: Any) -> None:
    noted, quiet = NOTED[note.name]
    assert note.text in of(noted).notes
    assert note.text not in of({**noted, **quiet}).notes


# ------------------------------------------------------------------------------------------------ world and source


def message(call: Any, *arguments: Any, **keywords: Any) -> str:
    """The text of the InputError that a call must raise."""
    with pytest.raises(InputError) as error:
        call(*arguments, **keywords)
    return str(error.value)


def test_world_names_all_factors_and_what_to_change() -> None:
    found = of({"parallel_config.context_parallel": 3})
    assert (found.world, found.factors["context_parallel"]) == (24, 3)
    check_world(found, 24)
    text = message(check_world, found, 12)
    product = "data_parallel 2 * model_parallel 2 * context_parallel 3 * pipeline_stage 2 = 24"
    assert f"job.yaml: parallel_config: {product}, but the job has 12 ranks: set data_parallel: 1, or start 24" in text
    assert "change one of them, or start 24 workers" in message(check_world, found, 8)


@pytest.mark.parametrize(
    ("changes", "world", "text"),
    [
        ({"use_parallel": False}, 8, "use_parallel: False is a job of one rank, but it has 8 ranks"),
        ({"world_size": 4}, 8, "world_size 4, but the job has 8 ranks"),
        ({"rank_id": 8}, 8, "rank_id 8, but the job has 8 ranks"),
        ({**AUTO, "transform_process_num": 3}, 8, "3 does not divide the 8 ranks of the job: set it to 2"),
        ({**AUTO, "transform_process_num": 16}, 8, "16 does not divide the 8 ranks of the job: set it to 8"),
        ({"npu_num_per_node": 6}, 8, "npu_num_per_node: expected a power of 2, found 6"),
    ],
)  # fmt: skip
def test_world_refuses(changes: dict[str, Any], world: int, text: str) -> None:
    assert text in message(check_world, of(changes), world)


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({"auto_trans_ckpt": True, "transform_process_num": 4, "npu_num_per_node": 4, "rank_id": 7}, 8),
        ({"transform_process_num": 3}, 8),  # not used: a note says so
        ({"use_parallel": False}, 1),
        ({"parallel.parallel_mode": 0}, 3),  # data parallel: the mesh does not count
    ],
)
def test_world_allows(changes: dict[str, Any], world: int) -> None:
    check_world(of(changes), world)


BY_NAME = {**AUTO, "resume_training": "a.ckpt"}
RANKS_4, RANKS_8 = ("ranks", 4, {"ckpt"}), ("ranks", 8, {"ckpt"})
FILE, COMPLETE = ("file", 1, {"ckpt"}), ("complete", 1, {"ckpt"})
BOTH = ("ranks", 8, {"ckpt", "safetensors"})
SOURCES: dict[str, tuple[dict[str, Any], tuple[Any, ...], tuple[dict[str, Any], tuple[Any, ...]]]] = {
    # name of the rule: settings and source (kind, ranks, formats) that break it, what mends it
    "complete, not cut": ({}, FILE, (AUTO, FILE)),
    "other number of ranks": ({}, RANKS_4, ({}, RANKS_8)),
    "ranks without a strategy": (AUTO, RANKS_4, ({"src_strategy_path_or_dir": "s"}, RANKS_4)),
    "complete with a strategy": ({**AUTO, "src_strategy_path_or_dir": "s"}, COMPLETE, ({}, RANKS_4)),
    "resume by name without ranks": (BY_NAME, COMPLETE, ({"resume_training": True}, COMPLETE)),
    "other format": ({"load_ckpt_format": "safetensors"}, RANKS_8, ({}, BOTH)),
    "two formats": ({}, BOTH, ({"load_ckpt_format": "ckpt"}, BOTH)),
}


def test_every_source_rule_has_a_case() -> None:
    assert sorted(SOURCES) == sorted(rule.name for rule in SOURCE_RULES)


@pytest.mark.parametrize("rule", SOURCE_RULES, ids=lambda rule: rule.name)
def test_source_rule_names_both_keys_and_can_be_mended(rule: Any) -> None:
    changes, source, (mending, mended) = SOURCES[rule.name]
    text = message(check_source, of(changes), *source)
    assert f"job.yaml: {rule.keys[0]}: " in text
    assert f" and {rule.keys[1]}: " in text
    assert "{" not in text
    assert check_source(of({**changes, **mending}), *mended) == ()


def test_source_says_what_it_found() -> None:
    assert "it has 4 rank directories, and the job 8" in message(check_source, of({}), "ranks", 4, {"ckpt"})
    assert "it holds ckpt and safetensors" in message(check_source, of({}), "ranks", 8, {"safetensors", "ckpt"})
    assert "it has 2 rank directories, and the job 1" in message(
        check_source, of({"use_parallel": False}), "ranks", 2, {"ckpt"}
    )


def test_source_allows_what_mindformers_does_not() -> None:
    assert check_source(of({**AUTO, "use_parallel": False}), "ranks", 4, {"safetensors"}, strategy="found") == ()
    assert check_source(of(AUTO), "file", 1, {"safetensors"}) == ()


def test_source_is_of_no_interest_when_only_the_strategy_is_saved() -> None:
    assert check_source(of({"only_save_strategy": True}), "file", 1, {"ckpt"}) == ()


@pytest.mark.parametrize(
    ("changes", "kind", "note"),
    [
        ({**AUTO, "remove_redundancy": True}, "complete", "remove_redundancy is not used"),
        (BY_NAME, "file", "resume_training 'a.ckpt' is taken as True"),
        ({**AUTO, "use_parallel": False}, "complete", "auto_trans_ckpt has nothing to do"),
    ],
)
def test_source_notes(changes: dict[str, Any], kind: Any, note: str) -> None:
    (found,) = check_source(of(changes), kind, 1, {"ckpt"})
    assert found.startswith(note)


# ------------------------------------------------------------------------------------------------ values


def test_defaults() -> None:
    found = of({"load_checkpoint": None, "use_parallel": None, "parallel_config": None})
    wanted = {
        "run_mode": "train", "use_parallel": False, "load_checkpoint": None, "auto_trans_ckpt": False,
        "src_strategy": None, "transform_process_num": None, "transform_by_rank": False, "npu_num_per_node": None,
        "only_save_strategy": False, "load_ckpt_format": None, "remove_redundancy": False, "resume_training": False,
        "remote_save_url": None, "use_legacy_format": True, "output_dir": "./output", "transform_in_memory": False,
        "load_strict": True, "keep": 2, "transform_timeout": 1800.0, "predict_data": (), "seed": 1, "rank_id": None,
        "world_size": None,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in FIELDS} == wanted
    assert (found.notes, found.extra, found.world) == ((), {}, 1)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("auto_trans_ckpt", "Flase", "True or False, found 'Flase'"),
        ("use_parallel", "True", "True or False without quotes"),
        ("transform_process_num", "two", "a whole number of at least 1"),
        ("transform_process_num", True, "a whole number of at least 1"),
        ("keep", 0, "a whole number of at least 1"),
        ("transform_timeout", 0, "a number of seconds greater than 0"),
        ("transform_timeout", float("inf"), "a number of seconds greater than 0"),
        ("load_ckpt_format", "ckp", "one of ckpt, safetensors"),
        ("run_mode", "trian", "one of train, finetune, eval, predict"),
        ("load_checkpoint", 7, "a text"),
        ("resume_training", 1, "True, False (without quotes) or a checkpoint's file name"),
        ("resume_training", "True", "True, False (without quotes)"),
        ("input_data", [1], "a text or a list of texts"),
        ("parallel_config.data_parallel", 0, "a whole number of at least 1"),
        ("parallel_config.expert_parallel", "x", "a whole number of at least 1"),
    ],
)
def test_wrong_value_names_its_key(key: str, value: Any, expected: str) -> None:
    assert f"job.yaml: {key}: expected {expected}" in message(of, {key: value})


def test_section_that_is_none() -> None:
    assert "parallel_config: expected keys and values, found 3" in message(of, {"parallel_config": 3})


def test_run_mode_is_needed() -> None:
    assert "run_mode is missing" in message(of, {"run_mode": None})
    assert "is not a job's configuration" in message(of, {"run_mode": None, "model": None})
    assert of({"run_mode": "predict_with_train_model"}).run_mode == "predict"


def test_empty_and_none_are_not_given() -> None:
    assert of({"src_strategy_path_or_dir": "None", "load_checkpoint": ""}).src_strategy is None


def test_resume_without_a_checkpoint_starts_anew_with_a_note() -> None:
    found = of({"resume_training": True, "load_checkpoint": ""})
    assert found.resume_training is False
    assert "training starts anew" in found.notes[0]


def test_several_processes_go_by_rank() -> None:
    found = of({"auto_trans_ckpt": True, "transform_process_num": 2, "transform_by_rank": False})
    assert found.transform_by_rank is True
    assert "transform_by_rank is taken as True" in found.notes[0]
    assert of({"auto_trans_ckpt": True, "transform_process_num": 2}).notes == ()


def test_weights_of_pretrained_model_dir() -> None:
    Path("hf").mkdir()
    asked = {"load_checkpoint": "", "pretrained_model_dir": "hf", "auto_trans_ckpt": True}
    assert "load_checkpoint: ''" in message(of, asked)
    Path("hf/model.safetensors").touch()
    found = of(asked)
    assert found.load_checkpoint == "hf"
    assert "pretrained_model_dir hf" in found.notes[0]
    assert of({**asked, "load_checkpoint": "x"}).load_checkpoint == "x"


def test_checkpoint_name_or_path() -> None:
    Path("w.ckpt").touch()
    asked = {"load_checkpoint": "", "model.model_config.checkpoint_name_or_path": "w.ckpt"}
    assert of({**asked, "run_mode": "predict"}).load_checkpoint == "w.ckpt"
    assert of(asked).load_checkpoint is None  # training clears it
    asked["model.model_config.checkpoint_name_or_path"] = "llama_7b"  # a name, not a path
    assert of({**asked, "run_mode": "predict"}).load_checkpoint is None


def test_section_checkpoint_means_the_new_format() -> None:
    found = of({"checkpoint": {"load_path": "new", "no_load_optim": False}})
    assert (found.use_legacy_format, found.load_checkpoint, found.resume_training) == (False, "new", True)
    assert of({"checkpoint": {"load_path": "new"}}).resume_training is False


# ------------------------------------------------------------------------------------------------ environment


def test_output_dir() -> None:
    local = {"LOCAL_DEFAULT_PATH": "/local"}
    assert of({}, local).output_dir == "/local"
    found = of({"output_dir": "mine"}, local)
    assert found.output_dir == "mine"
    assert found.notes == ("LOCAL_DEFAULT_PATH /local is not used: output_dir is mine",)
    assert of({"output_dir": "mine"}, {"LOCAL_DEFAULT_PATH": os.path.abspath("mine")}).notes == ()
    shipped = of({"output_dir": "./output"}, local)  # what every YAML says, so nobody's own word
    assert (shipped.output_dir, shipped.notes) == ("/local", ())
    assert of({"output_dir": "~/x"}).output_dir == os.path.expanduser("~/x")


def test_remote_save_url() -> None:
    assert of({"remote_save_url": "s3://b"}).remote_save_url == "s3://b"
    assert of({"remote_save_url": "s3://b"}, {"REMOTE_SAVE_URL": "obs://c"}).remote_save_url == "obs://c"
    placeholder = {"remote_save_url": "Please input"}
    assert (of(placeholder).remote_save_url, of(placeholder).notes) == (None, ())
    assert "is no obs:// or s3:// URL" in of({**placeholder, "auto_trans_ckpt": True}).notes[0]
    assert "remote_save_url: expected obs://" in message(
        of, {**placeholder, "auto_trans_ckpt": True}, {"MA_JOB_DIR": "x"}
    )


# ------------------------------------------------------------------------------------------------ spelling


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("auto_trans_ckp", "auto_trans_ckpt"),
        ("use_paralel", "use_parallel"),
        ("src_strategy", "src_strategy_path_or_dir"),
        ("transform_proces_num", "transform_process_num"),
        ("parallel_config.data_paralel", "data_parallel"),
        ("parallel.enable_paralel_optimizer", "enable_parallel_optimizer"),
        ("parallel.parallel_optimizer_config.paralel_optimizer_threshold", "parallel_optimizer_threshold"),
        ("parallel.strategy_ckpt_config.only_trainable_param", "only_trainable_params"),
        ("recompute_config.select_recomputes", "select_recompute"),
    ],
)
def test_misspelt_key_is_an_error_that_says_what_was_meant(key: str, meant: str) -> None:
    assert f"job.yaml: {key}: did you mean {meant}?" in message(of, {key: 1})


def test_other_unknown_keys() -> None:
    assert of({"zebra": 1, "parallel.quokka": 2}).notes == (
        "nothing is known to read zebra: check the spelling",
        "nothing is known to read parallel.quokka: check the spelling",
    )
    assert "parallel_config.zebra is not a key that MindFormers takes" in message(of, {"parallel_config.zebra": 1})
    assert of({"model.model_config.auto_trans_ckp": 1, "train_dataset.paralel": 1}).notes == ()


# ------------------------------------------------------------------------------------------------ flags

MINDFORMERS_FLAGS = {
    "run_mode": "finetune", "do_eval": "True", "train_dataset_dir": "d", "eval_dataset_dir": "e", "predict_data": "p",
    "modal_type": "text", "predict_batch_size": "3", "adapter_id": "a", "load_checkpoint": "l",
    "src_strategy_path_or_dir": "s", "auto_trans_ckpt": "True", "transform_process_num": "2",
    "only_save_strategy": "False", "resume_training": "r.ckpt", "strategy_load_checkpoint": "c",
    "remote_save_url": "obs://u", "seed": "5", "use_parallel": "False", "profile": "False", "epochs": "6",
    "batch_size": "7", "gradient_accumulation_steps": "8", "sink_mode": "True", "num_samples": "9", "output_dir": "o",
    "register_path": "g", "do_sample": "True", "trust_remote_code": "False", "mode": "0", "device_id": "1",
    "device_target": "CPU",
}  # fmt: skip
"""run_mindformer.py of MindFormers 1.9.0, all but --config and --options."""


def leaves(tree: Any) -> list[Any]:
    """All values of a tree."""
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return [tree] if below is None else [leaf for value in below for leaf in leaves(value)]


@pytest.mark.parametrize("name", MINDFORMERS_FLAGS)
def test_no_flag_of_mindformers_is_dropped(name: str) -> None:
    text = MINDFORMERS_FLAGS[name]
    before = flags()
    found = flags(f"--{name}", text)
    assert (found.document, found.extra) != (before.document, before.extra)
    assert yaml.safe_load(text) in [*leaves(found.document), *leaves(found.extra)]


def test_flags_reach_their_fields() -> None:
    words = [word for name, text in MINDFORMERS_FLAGS.items() for word in (f"--{name}", text)]
    found = flags(*words, "--keep", "4", "--transform_timeout", "2.5", "--load_strict", "no", "--npu_num_per_node", "8")
    assert (found.run_mode, found.load_checkpoint, found.src_strategy, found.seed) == ("finetune", "l", "s", 5)
    assert (found.auto_trans_ckpt, found.transform_process_num, found.resume_training) == (True, 2, "r.ckpt")
    assert (found.remote_save_url, found.output_dir, found.predict_data) == ("obs://u", "o", ("p",))
    assert (found.keep, found.transform_timeout, found.load_strict, found.npu_num_per_node) == (4, 2.5, False, 8)
    assert found.document["runner_config"] == {
        "epochs": 6,
        "batch_size": 7,
        "gradient_accumulation_steps": 8,
        "sink_mode": True,
    }
    assert found.document["train_dataset"]["data_loader"] == {
        "type": "MindDataset",
        "dataset_dir": "d",
        "num_samples": 9,
    }
    assert found.extra == {"modal_type": ["text"], "register_path": "g"}


def test_every_flag_is_a_field_or_a_key_of_mindformers() -> None:
    named = {flag.name for flag in settings_flags.FLAGS}
    keys = {field.key or name for name, field in FIELDS.items()} - {"input_data", "use_legacy_format"}
    assert keys | set(MINDFORMERS_FLAGS) == named


def test_flag_that_changes_nothing_says_so() -> None:
    found = flags("--num_samples", "3", train_dataset=None)
    assert found.extra == {"num_samples": 3}
    assert "the YAML has no data_loader" in found.notes[0]


def test_several_prompts() -> None:
    found = flags("--predict_data", "one", "two words", "--run_mode", "predict")
    assert found.predict_data == ("one", "two words")


def test_options_and_free_keys() -> None:
    found = flags(
        "--options", "parallel_config.data_parallel=4", "a.b=[1,(2.5,x),True]", "c=1,2", "zebra='q'", "keep=9",
        "--parallel_config.model_parallel", "1", "--runner_config.epochs=3", "--quokka", '{"a": [null]}', "--seed", "3",
        "--lr_schedule.learning_rate", "1e-3", "--keep", "5", "--do_eval=False",
    )  # fmt: skip
    assert found.factors == {"data_parallel": 4, "model_parallel": 1, "context_parallel": 1, "pipeline_stage": 2}
    assert found.document["a"] == {"b": [1, [2.5, "x"], True]}
    assert (found.document["c"], found.document["zebra"], found.document["quokka"]) == ([1, 2], "q", {"a": [None]})
    assert found.document["lr_schedule"] == {"learning_rate": 0.001}
    assert (found.document["runner_config"], found.keep, found.document["do_eval"]) == ({"epochs": 3}, 5, False)


def test_abbreviations_as_in_argparse() -> None:
    assert flags("--load_ch", "x").load_checkpoint == "x"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--auto_trans_ckpt", "maybe"], "'maybe' is not a boolean: write True or False"),
        (["--transform_process_num", "two"], "--transform_process_num: invalid int value"),
        (["--auto_tran_ckpt"], "--auto_tran_ckpt has no value; did you mean auto_trans_ckpt?"),
        (["--foo", "--bar", "1"], "--foo has no value"),
        (["--paralel.parallel_mode", "1"], "paralel is not a section of the YAML; did you mean parallel?"),
        (["--run_mode.x", "1"], "run_mode.x: run_mode is 'train', which has no keys below it"),
        (["stray"], "'stray' belongs to no flag"),
        (["--options", "a"], "--options a: expected KEY=VALUE"),
        (["--options", "a=[1,(2]"], "brackets"),
    ],
)
def test_wrong_flags(argv: list[str], text: str) -> None:
    with pytest.raises(UsageError) as error:
        flags(*argv)
    assert text in str(error.value)


def test_config_is_needed_and_looked_for_in_work_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--config"):
        read_settings([], {})
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        read_settings(["--config", "none.yaml"], {})
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "job.yaml").write_text(yaml.safe_dump(JOB))
    found = read_settings(["--config", "job.yaml"], {}, work_path=str(tmp_path / "there"))
    assert found.config == str(tmp_path / "there" / "job.yaml")


def test_misspelt_flag_with_a_value_is_a_misspelt_key() -> None:
    with pytest.raises(InputError, match=r"auto_tran_ckpt: did you mean auto_trans_ckpt\?"):
        flags("--auto_tran_ckpt", "True")


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings(["--help"], {})
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [flag.name for flag in settings_flags.FLAGS if f"--{flag.name}" not in text] == []


SAMPLES: dict[str, st.SearchStrategy[Any]] = {
    "load_checkpoint": st.sampled_from(["a", "b/c"]),
    "src_strategy_path_or_dir": st.sampled_from(["s", "t"]),
    "auto_trans_ckpt": st.booleans(),
    "transform_process_num": st.integers(1, 64),
    "npu_num_per_node": st.integers(1, 64),
    "only_save_strategy": st.booleans(),
    "load_ckpt_format": st.sampled_from(["ckpt", "safetensors"]),
    "remove_redundancy": st.booleans(),
    "resume_training": st.booleans(),
    "output_dir": st.sampled_from(["o", "p"]),
    "load_strict": st.booleans(),
    "keep": st.integers(1, 9),
    "seed": st.integers(0, 9),
}
FIELD_OF = {field.key or name: name for name, field in FIELDS.items()}


@given(
    st.fixed_dictionaries({}, optional=SAMPLES),
    st.fixed_dictionaries({}, optional=SAMPLES),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flag_wins_over_the_yaml(written: dict[str, Any], given_flags: dict[str, Any]) -> None:
    argv = [word for name, value in given_flags.items() for word in (f"--{name}", str(value))]
    found = flags(*argv, **written)
    for key, value in {**written, **given_flags}.items():
        assert getattr(found, FIELD_OF[key]) == value
        assert found.document[key] == value


# ------------------------------------------------------------------------------------------------ documents


def test_base_config() -> None:
    Path("base").mkdir()
    Path("base/one.yaml").write_text("seed: 3\nparallel_config: {data_parallel: 4, model_parallel: 2}\nkeep: 5\n")
    Path("base/two.yaml").write_text("seed: 4\nparallel_config: {data_parallel: 8}\n")
    Path("job.yaml").write_text(
        "base_config: [base/one.yaml, base/two.yaml]\nrun_mode: train\nuse_parallel: True\n"
        "parallel_config: {pipeline_stage: 1}\nseed: 5\n"
    )
    found = read_settings(["--config", "job.yaml"], {})
    # as MindFormerConfig: a later base replaces a section, the file itself is merged into it
    assert found.document["parallel_config"] == {"data_parallel": 8, "pipeline_stage": 1}
    assert (found.seed, found.keep, "base_config" in found.document) == (5, 5, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base_config: job.yaml", "base_config leads back"),
        ("base_config: 3", "base_config: expected a file name"),
        ("base_config: none.yaml", "none.yaml: no such file"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("a: &a [*a]", "its anchors unfold to more"),
        (
            "a: &a [1,1,1,1,1,1,1,1]\n"
            + "\n".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 8)}]" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
            "its anchors unfold to more",
        ),
    ],
)
def test_bad_documents(text: str, expected: str) -> None:
    Path("job.yaml").write_text(text)
    assert expected in message(read_settings, ["--config", "job.yaml"], {})


def test_anchors_are_copied_out() -> None:
    Path("job.yaml").write_text(
        "run_mode: train\ntrain_dataset: &t {data_loader: {type: x}}\ntrain_dataset_task: {dataset_config: *t}\n"
    )
    found = read_settings(["--config", "job.yaml", "--train_dataset_dir", "d"], {})
    assert found.document["train_dataset"]["data_loader"] == {"type": "x", "dataset_dir": "d"}
    assert found.document["train_dataset_task"]["dataset_config"]["data_loader"] == {"type": "x"}


def test_document_of_mindformers() -> None:
    mesh = SimpleNamespace(to_dict=lambda: {"data_parallel": 4, "select_recompute": False})
    document = changed({"transform_process_num": 1, "checkpoint": {"load_path": "now", "no_load_optim": True}})
    document["parallel_config"] = mesh
    found = settings_from_document(document, "their.yaml", {})
    assert found.factors["data_parallel"] == 4
    assert (found.transform_process_num, found.use_legacy_format, found.load_checkpoint) == (None, True, "now")
    assert (found.config, found.document["transform_process_num"]) == ("their.yaml", 1)
    assert settings_from_document(changed({"transform_process_num": 2}), "x", {}).transform_process_num == 2
    with pytest.raises(InputError, match=r"their\.yaml: auto_trans_ckpt: True and load_checkpoint: '' disagree"):
        settings_from_document(changed({"auto_trans_ckpt": True, "load_checkpoint": ""}), "their.yaml", {})


def test_the_document_is_nobody_elses() -> None:
    document = changed({})
    found = settings_from_document(document, "x", {})
    document["parallel_config"]["data_parallel"] = 99
    assert found.world == 8
