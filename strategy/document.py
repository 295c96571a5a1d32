"""What a strategy file says, whichever form it is stored in: the value between the formats and `Strategy`.

Protobuf and JSON are parsed into a `Document` and written from one, so that merging and checking exist once.
May import only strategy.layout, transform_ckpt.errors and transform_ckpt.views.

Facts (MindSpore 2.9.0 parallel/_parallel_serialization.py): a merged file has every name as `{stage}-{parameter}`;
`current_stage` counts saves and is not the stage, which only the strategy items tell; `field`, `param_split_shape` and
`indices_offset` describe uneven splits, which no transform of MindSpore applies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from strategy.layout import Layout, LayoutError, Stage, Strategy
from transform_ckpt.errors import InputError, Problems, name_some, rank_ranges
from transform_ckpt.views import Shape

_MERGED_NAME = re.compile(r"([0-9]{1,9})-(.+)", re.DOTALL)
_MAX_DEVICES = 1 << 24
_NOT_SPLIT = -1


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """One strategy item: an operator, its stage and how its inputs are split.  Only the stage means something to us."""

    name: str
    stage: int
    dims: tuple[Shape, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """One strategy file; names as written (with stage prefix in a merged one), in the file's order."""

    nodes: tuple[Node, ...]
    layouts: Mapping[str, Layout]
    tensor_shapes: Mapping[str, Shape] = field(default_factory=dict)
    """Full shapes; only MindSpore's JSON form has them."""

    def is_merged(self) -> bool:
        """Whether the names carry their stage."""
        return bool(self.layouts) and all(map(_MERGED_NAME.fullmatch, self.layouts))

    def same_content(self, other: Document) -> bool:
        """Equal but for order."""
        return (
            self.layouts == other.layouts
            and self.tensor_shapes == other.tensor_shapes
            and sorted(self.nodes) == sorted(other.nodes)
        )


class LayoutReader:
    """Turns stored layouts into `Layout`s, each distinct one once, and collects what is wrong with any of them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.layouts: dict[str, Layout] = {}
        self.problems = Problems()
        self._known: dict[tuple[Shape, tuple[Shape, ...], int, int], Layout] = {}

    def add(self, name: str, dev_matrix: Shape, tensor_map: tuple[Shape, ...], opt: tuple[int, int]) -> None:
        """One layout item; `tensor_map` has the axes of each tensor dimension, -1 where it is not split."""
        key = (dev_matrix, tensor_map, *opt)
        layout = self._known.get(key)
        try:
            if layout is None:
                axes = tuple(tuple(axis for axis in dim if axis != _NOT_SPLIT) for dim in tensor_map)
                layout = self._known[key] = _checked(Layout(dev_matrix, axes, *opt))
        except LayoutError as error:
            self.problem(name, str(error))
            return
        if not name:
            self.problem(name, "the name is empty")
        if self.layouts.setdefault(name, layout) != layout:
            self.problem(name, "is listed twice with different layouts")

    def problem(self, name: str, what: str) -> None:
        """Record what is wrong with one parameter's item."""
        self.problems.add(f"{self.path}: parameter {name!r}: {what}; save the strategy file again")

    def document(self, nodes: Sequence[Node], tensor_shapes: Mapping[str, Shape] | None = None) -> Document:
        """The file, or InputError with all that is wrong."""
        self.problems.raise_if_any(InputError)
        if not self.layouts:
            raise InputError(
                f"{self.path}: no parameter layouts (parallel_layout_item is empty); expected a strategy file of a "
                "network that was compiled for several devices: save it again"
            )
        return Document(tuple(nodes), self.layouts, tensor_shapes or {})


def _checked(layout: Layout) -> Layout:
    if layout.devices > _MAX_DEVICES:
        raise LayoutError(f"dev_matrix {list(layout.dev_matrix)} is {layout.devices:,} devices")
    return layout


def written_tensor_map(layout: Layout) -> list[int] | list[list[int]]:
    """The map as MindSpore stores it: flat, or a list a dimension when some dimension is split by several axes."""
    if any(len(dim) > 1 for dim in layout.tensor_map):
        return [list(dim) or [_NOT_SPLIT] for dim in layout.tensor_map]
    return [dim[0] if dim else _NOT_SPLIT for dim in layout.tensor_map]


