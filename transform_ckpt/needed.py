"""Which source ranks some target ranks need: of thousands of files, a rank of a large job should open a few.

Shapes come from one file of each source stage.  Whatever is out of the ordinary (a parameter that this file lacks,
removed redundancy, absent ranks) gives None: then all files are read, and the usual checks say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from strategy.layout import Layout, LayoutError, Strategy
from transform_ckpt.ranks import layout_of
from transform_ckpt.states import split_optimizer
from transform_ckpt.tensors import FileHeader
from transform_ckpt.views import Box, Shape

Read = Callable[[int], Sequence[FileHeader]]


def needed_ranks(
    present: Sequence[int], read: Read, source: Strategy, target: Strategy | None, ranks: Sequence[int]
) -> set[int] | None:
    """Source ranks of `present` that hold what target `ranks` need; None when all files must be looked at.

    `read` gives the headers of a rank's files.  Of replicas the first is taken, as when a plan is made of all.
    """
    if target is None or set(present) != set(range(source.world)):
        return None
    stages = sorted({target.stage_of(rank) for rank in ranks})
    wanted = {name for number in stages for name in target.stages[number].layouts}
    found: set[int] = set()
    cache: dict[tuple[Layout, Layout, Shape, int, int], set[int] | None] = {}
    for number, stage in enumerate(source.stages):
        first = source.ranks(number).start
        headers = read(first)
        held = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        if any(header.metadata.get("remove_redundancy") == "True" for header in headers):
            return None
        for name, layout in stage.layouts.items():
            weight = split_optimizer(name)[1]
            if name not in wanted and weight not in wanted:
                continue
            if name not in held:
                if name == weight:
                    return None
                continue  # optimizer states that were not saved
            shape = layout.full_shape(held[name].shape)
            for other in stages:
                aim = layout_of(target.stages[other].layouts, name)
                if aim is None:
                    continue
                key = (layout, aim, shape, number, other)
                if key not in cache:
                    cache[key] = _holders(layout, aim, shape, [r - target.ranks(other).start for r in ranks])
                holders = cache[key]
                if holders is None:
                    return None
                found |= {first + device for device in holders}
    return found or None


def _holders(source: Layout, target: Layout, shape: Shape, devices: Sequence[int]) -> set[int] | None:
    """Devices of a source stage that hold the boxes of some devices of a target stage, the first of equal ones."""
    try:
        boxes = source.boxes(shape)
        aims = [target.box(device, shape) for device in devices if 0 <= device < target.devices]
    except LayoutError:
        return None
    firsts: dict[Box, int] = {}
    for device, box in enumerate(boxes):
        firsts.setdefault(box, device)
    return {device for box, device in firsts.items() if any(box.intersect(aim) for aim in aims)}
