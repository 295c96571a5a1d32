"""MindFormers "Checkpoint 2.0" (`use_legacy_format: False`): one directory per iteration, online resharding.

    root/latest_checkpointed_iteration.txt            the number, no newline
    root/iteration_00000005/metadata.json             parameters, slices, which file holds which (absent on one card)
    root/iteration_00000005/common.json               step numbers, loss scale
    root/iteration_00000005/[{prefix}-]model-0000000-0000002.safetensors   weights of the first writing rank
    root/iteration_00000005/[{prefix}-]opt-0000000-0000002.safetensors     its optimizer states

Reading here; writing in checkpoint2_write.  May import transform_ckpt.{errors,tensors,views} and its own formats.

Facts (MindFormers 1.9.0, MindSpore 2.9.0):

- One card writes no metadata.json; the files then hold whole tensors (checkpoint/metadata.py
  `generate_default_metadata_from_checkpoint`), `global_step` among them.
- The optimizer's files hold tensors that metadata.json does not list (`global_step` and the like).  The loader takes
  `global_step` from common.json unless metadata.json lists it (checkpoint/checkpoint.py `load_checkpoint`), so
  common.json wins here, too.
- metadata.json lists `accu_grads.*`, which belong to the training wrapper and are in no file; the loader skips every
  name that contains `accu_grads` (same function).
- A parameter that two stages share is listed for both and stored by the first (MindSpore train/serialization.py
  `_convert_cell_param_and_names_to_dict` skips `is_pipeline_shared_param`): a listed copy may be missing from its
  file as long as another one is there.
- An iteration is complete when the tracker names it; a later directory is one whose save was cut short.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transform_ckpt.errors import InputError, Problems, name_some
from transform_ckpt.formats import safetensors
from transform_ckpt.formats.checkpoint2_common import (
    COMMON,
    COMMON_FIELDS,
    FILE_NAME,
    METADATA,
    TRACKER,
    iteration_name,
    load_json,
    parse_iteration,
    read_bytes,
    read_common,
    states_of,
)
from transform_ckpt.formats.checkpoint2_metadata import Chunk, Entry, Metadata, parse_metadata
from transform_ckpt.formats.checkpoint2_write import FORMAT, plan_target
from transform_ckpt.formats.files import listing
from transform_ckpt.tensors import FileHeader, Logical, Piece, Source, Tensor
from transform_ckpt.views import whole

__all__ = ["COMMON_FIELDS", "FORMAT", "detect", "plan_target", "read"]


def detect(path: str) -> bool:
    """Is this a Checkpoint 2.0 root, or one of its iteration directories?  Reads names only."""
    root = Path(path)
    if not root.is_dir():
        return False
    return _is_iteration(root) or any(_is_iteration(folder) for folder in _iterations(root).values())


def _is_iteration(path: Path) -> bool:
    return any(FILE_NAME.fullmatch(name) for name in listing(str(path)))


def _iterations(path: Path) -> dict[int, Path]:
    """Step -> directory, in the order of steps."""
    found = {parse_iteration(name): path / name for name in listing(str(path))}
    return {step: found[step] for step in sorted(s for s in found if s is not None) if found[step].is_dir()}


def read(path: str, step: int | None = None) -> Source:
    """The checkpoint at `path`, cross-checked against its files' headers.

    `path` is the root (then `step` chooses, else the tracker, else the highest) or an iteration directory.  `params`
    are what metadata.json lists (all tensors where there is none), `states` the rest and common.json's values, whose
    bytes are inline.  InputError names everything that does not fit.
    """
    folder, number, notes = _find(Path(path), step)
    common: dict[str, Tensor] = {}
    json_headers: list[FileHeader] = []
    if (folder / COMMON).is_file():
        common, header = read_common(folder / COMMON)
        json_headers.append(header)
    else:
        notes.append(f"{folder}: no {COMMON}: step numbers and loss scale are not carried")
    if (folder / METADATA).is_file():
        content, header = load_json(folder / METADATA)
        json_headers.append(header)
        headers, params, states = _distributed(folder, parse_metadata(header.path, content), common, notes)
    else:
        headers, params, states = _one_card(folder)
    if not params:
        raise InputError(f"{folder}: holds no parameter: its save was cut short: choose another iteration with --step")
    states = {**states_of(t for name, t in common.items() if name not in params), **states}
    return Source(FORMAT, str(folder), (*headers.values(), *json_headers), params, states, number, tuple(notes))


def _find(path: Path, step: int | None) -> tuple[Path, int | None, list[str]]:
    """Iteration directory, its step, notes."""
    if not path.is_dir():
        raise InputError(f"{path}: not a directory: give a Checkpoint 2.0 root or one of its iteration directories")
    iterations = _iterations(path)
    tracked = _tracked(path)
    if not iterations and tracked is None:
        return _check_is_iteration(path, step)
    notes: list[str] = []
    if step is None and tracked is None:
        notes.append(f"{path}: no {TRACKER}: took the highest iteration; its save may have been cut short")
        step = max(iterations)
    wanted = step if step is not None else tracked
    if wanted is None or wanted not in iterations:
        source = "the tracker names" if step is None else "asked for"
        have = ", ".join(map(str, iterations)) or "none"
        raise InputError(f"{path}: {source} iteration {wanted}, found: {have}: choose one with --step, or restore it")
    return iterations[wanted], wanted, notes


def _tracked(path: Path) -> int | None:
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    text = read_bytes(tracker).strip()
    if not text.isdigit() or len(text) > 20:
        raise InputError(f"{tracker}: {text[:20]!r} is not an iteration number: correct it, or choose with --step")
    return int(text)


def _check_is_iteration(path: Path, step: int | None) -> tuple[Path, int | None, list[str]]:
    if not _is_iteration(path):
        raise InputError(f"{path}: neither {iteration_name(1)} nor model-*.safetensors or the like: not Checkpoint 2.0")
    number = parse_iteration(path.resolve().name)
    if step is not None and step != number:
        raise InputError(f"{path}: asked for step {step}, this directory is {number}'s: give its parent, or no --step")
    return path, number, []


Found = tuple[dict[str, FileHeader], dict[str, Logical], dict[str, Logical]]
"""Headers by file name, params, states."""


def _one_card(folder: Path) -> Found:
    names = [name for name in listing(str(folder)) if name.endswith(".safetensors")]
    parts = [name for name in names if (match := FILE_NAME.fullmatch(name)) and int(match["total"]) > 1]
    if parts:
        raise InputError(f"{folder}: {parts[0]} is one of several ranks' files, but there is no {METADATA}: restore it")
    headers = {name: safetensors.read_header(str(folder / name)) for name in names}
    params: dict[str, Logical] = {}
    for header in headers.values():
        twice = params.keys() & header.tensors.keys()
        if twice:
            raise InputError(f"{header.path}: {name_some(twice)} is in another file, too: remove one of the files")
        params.update(states_of(header.tensors.values()))
    states = {name: params.pop(name) for name in COMMON_FIELDS if name in params}
    return headers, params, states


def _distributed(folder: Path, metadata: Metadata, common: Mapping[str, Tensor], notes: list[str]) -> Found:
    headers = _read_headers(folder, metadata, notes)
    problems = Problems()
    params: dict[str, Logical] = {}
    absent: list[str] = []
    fewer: list[str] = []
    for entry in metadata.entries:
        pieces, copies = _pieces(entry, headers, problems)
        fewer += [entry.name] if pieces and len(pieces) < copies else []
        if pieces:
            params[entry.name] = Logical(entry.name, pieces[0].tensor.dtype, entry.shape, pieces)
        else:
            absent.append(entry.name)
    lost = [name for name in absent if "accu_grads" not in name]
    if lost:
        problems.add(f"{folder}: {METADATA} lists {name_some(lost)}, which no file holds: save the checkpoint again")
    if len(absent) > len(lost):
        notes.append(f"{folder}: accumulated gradients of {len(absent) - len(lost)} parameters are listed, not stored")
    if fewer:
        notes.append(f"{folder}: not every listed copy of {name_some(fewer)} is stored; another one is")
    listed = {entry.name for entry in metadata.entries}
    states = _unlisted(headers, metadata.files, listed, problems)
    problems.raise_if_any(InputError)
    superseded = states.keys() & common.keys()
    if superseded:
        notes.append(
            f"{folder}: {name_some(superseded)} taken from {COMMON}, as MindFormers does, not from tensor files"
        )
    return headers, params, {name: state for name, state in states.items() if name not in superseded}


def _read_headers(folder: Path, metadata: Metadata, notes: list[str]) -> dict[str, FileHeader]:
    there = set(listing(str(folder)))
    missing = sorted(metadata.files.keys() - there)
    if missing:
        raise InputError(f"{folder}: {METADATA} names {name_some(missing)}, which is not there: fetch it again")
    extra = {name for name in there if FILE_NAME.fullmatch(name)} - metadata.files.keys()
    if extra:
        notes.append(f"{folder}: {name_some(extra)} is not named in {METADATA}: left out")
    if metadata.unused:
        notes.append(f"{folder}: storage_data lists slices that no parameter has: {name_some(metadata.unused)}")
    return {name: safetensors.read_header(str(folder / name)) for name in sorted(metadata.files)}


def _pieces(entry: Entry, headers: Mapping[str, FileHeader], problems: Problems) -> tuple[tuple[Piece, ...], int]:
    """Stored copies of all slices (none when no file holds the name), and how many copies are listed."""
    found: list[Piece] = []
    without: list[Chunk] = []
    for chunk in entry.chunks:
        here: list[Piece] = []
        for stored in chunk.stored:
            header = headers[stored.file]
            tensor = header.tensors.get(entry.name)
            if tensor is None:
                continue
            _check_tensor(header.path, entry, chunk, tensor, problems)
            here.append(Piece(tensor, chunk.box, stored.rank))
        if not here:
            without.append(chunk)
        found += here
    if found and without:
        files = name_some(stored.file for stored in without[0].stored)
        slice_name = f"slice {without[0].number} of {entry.name!r}"
        problems.add(f"{files}: expected {slice_name}, found no such tensor: save the checkpoint again")
    return tuple(found), sum(len(chunk.stored) for chunk in entry.chunks)


def _check_tensor(path: str, entry: Entry, chunk: Chunk, tensor: Tensor, problems: Problems) -> None:
    if tensor.shape != chunk.box.size:
        problems.add(
            f"{path}: {entry.name!r} has shape {list(tensor.shape)}, {METADATA} expects {list(chunk.box.size)} for "
            f"slice {chunk.number} of {list(entry.shape)}: file and metadata are not of one save: fetch both again"
        )
    if entry.dtype is not None and tensor.dtype != entry.dtype:
        problems.add(f"{path}: {entry.name!r} is {tensor.dtype}, {METADATA} expects {entry.dtype}: fetch both again")


def _unlisted(
    headers: Mapping[str, FileHeader], ranks: Mapping[str, int], listed: set[str], problems: Problems
) -> dict[str, Logical]:
    """Tensors that metadata.json does not list: whole states, one piece per file that holds them."""
    pieces: dict[str, list[Piece]] = {}
    for name, header in headers.items():
        for tensor in header.tensors.values():
            if tensor.name not in listed:
                pieces.setdefault(tensor.name, []).append(Piece(tensor, whole(tensor.shape), ranks[name]))
    states: dict[str, Logical] = {}
    for name, found in sorted(pieces.items()):
        first = found[0].tensor
        other = next((p.tensor for p in found if (p.tensor.dtype, p.tensor.shape) != (first.dtype, first.shape)), None)
        if other is not None:
            problems.add(
                f"{other.path}: {name!r} is {other.dtype}{list(other.shape)}, {first.dtype}{list(first.shape)} in "
                f"{Path(first.path).name}, and {METADATA} does not say which part it is: save it again"
            )
        ordered = tuple(sorted(found, key=lambda piece: piece.rank))
        states[name] = Logical(name, first.dtype, first.shape, ordered)
    return states
