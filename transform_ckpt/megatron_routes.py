"""Routes from and to Megatron checkpoints: flags of the command line as plans."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from transform_ckpt import api, megatron_plans, planner, values
from transform_ckpt.errors import DifferenceError, InputError, PlanError
from transform_ckpt.megatron.as_mindspore import renamed
from transform_ckpt.megatron.containers import STATES, split_state, state_name
from transform_ckpt.megatron.directory import has_iteration
from transform_ckpt.megatron.mindspore_names import mindspore_name
from transform_ckpt.megatron.mindspore_source import open_converted
from transform_ckpt.megatron.mindspore_target import ConvertedOptions, scalar_states
from transform_ckpt.megatron.read import Options, open_megatron
from transform_ckpt.megatron_plans import MegatronSource, MegatronTarget
from transform_ckpt.planner import Plan
from transform_ckpt.routes import (
    COMPLETE_ONLY,
    LAYOUT_FLAGS,
    MEGATRON_TARGET,
    MINDSPORE_ONLY,
    NAMES_LATER,
    Flags,
    Route,
    refuse,
)
from transform_ckpt.target import TargetOptions, lay_out

_SOURCE_SIZES = {
    "tp": "src_tp",
    "pp": "src_pp",
    "vpp": "src_vpp",
    "ep": "src_ep",
    "etp": "src_etp",
    "cp": "src_cp",
    "dp": "src_dp",
    "num_layers": "num_layers",
    "num_experts": "num_experts",
    "num_layer_list": "src_num_layer_list",
    "noop_layers": "src_noop_layers",
}
_RENAMED = {
    "decoder_first_pipeline_num_layers": "first_stage_layers",
    "decoder_last_pipeline_num_layers": "last_stage_layers",
}


def megatron_to_megatron(src: str, flags: Flags) -> Route:
    """Another parallel layout."""
    refuse(flags, MINDSPORE_ONLY, "a Megatron destination")
    made = megatron_plans.megatron_to_megatron(src, source_options(src, flags), target_options(flags))
    return Route(made, lambda path: _check_megatron(made, path))


def mindspore_to_megatron(src: str, flags: Flags) -> Route:
    """Shards of Megatron back into Megatron files."""
    refuse(flags, [flag for flag in MINDSPORE_ONLY if flag != "src_strategy"], "a Megatron destination")
    made = megatron_plans.converted_to_megatron(
        src,
        target_options(flags),
        meta=flags.get("param_map_path"),
        step=flags.get("step"),
        given=source_sizes(flags),
        optimizer=not flags.get("no_optimizer"),
    )
    return Route(made, lambda path: _check_megatron(made, path))


def megatron_to_mindspore(src: str, flags: Flags) -> Route:
    """Shards as they are, or complete weights."""
    naming = flags.get("naming")
    if naming != "mindspeed":
        raise InputError(NAMES_LATER.format(src=src, naming=naming or "mcore"))
    refuse(flags, MEGATRON_TARGET, "a MindSpore destination")
    if flags.get("megatron_shards"):
        refuse(flags, COMPLETE_ONLY, "files of Megatron's shards")
        made, _ = megatron_plans.megatron_to_mindspore(src, source_options(src, flags), converted_options(flags))
        return Route(made, lambda path: _check_converted(made, path))
    return _complete(src, flags)


def _complete(src: str, flags: Flags) -> Route:
    """Whole tensors under MindSpore's names, or slices by a destination strategy."""
    found = source_options(src, flags).open(src)
    optimizer = not flags.get("no_optimizer")
    names = flags.get("optimizer_names") or "exp_avg"
    source = values.settle(renamed(found.source, scalar_states(found) if optimizer else {}, names))
    strategy = api.read_strategy(flags.get("dst_strategy"))
    options = TargetOptions(
        "ckpt" if flags.get("container") == "ckpt" else "safetensors",
        flags["prefix"],
        flags["unified"],
        flags["checkpoint_2"],
        flags["crc"],
        optimizer,
        tuple(flags["carry"]),
    )
    made = planner.build(source, replace(lay_out(source, strategy, options), witnesses=_renamed_witnesses(found)))
    return Route(made, lambda path: api.verify_output(made, path, strategy, flags.get("progress")))


