"""What a Megatron checkpoint says of its own layout: `args`, completed by the directories and by the user's flags.

Names of args: Megatron-LM megatron/training/arguments.py, MindSpeed-LLM convert_ckpt_v2 (num_layer_list, noop_layers,
schedules_method, moe_tp_extend_ep).  Every value may be absent: forks and converters write only some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from strategy.megatron import DUALPIPEV, LayerMap, MegatronError, Sizes, global_rank, layer_map
from transform_ckpt.errors import InputError
from transform_ckpt.megatron.rules import Sharding

LARGEST = 1 << 16
"""Of a parallel size or a number of layers or experts: what is above is no checkpoint's."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Layout and layer options.  `num_layers` counts noop layers; `sizes.vpp` is the number of model chunks."""

    sizes: Sizes
    num_layers: int
    num_experts: int | None = None
    layers_per_virtual_stage: int | None = None
    num_layer_list: tuple[int, ...] = ()
    noop_layers: tuple[int, ...] = ()
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    schedule: str | None = None
    tied: bool | None = None
    extend_ep: bool = False
    args: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    """The file that says so, for messages."""

    def __post_init__(self) -> None:
        numbers = (self.num_layers, self.num_experts, self.layers_per_virtual_stage, self.first_stage_layers)
        numbers = (*numbers, self.last_stage_layers, *asdict(self.sizes).values())
        listed = (*self.num_layer_list, *self.noop_layers)
        likely = all(n is None or (type(n) is int and 0 <= n <= LARGEST) for n in numbers)
        if not likely or not all(type(n) is int and 0 <= n <= LARGEST for n in listed):
            raise InputError(f"{self.where}: sizes or layers are no numbers up to {LARGEST:,}: {self.sizes}")
        if self.sizes.tp % self.etp:
            raise InputError(
                f"an expert tensor parallel size of {self.etp} does not divide TP {self.sizes.tp}: ranks that hold "
                "different parts of an expert would share a directory: choose another"
            )

    @property
    def etp(self) -> int:
        """Size of expert tensor parallelism."""
        return self.sizes.tp if self.sizes.etp is None else self.sizes.etp

    @property
    def experts_dp(self) -> int:
        """How many ranks share an expert buffer."""
        sizes = self.sizes
        return max(1, sizes.dp * sizes.cp * sizes.tp // (sizes.ep * self.etp))

    def layers(self) -> LayerMap:
        """Which layer lies where; InputError where the options contradict each other."""
        try:
            return layer_map(
                self.num_layers,
                pp=self.sizes.pp,
                vpp=1 if self.schedule == DUALPIPEV else self.sizes.vpp,
                layers_per_virtual_stage=self.layers_per_virtual_stage,
                num_layer_list=self.num_layer_list,
                noop_layers=self.noop_layers,
                first_stage_layers=self.first_stage_layers,
                last_stage_layers=self.last_stage_layers,
                schedule=self.schedule,
            )
        except MegatronError as error:
            raise InputError(f"{self.where}: layers: {error}" if self.where else f"layers: {error}") from None

    def sharding(self, tp: int, ep: int) -> Sharding:
        """Place of the rank whose directory is (tp, ep): etp divides tp, its expert tensor rank is the remainder."""
        if self.extend_ep:  # MindSpeed's moe_tp_extend_ep: TP ranks are expert ranks, too
            size = self.sizes
            return Sharding(
                tp=size.tp, tp_rank=tp, ep=size.ep * size.tp, ep_rank=ep * size.tp + tp, num_experts=self.num_experts
            )
        return Sharding(
            tp=self.sizes.tp,
            tp_rank=tp,
            ep=self.sizes.ep,
            ep_rank=ep,
            etp=self.etp,
            etp_rank=tp % self.etp,
            num_experts=self.num_experts,
        )

    def expert_rank(self, tp: int, replica: int) -> int:
        """EP rank of a rank, by its TP rank and its place among those that share dense parameters."""
        if self.extend_ep:
            return replica % self.sizes.ep
        return (replica * self.sizes.tp + tp) // self.etp % self.sizes.ep

    def dense_ep(self, tp: int) -> int:
        """EP rank of the first data-parallel rank of a TP rank: its directory holds the dense optimizer state."""
        return self.expert_rank(tp, 0)

    def global_ranks(self, place: tuple[int, int, int]) -> list[int]:
        """Global ranks of a (tp, pp, ep), those that share its parameters, in order; none where no rank is that."""
        tp, pp, ep = place
        cp = self.sizes.cp
        mine = [r for r in range(self.sizes.dp * cp) if self.expert_rank(tp, r) == ep]
        return [global_rank(tp, pp, r // cp, r % cp, self.sizes) for r in mine]


SIZE_NAMES = {
    "tp": ("tensor_model_parallel_size",),
    "pp": ("pipeline_model_parallel_size",),
    "vpp": ("virtual_pipeline_model_parallel_size",),
    "ep": ("expert_model_parallel_size",),
    "etp": ("expert_tensor_parallel_size",),
    "cp": ("context_parallel_size",),
    "dp": ("data_parallel_size",),
}
_FIRST = ("decoder_first_pipeline_num_layers", "num_layers_in_first_pipeline_stage")
_LAST = ("decoder_last_pipeline_num_layers", "num_layers_in_last_pipeline_stage")


def facts_of(args: Mapping[str, Any], where: str, **given: Any) -> Facts:
    """Facts from `args`; what is in `given` (not None) wins.  InputError names the file and a value that is none."""

    def number(*names: str) -> int | None:
        for name in names:
            value = args.get(name)
            if value is None:
                continue
            if type(value) is not int or not 0 <= value <= LARGEST:
                raise InputError(f"{where}: args.{name} is {value!r:.80}, not a number: give it as a flag")
            return value
        return None

    sizes = {key: given.get(key) or number(*names) for key, names in SIZE_NAMES.items()}
    listed = given.get("num_layer_list") or numbers_of(args.get("num_layer_list"), "num_layer_list", where)
    layers = given.get("num_layers") or number("num_layers")
    if args.get("pipeline_model_parallel_layout") not in (None, ""):
        raise InputError(
            f"{where}: args.pipeline_model_parallel_layout is {args['pipeline_model_parallel_layout']!r:.80}: such "
            "layouts are not read: give --src-num-layer-list"
        )
    if layers is None:
        raise InputError(f"{where}: args does not say num_layers: give --num-layers")
    schedule = given.get("schedule") or (DUALPIPEV if args.get("schedules_method") == DUALPIPEV else None)
    untied = args.get("untie_embeddings_and_output_weights")
    try:
        found = Sizes(**{key: size for key, size in sizes.items() if size})
    except MegatronError as error:
        raise InputError(f"{where}: {error}") from None
    facts = Facts(
        sizes=found,
        num_layers=layers,
        num_experts=given.get("num_experts") or number("num_experts", "num_moe_experts") or None,
        layers_per_virtual_stage=given.get("layers_per_virtual_stage")
        or number("num_layers_per_virtual_pipeline_stage"),
        num_layer_list=listed,
        noop_layers=given.get("noop_layers") or numbers_of(args.get("noop_layers"), "noop_layers", where),
        first_stage_layers=given.get("first_stage_layers") or number(*_FIRST),
        last_stage_layers=given.get("last_stage_layers") or number(*_LAST),
        schedule=schedule,
        tied=None if untied is None else not untied,
        extend_ep=bool(args.get("moe_tp_extend_ep")) and found.tp > 1,
        args=args,
        where=where,
    )
    return _with_virtual_stages(_with_uneven_ends(facts))


def _with_uneven_ends(facts: Facts) -> Facts:
    """account_for_embedding_in_pipeline_split and ..._loss_...: these count as layers of the first and last stage."""
    first = bool(facts.args.get("account_for_embedding_in_pipeline_split"))
    last = bool(facts.args.get("account_for_loss_in_pipeline_split"))
    pp, vpp = facts.sizes.pp, facts.sizes.vpp
    if not (first or last) or pp == 1 or vpp > 1 or facts.num_layer_list:
        return facts
    each = (facts.num_layers + first + last) // pp
    return replace(
        facts,
        first_stage_layers=each - 1 if first else facts.first_stage_layers,
        last_stage_layers=each - 1 if last else facts.last_stage_layers,
    )


def _with_virtual_stages(facts: Facts) -> Facts:
    """The number of chunks from the layers of each, which args may give instead."""
    each, sizes = facts.layers_per_virtual_stage, facts.sizes
    if facts.schedule == DUALPIPEV:
        return replace(facts, layers_per_virtual_stage=None, sizes=replace(sizes, vpp=2))
    if each and sizes.vpp == 1 and facts.num_layers % (sizes.pp * each) == 0:
        return replace(facts, sizes=replace(sizes, vpp=facts.num_layers // (sizes.pp * each)))
    return facts


def numbers_of(value: object, name: str, where: str) -> tuple[int, ...]:
    """`"1,3"`, [1, 3], {1, 3} or None as numbers in order."""
    if value in (None, ""):
        return ()
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", value):
        return tuple(int(part) for part in value.split(","))
    if isinstance(value, Sequence | set | frozenset) and all(type(n) is int and 0 <= n < 1 << 31 for n in value):
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    raise InputError(f"{where}: {name} is {value!r:.80}, expected numbers as 1,3")
