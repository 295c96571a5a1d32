"""MindFormers' YAML, with or without Hugging Face's config.json, to what a strategy is generated from.

Sources: MindFormers 1.9.0 models/build_config.py `merge_model_config` (the YAML wins over config.json), trainer and
models/auto (which key names the model); generate_mesh and generate_sizes have those of their parts.
May import only strategy.generate_{checks,families,mesh,reading,sizes,types,values,yaml} and transform_ckpt.errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from strategy.generate_checks import check_parallel
from strategy.generate_families import FAMILIES, LEGACY_NAMES, MCORE_NAMES, Family
from strategy.generate_mesh import read_parallel, read_states
from strategy.generate_reading import Reading
from strategy.generate_sizes import BUILDERS
from strategy.generate_types import ModelParallelConfig
from strategy.generate_values import Values
from strategy.generate_yaml import read_hf_config, read_yaml
from transform_ckpt.errors import InputError

_REFUSED: Mapping[str, Callable[[Any], bool]] = {
    "experimental_attention_variant": lambda value: value == "dsa",
    "model_architecture": lambda value: value == "yoco",
    "pet_config": bool,
    "use_3d_tensor_parallel": bool,
    "pipeline_stage": lambda value: isinstance(value, dict),
    "moe_config": lambda value: isinstance(value, dict) and value.get("expert_num") not in (None, 0, 1),
}
"""Keys of the model's config, and the values of them that there are no rules for."""

_UNCONFIRMED: Mapping[str, Callable[[Any], bool]] = {
    "print_expert_load": bool,
    "enable_expert_relocation": bool,
    "fine_grain_interleave": lambda value: isinstance(value, int) and value > 1,
}
"""Keys whose additional buffers or operators the rules leave out."""


def read_config(path: str, hf_config: str | None = None) -> ModelParallelConfig:
    """Read a YAML; sizes that it leaves to a Hugging Face config come from `hf_config` (file or directory).

    Without `hf_config` the YAML's own pretrained_model_dir is used where it exists.
    """
    path = os.fspath(path)
    document = read_yaml(path)
    pretrained = document.get("pretrained_model_dir")
    if hf_config is None and isinstance(pretrained, str) and os.path.isfile(os.path.join(pretrained, "config.json")):
        hf_config = pretrained
    return parse_config(document, read_hf_config(hf_config) if hf_config else None, path)


def parse_config(document: Mapping[str, Any], hf: Mapping[str, Any] | None, where: str) -> ModelParallelConfig:
    """What to generate; InputError with every key that is missing, unknown or contradicts another."""
    reading = Reading(where, document)
    family, defaults, sections = _model_sections(reading, hf)
    values = Values.by_meaning(f"{where}: model.model_config", sections, defaults, reading.problems)
    values.need(family.needs)
    parallel = read_parallel(reading, values)
    _check_keys(reading, sections[-1])
    model = BUILDERS[family.naming](reading, family, values, parallel)
    _add_missing(reading, values, hf)
    check_parallel(parallel, where, reading.problems)
    reading.problems.raise_if_any(InputError)
    if family.note:
        reading.notes.append(family.note)
    strategy = reading.values("parallel", "strategy_ckpt_config", only_trainable_params=True)
    only_trainable = strategy.flag("only_trainable_params")
    states = read_states(reading, parallel)
    reading.problems.raise_if_any(InputError)
    return ModelParallelConfig(model, parallel, states, only_trainable, where, tuple(reading.notes))


# ------------------------------------------------------------------------------------------------ which model


def _model_sections(
    reading: Reading, hf: Mapping[str, Any] | None
) -> tuple[Family, Mapping[str, Any], list[Mapping[str, Any]]]:
    """(family, its defaults, config.json and the YAML's model_config); InputError when the family is not known."""
    config = reading.section("model", "model_config") or reading.section("model_config")
    sections = [hf, config] if hf is not None else [config]
    legacy = [config.get("type"), reading.section("model", "arch").get("type")]
    mcore = [value for section in reversed(sections) for value in _mcore_names(section)]
    kinds = [(legacy, LEGACY_NAMES), (mcore, MCORE_NAMES)]
    if not reading.values(use_legacy=True).flag("use_legacy"):
        kinds.reverse()
    named = [([str(name) for name in written if name], table) for written, table in kinds]
    found, table = next(((names, table) for names, table in named if names), ([], {}))
    if not found:
        raise InputError(_no_family(reading, config))
    known = [table[name] for name in found if name in table]
    if known:
        return FAMILIES[known[0]], FAMILIES[known[0]].defaults, sections
    unknown = ", ".join(dict.fromkeys(found))
    raise InputError(
        f"{reading.where}: model family {unknown} is not one that strategies can be generated for; known are "
        f"{', '.join([*LEGACY_NAMES, *MCORE_NAMES])}: let MindSpore write the strategy with only_save_strategy: True"
    )


def _mcore_names(section: Mapping[str, Any]) -> list[Any]:
    architectures = section.get("architectures") or []
    listed = architectures if isinstance(architectures, list) else [architectures]
    return [section.get("model_type"), *listed]


def _no_family(reading: Reading, config: Mapping[str, Any]) -> str:
    pretrained = reading.document.get("pretrained_model_dir")
    wanted = [name for name in ("num_hidden_layers", "hidden_size", "vocab_size") if name not in config]
    lacks = ", ".join(["model_type", *wanted])
    if pretrained:
        return (
            f"{reading.where}: lacks {lacks}: they are in the config.json of pretrained_model_dir {pretrained!r}, "
            "which is not here; give it with --hf-config"
        )
    return (
        f"{reading.where}: lacks {lacks} (model.model_config); expected a model's YAML, or its config.json with "
        "--hf-config"
    )


def _add_missing(reading: Reading, values: Values, hf: Mapping[str, Any] | None) -> None:
    pretrained = reading.document.get("pretrained_model_dir")
    if pretrained and hf is None:
        lacks = f" (here lacks {', '.join(values.missing)})" if values.missing else ""
        reading.problems.add(
            f"{reading.where}: the model's sizes are in the config.json of pretrained_model_dir {pretrained!r}, which "
            f"is not here{lacks}; give it with --hf-config"
        )
    elif values.missing:
        reading.problems.add(f"{values.where} lacks {', '.join(values.missing)}; give them, or --hf-config")


def _check_keys(reading: Reading, config: Mapping[str, Any]) -> None:
    """Keys that change the network in ways that there are no rules for."""
    moe = {"moe_config": reading.document.get("moe_config")} if reading.document.get("moe_config") else {}
    for key, refused in _REFUSED.items():
        value = {**moe, **config}.get(key)
        if value is not None and refused(value):
            reading.problems.add(f"{reading.where}: {key}: {value!r} is not one that strategies can be generated for")
    reading.notes += [
        f"{key}: what it adds to the network is left out"
        for key, active in _UNCONFIRMED.items()
        if active(config.get(key))
    ]
