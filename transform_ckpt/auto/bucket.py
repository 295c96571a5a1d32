"""A job whose nodes share a bucket and no disk (ModelArts): what is written is sent, what is missing is fetched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transform_ckpt.auto.board import Board, RemoteBoard
from transform_ckpt.auto.remote import Remote
from transform_ckpt.auto.remote_results import fetch_rank, fetch_strategies, publish_rank, publish_strategy
from transform_ckpt.auto.rendezvous import DIRECTORY, Rendezvous


@dataclass(frozen=True)
class Bucket:
    """`timeout` is of every wait, in seconds."""

    remote: Remote
    timeout: float
    board: Board = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "board", RemoteBoard(self.remote, DIRECTORY))

    def give_strategy(self, run_id: str, directory: str, rank: int, world: int) -> None:
        """Send one rank's strategy file."""
        publish_strategy(self.remote, directory, rank, run_id=run_id, world=world)

    def fetch_strategies(self, rendezvous: Rendezvous, directory: str, ranks: Iterable[int]) -> None:
        """Bring the strategy files of some ranks here, those that are not."""
        fetch_strategies(self.remote, directory, ranks, self.timeout, rendezvous.check, run_id=rendezvous.run_id)

    def give_ranks(self, run_id: str, results: str, name: str, ranks: Sequence[int]) -> None:
        """Send the ranks that this process has made."""
        for rank in ranks:
            publish_rank(self.remote, name, os.path.join(results, name, f"rank_{rank}"), rank, run_id=run_id)

    def fetch_rank(self, rendezvous: Rendezvous, results: str, name: str, rank: int) -> None:
        """Bring one rank's file here, unless it is."""
        run_id = rendezvous.run_id
        local = os.path.join(results, name)
        fetch_rank(self.remote, name, rank, local, self.timeout, rendezvous.check, run_id=run_id)