def _renamed_witnesses(found: Any) -> tuple[Any, ...]:
    """Master weights are the parameters now: each must equal the model's own."""
    return tuple(replace(w, name=mindspore_name(split_state(w.name)[1])) for w in found.witnesses)


def _check_megatron(made: Plan, path: str) -> None:
    """The output read as anyone would, against the source: every weight and every optimizer state."""
    _check(made, path, lambda: open_megatron(path, Options(allow_missing=("*",))).source)


def _check_converted(made: Plan, path: str) -> None:
    _check(made, path, lambda: open_converted(path).source)


def _check(made: Plan, path: str, reopen: Callable[[], Any]) -> None:
    from transform_ckpt.compare import check_output

    try:
        found = reopen()
    except (InputError, PlanError) as error:
        raise DifferenceError(f"{path}: 1 differences from the source: it cannot be read again: {error}") from None
    same = {
        name
        for name, logical in made.source.params.items()
        if name in found.params and _comparable(logical, found.params[name])
    }
    missing = [n for n in made.source.params if _is_lost(n, made, found.params)]
    if missing:
        raise DifferenceError(f"{path}: {len(missing)} tensors of the source are missing: {missing[0]}")
    kept = {name: logical for name, logical in made.source.params.items() if name in same}
    narrowed = replace(made, source=replace(made.source, params=kept, states={}))
    check_output(narrowed, path, found)


def _is_lost(name: str, made: Plan, there: Collection[str]) -> bool:
    """A weight and its master stand for one another: MindSpore has the one, weights alone of Megatron the other."""
    state, weight = split_state(name)
    twin = weight if state == STATES[0] else state_name(name)
    return name not in there and twin not in there and name not in made.target.dropped


def _comparable(one: Any, two: Any) -> bool:
    """Casts and another padding of the vocabulary are not compared by value: digests and the plan's proof hold."""
    return (one.dtype, one.shape) == (two.dtype, two.shape)


def source_sizes(flags: Flags) -> dict[str, Any]:
    """What the user says of a source's layout."""
    return {key: flags[flag] for key, flag in _SOURCE_SIZES.items() if flags.get(flag)}


def source_options(src: str, flags: Flags) -> MegatronSource:
    """Flags about reading a Megatron checkpoint."""
    return MegatronSource(
        iteration=_source_iteration(src, flags),
        param_map=flags.get("param_map_path"),
        version=flags.get("megatron_core_version"),
        bucket_size=flags.get("bucket_size"),
        given=source_sizes(flags),
        optimizer=not flags.get("no_optimizer"),
        allow_missing=tuple(flags.get("allow_missing") or ()),
    )


def _source_iteration(src: str, flags: Flags) -> int | str | None:
    """--step always means the source; --iteration does where the source has it, and else names the output alone."""
    if flags.get("step") is not None:
        return int(flags["step"])
    wanted: int | str | None = flags.get("iteration")
    return wanted if wanted is not None and has_iteration(src, wanted) else None


def target_options(flags: Flags) -> MegatronTarget:
    """Flags about writing one."""
    return MegatronTarget(
        layout={_RENAMED.get(flag, flag): flags[flag] for flag in LAYOUT_FLAGS if flags.get(flag)},
        iteration=flags.get("iteration"),
        container=flags.get("megatron_container"),
        version=flags.get("megatron_core_version"),
        bucket_size=flags.get("bucket_size"),
        vocab_divisible_by=flags.get("vocab_divisible_by"),
        impl=flags.get("impl"),
        experts=flags.get("experts"),
    )


def converted_options(flags: Flags) -> ConvertedOptions:
    """Flags about tensor-parallel shards in MindSpore."""
    return ConvertedOptions(
        container=flags.get("container") or "ckpt",
        param_only=bool(flags.get("no_optimizer")),
        optimizer_names=flags.get("optimizer_names") or "exp_avg",
    )
