"""Plans of conversions from and to Megatron checkpoints: what is read, how it is laid out, proven complete."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Any

from transform_ckpt import planner
from transform_ckpt.errors import InputError, UsageError
from transform_ckpt.megatron import directory
from transform_ckpt.megatron.buckets import BucketError, BufferMap, padding_of, parse_version
from transform_ckpt.megatron.carry import model_of, same_layout, same_parameters
from transform_ckpt.megatron.containers import PREFIX
from transform_ckpt.megatron.directory import Place
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.maps import MapOptions, inferred_bucket_size
from transform_ckpt.megatron.mindspore_source import ConvertedSource, open_converted
from transform_ckpt.megatron.mindspore_target import Converted, ConvertedOptions, lay_out_converted
from transform_ckpt.megatron.names import dialect_of
from transform_ckpt.megatron.read import Megatron, Options, open_megatron
from transform_ckpt.megatron.resume import resumed_model
from transform_ckpt.megatron.write import Layout, lay_out_megatron
from transform_ckpt.planner import Plan

Maps = Mapping[tuple[Place, bool], Sequence[tuple[int, BufferMap]]]
CONTAINERS = {"list": False, "coalesced": True}
OLDEST_COALESCED = (0, 7)


@dataclass(frozen=True, slots=True)
class MegatronSource:
    """How a Megatron checkpoint is read: flags of the command line; None is what the checkpoint says."""

    iteration: int | str | None = None
    param_map: str | None = None
    version: str | None = None
    bucket_size: int | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    optimizer: bool = True
    allow_missing: Sequence[str] = ()
    strict: bool = False
    """What is given must be what args says, not win over it."""

    def open(self, path: str) -> Megatron:
        """Its headers."""
        maps = MapOptions(self.param_map, _parsed(self.version) if self.version else None, self.bucket_size)
        options = Options(
            iteration=self.iteration,
            maps=maps,
            given=self.given,
            defaults=self.defaults,
            optimizer=self.optimizer,
            allow_missing=tuple(self.allow_missing),
            strict=self.strict,
        )
        return open_megatron(path, options)


@dataclass(frozen=True, slots=True)
class MegatronTarget:
    """How one is written.  `layout` are sizes and layer options; what is not in it is the source's.

    `bucket_size` in elements; 0 is one bucket for each chunk, None what the source has.
    """

    layout: Mapping[str, Any] = field(default_factory=dict)
    iteration: int | str | None = None
    container: str | None = None
    version: str | None = None
    bucket_size: int | None = None
    vocab_divisible_by: int | None = None
    all_places: bool = True
    impl: str | None = None
    experts: str | None = None
    keep_step: bool = False
    """The directory is called after the step, where `iteration` does not say another."""


_SIZES = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")
_LAYERS = (
    *("num_layer_list", "noop_layers", "first_stage_layers", "last_stage_layers", "layers_per_virtual_stage"),
    "schedule",
)


def megatron_to_mindspore(path: str, source: MegatronSource, options: ConvertedOptions) -> tuple[Plan, Converted]:
    """Rank directories of tensor-parallel shards, as convert_pt2ckpt makes them."""
    found = source.open(path)
    converted = lay_out_converted(found, options)
    return planner.build(converted.source, converted.target), converted


def megatron_to_megatron(path: str, source: MegatronSource, target: MegatronTarget) -> Plan:
    """Another parallel layout, optimizer and all."""
    found = source.open(path)
    optimizer = source.optimizer and found.coalesced is not None
    facts, notes = _runnable(target_facts(found.facts, target.layout), target, optimizer=optimizer)
    model, read = model_of(found, facts, optimizer=optimizer)
    _check_dialect(target, model.rules)
    rows = vocabulary_rows(model.logicals, model.rules, facts, target.vocab_divisible_by)
    coalesced = _container(target, coalesced=found.coalesced) if optimizer else None
    same = same_layout(found.facts, facts) and coalesced == found.coalesced and _same_rules(target, found.versions)
    maps = {key: [(p.chunk, p.map) for p in placed] for key, placed in found.buffers.items()}
    layout = Layout(
        facts=facts,
        iteration=output_iteration(target, found.source.step),
        step=found.source.step if optimizer else None,
        coalesced=coalesced,
        version=_version(target, found.versions, coalesced=coalesced),
        bucket_size=None if same else _bucket_size(target, maps, found.facts),
        vocabulary=rows,
        maps=maps if same else {},
        all_places=target.all_places,
    )
    made = lay_out_megatron(model, layout)
    notes += _step_note(layout)
    made = replace(made, notes=(*made.notes, *notes), witnesses=found.witnesses if optimizer else ())
    return planner.build(read, made)


def converted_to_megatron(
    path: str,
    target: MegatronTarget,
    *,
    meta: str | None = None,
    template: str | None = None,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    optimizer: bool = True,
) -> Plan:
    """Rank directories of Megatron shards back into Megatron files, in their own layout or another."""
    found = open_converted(path, meta, template=template, step=step, given=given)
    optimizer = optimizer and found.optimizer
    facts, notes = _runnable(target_facts(found.facts, target.layout), target, optimizer=optimizer)
    model, read = resumed_model(found, facts, optimizer=optimizer)
    _check_dialect(target, model.rules)
    recorded = found.recorded
    held = _held_coalesced(found)
    coalesced = _container(target, coalesced=held) if optimizer else None
    known = [recorded.version] if recorded is not None and recorded.version else []
    # buckets are those of the run; their padding is what a container of another version has otherwise
    same = _same_buffers(found.facts, facts) and coalesced in (None, held) and _same_rules(target, known)
    layout = Layout(
        facts=facts,
        iteration=output_iteration(target, found.source.step),
        step=found.source.step if optimizer or target.keep_step else None,
        coalesced=coalesced,
        version=_version(target, known, coalesced=coalesced),
        bucket_size=None if same else _bucket_size(target, found.maps, found.facts),
        vocabulary=vocabulary_rows(model.logicals, model.rules, facts, target.vocab_divisible_by),
        maps=found.maps if same else {},
        all_places=target.all_places,
    )
    made = lay_out_megatron(model, layout)
    return planner.build(read, replace(made, notes=(*made.notes, *notes, *_step_note(layout))))


def _held_coalesced(found: ConvertedSource) -> bool:
    """The container of the run: as recorded, else as its maps say (a list has no padding between parameters)."""
    if found.recorded is not None:
        return bool(found.recorded.coalesced)
    return any(
        one.end != two.start and one.bucket == two.bucket
        for buffers in found.maps.values()
        for _, buffer in buffers
        for one, two in pairwise(buffer.ranges)
    )


def _runnable(facts: Facts, target: MegatronTarget, *, optimizer: bool) -> tuple[Facts, list[str]]:
    """Facts that a job can have: experts need as many ranks; InputError where --dp says otherwise."""
    sizes = facts.sizes
    if sizes.ep > 1 and facts.num_experts is None:
        raise InputError(f"EP {sizes.ep}: the model has no experts: drop --ep")
    ranks, needed = sizes.dp * sizes.cp * sizes.tp, sizes.ep * facts.etp
    if not optimizer or facts.extend_ep or ranks % needed == 0:
        return facts, []
    dp = next(n for n in count(sizes.dp) if n * sizes.cp * sizes.tp % needed == 0)
    if target.layout.get("dp"):
        raise InputError(
            f"dp {sizes.dp} x cp {sizes.cp} x tp {sizes.tp} ranks do not divide over EP {sizes.ep} x ETP {facts.etp}: "
            f"give --dp {dp}"
        )
    return replace(facts, sizes=replace(sizes, dp=dp)), [f"EP {sizes.ep} needs dp {dp}: args and buffers are for it"]


def _check_dialect(target: MegatronTarget, names: Collection[str]) -> None:
    """InputError where --impl or --experts asks for names that the source does not have."""
    held = dialect_of(names)
    for flag, wanted in (("impl", target.impl), ("experts", target.experts)):
        if wanted is not None and held[flag] and wanted not in held[flag]:
            raise InputError(
                f"--{flag} {wanted}: the source has {' or '.join(sorted(held[flag]))} names, which this version keeps: "
                f"drop --{flag}"
            )


def _step_note(layout: Layout) -> list[str]:
    if layout.step in (None, layout.iteration) or layout.iteration is None:
        return []
    name = directory.iteration_name(layout.iteration)
    return [f"{name} holds the training state of step {layout.step}: --iteration {layout.step} calls it so"]


def _same_buffers(source: Facts, target: Facts) -> bool:
    """With the same model-parallel layout the run's own maps hold.

    dp only changes padding at the ends of buckets, before which a shared embedding's bucket may begin.
    """
    if source.sizes.pp > 1 and (source.tied or source.args.get("mtp_num_layers")):
        return same_layout(source, target)
    return same_parameters(source, target)


def target_facts(source: Facts, layout: Mapping[str, Any]) -> Facts:
    """Facts of the destination: options that are not given are the source's where they still fit."""
    given = {key: value for key, value in layout.items() if value not in (None, ())}
    sizes = {key: given.pop(key) for key in _SIZES if key in given}
    if "etp" not in sizes and source.etp == source.sizes.tp:
        sizes["etp"] = None  # it goes with tp
    pipeline = "pp" in sizes or "vpp" in sizes or any(key in given for key in _LAYERS)
    if not pipeline:
        return replace(source, sizes=replace(source.sizes, **sizes), **given)
    noop = given.get("noop_layers", ())
    real = source.layers().num_layers
    each = given.get("layers_per_virtual_stage")
    total = real + len(noop)
    pp = sizes.get("pp", source.sizes.pp)
    if each and total % (pp * each):
        raise InputError(f"{total} layers do not divide into {pp} stages of chunks of {each} layers")
    sizes["vpp"] = total // (pp * each) if each else sizes.get("vpp", 2 if given.get("schedule") else 1)
    return replace(
        source,
        sizes=replace(source.sizes, **sizes),
        num_layers=total,
        layers_per_virtual_stage=each,
        num_layer_list=given.get("num_layer_list", ()),
        noop_layers=noop,
        first_stage_layers=given.get("first_stage_layers"),
        last_stage_layers=given.get("last_stage_layers"),
        schedule=given.get("schedule"),
    )


