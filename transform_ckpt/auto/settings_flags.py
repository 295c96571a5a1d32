"""The command line of run_mindformer.py: which key of the YAML each flag sets.

Flags, meanings and the free ones (`--parallel_config.model_parallel 4`) are those of run_mindformer.py of MindFormers
1.9.0 (the file lies beside the wheel's sources, not in it), abbreviations included.  What differs: booleans may be
written as in every other command here; `--options a.b=True` is True (there ActionDict compares a method with a text,
so that every boolean becomes False); what is given by name wins over `--options`.
May import only transform_ckpt.auto.settings_{document,keys,unknown}, transform_ckpt.flags and errors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from transform_ckpt.auto.request import DEFAULT_KEEP, DEFAULT_TIMEOUT_SECONDS
from transform_ckpt.auto.settings_document import get, put
from transform_ckpt.auto.settings_keys import TOP
from transform_ckpt.auto.settings_unknown import near_key
from transform_ckpt.errors import UsageError
from transform_ckpt.flags import boolean


def _boolean_or_text(text: str) -> bool | str:
    """resume_training: True, False, or the name of a checkpoint."""
    return {"true": True, "false": False}.get(text.lower(), text)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: the keys it sets (none: it is handed over in `extra`), how it is read, what it means."""

    name: str
    parse: Callable[[str], Any]
    meaning: str
    keys: tuple[str, ...] = ()
    many: bool = False
    where: str = ""
    """`keys` are set only where the section of this name exists in the section that they begin with."""


def _same(name: str, parse: Callable[[str], Any], meaning: str, *, many: bool = False) -> Flag:
    return Flag(name, parse, meaning, (name,), many)


FLAGS: tuple[Flag, ...] = (
    _same("run_mode", str, "train, finetune, eval or predict"),
    _same("use_parallel", boolean, "whether the job has several ranks"),
    _same("load_checkpoint", str, "file, directory of complete files, or directory of rank_0/ ..."),
    _same("src_strategy_path_or_dir", str, "strategy of load_checkpoint: file or directory; None for complete weights"),
    _same("auto_trans_ckpt", boolean, "make of load_checkpoint what each rank needs"),
    _same("transform_process_num", int, "so many ranks transform; not given: each makes its own slice"),
    _same("transform_by_rank", boolean, "accepted; the result is the same"),
    _same("npu_num_per_node", int, "ranks on one node, a power of 2"),
    _same("only_save_strategy", boolean, "write the strategy files and end"),
    _same("load_ckpt_format", str, "ckpt or safetensors; not given: what load_checkpoint holds"),
    _same("remove_redundancy", boolean, "load_checkpoint was saved without what other ranks hold, too"),
    _same("resume_training", _boolean_or_text, "True, False, or the checkpoint's file name"),
    _same("remote_save_url", str, "obs://... or s3://...: results are copied there"),
    _same("output_dir", str, "where strategy/, transformed_checkpoint/ and checkpoint/ go"),
    _same("transform_in_memory", boolean, "load the slices without writing transformed_checkpoint/"),
    _same("load_strict", boolean, "a parameter without a tensor is an error (default True)"),
    _same("keep", int, f"so many transformed checkpoints stay (default {DEFAULT_KEEP})"),
    _same("transform_timeout", float, f"seconds to wait for other ranks (default {DEFAULT_TIMEOUT_SECONDS:g})"),
    _same("rank_id", int, "this process's rank; default from the environment"),
    _same("world_size", int, "number of ranks; default from the environment"),
    _same("seed", int, "random seed"),
    _same("do_eval", boolean, "evaluate while training"),
    _same("profile", boolean, "profile the job"),
    _same("predict_batch_size", int, "batch size of prediction"),
    _same("adapter_id", str, "LoRA adapters of prediction", many=True),
    _same("trust_remote_code", boolean, "whether tokenizers may bring code"),
    Flag("predict_data", str, "texts or files to predict from", ("input_data",), many=True),
    Flag("mode", int, "0 graph, 1 PyNative", ("context.mode",)),
    Flag("device_id", int, "device of this process", ("context.device_id",)),
    Flag("device_target", str, "Ascend or CPU", ("context.device_target",)),
    Flag("train_dataset_dir", str, "data set to train with", ("train_dataset.data_loader.dataset_dir",)),
    Flag("eval_dataset_dir", str, "data set to evaluate with", ("eval_dataset.data_loader.dataset_dir",)),
    Flag(
        "strategy_load_checkpoint", str, "strategy that the compiler starts from", ("parallel.strategy_ckpt_load_file",)
    ),
    Flag("epochs", int, "epochs", ("runner_config.epochs",)),
    Flag("batch_size", int, "batch size", ("runner_config.batch_size",)),
    Flag(
        "gradient_accumulation_steps",
        int,
        "steps before each update",
        ("runner_config.gradient_accumulation_steps",),
    ),
    Flag("sink_mode", boolean, "sink mode", ("runner_config.sink_mode",)),
    Flag("do_sample", boolean, "sample while generating", ("model.model_config.do_sample",)),
    Flag(
        "num_samples",
        int,
        "samples of the data sets that are configured",
        ("train_dataset.data_loader.num_samples", "eval_dataset.data_loader.num_samples"),
        where="data_loader",
    ),
    Flag("modal_type", str, "kinds of predict_data", many=True),
    Flag("register_path", str, "directory of classes to register"),
)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> _Parser:
    parser = _Parser(prog="run_mindformer.py", description="Run a MindFormers YAML; flags override its keys.")
    parser.add_argument("--config", required=True, help="the YAML")
    for flag in FLAGS:
        parser.add_argument(f"--{flag.name}", type=flag.parse, nargs="+" if flag.many else None, help=flag.meaning)
    parser.add_argument("--options", nargs="+", metavar="KEY.SUB=VALUE", help="override any key of the YAML")
    return parser


