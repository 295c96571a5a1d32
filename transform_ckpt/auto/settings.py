"""The settings of an auto_trans_ckpt job: MindFormers' YAML and command line in, one checked value out.

`read_settings` is for the command line, `settings_from_document` for code inside of MindFormers, whose configuration
is read already.  What follows from other keys follows as in MindFormers 1.9.0:
trainer/trainer.py `_adjust_resume_training_if_ckpt_path_invalid`, `_try_use_pretrained_model_dir_as_ckpt`,
`_using_checkpoint_name_or_path_if_needed`; trainer/utils.py `convert_checkpoint_config`; tools/utils.py
`set_remote_save_url`, `check_in_modelarts`; utils/file_utils.py `set_output_path`.
May import only its settings_* neighbours, remote_names, launcher and errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transform_ckpt.auto.remote_names import SCHEMES
from transform_ckpt.auto.settings_document import get, plain, read_document
from transform_ckpt.auto.settings_rules import check_rules
from transform_ckpt.auto.settings_types import TRAINING, JobSettings
from transform_ckpt.auto.settings_unknown import check_keys
from transform_ckpt.auto.settings_values import FIELDS, read_values
from transform_ckpt.auto.settings_world import Kind, check_source, check_world
from transform_ckpt.errors import InputError, Problems
from transform_ckpt.launcher import in_modelarts

__all__ = [
    "JobSettings",
    "Kind",
    "check_source",
    "check_world",
    "read_settings",
    "settings_from_document",
]

DEFAULT_OUTPUT = "output"

Values = dict[str, Any]


def read_settings(argv: Sequence[str], environ: Mapping[str, str] = os.environ, *, work_path: str = "") -> JobSettings:
    """The job of a command line of run_mindformer.py.

    A relative --config is looked for here, then in `work_path` (MindFormers: the directory of run_mindformer.py).
    UsageError for flags, InputError for the YAML; `--help` prints and raises SystemExit(0).
    """
    from transform_ckpt.auto.settings_flags import apply_flags, parse_flags

    given = parse_flags(argv)
    beside = os.path.join(work_path, given.config)
    config = given.config if os.path.exists(given.config) or not os.path.exists(beside) else beside
    document = read_document(config)
    extra, notes = apply_flags(given, document)
    problems = Problems()
    notes += check_keys(document, config, problems)
    values = read_values(document, config, problems)
    problems.raise_if_any(InputError)
    if document.get("checkpoint") and values["use_legacy_format"]:
        values["use_legacy_format"] = False
        notes.append("use_legacy_format is False, since the YAML has a section checkpoint")
    return _settings(config, document, values, environ, extra=extra, notes=notes)


def settings_from_document(
    document: Mapping[str, Any], config: str, environ: Mapping[str, str] = os.environ
) -> JobSettings:
    """The job of a configuration that MindFormers has read; `config` names it in messages.

    MindFormers has filled in its defaults, checked the names of keys, and added a section checkpoint whatever the
    format, so none of these is taken for the user's word: transform_process_num 1 is "not given" here.
    """
    tree = plain(document, config)
    problems = Problems()
    values = read_values(tree, config, problems)
    problems.raise_if_any(InputError)
    if values["transform_process_num"] == 1:
        values["transform_process_num"] = None
    return _settings(config, tree, values, environ)


def _settings(
    config: str,
    document: Mapping[str, Any],
    values: Values,
    environ: Mapping[str, str],
    *,
    extra: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> JobSettings:
    said = list(notes)
    if values["run_mode"] == "predict_with_train_model":
        values["run_mode"] = "predict"
    _follow_checkpoint(values, document, said)
    _follow_resume(values, said)
    _follow_processes(values, said)
    _follow_url(values, environ, config, said)
    _follow_output(values, environ, said)
    fields = {name: values[name] for name in FIELDS}
    settings = JobSettings(config=config, document=document, extra=extra or {}, notes=tuple(said), **fields)
    return replace(settings, notes=(*said, *check_rules(settings)))


def _follow_checkpoint(values: Values, document: Mapping[str, Any], notes: list[str]) -> None:
    """load_checkpoint: the new format's load_path, weights in pretrained_model_dir, checkpoint_name_or_path."""
    if values["checkpoint.load_path"]:
        values["load_checkpoint"] = values["checkpoint.load_path"]
    if not values["use_legacy_format"] and values["checkpoint.no_load_optim"] is not None:
        values["resume_training"] = not values["checkpoint.no_load_optim"]
    if values["load_checkpoint"] is not None:
        return
    pretrained = values["pretrained_model_dir"]
    named = get(document, "model.model_config.checkpoint_name_or_path")
    asked = values["auto_trans_ckpt"] or values["resume_training"] or values["run_mode"] not in TRAINING
    if pretrained and _has_weights(pretrained):
        values["load_checkpoint"] = pretrained
        notes.append(f"load_checkpoint is not given: the weights of pretrained_model_dir {pretrained} are loaded")
    elif asked and isinstance(named, str) and os.path.exists(named):
        values["load_checkpoint"] = named
        notes.append(f"load_checkpoint is not given: model.model_config.checkpoint_name_or_path {named} is loaded")


def _has_weights(directory: str) -> bool:
    try:
        return any(name.endswith(".safetensors") for name in os.listdir(directory))
    except OSError:  # not there, or not a directory: shipped YAMLs have placeholders
        return False


def _follow_resume(values: Values, notes: list[str]) -> None:
    if values["resume_training"] is True and values["load_checkpoint"] is None:
        values["resume_training"] = False
        notes.append("resume_training is taken as False: load_checkpoint is not given, training starts anew")


def _follow_processes(values: Values, notes: list[str]) -> None:
    several = (values["transform_process_num"] or 1) > 1
    if several and values["transform_by_rank"] is False:
        notes.append("transform_by_rank is taken as True: transform_process_num is more than 1")
    values["transform_by_rank"] = bool(values["transform_by_rank"] or several)


def _follow_url(values: Values, environ: Mapping[str, str], config: str, notes: list[str]) -> None:
    """The environment's REMOTE_SAVE_URL wins.  A text that is no URL counts only where it would be used: ModelArts."""
    url = environ.get("REMOTE_SAVE_URL") or values["remote_save_url"]
    if url and not url.startswith(SCHEMES):
        if values["auto_trans_ckpt"] or values["resume_training"]:
            if in_modelarts(environ):
                raise InputError(f"{config}: remote_save_url: expected obs://... or s3://..., found {url!r}")
            notes.append(f"remote_save_url {url!r} is not used: it is no obs:// or s3:// URL")
        url = None
    values["remote_save_url"] = url


def _follow_output(values: Values, environ: Mapping[str, str], notes: list[str]) -> None:
    """The YAML's output_dir where it is the user's own word, else LOCAL_DEFAULT_PATH, else ./output.

    MindFormers overwrites LOCAL_DEFAULT_PATH with output_dir as a job starts, so the YAML wins there, too; but every
    shipped YAML says ./output, which here is no word against what run_distribute.sh or the user has exported.
    """
    local = environ.get("LOCAL_DEFAULT_PATH")
    written = values["output_dir"]
    if local and written and os.path.normpath(written) == DEFAULT_OUTPUT:
        written = None
    chosen = os.path.expanduser(written or local or f"./{DEFAULT_OUTPUT}")
    if written and local and os.path.realpath(chosen) != os.path.realpath(os.path.expanduser(local)):
        notes.append(f"LOCAL_DEFAULT_PATH {local} is not used: output_dir is {written}")
    values["output_dir"] = chosen
