"""The strategy of the job that is starting: by rule from its configuration, or what MindSpore's compiler wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from strategy import mindspore_file
from strategy.generate import Generated, generate
from strategy.generate_config import parse_config
from strategy.generate_files import MERGED_FILE, RANK_FILE
from strategy.generate_yaml import read_hf_config
from strategy.layout import Layout, LayoutError, Stage, Strategy
from transform_ckpt.errors import InputError
from transform_ckpt.views import Shape


def by_rule(document: Mapping[str, Any], where: str) -> Generated:
    """From the whole YAML; sizes that it leaves to Hugging Face's config.json are read from pretrained_model_dir."""
    pretrained = document.get("pretrained_model_dir")
    there = isinstance(pretrained, str) and os.path.isfile(os.path.join(pretrained, "config.json"))
    return generate(parse_config(document, read_hf_config(str(pretrained)) if there else None, where))


def write_own(strategy: Strategy, directory: str, rank: int) -> str:
    """Write one rank's file; its path."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, RANK_FILE.format(rank=rank))
    mindspore_file.write_stage(strategy, strategy.stage_of(rank), path)
    return path


def write_merged(strategy: Strategy, directory: str) -> str | None:
    """Write the merged file of a pipeline, as MindFormers does when pipeline_stage > 1; its path."""
    if len(strategy.stages) < 2:
        return None
    path = os.path.join(directory, MERGED_FILE)
    mindspore_file.write_strategy(strategy, path)
    return path


def first_ranks(world: int, stages: int) -> list[int]:
    """The first rank of each stage: ranks of one stage write equal files, so these are all that one needs to read."""
    if stages < 1 or world % stages:
        raise InputError(f"pipeline_stage {stages} does not divide the {world} ranks of the job")
    return list(range(0, world, world // stages))


def read_compiled(directory: str, world: int, stages: int) -> Strategy:
    """The strategy that the compiler has written to a directory, from one file of each stage."""
    found: list[Stage] = []
    for rank in first_ranks(world, stages):
        path = os.path.join(directory, RANK_FILE.format(rank=rank))
        file = mindspore_file.read_stage_file(path)
        if file.stage.devices != world // stages:
            raise InputError(
                f"{path}: is for {file.stage.devices} devices a stage, the job has {world // stages}: it is of another "
                "job"
            )
        if file.number not in (len(found), None):
            raise InputError(f"{path}: is of stage {file.number}, rank {rank} of the job is in stage {len(found)}")
        found.append(file.stage)
    return Strategy(tuple(found), directory)


def differences(compiled: Strategy, ruled: Strategy, shapes: Mapping[str, Shape]) -> list[str]:
    """Parameters for which the compiler and the rules disagree, in words; empty when they mean the same slices."""
    if compiled.world != ruled.world or len(compiled.stages) != len(ruled.stages):
        one, other = (f"{s.world} ranks in {len(s.stages)} stages" for s in (compiled, ruled))
        return [f"the compiler has {one}, the rules {other}"]
    found: list[str] = []
    for number, (left, right) in enumerate(zip(compiled.stages, ruled.stages, strict=True)):
        for name in sorted({*left.layouts, *right.layouts}):
            text = _difference(left.layouts.get(name), right.layouts.get(name), shapes.get(name))
            if text:
                found.append(f"{name} (stage {number}): {text}")
    return found


def _difference(compiled: Layout | None, ruled: Layout | None, shape: Shape | None) -> str | None:
    if compiled is None or ruled is None:
        return "the compiler does not list it" if compiled is None else "the rules do not list it"
    if shape is None:
        return None
    texts = []
    for layout in (compiled, ruled):
        try:
            texts.append(repr([(box.start, box.size) for box in layout.boxes(shape)]))
        except LayoutError as error:
            texts.append(str(error))
    return None if texts[0] == texts[1] else f"the compiler says {texts[0][:200]}, the rules {texts[1][:200]}"