def stage_number(document: Document, path: str) -> int | None:
    """The stage of a per-rank file, None when its strategy items do not say."""
    stages = {node.stage for node in document.nodes}
    if len(stages) > 1:
        raise InputError(
            f"{path}: its strategy items belong to the stages {rank_ranges(stages)}, but its parameter names have no "
            "stage prefix; expected the file of one stage or a merged one: merge the per-rank files again"
        )
    return min(stages, default=None)


def make_stage(layouts: Mapping[str, Layout], where: str) -> Stage:
    """A stage of layouts over equally many devices; InputError names the parameters that differ from the first."""
    first, devices = next((name, layout.devices) for name, layout in layouts.items())
    odd = {name: layout for name, layout in layouts.items() if layout.devices != devices}
    if odd:
        name = min(odd)
        raise InputError(
            f"{where}: parameter {name!r} is laid out over {odd[name].devices} devices (dev_matrix "
            f"{list(odd[name].dev_matrix)}), {first!r} over {devices}; {len(odd)} of {len(layouts)} parameters differ, "
            "but all of a stage must agree: save the strategy again"
        )
    return Stage(devices, dict(layouts))


def split_merged(document: Document, path: str) -> tuple[Stage, ...]:
    """The stages of a merged file, in order; InputError for a missing stage or a file merged twice."""
    found: dict[int, dict[str, Layout]] = {}
    for written, layout in document.layouts.items():
        prefix, _, name = written.partition("-")
        number = int(prefix)
        if found.setdefault(number, {}).setdefault(name, layout) != layout:
            raise InputError(f"{path}: parameter {name!r} of stage {number} is listed twice with different layouts")
    check_no_gap(found, path)
    for number, layouts in found.items():
        _check_merged_once(layouts, len(found), f"{path}: stage {number}")
    return tuple(make_stage(found[number], f"{path}: stage {number}") for number in sorted(found))


def _check_merged_once(layouts: Mapping[str, Layout], stages: int, where: str) -> None:
    """MindSpore's merge prefixes the names of an older merged file in the directory a second time."""
    again = [_MERGED_NAME.fullmatch(name) for name in layouts]
    if all(match is not None and int(match[1]) < stages for match in again):
        raise InputError(
            f"{where}: names still have a stage prefix ({name_some(layouts, limit=2)}); the file was merged twice: "
            "merge the per-rank files again, without the old merged file in their directory"
        )


def check_no_gap(numbers: Iterable[int], where: str) -> None:
    """InputError unless the stages are 0..n-1."""
    missing, expected = [], 0
    present = sorted(numbers)
    for number in present:
        if number > expected:
            missing.append(str(expected) if number == expected + 1 else f"{expected}-{number - 1}")
        expected = number + 1
    if missing:
        raise InputError(
            f"{where}: stage {', '.join(missing)} is missing, only stage {rank_ranges(present)} is here; "
            "add the strategy files of the missing stages"
        )


def merged_document(parts: Mapping[int, Document]) -> Document:
    """The merged file of one document a stage, as mindspore.merge_pipeline_strategys builds it."""
    nodes: list[Node] = []
    layouts: dict[str, Layout] = {}
    shapes: dict[str, Shape] = {}
    for number in sorted(parts):
        part = parts[number]
        nodes += part.nodes
        layouts.update({f"{number}-{name}": layout for name, layout in part.layouts.items()})
        shapes.update({f"{number}-{name}": shape for name, shape in part.tensor_shapes.items()})
    return Document(tuple(nodes), layouts, shapes)


def stage_document(strategy: Strategy, number: int, path: str) -> Document:
    """The per-rank file of one stage.

    MindSpore refuses a file without strategy items and reads the stage from the first, so each parameter gets one,
    named like the compiler's (`MatMul_<parameter>`).
    """
    stage = strategy.stages[number]
    if not stage.layouts:
        raise InputError(f"{path}: stage {number} has no parameters, which no strategy file can say")
    if make_stage(stage.layouts, f"{path}: stage {number}").devices != stage.devices:
        raise InputError(f"{path}: stage {number} has {stage.devices} devices, but its layouts have another number")
    nodes = tuple(Node(f"MatMul_{name}", number, (layout.splits,)) for name, layout in stage.layouts.items())
    return Document(nodes, dict(stage.layouts))
