"""Opens a checkpoint: headers, and for distributed MindSpore directories the strategy, become one `Source`.

May import formats, strategy, states, tensors, views, errors.  Reads no tensor bytes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from strategy.layout import Strategy
from transform_ckpt.errors import InputError, PlanError, Problems, name_some, rank_ranges
from transform_ckpt.formats import mindspore_dir, read_header
from transform_ckpt.megatron.directory import FORMAT, is_megatron
from transform_ckpt.needed import needed_ranks
from transform_ckpt.ranks import RankReader
from transform_ckpt.tensors import FileHeader, Logical, Piece, Source
from transform_ckpt.views import whole

MINDSPORE = "mindspore"
MEGATRON = FORMAT
CHECKPOINT_2 = "mindspore-checkpoint-2.0"


def detect(path: str) -> str:
    """Format code of a checkpoint path; InputError when it is none that is known."""
    if not os.path.exists(path):
        raise InputError(f"{path}: not found: check the path of the checkpoint")
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path}: is neither a file nor a directory: give the checkpoint itself")
    if os.path.isfile(path) or mindspore_dir.rank_dirs(path):
        return MINDSPORE
    from transform_ckpt.formats import checkpoint2

    if checkpoint2.detect(path):
        return CHECKPOINT_2
    if mindspore_dir.detect(path):
        return MINDSPORE
    if is_megatron(path):
        return MEGATRON
    raise InputError(
        f"{path}: no checkpoint found here: expected rank_i/ directories, .ckpt or .safetensors files, or Megatron's "
        "iter_*/mp_rank_* directories"
    )


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a source is opened for: some ranks of a target strategy.  Only the files that they need are read."""

    strategy: Strategy | None
    ranks: Sequence[int]


def open_source(
    path: str,
    strategy: Strategy | None = None,
    step: int | None = None,
    allow_missing: Sequence[str] = (),
    purpose: Purpose | None = None,
    kind: str | None = None,
) -> Source:
    """Headers of every file, checked against the strategy; `strategy` None means complete weights.

    `allow_missing` are patterns of names that the strategy lists and no file needs to hold.  With a `purpose` the
    source may be of fewer ranks' files: those that hold what it needs.  `kind` is what `detect` has said already.
    """
    path = os.path.abspath(path)
    found = kind or detect(path)
    if strategy is None and found == MINDSPORE and os.path.isdir(path):
        _check_only_one_checkpoint(path)
    if found == CHECKPOINT_2:
        from transform_ckpt.formats import checkpoint2

        if strategy is not None:
            raise InputError(f"{path}: a Checkpoint 2.0 directory describes its own layout: drop the source strategy")
        return checkpoint2.read(path, step)
    files = mindspore_dir.find(path, step)
    headers = _Headers(files.ranks)
    chosen = None
    if purpose is not None and strategy is not None:
        chosen = needed_ranks(list(files.ranks), headers.of, strategy, purpose.strategy, purpose.ranks)
    return _opened(path, files, headers.all(chosen), strategy, allow_missing, partial=chosen is not None)


class _Headers:
    """Headers of each rank's files, read once."""

    def __init__(self, files: Mapping[int, Sequence[str]]) -> None:
        self._files = files
        self._read: dict[int, tuple[FileHeader, ...]] = {}

    def of(self, rank: int) -> tuple[FileHeader, ...]:
        if rank not in self._read:
            self._read[rank] = tuple(read_header(path) for path in self._files[rank])
        return self._read[rank]

    def all(self, ranks: Collection[int] | None) -> dict[int, tuple[FileHeader, ...]]:
        return {rank: self.of(rank) for rank in self._files if ranks is None or rank in ranks}


def _opened(
    path: str,
    files: mindspore_dir.Files,
    headers: Mapping[int, Sequence[FileHeader]],
    strategy: Strategy | None,
    allow_missing: Sequence[str],
    *,
    partial: bool,
) -> Source:
    if files.weight_map is not None:
        _check_weight_map(path, files.weight_map, headers[0])
    if strategy is None:
        source = _complete(path, files, headers)
    else:
        source = _distributed(path, files, headers, strategy, allow_missing, partial=partial)
    if not source.params and not source.states:
        raise InputError(f"{path}: holds no tensor ({len(source.headers)} files without any): fetch or save it again")
    return replace(source, step=files.step, notes=(*files.notes, *source.notes))


def _check_only_one_checkpoint(path: str) -> None:
    """A job that changed use_legacy_format leaves both kinds in its output directory."""
    from transform_ckpt.formats import checkpoint2

    if checkpoint2.detect(path):
        raise PlanError(
            f"{path}: holds rank directories and Checkpoint 2.0 iterations, cannot tell which is meant: give the "
            "iteration's directory, or the source strategy of the rank directories, or move one away"
        )


def _check_weight_map(path: str, weight_map: Mapping[str, str], headers: Sequence[FileHeader]) -> None:
    problems = Problems()
    for header in headers:
        name = os.path.basename(header.path)
        wanted = {param for param, file in weight_map.items() if file == name}
        missing = wanted - header.tensors.keys()
        if missing:
            problems.add(
                f"{path}: param_name_map.json says {name} holds {name_some(missing)}; the file does not: "
                "fetch both again"
            )
    problems.raise_if_any(InputError)


def _complete(path: str, files: mindspore_dir.Files, headers: Mapping[int, Sequence[FileHeader]]) -> Source:
    if len(files.ranks) > 1 or (not files.complete and 0 not in files.ranks):
        raise InputError(
            f"{path}: found the directories of ranks {rank_ranges(files.ranks)} but no source strategy: "
            "give --src-strategy (the merged file, or the directory of ckpt_strategy_rank_*.ckpt files)"
        )
    params: dict[str, Logical] = {}
    for header in headers[0]:
        for name, tensor in header.tensors.items():
            if name in params:
                other = params[name].pieces[0].tensor.path
                raise PlanError(f"{name!r} is in {other} and in {header.path}: leave one checkpoint in the directory")
            params[name] = Logical(name, tensor.dtype, tensor.shape, (Piece(tensor, whole(tensor.shape), 0),))
    return Source(MINDSPORE, path, tuple(headers[0]), params, {})


def _distributed(
    path: str,
    files: mindspore_dir.Files,
    headers: Mapping[int, Sequence[FileHeader]],
    strategy: Strategy,
    allow_missing: Sequence[str],
    *,
    partial: bool,
) -> Source:
    if files.complete and strategy.world > 1:
        raise InputError(
            f"{path}: complete weights, but the source strategy {strategy.origin} is for {strategy.world} ranks: "
            "drop the source strategy, or give the directory that holds rank_0/ ..."
        )
    beyond = [rank for rank in files.ranks if rank >= strategy.world]
    if beyond:
        raise InputError(
            f"{path}: directories of ranks {rank_ranges(beyond)} are there, but the source strategy {strategy.origin} "
            f"is for {strategy.world} ranks: give the strategy that this checkpoint was saved with"
        )
    reader = RankReader(path, strategy, headers, allow_missing, partial=partial)
    params = reader.params()
    states = reader.states(params.keys())
    if not partial:
        reader.check_absent_ranks(params)
    return Source(
        MINDSPORE, path, tuple(h for hs in headers.values() for h in hs), params, states, notes=tuple(reader.notes)
    )
