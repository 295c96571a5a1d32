"""What the ranks of one run give each other through the bucket: strategies, and converted rank directories.

    {remote}/runs/{run_id}/strategy/ckpt_strategy_rank_0.ckpt           what ranks wait for and read
    {remote}/runs/{run_id}/transformed_checkpoint/{name}/rank_0/...
    {remote}/runs/{run_id}/complete/...rank_0.json                      written last: sizes and digests of the above
    {remote}/strategy/..., {remote}/transformed_checkpoint/...          copies, under the names that users know

The last are those of MindFormers 1.9.0 (tools/ckpt_transform/transform_checkpoint.py).  An earlier run has another
id, so nothing of it passes as this run's.  May import errors, formats.files,
remote and remote_names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from transform_ckpt.auto.remote import Remote
from transform_ckpt.auto.remote_names import check_name, local_files
from transform_ckpt.errors import InputError, StorageError
from transform_ckpt.formats.files import storage_error

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANK_STRATEGY = re.compile(r"ckpt_strategy_rank_(\d+)\.ckpt")
_MERGED_STRATEGY = "merged_ckpt_strategy.ckpt"
_BUFFER_NBYTES = 1 << 20
_DOWNLOADS_AT_ONCE = 8

Check = Callable[[], None] | None


def strategy_name(rank: int) -> str:
    """The strategy file of a rank (MindFormers 1.9.0 sets strategy_ckpt_save_file so, models/modeling_utils.py)."""
    return f"ckpt_strategy_rank_{rank}.ckpt"


@dataclass(frozen=True, slots=True)
class _Shelf:
    """One rank's place: `folder` is the well-known directory, `mark` the name of the completion object."""

    run_id: str
    folder: str
    mark_name: str

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise InputError(f"run id {self.run_id!r}: expected letters, digits, '.', '_' and '-' only")
        check_name(self.folder)

    def inside(self, name: str) -> str:
        """Where this run keeps a file."""
        return f"runs/{self.run_id}/{self.folder}/{name}"

    def known(self, name: str) -> str:
        """Where users look for it."""
        return f"{self.folder}/{name}"

    @property
    def mark(self) -> str:
        """Lists sizes and digests once all files are there."""
        return f"runs/{self.run_id}/complete/{self.mark_name}.json"


def _strategy(run_id: str, rank: int) -> _Shelf:
    return _Shelf(run_id, "strategy", f"strategy/rank_{rank}")


def _converted(run_id: str, name: str, rank: int) -> _Shelf:
    check_name(name)
    folder = f"transformed_checkpoint/{name}/rank_{rank}"
    return _Shelf(run_id, folder, folder)


def publish_strategy(remote: Remote, local_dir: str, rank: int, *, run_id: str, world: int | None = None) -> None:
    """Upload this rank's strategy file.

    With `world`, rank 0 also removes the well-known strategies of an earlier run that had more ranks, and its merged
    one: merged with this run's they would make no strategy of any run.
    """
    shelf = _strategy(run_id, rank)
    _publish(remote, shelf, local_dir, [strategy_name(rank)])
    if rank == 0 and world is not None:
        for name in remote.list(shelf.folder):
            found = _RANK_STRATEGY.fullmatch(name)
            if name == _MERGED_STRATEGY or (found and int(found[1]) >= world):
                remote.delete(shelf.known(name))


def publish_rank(remote: Remote, name: str, local_rank_dir: str, rank: int, *, run_id: str) -> None:
    """Upload all files of a rank directory of checkpoint `name`; what else the well-known directory held is removed."""
    shelf = _converted(run_id, name, rank)
    files = local_files(local_rank_dir)
    if not files:
        raise InputError(f"{local_rank_dir}: holds no files, so there is nothing to publish for rank {rank}")
    _publish(remote, shelf, local_rank_dir, files)
    for stale in set(remote.list(shelf.folder)) - set(files):
        remote.delete(shelf.known(stale))


def fetch_strategies(
    remote: Remote,
    local_dir: str,
    ranks: Iterable[int],
    timeout: float,
    check: Check = None,
    *,
    run_id: str,
    poll: float = 5.0,
) -> None:
    """Wait for the strategies of `ranks`; download those that `local_dir` lacks, or holds from another run."""
    shelves = [_strategy(run_id, rank) for rank in ranks]
    remote.wait_for((shelf.mark for shelf in shelves), timeout, check, poll)
    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        for _ in pool.map(lambda shelf: _fetch(remote, shelf, local_dir), shelves):
            if check is not None:
                check()


def fetch_rank(
    remote: Remote,
    name: str,
    rank: int,
    local_dir: str,
    timeout: float,
    check: Check = None,
    *,
    run_id: str,
    poll: float = 5.0,
) -> str:
    """Wait for one rank of checkpoint `name`, download what is not there; returns `{local_dir}/rank_{rank}`."""
    shelf = _converted(run_id, name, rank)
    remote.wait_for([shelf.mark], timeout, check, poll)
    folder = os.path.join(local_dir, f"rank_{rank}")
    _fetch(remote, shelf, folder)
    return folder


def _publish(remote: Remote, shelf: _Shelf, local_dir: str, files: Iterable[str]) -> None:
    remote.delete(shelf.mark)
    marked = {}
    for name in files:
        path = os.path.join(local_dir, name)
        marked[name] = _stamp(path)
        remote.upload(path, shelf.inside(name))
    remote.write(shelf.mark, json.dumps({"files": marked}, sort_keys=True).encode())
    for name in marked:
        remote.copy(shelf.inside(name), shelf.known(name))


def _fetch(remote: Remote, shelf: _Shelf, local_dir: str) -> None:
    for name, expected in _parse_mark(remote.join(shelf.mark), remote.read(shelf.mark)).items():
        path = os.path.join(local_dir, name)
        if os.path.isfile(path) and os.path.getsize(path) == expected[0] and _stamp(path) == expected:
            continue
        url = remote.join(shelf.inside(name))
        remote.download(shelf.inside(name), path, verify=partial(_check_stamp, url, expected))


def _parse_mark(url: str, data: bytes) -> Mapping[str, tuple[int, str]]:
    try:
        files = {str(name): (int(nbytes), str(digest)) for name, (nbytes, digest) in json.loads(data)["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise StorageError(f"{url}: is not what a rank writes when it is complete: remove it, start again") from None
    for name in files:
        check_name(name)
    return files


def _check_stamp(url: str, expected: tuple[int, str], path: str) -> None:
    if (found := _stamp(path)) != expected:
        raise StorageError(
            f"{url}: has {found[0]:,} bytes with XXH3 {found[1]}, its rank published {expected[0]:,} bytes with "
            f"{expected[1]}; the object is truncated or was replaced: start the run again"
        )


def _stamp(path: str) -> tuple[int, str]:
    """Size in bytes and XXH3-128 of a file."""
    import xxhash

    digest = xxhash.xxh3_128()
    nbytes = 0
    try:
        with open(path, "rb", buffering=0) as stream:
            while block := stream.read(_BUFFER_NBYTES):
                digest.update(block)
                nbytes += len(block)
    except OSError as error:
        raise storage_error(path, error, "reading it for the other ranks") from None
    return nbytes, digest.hexdigest()
