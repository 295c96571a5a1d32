"""Tensors of rank files, put where a strategy says they belong.  Pure: headers in, `Logical` out.

May import strategy.layout, states, tensors, views, errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from strategy.layout import Layout, LayoutError, Strategy
from transform_ckpt.errors import InputError, PlanError, Problems, name_some, rank_ranges
from transform_ckpt.states import split_optimizer
from transform_ckpt.tensors import FileHeader, Logical, Piece, Tensor
from transform_ckpt.views import Box, whole


def layout_of(layouts: Mapping[str, Layout], name: str) -> Layout | None:
    """A parameter's layout; an optimizer state that is not listed follows its weight."""
    found = layouts.get(name)
    if found is None:
        prefix, weight = split_optimizer(name)
        if prefix:
            return layouts.get(weight)
    return found


class RankReader:
    """Puts the tensors of rank files where the strategy says they belong."""

    def __init__(
        self,
        path: str,
        strategy: Strategy,
        headers: Mapping[int, Sequence[FileHeader]],
        allow_missing: Sequence[str] = (),
        *,
        partial: bool = False,
    ) -> None:
        """`partial`: the headers are of some ranks only, so that what other stages list is not looked for."""
        self.path, self.strategy, self.allow_missing, self.partial = path, strategy, allow_missing, partial
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
        """Laid-out parameters; InputError and PlanError where the files do not fit the strategy."""
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
        """A strategy entry without a tensor is normal, unless its sisters have theirs: then files were lost or cut.

        A .ckpt that ends at a record boundary looks whole; only what is missing tells.
        """
        kinds: dict[str, list[str]] = {}
        read = {self.stage_of[rank] for rank in self.tensors}
        for name, stages in self.strategy.names.items():
            if not self.partial or read.intersection(stages):
                kinds.setdefault(_kind(name), []).append(name)
        absent = {k: [n for n in names if n not in params and not self._may_miss(n)] for k, names in kinds.items()}
        problems = Problems()
        for kind, missing in absent.items():
            if missing and len(missing) < len(kinds[kind]):
                problems.add(self._lost(missing, "other tensors of this kind are there"))
        gone = [m for k, m in absent.items() if m and len(m) == len(kinds[k]) and not split_optimizer(m[0])[0]]
        lacking = [name for names in gone for name in names]
        if lacking and not params:
            raise InputError(
                f"{self.path}: no file holds any tensor of {self.strategy.origin} ({name_some(lacking)}): it is the "
                "strategy of another model, or the files are truncated"
            )
        if lacking and all(len(names) == 1 for names in gone):
            problems.add(self._lost(lacking, "every layer is there"))
        elif lacking:
            self.notes.append(f"{len(lacking)} parameters of the source strategy have no tensor: {name_some(lacking)}")
        if problems.messages and len(self.tensors) < self.strategy.world and not self.partial:
            problems.messages.insert(
                0,
                f"{self.path}: ranks {rank_ranges(self.tensors)} are there, {self.strategy.origin} is for "
                f"{self.strategy.world} ranks: if none was lost, it is not the strategy of this checkpoint",
            )
        problems.raise_if_any(PlanError)

    def _lost(self, names: Sequence[str], though: str) -> str:
        ranks = rank_ranges(r for n in names for s in self.strategy.names[n] for r in self.strategy.ranks(s))
        return (
            f"{self.path}: no file holds {name_some(names)} of {self.strategy.origin}, though {though}: look for "
            f"missing or truncated files of ranks {ranks}, or name them with --allow-missing"
        )

    def _may_miss(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.allow_missing)

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
            lost = [n for n in stage.layouts if not (n in params or split_optimizer(n)[0] or self._may_miss(n))]
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


def _kind(name: str) -> str:
    """What a tensor stands or falls with: a weight with its sisters in other layers, a state with all of its prefix."""
    return split_optimizer(name)[0] or re.sub(r"\d+", "#", name)
