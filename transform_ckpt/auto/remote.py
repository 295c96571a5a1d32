"""A directory in a bucket: what the nodes of a ModelArts job share, each having a disk of its own.

A name is relative to the directory, its parts joined by "/".  May import errors, formats.files, remote_backends and
remote_names.
"""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from transform_ckpt.auto.remote_backends import Backend, open_backend
from transform_ckpt.auto.remote_names import SCHEMES, check_name, discard, local_files
from transform_ckpt.errors import InputError, Problems, StorageError, TransformError, UsageError, name_some
from transform_ckpt.formats.files import storage_error

_T = TypeVar("_T")


def check_remote_url(url: object) -> None:
    """InputError unless `url` is what MindFormers 1.9.0 takes (tools/utils.py, check_obs_url) and names a bucket."""
    if not isinstance(url, str) or not url.startswith(SCHEMES):
        raise InputError(f"remote_save_url: found {url!r}, expected obs://bucket/directory or s3://bucket/directory")
    bucket, _, name = url.split("://", 1)[1].partition("/")
    if not bucket.strip():
        raise InputError(f"remote_save_url: {url!r} names no bucket: expected obs://bucket/directory")
    if name.strip("/"):
        check_name(name.rstrip("/"))


@dataclass(frozen=True, slots=True)
class Remote:
    """One directory in a bucket.  `delays`: seconds to wait before the second, third ... attempt of a request."""

    backend: Backend
    url: str
    delays: tuple[float, ...] = (1.0, 4.0, 16.0)

    @classmethod
    def open(cls, url: str, *, storage_options: Mapping[str, Any] | None = None) -> Remote:
        """By moxing where it imports, else by s3fs, which `storage_options` are for.  InputError without either."""
        check_remote_url(url)
        return cls(open_backend(url, storage_options, os.environ), url.rstrip("/"))

    def join(self, *names: str) -> str:
        """The url of a name."""
        for name in names:
            check_name(name)
        return "/".join((self.url, *names))

    def exists(self, name: str) -> bool:
        """Is there an object (not a directory) of this name?"""
        return self._size(self.join(name)) is not None

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names of the objects below a directory, relative to it."""
        url = self.join(prefix) if prefix else self.url
        return sorted(self._attempt("listing", url, lambda: self.backend.names(url)))

    def read(self, name: str) -> bytes:
        """A whole object."""
        url = self.join(name)
        return self._attempt("reading", url, lambda: self.backend.read(url))

    def write(self, name: str, data: bytes) -> None:
        """A whole object; readers see the old one or the new one."""
        url = self.join(name)
        self._attempt("writing", url, lambda: self.backend.write(url, data))

    def copy(self, name: str, to: str) -> None:
        """An object under a second name, without passing through this machine."""
        source, target = self.join(name), self.join(to)
        self._attempt(f"copying {source}", target, lambda: self.backend.copy(source, target))

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        url = self.join(name)
        self._attempt("removing", url, lambda: self.backend.remove(url))

    def delete_tree(self, prefix: str) -> None:
        """Remove all objects below a directory."""
        above = self.join(prefix)
        for name in self.list(prefix):
            url = f"{above}/{name}"
            self._attempt("removing", url, partial(self.backend.remove, url))

    def upload(self, local_path: str, name: str) -> None:
        """A file, or the files of a tree; what is certainly there already is not sent.  Empty directories are not kept.

        Streamed; each file's size in the store is checked.  StorageError names the object and the reason.
        """
        if not os.path.isdir(local_path):
            self._put(local_path, self.join(name))
            return
        for relative in local_files(local_path):
            self._put(os.path.join(local_path, relative), self.join(name, relative))

    def download(self, name: str, local_path: str, *, verify: Callable[[str], None] | None = None) -> None:
        """An object, or all objects below a directory; `local_path` appears when everything is there.

        Written to `{local_path}.{process}.partial` first, so that processes of one node do not meet.  A file is
        replaced, a directory with content is not (UsageError).  `verify` gets each file's path before it has its name
        and raises what it finds.  InputError for object names that would lead outside of `local_path`.
        """
        url = self.join(name)
        unfinished = f"{local_path}.{os.getpid()}.partial"
        tree = self._size(url) is None
        names = self._safe_names(name) if tree else [""]
        if tree and os.path.lexists(local_path) and (not os.path.isdir(local_path) or os.listdir(local_path)):
            raise UsageError(f"{local_path}: is there already, {url} cannot be written over it: remove or rename it")
        try:
            for relative in names:
                target = os.path.join(unfinished, relative) if relative else unfinished
                self._get(f"{url}/{relative}" if relative else url, target)
                if verify is not None:
                    verify(target)
            os.replace(unfinished, local_path)
        except OSError as error:
            raise storage_error(local_path, error, f"downloading {url}") from None
        finally:
            discard(unfinished)

    def wait_for(
        self, names: Iterable[str], timeout: float, check: Callable[[], None] | None = None, poll: float = 5.0
    ) -> None:
        """Return when all objects are there.  `check` is called before every pause and may raise.

        StorageError after `timeout` seconds, naming what is missing.  One request a poll, however many names.
        """
        wanted = set(names)
        missing = set(wanted)
        deadline = time.monotonic() + timeout
        while missing:
            missing -= self._present(missing)
            if not missing:
                return
            if check is not None:
                check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise StorageError(
                    f"{self.url}: {len(missing)} of {len(wanted)} objects are still missing after {timeout:g} s: "
                    f"{name_some(missing)}: look at the logs of the ranks that write them, or wait longer"
                )
            time.sleep(min(poll, left))

    def _present(self, names: set[str]) -> set[str]:
        """A listing, since looking for one object does not tell a missing bucket."""
        above = posixpath.commonpath([posixpath.dirname(name) for name in names])
        return names & {posixpath.join(above, found) for found in self.list(above)}

    def _size(self, url: str) -> int | None:
        return self._attempt("looking up", url, lambda: self.backend.size(url))

    def _safe_names(self, prefix: str) -> Sequence[str]:
        found = self.list(prefix)
        if not found:
            raise StorageError(f"{self.join(prefix)}: there is no such object or directory: check remote_save_url")
        problems = Problems()
        for name in found:
            try:
                check_name(name)
            except InputError as error:
                problems.add(
                    f"{self.join(prefix)}: object {error}: nothing was downloaded; rename or remove the object"
                )
        problems.raise_if_any(InputError)
        return found

    def _put(self, path: str, url: str) -> None:
        def action() -> None:
            nbytes = os.path.getsize(path)
            if self.backend.same(path, url):
                return
            self.backend.put(path, url)
            if (stored := self.backend.size(url)) != nbytes:
                raise OSError(f"the store holds {stored} bytes, {path} has {nbytes}")

        self._attempt(f"uploading {path}", url, action)

    def _get(self, url: str, path: str) -> None:
        def action() -> None:
            nbytes = self.backend.size(url)
            self.backend.get(url, path)
            if (received := os.path.getsize(path)) != nbytes:
                raise OSError(f"received {received} of {nbytes} bytes")

        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._attempt("downloading", url, action)

    def _attempt(self, doing: str, url: str, action: Callable[[], _T]) -> _T:
        """Carry out one request, again after each delay, unless the error says that it is of no use."""
        delays = iter(self.delays)
        while True:
            try:
                return action()
            except self.backend.errors as error:
                local = _local_error(error, doing)
                refusal = self.backend.refusal(error)
                delay = next(delays, None)
                if local is not None:
                    raise local from None
                if refusal:
                    raise StorageError(f"{url}: {refusal} (while {doing})") from None
                if delay is None:
                    raise StorageError(
                        f"{url}: {doing} failed {len(self.delays) + 1} times, at last with {type(error).__name__}: "
                        f"{error}: check the network and the store, then start again"
                    ) from None
            time.sleep(delay)


def _local_error(error: Exception, doing: str) -> TransformError | None:
    """An error of this machine's disk: it names a path, which those of a store do not."""
    name = getattr(error, "filename", None)
    if isinstance(error, OSError) and isinstance(name, str) and "://" not in name:
        return storage_error(name, error, doing)
    return None
