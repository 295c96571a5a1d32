"""Which conversion a command asks for: source format and target format choose a route; each is one entry of a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from strategy.generate_files import DIRECTORY as STRATEGY_DIRECTORY
from transform_ckpt import api, planner, values
from transform_ckpt.errors import DifferenceError, InputError, PlanError, UsageError
from transform_ckpt.megatron.as_mindspore import renamed
from transform_ckpt.megatron.containers import PREFIX
from transform_ckpt.megatron.directory import has_iteration
from transform_ckpt.megatron.mindspore_source import is_converted, open_converted
from transform_ckpt.megatron.mindspore_target import ConvertedOptions, scalar_states
from transform_ckpt.megatron.read import Options, open_megatron
from transform_ckpt.megatron_plans import (
    MegatronSource,
    MegatronTarget,
    converted_to_megatron,
    megatron_to_megatron,
    megatron_to_mindspore,
)
from transform_ckpt.planner import Plan
from transform_ckpt.source import CHECKPOINT_2, MEGATRON, MINDSPORE
from transform_ckpt.target import DEFAULT_PREFIX, TargetOptions, lay_out

Flags = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """A plan, and how its output is compared with the source before it gets its name."""

    plan: Plan
    check: Callable[[str], None]


def route(src: str, flags: Flags) -> Route:
    """The plan that flags ask for; InputError for pairs of formats that this version does not convert."""
    source = flags.get("from_format") or _family(api.detect(src))
    target = flags.get("to_format")
    found = _ROUTES.get((source, str(target)))
    if found is None:
        known = ", ".join(f"{a} to {b}" for a, b in _ROUTES)
        raise InputError(f"{source} to {target}: this version converts {known} (transform-ckpt formats)")
    if source != _family(api.detect(src)):
        raise InputError(f"{src}: is a {_family(api.detect(src))} checkpoint, and --from {source} is given: drop it")
    return found(src, flags)


def _family(kind: str) -> str:
    return MINDSPORE if kind == CHECKPOINT_2 else kind


def _mindspore_to_mindspore(src: str, flags: Flags) -> Route:
    naming = flags.get("naming")
    if naming is not None and not (naming == "mindspeed" and is_converted(src)):
        raise InputError(_NAMES_LATER.format(src=src, naming=naming))
    _refuse(flags, (*_MEGATRON_TARGET, *_SHARDS), "a MindSpore destination of MindSpore tensors")
    keys = (
        *("src_strategy", "dst_strategy", "dst_parallel", "container", "step", "prefix", "unified", "checkpoint_2"),
        *("crc", "carry", "allow_missing"),
    )
    options = {key: flags[key] for key in keys if key in flags}
    made = api.plan(src, optimizer=not flags.get("no_optimizer"), **options)
    written = flags.get("dst_strategy")

    def check(path: str) -> None:
        strategy = os.path.join(path, STRATEGY_DIRECTORY) if flags.get("dst_parallel") else written
        api.verify_output(made, path, strategy, flags.get("progress"))

    return Route(made, check)


def _megatron_to_megatron(src: str, flags: Flags) -> Route:
    _refuse(flags, _MINDSPORE_ONLY, "a Megatron destination")
    made = megatron_to_megatron(src, source_options(src, flags), target_options(flags))
    return Route(made, lambda path: _check_megatron(made, path))


def _mindspore_to_megatron(src: str, flags: Flags) -> Route:
    _refuse(flags, [flag for flag in _MINDSPORE_ONLY if flag != "src_strategy"], "a Megatron destination")
    made = converted_to_megatron(
        src,
        target_options(flags),
        meta=flags.get("param_map_path"),
        step=flags.get("step"),
        given=source_sizes(flags),
        optimizer=not flags.get("no_optimizer"),
    )
    return Route(made, lambda path: _check_megatron(made, path))


def _megatron_to_mindspore(src: str, flags: Flags) -> Route:
    naming = flags.get("naming")
    if naming != "mindspeed":
        raise InputError(_NAMES_LATER.format(src=src, naming=naming or "mcore"))
    _refuse(flags, _MEGATRON_TARGET, "a MindSpore destination")
    if flags.get("megatron_shards"):
        _refuse(flags, _COMPLETE_ONLY, "files of Megatron's shards")
        made, _ = megatron_to_mindspore(src, source_options(src, flags), converted_options(flags))
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
    from transform_ckpt.megatron.as_mindspore import split_state
    from transform_ckpt.megatron.mindspore_names import mindspore_name

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
    missing = [n for n in made.source.params if n not in found.params and n.startswith(PREFIX)]
    missing = [n for n in missing if n not in made.target.dropped]
    if missing:
        raise DifferenceError(f"{path}: {len(missing)} tensors of the source are missing: {missing[0]}")
    kept = {name: logical for name, logical in made.source.params.items() if name in same}
    narrowed = replace(made, source=replace(made.source, params=kept, states={}))
    check_output(narrowed, path, found)


def _comparable(one: Any, two: Any) -> bool:
    """Casts and another padding of the vocabulary are not compared by value: digests and the plan's proof hold."""
    return (one.dtype, one.shape) == (two.dtype, two.shape)


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
_LAYOUT = {
    "tp": "tp",
    "pp": "pp",
    "ep": "ep",
    "etp": "etp",
    "cp": "cp",
    "dp": "dp",
    "layers_per_virtual_stage": "layers_per_virtual_stage",
    "num_layer_list": "num_layer_list",
    "noop_layers": "noop_layers",
    "first_stage_layers": "decoder_first_pipeline_num_layers",
    "last_stage_layers": "decoder_last_pipeline_num_layers",
    "schedule": "schedule",
}
_MEGATRON_TARGET = (*_LAYOUT.values(), "megatron_container", "vocab_divisible_by", "impl", "experts")
_SHARDS = ("megatron_shards", "optimizer_names")
_COMPLETE_ONLY = ("dst_strategy", "dst_parallel", "unified", "checkpoint_2", "crc", "prefix", "carry", "src_strategy")
_MINDSPORE_ONLY = (*_COMPLETE_ONLY, *_SHARDS, "naming", "container")
_SPELLED = {"megatron_container": "container", "container": "format"}
_UNSET = {"prefix": DEFAULT_PREFIX}
_NAMES_LATER = (
    "{src}: names of MindFormers ({naming}) need the tables of model families, which this version lacks: add "
    "--naming mindspeed for Megatron's own, as convert_pt2ckpt writes them"
)


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
        layout={key: flags[flag] for key, flag in _LAYOUT.items() if flags.get(flag)},
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


def _refuse(flags: Flags, names: Sequence[str], what: str) -> None:
    """UsageError for flags that would have no effect."""
    given = [
        f"--{_SPELLED.get(n, n).replace('_', '-')}"
        for n in names
        if flags.get(n) not in (None, False, (), _UNSET.get(n))
    ]
    if given:
        raise UsageError(f"{', '.join(given)}: has no meaning for {what}: drop it")


_ROUTES: Mapping[tuple[str, str], Callable[[str, Flags], Route]] = {
    (MINDSPORE, MINDSPORE): _mindspore_to_mindspore,
    (MEGATRON, MEGATRON): _megatron_to_megatron,
    (MEGATRON, MINDSPORE): _megatron_to_mindspore,
    (MINDSPORE, MEGATRON): _mindspore_to_megatron,
}
