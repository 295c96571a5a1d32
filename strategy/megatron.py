"""Where Megatron keeps what: layers over pipeline stages and model chunks, checkpoint directories, global ranks.

Pure integers; imports nothing of transform_ckpt.

Facts: megatron-core 0.16.1 transformer/transformer_layer.py (get_transformer_layer_offset: interleaved chunks, first
and last stage of their own sizes) and parallel_state.py (order tp-cp-ep-dp-pp); MindSpeed-LLM convert_ckpt_v2
(num_layer_list, noop_layers, dualpipev).  Layers are numbered from 0 in every chunk of a file.  A noop layer has a
number in num_layers and a place in its chunk, and no tensors; the other layers are numbered in order without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

DUALPIPEV = "dualpipev"
Place = tuple[int, int]
"""(pp, vpp): a pipeline rank and one of its model chunks."""

_DIRECTORY = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_EXCLUSIVE = (
    ("num_layer_list", "vpp"),
    ("num_layer_list", "layers_per_virtual_stage"),
    ("num_layer_list", "noop_layers"),
    ("num_layer_list", "first_stage_layers or last_stage_layers"),
    ("num_layer_list", DUALPIPEV),
    ("noop_layers", "first_stage_layers or last_stage_layers"),
    ("layers_per_virtual_stage", "first_stage_layers or last_stage_layers"),
    (DUALPIPEV, "vpp"),
    (DUALPIPEV, "layers_per_virtual_stage"),
    (DUALPIPEV, "first_stage_layers or last_stage_layers"),
)


class MegatronError(ValueError):
    """Parallel sizes, layer options or numbers that contradict each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Parallel sizes.  `etp` None is `tp`; `dp` excludes `cp`; `ep` takes its ranks out of dp * cp."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "cp": self.cp, "dp": self.dp}
        for name, size in (*sizes.items(), ("etp", 1 if self.etp is None else self.etp)):
            if size < 1:
                raise MegatronError(f"{name} is {size}, and a parallel size is 1 at least")


@dataclass(frozen=True)
class LayerMap:
    """Which layer lies where: `chunks[pp][vpp][local]` is a global layer, None a noop.

    `folded` is dualpipev: the last chunk is the first rank's second one, so that rank has both ends of the model.
    """

    chunks: tuple[tuple[tuple[int | None, ...], ...], ...]
    folded: bool = False

    @cached_property
    def _places(self) -> dict[int, tuple[int, int, int]]:
        return {
            layer: (pp, vpp, local)
            for pp, stage in enumerate(self.chunks)
            for vpp, chunk in enumerate(stage)
            for local, layer in enumerate(chunk)
            if layer is not None
        }

    @property
    def num_layers(self) -> int:
        """How many layers there are, noop ones not counted."""
        return len(self._places)

    @property
    def first(self) -> Place:
        """The chunk with the embedding."""
        return 0, 0

    @property
    def last(self) -> Place:
        """The chunk with the final norm and the output layer."""
        pp = 0 if self.folded else len(self.chunks) - 1
        return pp, len(self.chunks[pp]) - 1

    def global_layer(self, pp: int, vpp: int, local: int) -> int:
        """The global number of a chunk's layer; MegatronError where there is none."""
        if not (0 <= pp < len(self.chunks) and 0 <= vpp < len(self.chunks[pp])):
            raise MegatronError(f"pp {pp}, chunk {vpp}: there are {len(self.chunks)} x {len(self.chunks[0])} chunks")
        chunk = self.chunks[pp][vpp]
        layer = chunk[local] if 0 <= local < len(chunk) else None
        if layer is None:
            numbers = [n for n, real in enumerate(chunk) if real is not None]
            raise MegatronError(f"pp {pp}, chunk {vpp}: has no layer {local}; its layers are {numbers}")
        return layer

    def place_of(self, layer: int) -> tuple[int, int, int]:
        """(pp, vpp, local) of a global layer; MegatronError where there is none."""
        if layer not in self._places:
            raise MegatronError(f"layer {layer} of {self.num_layers} layers")
        return self._places[layer]


def layer_map(
    num_layers: int,
    *,
    pp: int = 1,
    vpp: int = 1,
    layers_per_virtual_stage: int | None = None,
    num_layer_list: Sequence[int] = (),
    noop_layers: Sequence[int] = (),
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    schedule: str | None = None,
) -> LayerMap:
    """The layers of a model over its chunks; MegatronError for options that cannot be together.

    `num_layers` counts noop layers, and `noop_layers` are numbers among all of them.  `num_layer_list`: layers per
    stage.  `first_stage_layers`, `last_stage_layers`: theirs, the other stages share the rest.  `schedule` "dualpipev":
    two chunks a rank, the second of them mirrored (rank 0 has the first and the last layers).
    """
    folded = schedule == DUALPIPEV
    ends = {0: first_stage_layers, pp - 1: last_stage_layers} if pp > 1 else {}
    ends_given = first_stage_layers is not None or last_stage_layers is not None
    _check_sizes({"num_layers": num_layers, "pp": pp, "vpp": vpp, "layers_per_virtual_stage": layers_per_virtual_stage})
    _check_exclusive(
        {
            "num_layer_list": bool(num_layer_list),
            "vpp": vpp > 1,
            "layers_per_virtual_stage": layers_per_virtual_stage is not None,
            "noop_layers": bool(noop_layers),
            "first_stage_layers or last_stage_layers": ends_given,
            DUALPIPEV: folded,
        }
    )
    if schedule is not None and not folded:
        raise MegatronError(f"schedule {schedule!r} is not known; the one that moves layers is {DUALPIPEV!r}")
    if ends_given and pp == 1:
        raise MegatronError("first_stage_layers and last_stage_layers need pp 2 at least")
    sizes = _stage_sizes(num_layers, pp, num_layer_list, {p: n for p, n in ends.items() if n is not None})
    chunks_per_stage = 2 if folded else _chunks_per_stage(sizes[0], vpp, layers_per_virtual_stage)
    for stage, size in enumerate(sizes):
        if size % chunks_per_stage:
            raise MegatronError(f"the {size} layers of stage {stage} do not divide into {chunks_per_stage} chunks")
    numbers = _real_numbers(num_layers, noop_layers)
    found: dict[Place, tuple[int | None, ...]] = {}
    at = 0
    for v in range(chunks_per_stage):
        for p in reversed(range(pp)) if folded and v else range(pp):
            stop = at + sizes[p] // chunks_per_stage
            found[p, v] = tuple(numbers[at:stop])
            at = stop
    return LayerMap(tuple(tuple(found[p, v] for v in range(chunks_per_stage)) for p in range(pp)), folded)


