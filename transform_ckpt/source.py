"""Opens a checkpoint: headers, and for distributed MindSpore directories the strategy, become one `Source`.

May import formats, strategy, states, tensors, views, errors.  Reads no tensor bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from strategy.layout import Layout, LayoutError, Strategy
from transform_ckpt.errors import InputError, PlanError, Problems, name_some, rank_ranges
from transform_ckpt.formats import mindspore_dir, read_header
from transform_ckpt.states import split_optimizer
from transform_ckpt.tensors import FileHeader, Logical, Piece, Source, Tensor
from transform_ckpt.views import Box, whole

MINDSPORE = "mindspore"
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
    raise InputError(f"{path}: no checkpoint found here: expected rank_i/ directories, .ckpt or .safetensors files")


def open_source(path: str, strategy: Strategy | None = None, step: int | None = None) -> Source:
    """Headers of every file, checked against the strategy; `strategy` None means complete weights."""
    path = os.path.abspath(path)
    if detect(path) == CHECKPOINT_2:
        from transform_ckpt.formats import checkpoint2

        if strategy is not None:
            raise InputError(f"{path}: a Checkpoint 2.0 directory describes its own layout: drop the source strategy")
        return checkpoint2.read(path, step)
    files = mindspore_dir.find(path, step)
    headers = {rank: tuple(read_header(p) for p in paths) for rank, paths in files.ranks.items()}
    if files.weight_map is not None:
        _check_weight_map(path, files.weight_map, headers[0])
    if strategy is None:
        source = _complete(path, files, headers)
    else:
        source = _distributed(path, files, headers, strategy)
    if not source.params and not source.states:
        raise InputError(f"{path}: holds no tensor ({len(source.headers)} files without any): fetch or save it again")
    return replace(source, step=files.step, notes=(*files.notes, *source.notes))


def layout_of(layouts: Mapping[str, Layout], name: str) -> Layout | None:
    """A parameter's layout; an optimizer state that is not listed follows its weight."""
    found = layouts.get(name)
    if found is None:
        prefix, weight = split_optimizer(name)
        if prefix:
            return layouts.get(weight)
    return found


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
    path: str, files: mindspore_dir.Files, headers: Mapping[int, Sequence[FileHeader]], strategy: Strategy
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
    reader = _RankReader(path, strategy, headers)
    params = reader.params()
    states = reader.states(params.keys())
    reader.check_absent_ranks(params)
    return Source(
        MINDSPORE, path, tuple(h for hs in headers.values() for h in hs), params, states, notes=tuple(reader.notes)
    )


