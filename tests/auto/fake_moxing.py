# ruff: noqa: FBT002 - signatures of moxing
"""A stand-in for `moxing.file` over a local directory: real names, signatures and documented behaviour.

Source: "mox.file API document" of `moxing.framework.file` (parameters of each function; `remove` of a directory without
`recursive`, or of a file by a name with a slash, does nothing; errors carry `resp`) and Huawei Cloud's ModelArts guide,
MoXing sample code (`list_directory(recursive=True)` gives 'dir0', 'dir0/file00', 'file1'; `write` replaces; the size of
a directory is 0 without `recursive`).  Defaults that those do not name are marked.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace


class MoxFileRespException(Exception):  # noqa: N818 - moxing's name
    """The store answered with a status of 300 or more."""

    def __init__(self, status, code, message):
        super().__init__(f"stat:{status} errorCode:{code} errorMessage:{message}")
        self.resp = SimpleNamespace(status=status, errorCode=code, errorMessage=message)


class MoxFileNotExistsException(Exception):  # noqa: N818 - moxing's name
    """`stat`, `get_size` and the like of what is not there."""


class File:
    """The functions of `moxing.file`; `root` holds one directory for each bucket."""

    MoxFileRespException = MoxFileRespException
    MoxFileNotExistsException = MoxFileNotExistsException

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, url):
        if "://" not in url:
            return Path(url)
        bucket, _, key = url.split("://", 1)[1].partition("/")
        if not (self.root / bucket).is_dir():
            raise MoxFileRespException(404, "NoSuchBucket", "The specified bucket does not exist")
        return self.root / bucket / key

    def exists(self, url):
        return self._path(url).exists()

    def is_directory(self, url):
        return self._path(url).is_dir()

    def get_size(self, url, recursive=False):
        path = self._path(url)
        if not path.exists():
            raise MoxFileNotExistsException(url)
        return 0 if path.is_dir() else path.stat().st_size

    def list_directory(
        self, url, recursive=False, remove_sep=True, skip_file=False, skip_dir=False
    ):  # defaults: inferred
        path = self._path(url)
        found = path.rglob("*") if recursive else path.glob("*")
        return sorted(entry.relative_to(path).as_posix() for entry in found)

    def make_dirs(self, url):
        self._path(url).mkdir(parents=True, exist_ok=True)

    def read(self, url, client_id=None, binary=False):
        if not self._path(url).is_file():
            raise MoxFileRespException(404, "NoSuchKey", "The specified key does not exist")
        data = self._path(url).read_bytes()
        return data if binary else data.decode()

    def write(self, url, data, binary=False):
        self._path(url).parent.mkdir(parents=True, exist_ok=True)
        self._path(url).write_bytes(data if binary else data.encode())

    def copy(self, src_url, dst_url, client_id=None):
        source, target = self._path(src_url), self._path(dst_url)
        if not source.is_file():
            raise FileNotFoundError(f"{src_url} is not found")
        if "://" in dst_url:
            target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def copy_parallel(
        self, src_url, dst_url, file_list=None, threads=16, is_processing=True, use_queue=True
    ):  # inferred
        shutil.copytree(self._path(src_url), self._path(dst_url), dirs_exist_ok=True)

    def remove(self, url, recursive=False):
        path = self._path(url)
        if path.is_dir():
            if recursive:
                shutil.rmtree(path)
        elif not url.endswith("/"):
            os.unlink(path)
