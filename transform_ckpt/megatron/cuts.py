"""What a rank holds of each parameter, by its rule: read from what is stored, or computed for what is to be written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product

from transform_ckpt.errors import InputError, Problems, rank_ranges
from transform_ckpt.megatron.rules import (
    EXPERT,
    GROUPED1,
    GROUPED2,
    UNKNOWN,
    Cut,
    Rule,
    Sharding,
    Stored,
    rule_of,
)
from transform_ckpt.views import Box, Shape, whole


def read_cuts(shapes: Mapping[str, Shape], sharding: Sharding, where: str) -> dict[str, Cut]:
    """All tensors of one model chunk, by stored name without "module."; InputError with all that is wrong.

    On one rank (TP = EP = ETP = 1) a tensor of an unknown name is whole.
    """
    problems = Problems()
    cuts: dict[str, Cut] = {}
    unknown: set[str] = set()
    for name, shape in shapes.items():
        tensor = Stored(name, shape, shapes, sharding)
        try:
            found = rule_of(tensor)
            if found is not None or sharding.alone:
                cuts[name] = _read_cut(tensor, *(found or (UNKNOWN, shape)))
            else:
                unknown.add(re.sub(r"\.\d+\.", ".*.", name))
        except InputError as error:
            problems.add(f"{where}: {error}")
    if unknown:
        problems.add(
            f"{where}: how TP {sharding.tp}, EP {sharding.ep} cut these is not known: {', '.join(sorted(unknown))}; "
            "convert the checkpoint to one rank with the tool that wrote it"
        )
    problems.raise_if_any(InputError)
    _check_experts(shapes, sharding, where)
    return cuts


def _read_cut(tensor: Stored, rule: Rule, local: Shape) -> Cut:
    sharding = tensor.sharding
    shape = list(local)
    if rule.axis is not None:
        if rule.axis >= len(shape):
            raise tensor.error(f"expected {rule.axis + 1} axes at least, as axis {rule.axis} is cut")
        shape[rule.axis] *= sharding.etp if rule.expert else sharding.tp
    if rule.stacked:
        shape[0] *= sharding.ep
    return write_cut(logical_name(tensor.name, sharding), tuple(shape), rule, sharding)


def write_cut(name: str, shape: Shape, rule: Rule, sharding: Sharding, rows: int | None = None) -> Cut:
    """What a rank stores of a logical tensor; InputError where it does not divide.

    `rows` is how many rows of the vocabulary the target has: there may be more than `shape` has, whose place is behind
    the boxes, or fewer.  Other tensors do not heed it.
    """
    if not rule.known and not sharding.alone:
        raise InputError(f"{name!r}: how TP {sharding.tp}, EP {sharding.ep} cut it is not known: write it for one rank")
    local = list(shape)
    spans = [[(0, n)] for n in shape]

    def cut(axis: int, length: int, blocks: int, parts: int, part: int) -> None:
        size, rest = divmod(length, blocks * parts)
        if rest:
            raise InputError(
                f"{name!r} of shape {list(shape)}: {length} on axis {axis} do not divide into "
                f"{f'{blocks} x ' if blocks > 1 else ''}{parts} parts: choose other parallel sizes"
            )
        local[axis] = size * blocks
        spans[axis] = [((block * parts + part) * size, size) for block in range(blocks)]

    if rule.stacked:
        cut(0, shape[0], 1, sharding.ep, sharding.ep_rank)
    if rule.axis is not None:
        length = rows if rule.vocabulary and rows is not None else shape[rule.axis]
        over = (sharding.etp, sharding.etp_rank) if rule.expert else (sharding.tp, sharding.tp_rank)
        cut(rule.axis, length, rule.blocks, *over)
    stored = tuple(local)
    if rule == GROUPED1:
        stored = (local[1], local[0] * local[2] * local[3])
    elif rule == GROUPED2:
        stored = (local[0] * local[1], local[2])
    boxes = (Box(tuple(s for s, _ in each), tuple(n for _, n in each)) for each in product(*spans))
    return Cut(name, shape, stored, tuple(part for box in boxes if (part := box.intersect(whole(shape)))), rule)


def stored_name(name: str, sharding: Sharding) -> str | None:
    """A logical tensor's name in a rank's file, where experts are counted from 0; None for another EP rank's expert."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return name
    count = sharding.experts(name)
    number = int(match[2]) - sharding.ep_rank * count
    return f"{match[1]}{number}{match[3]}" if 0 <= number < count else None


def logical_name(name: str, sharding: Sharding) -> str:
    """The inverse of `stored_name`; InputError for an expert that a rank cannot have."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return name
    count = sharding.experts(name)
    if int(match[2]) >= count:
        raise InputError(f"{name!r}: a rank has {count} experts, as the model has {sharding.num_experts}")
    return f"{match[1]}{int(match[2]) + sharding.ep_rank * count}{match[3]}"


def _check_experts(shapes: Mapping[str, Shape], sharding: Sharding, where: str) -> None:
    """InputError unless every expert has what another one of its layer has."""
    found: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(EXPERT.fullmatch, shapes)):
        found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    problems = Problems()
    for (head, tail), numbers in found.items():
        missing = set(range(sharding.experts(head))) - numbers
        if missing:
            problems.add(f"{where}: {head + '*' + tail!r} of experts {rank_ranges(missing)} is missing: find it")
    problems.raise_if_any(InputError)
