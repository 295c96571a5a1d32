"""Tokens and batches: which samples a step has depends on the step and the global batch, not on the number of ranks.

Imports NumPy at once; transformers only where a tokenizer is named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transform_ckpt.embedded.config import EmbeddedConfig
from transform_ckpt.errors import InputError, StorageError

Ids = np.ndarray[Any, np.dtype[np.int32]]

_DRAWN_SAMPLES = 256
"""Length of the stream that is drawn when no data set is named."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Samples:
    """Windows of `seq_length` + 1 tokens that overlap by one, in the stream's order, and again from its start."""

    def __init__(self, tokens: Ids, config: EmbeddedConfig, where: str) -> None:
        self.tokens = tokens
        self.config = config
        self.count = (len(tokens) - 1) // config.seq_length
        if self.count < config.global_batch_size:
            raise InputError(
                f"{where}: {len(tokens)} tokens are {max(self.count, 0)} samples of seq_length {config.seq_length}, a "
                f"step of all ranks needs {config.global_batch_size} (runner_config.batch_size {config.batch_size} * "
                f"data_parallel {config.dp}); give more text, or shorten seq_length or batch_size"
            )
        outside = [found for found in (int(tokens.min()), int(tokens.max())) if not 0 <= found < config.model.vocab]
        if outside:
            raise InputError(
                f"{where}: token {outside[0]} is not one of vocab_size {config.model.vocab}; expected a data set and "
                "tokenizer of this model"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every sample once; what is left over waits for the next epoch's start."""
        return self.count // self.config.global_batch_size

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        wanted = self.steps_per_epoch * self.config.epochs
        return wanted if self.config.max_steps is None else min(wanted, self.config.max_steps)

    def batch(self, step: int, dp_index: int) -> tuple[Ids, Ids]:
        """(inputs, the tokens after them) of one data-parallel rank, after `step` finished steps."""
        config = self.config
        first = step % self.steps_per_epoch * config.global_batch_size + dp_index * config.batch_size
        length = config.seq_length
        rows = [self.tokens[n * length : n * length + length + 1] for n in range(first, first + config.batch_size)]
        batch = np.stack(rows)
        return np.ascontiguousarray(batch[:, :-1]), np.ascontiguousarray(batch[:, 1:])


def read_samples(config: EmbeddedConfig, *, evaluation: bool = False) -> Samples:
    """The samples of the run; evaluation takes eval_dataset where it is given."""
    path = config.eval_dataset if evaluation and config.eval_dataset else config.dataset
    if path is None:
        return Samples(_drawn(config), config, f"{config.where}: the drawn token stream")
    try:
        tokens = _READERS.get(os.path.splitext(path)[1], _read_text)(path, config)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file (data_loader.dataset_dir); expected a text, or token ids as .npy or as .bin of int32"
        ) from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory; data_loader.dataset_dir must name one file here") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    return Samples(tokens, config, path)


def _drawn(config: EmbeddedConfig) -> Ids:
    """Mostly the token after the one before, so that there is something to learn."""
    length = _DRAWN_SAMPLES * config.seq_length + 1
    length = max(length, config.global_batch_size * config.seq_length + 1)
    generator = np.random.default_rng([config.seed, length])
    jumps = np.where(generator.random(length) < 0.1, generator.integers(0, config.model.vocab, length), 1)
    return np.asarray(np.cumsum(jumps) % config.model.vocab, dtype=np.int32)


def _read_npy(path: str, _config: EmbeddedConfig) -> Ids:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not an .npy file of numbers: {error}") from error
    if found.dtype.kind not in "iu":
        raise InputError(f"{path}: expected token ids (whole numbers), found {found.dtype}")
    _check_range(path, found)
    return np.asarray(found, dtype=np.int32).reshape(-1)


def _check_range(path: str, found: np.ndarray[Any, Any]) -> None:
    most = np.iinfo(np.int32).max
    if found.size and not -most <= int(found.min()) <= int(found.max()) <= most:
        raise InputError(f"{path}: token {int(found.max())} is larger than any vocabulary")


def _read_bin(path: str, _config: EmbeddedConfig) -> Ids:
    nbytes = os.path.getsize(path)
    if nbytes % 4:
        raise InputError(f"{path}: {nbytes} bytes are no multiple of 4; expected token ids as little-endian int32")
    return np.fromfile(path, dtype="<i4").astype(np.int32)


def _read_text(path: str, config: EmbeddedConfig) -> Ids:
    with open(path, "rb") as file:
        data = file.read()
    if config.tokenizer is None:
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text (byte {error.start}); expected UTF-8, .npy or .bin") from error
    return np.asarray(Tokenizer(config).encode(text), dtype=np.int32)


def _refuse_records(path: str, _config: EmbeddedConfig) -> Ids:
    raise InputError(f"{path}: MindRecord is not read here; expected a text, or token ids as .npy or as .bin of int32")


_READERS: Mapping[str, Callable[[str, EmbeddedConfig], Ids]] = {
    ".npy": _read_npy,
    ".bin": _read_bin,
    ".mindrecord": _refuse_records,
}
"""By suffix; everything else is text."""


class Tokenizer:
    """A Hugging Face tokenizer, or without one the bytes of UTF-8 as ids."""

    def __init__(self, config: EmbeddedConfig) -> None:
        self._real = None if config.tokenizer is None else _load_tokenizer(config.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(text.encode()) if self._real is None else [int(number) for number in self._real.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; ids that are no byte show as U+FFFD."""
        if self._real is not None:
            return str(self._real.decode(ids, skip_special_tokens=True))
        return bytes(number if number < 256 else 0xFF for number in ids).decode(errors="replace")


def _load_tokenizer(path: str) -> Any:
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    if not any(os.path.isfile(os.path.join(directory, name)) for name in _TOKENIZER_FILES):
        raise InputError(
            f"{path}: processor.tokenizer names no Hugging Face tokenizer; expected a directory with one of "
            f"{', '.join(_TOKENIZER_FILES)}; without processor.tokenizer the bytes of a text are its tokens"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{directory}: transformers cannot load this tokenizer: {error}") from error