def _check_sizes(sizes: Mapping[str, int | None]) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise MegatronError(f"{name} is {size}, expected 1 at least")


def _check_exclusive(given: Mapping[str, bool]) -> None:
    for one, other in _EXCLUSIVE:
        if given[one] and given[other]:
            raise MegatronError(f"{one} together with {other}: no Megatron lays out layers by both, give one of them")


def _stage_sizes(num_layers: int, pp: int, listed: Sequence[int], ends: Mapping[int, int]) -> tuple[int, ...]:
    """Layers per stage: as listed, or those of `ends` as given and the rest equal."""
    if listed:
        if len(listed) != pp or sum(listed) != num_layers or min(listed) < 0:
            raise MegatronError(
                f"num_layer_list {list(listed)} is {len(listed)} stages of {sum(listed)} layers together, "
                f"expected {pp} stages of {num_layers}"
            )
        return tuple(listed)
    if any(n < 1 for n in ends.values()):
        raise MegatronError(f"first and last stage of {list(ends.values())} layers, expected 1 at least")
    stages, rest = pp - len(ends), num_layers - sum(ends.values())
    if rest < 0 or (rest % stages if stages else rest):
        given = f"{rest} of {num_layers}" if ends else f"{num_layers}"
        raise MegatronError(f"{given} layers do not divide over {stages} pipeline stages: say how many each has")
    return tuple(ends.get(p, rest // max(stages, 1)) for p in range(pp))


def _chunks_per_stage(layers: int, vpp: int, layers_per_chunk: int | None) -> int:
    if layers_per_chunk is None:
        return vpp
    if layers % layers_per_chunk:
        raise MegatronError(f"the {layers} layers of a stage do not divide into chunks of {layers_per_chunk} layers")
    if vpp not in {1, layers // layers_per_chunk}:
        raise MegatronError(f"{layers} layers in chunks of {layers_per_chunk} are not {vpp} chunks")
    return layers // layers_per_chunk


def _real_numbers(num_layers: int, noop_layers: Sequence[int]) -> list[int | None]:
    """The number of each layer without the noop ones, None for these."""
    noops = set(noop_layers)
    if len(noops) != len(noop_layers):
        raise MegatronError(f"noop_layers {list(noop_layers)} name a layer twice")
    if not all(0 <= n < num_layers for n in noops):
        raise MegatronError(f"noop_layers {list(noop_layers)} among {num_layers} layers: not 0 to {num_layers - 1}")
    real = iter(range(num_layers))
    return [None if n in noops else next(real) for n in range(num_layers)]


def directory_name(tp: int, pp: int, ep: int, *, pp_size: int, ep_size: int) -> str:
    """The directory of a model-parallel rank: tp, then pp where there are several stages, then ep likewise."""
    pipeline = f"_{pp:03d}" if pp_size > 1 else ""
    expert = f"_{ep:03d}" if ep_size > 1 else ""
    return f"mp_rank_{tp:02d}{pipeline}{expert}"


def parse_directory(name: str, *, pp_size: int, ep_size: int) -> tuple[int, int, int] | None:
    """(tp, pp, ep) of a directory, None where it is no directory of these sizes (`mp_rank_00_001` may be pp or ep)."""
    match = _DIRECTORY.fullmatch(name)
    if match is None:
        return None
    tp, *rest = (int(text) for text in match.groups() if text is not None)
    pp = rest.pop(0) if pp_size > 1 and rest else 0
    ep = rest.pop(0) if ep_size > 1 and rest else 0
    fits = pp < pp_size and ep < ep_size and name == directory_name(tp, pp, ep, pp_size=pp_size, ep_size=ep_size)
    return (tp, pp, ep) if fits else None


def global_rank(tp: int, pp: int, dp: int, cp: int, sizes: Sizes) -> int:
    """The global rank in the order tp-cp-ep-dp-pp, tp fastest."""
    for name, rank, size in (("tp", tp, sizes.tp), ("pp", pp, sizes.pp), ("dp", dp, sizes.dp), ("cp", cp, sizes.cp)):
        if not 0 <= rank < size:
            raise MegatronError(f"{name} rank {rank} of {name} size {size}")
    return ((pp * sizes.dp + dp) * sizes.cp + cp) * sizes.tp + tp
