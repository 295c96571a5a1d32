"""Where a run's results lie: `{output}/auto_trans/{run}/`, with the well-known names pointing at the newest.

    {output}/strategy                -> auto_trans/{run}/strategy
    {output}/transformed_checkpoint  -> auto_trans/{run}/transformed_checkpoint

MindFormers 1.9.0 writes to the well-known names themselves and deletes them at the start of every run (utils/file_utils
`clear_auto_trans_output`).  Here they change only when every rank has looked up what they pointed at, since the source
of a run may be named by them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection

from transform_ckpt.auto.rendezvous import DIRECTORY
from transform_ckpt.destination import unused_name
from transform_ckpt.formats.files import storage_error

STRATEGY = "strategy"
TRANSFORMED = "transformed_checkpoint"
SAVES = "saves_checkpoints"
_RUN = re.compile(r"\d{8}_\d{6}_[0-9a-f]{6}")


def point(output: str, run_id: str, name: str, say: Callable[[str], None]) -> None:
    """Let `{output}/{name}` mean this run's.  What lay there of another program is moved aside, never removed.

    Several ranks may do so at once: what is in the way is left to the first that sees it.
    """
    output = os.path.abspath(output)
    known, target = os.path.join(output, name), os.path.join(DIRECTORY, run_id, name)
    part = f"{known}.{secrets.token_hex(4)}.tmp"
    try:
        if os.path.lexists(known) and not os.path.islink(known):
            try:
                os.mkdir(os.path.join(output, DIRECTORY, run_id, f"{name}.moved"))
            except FileExistsError:
                return
            _move_aside(known, unused_name(os.path.join(output, f"{name}.before_{run_id}")), say)
        os.symlink(target, part)
        os.replace(part, known)
    except OSError as error:
        say(f"{known}: cannot point at {target} ({error.strerror}): look for this run's results there")


def _move_aside(known: str, aside: str, say: Callable[[str], None]) -> None:
    if os.path.isdir(known) and not os.listdir(known):
        os.rmdir(known)
    else:
        os.rename(known, aside)
        say(f"{known}: was not ours, moved to {aside}")


def runs(output: str) -> list[str]:
    """Ids of the runs that are there, newest last (they begin with the time)."""
    try:
        names = os.listdir(os.path.join(output, DIRECTORY))
    except FileNotFoundError:
        return []
    return sorted(name for name in names if _RUN.fullmatch(name))


def prune(output: str, keep: int, needed: Collection[str], say: Callable[[str], None]) -> list[str]:
    """Remove all but the `keep` newest runs; those that hold one of the `needed` paths stay.  The ids removed.

    Of a run that saves checkpoints (`mark_saving`) the strategy stays: without it nobody can read them.  So does a run
    that a well-known name points at.
    """
    removed = []
    needed = [*needed, *(os.path.join(output, name) for name in (STRATEGY, TRANSFORMED))]
    for run_id in runs(output)[:-keep]:
        folder = os.path.realpath(os.path.join(output, DIRECTORY, run_id))
        if any(_lies_in(path, folder) for path in needed):
            continue
        try:
            if not _remove(folder):
                continue
        except FileNotFoundError:  # another rank has removed it
            continue
        except OSError as error:
            say(str(storage_error(folder, error, "removing an old run")))
            continue
        removed.append(run_id)
    return removed


def _lies_in(path: str, folder: str) -> bool:
    found = os.path.realpath(path)
    return found == folder or found.startswith(folder + os.sep)


def mark_saving(output: str, run_id: str) -> None:
    """Say that the job of a run saves checkpoints that only its strategy describes."""
    with open(os.path.join(output, DIRECTORY, run_id, SAVES), "w", encoding="utf-8"):
        pass


def _remove(folder: str) -> bool:
    """In one step for anybody who looks: renamed first.  False when there was nothing left to remove."""
    if not os.path.exists(os.path.join(folder, SAVES)):
        gone = f"{folder}.removed"
        os.rename(folder, gone)
        shutil.rmtree(gone)
        return True
    rest = [name for name in os.listdir(folder) if name not in (STRATEGY, SAVES) and not name.endswith(".removed")]
    for name in rest:
        gone = os.path.join(folder, f"{name}.removed")
        os.rename(os.path.join(folder, name), gone)
        shutil.rmtree(gone)
    return bool(rest)
