"""What of a job's settings must fit the number of ranks, and the checkpoint that is there.

Sources: MindFormers 1.9.0 tools/ckpt_transform/transform_checkpoint.py `TransformCkpt.__init__` (npu_num_per_node,
transform_process_num), utils/load_checkpoint_utils.py `validate_config_with_file_mode` and `_get_src_strategy`.  Ours
allows two things that are refused there: rank directories with use_parallel False, and a single file with use_parallel
True.  Pure; may import only settings_{rules,types} and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from transform_ckpt.auto.settings_rules import disagree
from transform_ckpt.auto.settings_types import JobSettings
from transform_ckpt.errors import InputError, Problems

Kind = Literal["ranks", "complete", "file"]
"""What load_checkpoint is: a directory of rank_0/ ..., a directory of complete files, one complete file."""


def check_world(settings: JobSettings, world: int) -> None:
    """InputError when the settings are not those of a job of `world` ranks; every key that would have to change."""
    problems = Problems()
    where = settings.config
    if settings.world_size not in {None, world}:
        problems.add(f"{where}: world_size {settings.world_size}, but the job has {_ranks(world)}: leave it out")
    if settings.rank_id is not None and settings.rank_id >= world:
        problems.add(f"{where}: rank_id {settings.rank_id}, but the job has {_ranks(world)}, counted from 0")
    if not settings.use_parallel and world != 1:
        problems.add(
            f"{where}: use_parallel: False is a job of one rank, but it has {_ranks(world)}: set use_parallel: True, "
            "or start one worker"
        )
    elif settings.world != world and not settings.holds_whole:
        problems.add(_wrong_mesh(settings, world))
    count = settings.transform_process_num
    if settings.auto_trans_ckpt and count is not None and world % count:
        fitting = max(n for n in range(1, min(count, world) + 1) if world % n == 0)
        problems.add(
            f"{where}: transform_process_num: {count} does not divide the {_ranks(world)} of the job: set it to "
            f"{fitting}, or leave it out so that every rank makes its own slice"
        )
    node = settings.npu_num_per_node
    if node is not None and node & (node - 1):
        problems.add(f"{where}: npu_num_per_node: expected a power of 2, found {node}")
    problems.raise_if_any(InputError)


def _wrong_mesh(settings: JobSettings, world: int) -> str:
    product = " * ".join(f"{key} {size}" for key, size in settings.factors.items())
    rest = settings.world // settings.factors["data_parallel"]
    change = f"set data_parallel: {world // rest}" if world % rest == 0 else "change one of them"
    return (
        f"{settings.config}: parallel_config: {product} = {settings.world}, but the job has {_ranks(world)}: "
        f"{change}, or start {settings.world} workers"
    )


def _ranks(count: int) -> str:
    return f"{count} rank" + "s" * (count != 1)


@dataclass(frozen=True, slots=True)
class Found:
    """What is at load_checkpoint: its kind, the number of rank directories, ckpt and safetensors, any strategy."""

    kind: Kind
    ranks: int
    formats: frozenset[str]
    strategy: str | None


@dataclass(frozen=True, slots=True)
class SourceRule:
    """Two keys that disagree in the face of what load_checkpoint holds."""

    name: str
    keys: tuple[str, str]
    broken: Callable[[JobSettings, Found], bool]
    advice: str
    """Filled in with `ranks` and `formats` as found, and `world` of the mesh."""


SOURCE_RULES: tuple[SourceRule, ...] = (
    SourceRule(
        "complete, not cut",
        ("use_parallel", "auto_trans_ckpt"),
        lambda s, f: f.kind != "ranks" and s.use_parallel and not s.auto_trans_ckpt and not s.holds_whole,
        "load_checkpoint holds complete weights, which no rank can load as they are: set auto_trans_ckpt: True",
    ),
    SourceRule(
        "other number of ranks",
        ("auto_trans_ckpt", "load_checkpoint"),
        lambda s, f: f.kind == "ranks" and not s.auto_trans_ckpt and f.ranks != s.world and not s.holds_whole,
        "it has {ranks} rank directories, and the job {world} by its mesh (use_parallel, parallel_config): set "
        "auto_trans_ckpt: True",
    ),
    SourceRule(
        "ranks without a strategy",
        ("load_checkpoint", "src_strategy_path_or_dir"),
        lambda s, f: f.kind == "ranks" and f.ranks > 1 and s.auto_trans_ckpt and not f.strategy,
        "how {ranks} rank directories are cut is written in the strategy of the run that saved them: give "
        "src_strategy_path_or_dir (its output/strategy)",
    ),
    SourceRule(
        "complete with a strategy",
        ("load_checkpoint", "src_strategy_path_or_dir"),
        lambda s, f: f.kind != "ranks" and s.auto_trans_ckpt and s.src_strategy is not None,
        "complete weights have no strategy: leave src_strategy_path_or_dir empty",
    ),
    SourceRule(
        "resume by name without ranks",
        ("resume_training", "load_checkpoint"),
        lambda s, f: isinstance(s.resume_training, str) and f.kind == "complete",
        "the name is looked for in rank_0/ ..., and there are none: set resume_training: True",
    ),
    SourceRule(
        "other format",
        ("load_ckpt_format", "load_checkpoint"),
        lambda s, f: s.load_ckpt_format is not None and bool(f.formats) and s.load_ckpt_format not in f.formats,
        "it holds {formats}: set load_ckpt_format to that, or leave it out",
    ),
    SourceRule(
        "two formats",
        ("load_ckpt_format", "load_checkpoint"),
        lambda s, f: s.load_ckpt_format is None and len(f.formats) > 1,
        "it holds {formats}: say which with load_ckpt_format",
    ),
)


def check_source(
    settings: JobSettings, kind: Kind, ranks: int, formats: Collection[str], *, strategy: str | None = None
) -> tuple[str, ...]:
    """InputError when the settings do not fit what load_checkpoint holds; else notes.

    `ranks`: rank directories, 1 for complete weights; `formats`: ckpt, safetensors; `strategy`: one that was found
    where MindFormers looks when src_strategy_path_or_dir is empty, `<load_checkpoint>/../strategy`.
    """
    found = Found(kind, ranks, frozenset(formats), settings.src_strategy or strategy)
    problems = Problems()
    facts = {"ranks": ranks, "formats": " and ".join(sorted(formats)), "world": settings.world}
    for rule in SOURCE_RULES:
        if not settings.only_save_strategy and rule.broken(settings, found):
            problems.add(disagree(settings, rule.keys, rule.advice.format(**facts)))
    problems.raise_if_any(InputError)
    notes = {
        "remove_redundancy is not used: load_checkpoint holds complete weights": kind != "ranks"
        and settings.remove_redundancy,
        f"resume_training {settings.resume_training!r} is taken as True: load_checkpoint is a file": kind == "file"
        and isinstance(settings.resume_training, str),
        "auto_trans_ckpt has nothing to do: complete weights for one device": kind != "ranks"
        and settings.auto_trans_ckpt
        and settings.world == 1,
    }
    return tuple(text for text, applies in notes.items() if applies)