class _RankReader:
    """Puts the tensors of rank files where the strategy says they belong."""

    def __init__(self, path: str, strategy: Strategy, headers: Mapping[int, Sequence[FileHeader]]) -> None:
        self.path, self.strategy = path, strategy
        self.notes: list[str] = []
        self.tensors: dict[int, dict[str, Tensor]] = {
            rank: {name: t for header in found for name, t in header.tensors.items()} for rank, found in headers.items()
        }
        self.holders: dict[str, list[int]] = {}
        for rank in sorted(self.tensors):
            for name in self.tensors[rank]:
                self.holders.setdefault(name, []).append(rank)
        self.stage_of = {rank: s for s in range(len(strategy.stages)) for rank in strategy.ranks(s)}

    def params(self) -> dict[str, Logical]:
        problems = Problems()
        found: dict[str, Logical] = {}
        astray: list[str] = []
        cache: dict[tuple[Layout, tuple[int, ...]], tuple[Box, ...]] = {}
        for name, ranks in self.holders.items():
            laid_out = [
                (rank, layout)
                for rank in ranks
                if (layout := layout_of(self.strategy.stages[self.stage_of[rank]].layouts, name)) is not None
            ]
            if not laid_out:
                continue
            try:
                found[name] = self._logical(name, laid_out, cache)
            except InputError as error:
                problems.add(str(error))
            strays = sorted(set(ranks) - {rank for rank, _ in laid_out})
            if strays:
                astray.append(name)
                self.notes.append(
                    f"{name!r} in the files of ranks {rank_ranges(strays)} is in no layout of their stage"
                )
        problems.raise_if_any(InputError)
        if 2 * len(astray) > len(found):
            raise InputError(
                f"{self.path}: {len(astray)} of {len(found)} tensors are in files of ranks whose stage does not list "
                f"them ({name_some(astray)}): {self.strategy.origin} is not the strategy of this checkpoint"
            )
        self._check_optimizer_shapes(found)
        self._check_listed(found)
        return found

    def _logical(
        self,
        name: str,
        laid_out: Sequence[tuple[int, Layout]],
        cache: dict[tuple[Layout, tuple[int, ...]], tuple[Box, ...]],
    ) -> Logical:
        pieces: list[Piece] = []
        first = self.tensors[laid_out[0][0]][name]
        full: tuple[int, ...] = ()
        for rank, layout in laid_out:
            tensor = self.tensors[rank][name]
            try:
                shape = layout.full_shape(tensor.shape)
            except LayoutError as error:
                raise InputError(
                    f"{tensor.path}: {name!r}{list(tensor.shape)}: {error} ({self.strategy.origin})"
                ) from None
            if not pieces:
                full = shape
            if shape != full or tensor.dtype != first.dtype:
                raise InputError(
                    f"{name!r} does not agree between ranks: {first.path} has {first.dtype}{list(first.shape)} of a "
                    f"whole {list(full)}, {tensor.path} has {tensor.dtype}{list(tensor.shape)} of a whole "
                    f"{list(shape)}: the files are of different runs, or {self.strategy.origin} is not their strategy"
                )
            boxes = cache.get((layout, full))
            if boxes is None:
                boxes = cache[layout, full] = layout.boxes(full)
            local = rank - self.strategy.ranks(self.stage_of[rank]).start
            pieces.append(Piece(tensor, boxes[local], rank))
        return Logical(name, first.dtype, full, tuple(pieces))

    def _check_optimizer_shapes(self, params: Mapping[str, Logical]) -> None:
        problems = Problems()
        for name, logical in params.items():
            prefix, weight = split_optimizer(name)
            if prefix and weight in params and params[weight].shape != logical.shape:
                problems.add(
                    f"{name!r} is {list(logical.shape)} when whole, its weight {list(params[weight].shape)}: "
                    f"{self.strategy.origin} is not the strategy of this checkpoint"
                )
        problems.raise_if_any(InputError)

    def _check_listed(self, params: Mapping[str, Logical]) -> None:
        """A strategy entry without a tensor is normal, unless its sisters in other layers have theirs."""
        listed: dict[str, list[str]] = {}
        for name in self.strategy.names:
            listed.setdefault(_pattern(name), []).append(name)
        problems = Problems()
        lacking: list[str] = []
        whole_kinds = 0
        for names in listed.values():
            missing = [n for n in names if n not in params]
            if missing and len(missing) < len(names):
                stages = sorted({s for n in missing for s in self.strategy.names[n]})
                ranks = rank_ranges(r for s in stages for r in self.strategy.ranks(s))
                problems.add(
                    f"{self.path}: no file holds {name_some(missing)}, though {len(names) - len(missing)} other "
                    f"tensors of the same kind are there: look for missing or truncated files of ranks {ranks}"
                )
            elif missing and not split_optimizer(names[0])[0]:
                lacking += missing
                whole_kinds += len(names) > 1
        if lacking and not params:
            raise InputError(
                f"{self.path}: no file holds any tensor of {self.strategy.origin} ({name_some(lacking)}): it is the "
                "strategy of another model, or the files are truncated"
            )
        if lacking and not whole_kinds:
            stages = sorted({s for n in lacking for s in self.strategy.names[n]})
            ranks = rank_ranges(r for s in stages for r in self.strategy.ranks(s))
            problems.add(
                f"{self.path}: no file holds {name_some(lacking)} of {self.strategy.origin}, though every layer is "
                f"there: look for missing or truncated files of ranks {ranks}"
            )
        elif lacking:
            self.notes.append(f"{len(lacking)} parameters of the source strategy have no tensor: {name_some(lacking)}")
        problems.raise_if_any(PlanError)

    def states(self, params: Iterable[str]) -> dict[str, Logical]:
        """Tensors in no layout: whole, one piece a rank."""
        known = set(params)
        found: dict[str, Logical] = {}
        problems = Problems()
        for name, ranks in self.holders.items():
            if name in known:
                continue
            tensors = [self.tensors[rank][name] for rank in ranks]
            first = tensors[0]
            odd = [t for t in tensors if (t.dtype, t.shape) != (first.dtype, first.shape)]
            if odd:
                problems.add(
                    f"{name!r} is in no source strategy and differs in shape or type: {first.dtype}{list(first.shape)} "
                    f"in {first.path}, {odd[0].dtype}{list(odd[0].shape)} in {odd[0].path}: give a strategy that "
                    "lists it"
                )
            pieces = tuple(Piece(t, whole(t.shape), r) for t, r in zip(tensors, ranks, strict=True))
            found[name] = Logical(name, first.dtype, first.shape, pieces)
        problems.raise_if_any(InputError)
        return found

    def check_absent_ranks(self, params: Mapping[str, Logical]) -> None:
        """A rank may be absent only when somebody else holds what it holds; a whole stage never."""
        problems = Problems()
        for number, stage in enumerate(self.strategy.stages):
            ranks = self.strategy.ranks(number)
            if any(rank in self.tensors for rank in ranks):
                continue
            lost = [n for n in stage.layouts if n not in params and not split_optimizer(n)[0]]
            if lost:
                problems.add(
                    f"{self.path}: rank_{ranks.start} to rank_{ranks.stop - 1} (stage {number}) are missing, and "
                    f"nobody else holds {name_some(lost)}: copy them here"
                    if len(ranks) > 1
                    else f"{self.path}: rank_{ranks.start} (stage {number}) is missing, and nobody else holds "
                    f"{name_some(lost)}: copy it here"
                )
        problems.raise_if_any(PlanError)
        absent = [rank for rank in range(self.strategy.world) if rank not in self.tensors]
        if absent:
            self.notes.append(
                f"rank directories {rank_ranges(absent)} are absent or empty: others must hold what they held"
            )


def _pattern(name: str) -> str:
    """What a tensor stands or falls with: a weight with its sisters in other layers, a state with all of its prefix."""
    return split_optimizer(name)[0] or re.sub(r"\d+", "#", name)