@dataclass(frozen=True, slots=True)
class Given:
    """What a command line gives: by flag, by `--options`, and by free dotted keys, in the order they are applied."""

    config: str
    options: Mapping[str, Any]
    flags: Mapping[str, Any]
    free: Mapping[str, Any]


def parse_flags(argv: Sequence[str]) -> Given:
    """The command line; UsageError names the flag.  `--help` prints and raises SystemExit(0)."""
    found, rest = _parser().parse_known_args(list(argv))
    values = {flag.name: getattr(found, flag.name) for flag in FLAGS}
    given = {name: value for name, value in values.items() if value is not None}
    options: dict[str, Any] = {}
    for item in found.options or []:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--options {item}: expected KEY=VALUE")
        options[key] = _option(text)
    return Given(found.config, options, given, _free(rest))


def apply_flags(given: Given, document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Set the keys in `document`; (what has no key there, notes)."""
    extra: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in given.options.items():
        put(document, key, value)
    for flag in FLAGS:
        if flag.name not in given.flags:
            continue
        value = given.flags[flag.name]
        keys = [key for key in flag.keys if not flag.where or get(document, key.rpartition(".")[0]) is not None]
        for key in keys:
            put(document, key, value)
        if not keys:
            extra[flag.name] = value
            if flag.where:
                notes.append(f"--{flag.name} {value}: the YAML has no {flag.where}, so it changes nothing")
    for key, value in given.free.items():
        put(document, key, value)
    return extra, notes


def _free(rest: Sequence[str]) -> dict[str, Any]:
    """`--a.b 1` and `--a.b=1`: keys without a flag of their own."""
    words = list(rest)
    found: dict[str, Any] = {}
    while words:
        word, equals, text = words.pop(0).partition("=")
        if not word.startswith("--") or word == "--":
            raise UsageError(f"{word!r} belongs to no flag; a key of the YAML is given as --key.sub VALUE")
        key = word[2:]
        if not equals:
            if not words or words[0].startswith("--"):
                raise UsageError(f"--{key} has no value{_meant(key)}")
            text = words.pop(0)
        first, dot, _ = key.partition(".")
        if dot and first not in TOP.keys:
            raise UsageError(f"--{key}: {first} is not a section of the YAML{_meant(first)}")
        found[key] = _value(text)
    return found


def _meant(key: str) -> str:
    near = near_key(key, (*(flag.name for flag in FLAGS), *TOP.keys))
    return f"; did you mean {near}?" if near else ""


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _value(text: str) -> Any:
    """A free key's value: number, boolean, JSON, or the text."""
    found = _number(text)
    if not isinstance(found, str):
        return found
    try:
        return json.loads(text)
    except ValueError:
        return text


def _option(text: str) -> Any:
    """A value of --options: a number, a boolean, a text, or a list of them by comma, in brackets or not."""
    text = text.strip("'\"").replace(" ", "")
    if text[:1] + text[-1:] in {"()", "[]"}:
        text = text[1:-1]
    elif "," not in text:
        return _number(text)
    items, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            break
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if depth:
        raise UsageError(f"--options: brackets in {text!r} do not pair")
    return [_option(item) for item in items if item]
