"""What `Remote` needs of a client of an object store, and which client a machine has.

Two clients implement it: moxing (`remote_moxing`), which ModelArts images bring along and which is on no package
index, and fsspec with s3fs (`remote_fsspec`).  May import errors and those two.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from transform_ckpt.auto.remote_fsspec import Fsspec
from transform_ckpt.auto.remote_moxing import Moxing
from transform_ckpt.errors import InputError

ENDPOINT_VARIABLES = ("OBS_ENDPOINT", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")
"""Where the endpoint of the S3 protocol is looked up, the first that is set."""


class Backend(Protocol):
    """A client; a url is `obs://bucket/key` or `s3://bucket/key`, without a slash at its end."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What its calls raise for reasons outside this program."""

    def names(self, url: str) -> list[str]:
        """Objects below `url`, relative to it, at any depth; directory markers are left out."""

    def size(self, url: str) -> int | None:
        """Bytes of an object; None where there is none of this name."""

    def same(self, path: str, url: str) -> bool:
        """Is it certain that the object holds what the local file holds?  A client without digests says no."""

    def read(self, url: str) -> bytes:
        """A whole object."""

    def write(self, url: str, data: bytes) -> None:
        """A whole object at once: readers see the old one or the new one."""

    def get(self, url: str, path: str) -> None:
        """An object into a local file, streamed."""

    def put(self, path: str, url: str) -> None:
        """A local file into an object, streamed."""

    def copy(self, url: str, to: str) -> None:
        """An object under a second name, within the store."""

    def remove(self, url: str) -> None:
        """Remove one object; one that is not there is no error."""

    def refusal(self, error: Exception) -> str:
        """Why trying again is of no use and what to do instead; empty where it may help."""


def open_backend(url: str, storage_options: Mapping[str, Any] | None, environ: Mapping[str, str]) -> Backend:
    """moxing where it imports, else fsspec; `storage_options` are fsspec's, so that giving them chooses fsspec.

    InputError where neither is installed, or obs:// has no endpoint.
    """
    if storage_options is None:
        try:
            return Moxing(importlib.import_module("moxing").file)
        except ImportError:
            pass
    options = dict(storage_options or {})
    found = next((environ[name] for name in ENDPOINT_VARIABLES if environ.get(name)), None)
    endpoint = options.pop("endpoint_url", None) or found
    if endpoint is None and url.startswith("obs://"):
        raise InputError(
            f"{url}: without moxing, OBS is reached by the S3 protocol, which needs an endpoint: "
            f"set {ENDPOINT_VARIABLES[0]}, for example to https://obs.cn-north-4.myhuaweicloud.com"
        )
    try:
        return Fsspec.connect(endpoint, options)
    except ImportError as error:
        raise InputError(
            f"{url}: needs moxing (part of ModelArts images) or fsspec with s3fs, but neither imports ({error}): "
            "pip install 'transform_ckpt[remote]'"
        ) from None