def vocabulary_rows(
    logicals: Mapping[str, Any], rules: Mapping[str, Any], facts: Facts, divisible_by: int | None
) -> int | None:
    """Rows that the vocabulary has in the destination, None where no tensor has one."""
    rows = {p.shape[0] for n, p in logicals.items() if rules[n].vocabulary and not n.startswith(PREFIX)}
    rows = rows or {p.shape[0] for n, p in logicals.items() if n in rules and rules[n].vocabulary}
    if not rows:
        return None
    known = facts.args.get("vocab_size")
    least = max(rows)
    if divisible_by is not None and type(known) is int and 0 < known <= least:
        least = known  # what is above is padding of the old layout
    step = (divisible_by or 1) * facts.sizes.tp
    return int(-(-least // step) * step)


def output_iteration(target: MegatronTarget, step: int | None) -> int | None:
    """The number of the destination; None is `release`."""
    if target.iteration == "release":
        return None
    if target.iteration is not None:
        return int(target.iteration)
    return step or 1 if target.keep_step else 1


def _container(target: MegatronTarget, *, coalesced: bool | None) -> bool:
    if target.container is not None:
        return CONTAINERS[target.container]
    return bool(coalesced)


def _version(target: MegatronTarget, known: Collection[tuple[int, ...]], *, coalesced: bool | None) -> tuple[int, ...]:
    """Of megatron-core, whose rules the buffers follow; each known one is the newest that fits some buffer."""
    if target.version:
        version = _parsed(target.version)
        if coalesced is not None and (version >= OLDEST_COALESCED) != coalesced:
            kind = "coalesced" if coalesced else "a list"
            raise UsageError(
                f"megatron-core {target.version} does not read {kind}: give another --container or version"
            )
        return version
    fits = [v for v in known if (v >= OLDEST_COALESCED) == bool(coalesced)]
    return min(fits, default=(0, 16, 1) if coalesced else (0, 6))


def _parsed(text: str) -> tuple[int, ...]:
    """A version whose rules are known; UsageError for any other word."""
    try:
        version = parse_version(text)
        padding_of(version)
    except BucketError as error:
        raise UsageError(f"--megatron-core-version: {error}") from None
    return version


def _same_rules(target: MegatronTarget, known: Collection[tuple[int, ...]]) -> bool:
    """Are buffers to be as in the source, as far as the user says of them?"""
    if target.version is None:
        return target.bucket_size is None
    rules = padding_of(_parsed(target.version))
    return target.bucket_size is None and bool(known) and padding_of(min(known)) == rules


def _bucket_size(target: MegatronTarget, maps: Maps, facts: Facts) -> int | None:
    """As the user says, else of the source's first stage, where its buffers have several buckets."""
    if target.bucket_size is not None:
        return target.bucket_size
    first = [buffers[0][1] for (place, experts), buffers in maps.items() if not place[1] and not experts]
    return inferred_bucket_size(first[0] if first else None, facts)
