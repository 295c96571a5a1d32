"""One merged strategy file of a directory of per-rank ones, as mindspore.merge_pipeline_strategys makes it.

Unlike that it is deterministic and atomic, reads every file, and is redone only when its content would change.
May import only strategy.{codec,directory,document,files,layout} and transform_ckpt.errors.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile

from strategy.codec import Form, decode, encode, form_for, form_of
from strategy.directory import MERGED_STEM, read_directory
from strategy.document import Document, split_merged
from strategy.files import read_bytes, write_atomically
from strategy.layout import Strategy
from transform_ckpt.errors import InputError, StorageError, TransformError

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def merge_directory(src_dir: str, dst_file: str, *, form: Form | None = None) -> Strategy:
    """Merge the per-rank files of `src_dir` into `dst_file` and return what was written.

    Strategy items are carried over; `tensor_shape`, which only JSON has, is lost in protobuf.  The form is by default
    the one that MindSpore expects of the destination's suffix.  InputError as strategy.directory.
    """
    src_dir, dst_file = os.fspath(src_dir), os.fspath(dst_file)
    document = _read(src_dir, dst_file)
    stages = split_merged(document, src_dir)
    write_atomically(dst_file, encode(document, form or form_for(dst_file)))
    return Strategy(stages, dst_file)


def up_to_date(src_dir: str, dst_file: str) -> bool:
    """Whether merging now would give `dst_file` the content it has (order of items aside, which MindSpore varies)."""
    src_dir, dst_file = os.fspath(src_dir), os.fspath(dst_file)
    return _is_current(_read(src_dir, dst_file), dst_file)


def merged_strategy_file(directory: str) -> str:
    """Path of `directory`'s merged file: the one in it, made or renewed where needed.

    In a directory that cannot be written it lies in a temporary place, which is removed when the process ends.
    """
    directory = os.fspath(directory)
    path = os.path.join(directory, MERGED_STEM + ".ckpt")
    document = _read(directory, path)
    split_merged(document, directory)
    if _is_current(document, path):
        return path
    data = encode(document, "protobuf")
    try:
        write_atomically(path, data)
    except StorageError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _READ_ONLY:
            raise
        path = os.path.join(_temporary_directory(), MERGED_STEM + ".ckpt")
        write_atomically(path, data)
    return path


def _read(src_dir: str, dst_file: str) -> Document:
    if not os.path.isdir(src_dir):
        raise InputError(f"{src_dir}: no such directory; expected a directory of per-rank strategy files")
    return read_directory(src_dir, ignore=dst_file)


def _is_current(document: Document, path: str) -> bool:
    """A file that cannot be read, is damaged, or has a form that MindSpore would not expect there, is not."""
    form = form_for(path)
    try:
        data = read_bytes(path)
        if form_of(data) != form:
            return False
        return decode(data, path).same_content(decode(encode(document, form), path))
    except TransformError:
        return False


def _temporary_directory() -> str:
    directory = tempfile.mkdtemp(prefix="transform_ckpt_strategy_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
