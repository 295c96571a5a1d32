"""pt_meta/: what MindSpore's files cannot say of a Megatron checkpoint, beside a converted one.

The parameter maps and args_tp{tt}_pp{ppp}.pt are those of MindSpeed-Core-MS's convert_pt2ckpt.py; layout.json is ours:
the parallel layout and the order of names, so that [gate; up] shards can be put together and the way back is exact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from strategy.megatron import Sizes
from transform_ckpt import dtypes
from transform_ckpt.errors import InputError
from transform_ckpt.formats.files import open_binary
from transform_ckpt.megatron.carry import COMMON, Carried, args_of
from transform_ckpt.megatron.directory import LAYOUT_FILE, META_DIRECTORY, Place
from transform_ckpt.megatron.facts import Facts
from transform_ckpt.megatron.map_files import dumps, file_name
from transform_ckpt.megatron.maps import Placed
from transform_ckpt.megatron.model import Chunk
from transform_ckpt.megatron.outline import Entry, Outline
from transform_ckpt.megatron.read import Megatron, Rank
from transform_ckpt.megatron.torch_target import TorchBuilder
from transform_ckpt.megatron.write import transplanted
from transform_ckpt.tensors import Logical, SmallFile, TargetFile

LAYOUT_VERSION = 1
_MAX_NBYTES = 1 << 28
_OPTIONS = (
    *("num_layers", "num_experts", "layers_per_virtual_stage", "num_layer_list", "noop_layers"),
    *("first_stage_layers", "last_stage_layers", "schedule", "tied", "extend_ep"),
)


@dataclass(frozen=True, slots=True)
class Meta:
    """Files of pt_meta/."""

    small: tuple[SmallFile, ...]
    files: tuple[TargetFile, ...]


def args_name(place: Place, ep_size: int) -> str:
    """args_tp00_pp000.pt; with expert parallelism each EP rank beyond the first has its own."""
    expert = f"_ep{place[2]:03d}" if ep_size > 1 and place[2] else ""
    return f"args_tp{place[0]:02d}_pp{place[1]:03d}{expert}.pt"


def meta_files(
    found: Megatron, carried: Carried, container: str, *, param_only: bool
) -> tuple[Meta, dict[str, Logical]]:
    """Everything of pt_meta/, and the tensors of generators that go into it."""
    small = [SmallFile(f"{META_DIRECTORY}/{LAYOUT_FILE}", _layout(found, container, param_only=param_only))]
    for (place, experts), placed in found.buffers.items():
        numbers: dict[int, int] = {}
        for entry in placed:
            number = numbers[entry.chunk] = numbers.get(entry.chunk, -1) + 1
            name = file_name(number, 0, place[0], place[1], entry.chunk, place[2] if experts else None)
            small.append(SmallFile(f"{META_DIRECTORY}/{name}", dumps(entry.map)))
    files = tuple(_args_file(found, carried, rank, param_only=param_only) for rank in found.ranks.values())
    return Meta(tuple(small), files), carried.logicals


def _args_file(found: Megatron, carried: Carried, rank: Rank, *, param_only: bool) -> TargetFile:
    builder = TorchBuilder()
    own = carried.own(rank.rest, rank.file)
    tree: dict[str, Any] = {
        "args": args_of(rank),
        "checkpoint_version": rank.rest.get("checkpoint_version"),
        "iteration": rank.rest.get("iteration"),
        "optimizer": carried.value(rank.rest.get("optimizer"), rank.file),
        "opt_param_scheduler": rank.rest.get("opt_param_scheduler"),
        "rng_state": own.get("rng_state"),
        **{key: rank.rest.get(key) for key in COMMON if key not in ("opt_param_scheduler", "checkpoint_version")},
    }
    if param_only:
        tree["param_name_list"] = [_names(number, chunk, len(rank.chunks)) for number, chunk in enumerate(rank.chunks)]
    plain = {key: transplanted(value, builder) for key, value in tree.items()}
    return builder.file(f"{META_DIRECTORY}/{args_name(rank.place, found.facts.sizes.ep)}", plain)


def _names(number: int, chunk: Chunk, count: int) -> list[str]:
    key = "model" if count == 1 else f"model{number}"
    return [f"{key}.{name}" for name in reversed(chunk.tensors)]


def _layout(found: Megatron, container: str, *, param_only: bool) -> bytes:
    facts = found.facts
    weights = {n: p.dtype for n, p in found.source.params.items() if not n.startswith("optimizer.state.")}
    content = {
        "version": LAYOUT_VERSION,
        "sizes": asdict(facts.sizes),
        **{key: getattr(facts, key) for key in _OPTIONS},
        "format": container,
        "param_only": param_only,
        "coalesced": found.coalesced,
        "megatron_core": min(found.versions, default=None),
        "nested": found.first().chunks[0].nested,
        "outline": {
            "before": [[e.name, len(e.path)] for e in found.outline.before],
            "layers": {n: [[e.name, len(e.path)] for e in entries] for n, entries in found.outline.layers.items()},
            "behind": [[e.name, len(e.path)] for e in found.outline.behind],
        },
        "weights": weights,
        "buffers": [
            [list(place), experts, [_sizes(found, place, experts=experts, number=n) for n in range(len(placed))]]
            for (place, experts), placed in found.buffers.items()
        ],
    }
    return json.dumps(content).encode() + b"\n"


def _sizes(found: Megatron, place: Place, *, experts: bool, number: int) -> dict[str, Any]:
    placed: Placed = found.buffers[place, experts][number]
    held = found.numels[place, experts][number]
    return {"unpadded": list(placed.map.unpadded), "padded": list(placed.map.padded or held)}


BucketSizes = tuple[tuple[int, ...], tuple[int, ...]]
"""(unpadded, padded) sizes of the buckets of a buffer."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """layout.json as it was written."""

    facts: Facts
    coalesced: bool | None
    version: tuple[int, ...] | None
    outline: Outline
    weights: Mapping[str, str]
    nested: bool
    buffers: Mapping[tuple[Place, bool], Sequence[BucketSizes]] = field(default_factory=dict)
    """Of every buffer."""


def read_layout(directory: str, args: Mapping[str, Any]) -> Recorded | None:
    """layout.json of a pt_meta directory, None where there is none (another tool's pt_meta)."""
    path = os.path.join(directory, LAYOUT_FILE)
    if not os.path.isfile(path):
        return None
    with open_binary(path, "reading the layout") as (fd, nbytes):
        raw = os.pread(fd, min(nbytes, _MAX_NBYTES), 0)
    try:
        content = json.loads(raw)
        if content["version"] != LAYOUT_VERSION:
            raise InputError(f"{path}: of version {content['version']!r:.20}, this tool reads {LAYOUT_VERSION}")
        outline = Outline()
        listed = content["outline"]
        for names in (listed["before"], *listed["layers"].values(), listed["behind"]):
            outline.add(_entry(name, depth) for name, depth in names)
        options: dict[str, Any] = {k: tuple(v) if isinstance(v := content[k], list) else v for k in _OPTIONS}
        version = content["megatron_core"]
        return Recorded(
            Facts(sizes=Sizes(**content["sizes"]), args=args, where=path, **options),
            content["coalesced"],
            _counts(version) if version else None,
            outline,
            {str(name): dtypes.BY_CODE[kind].code for name, kind in content["weights"].items()},
            content["nested"],
            {
                (tuple(place), experts): [(_counts(s["unpadded"]), _counts(s["padded"])) for s in sizes]
                for place, experts, sizes in content["buffers"]
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is not what convert_pt2ckpt writes ({error!r:.200}): fetch it again") from None


def _entry(name: str, depth: int) -> Entry:
    """One name of the outline; ValueError where it is none."""
    if not 1 <= depth <= name.count(".") + 1:
        raise ValueError(f"{name!r:.80} of depth {depth}")
    return Entry(name, tuple(name.split(".", depth - 1)) if depth > 1 else (name,))


def _counts(values: Sequence[int]) -> tuple[int, ...]:
    """Numbers as such; ValueError for others."""
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in values):
        raise ValueError(f"{values!r:.80} are no counts")
    return tuple(values)
