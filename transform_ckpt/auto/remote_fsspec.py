"""Object storage by fsspec and s3fs: the S3 protocol, which OBS speaks too.

Imports fsspec, s3fs and botocore when a connection is made.  A connection belongs to the process that made it: s3fs
talks in a thread, which a forked child does not have.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PART_NBYTES = 16 << 20
"""A part of a multipart upload; smaller files than two parts are sent in one request (s3fs 2025.3.0, _put_file)."""

_PARTS_AT_ONCE = 4
_MOST_PARTS = 10_000  # of the S3 protocol
_BUFFER_NBYTES = 1 << 20

_PLAIN_CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")
"""Since botocore 1.36 uploads carry a CRC trailer unless these say "when_required"; other stores than AWS reject it."""

_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a key that may read and write this bucket"
_REFUSALS = {
    "NoSuchBucket": "the bucket does not exist: create it, or correct remote_save_url",
    "NoSuchKey": "there is no such object",
    "InvalidAccessKeyId": f"access is refused, the access key is unknown: {_KEYS}",
    "SignatureDoesNotMatch": f"access is refused, the secret key does not fit the access key: {_KEYS}",
    "ExpiredToken": f"access is refused, the token has expired: {_KEYS}",
    "NoCredentialsError": f"no credentials were found: {_KEYS}",
    "PartialCredentialsError": f"the credentials are incomplete: {_KEYS}",
    "PermissionError": f"access is refused: {_KEYS}",
    "FileNotFoundError": "there is no such object",
}
"""By the error code of the store's answer, else by the name of the exception's class."""


@dataclass(frozen=True, slots=True)
class Fsspec:
    """`fs` is an s3fs.S3FileSystem."""

    fs: Any
    errors: tuple[type[Exception], ...]

    @classmethod
    def connect(cls, endpoint: str | None, options: Mapping[str, Any]) -> Fsspec:
        """A connection of its own, with `options` for s3fs; nothing is sent yet.  ImportError without s3fs."""
        import aiohttp
        import fsspec  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

        # Retries are Remote's, beside s3fs's own five quick ones for a broken connection.
        config: dict[str, Any] = {"retries": {"max_attempts": 0}}
        if endpoint is not None:
            endpoint = endpoint if "://" in endpoint else f"https://{endpoint}"
            config |= {name: "when_required" for name in _PLAIN_CHECKSUMS if name in Config.OPTION_DEFAULTS}
        given = dict(options)
        config |= given.pop("config_kwargs", {})
        defaults = {"skip_instance_cache": True, "use_listings_cache": False}
        fs = fsspec.filesystem("s3", endpoint_url=endpoint, config_kwargs=config, **(defaults | given))
        # s3fs gives some errors of botocore and aiohttp on as they are.
        return cls(fs, (OSError, asyncio.TimeoutError, BotoCoreError, ClientError, aiohttp.ClientError))

    def names(self, url: str) -> list[str]:
        """Objects below `url`; what is exactly named so is not below."""
        start = _key(url) + "/"
        found = (name for name in self.fs.find(_key(url)) if name.startswith(start) and not name.endswith("/"))
        return [name[len(start) :] for name in found]

    def size(self, url: str) -> int | None:
        """Of an object; a common prefix has none."""
        info = self._info(url)
        return None if info is None else int(info["size"])

    def same(self, path: str, url: str) -> bool:
        """By size and ETag: the MD5 of the content, or of the parts' MD5s where `put` sent parts.

        A store that encrypts with its own keys has other ETags; then every file counts as different.
        """
        info = self._info(url)
        return info is not None and info["size"] == os.path.getsize(path) and info["ETag"].strip('"') == etag(path)

    def read(self, url: str) -> bytes:
        """One request."""
        return bytes(self.fs.cat_file(_key(url)))

    def write(self, url: str, data: bytes) -> None:
        """One put; above 100 MiB a multipart upload (s3fs 2025.3.0, _pipe_file), which appears as a whole too."""
        self.fs.pipe_file(_key(url), data)

    def get(self, url: str, path: str) -> None:
        """Streamed in 64 KiB (s3fs 2025.3.0, _get_file)."""
        self.fs.get_file(_key(url), path)

    def put(self, path: str, url: str) -> None:
        """In parts, so that memory stays below `_PARTS_AT_ONCE` of them."""
        part = part_nbytes(os.path.getsize(path))
        self.fs.put_file(path, _key(url), chunksize=part, max_concurrency=_PARTS_AT_ONCE)

    def copy(self, url: str, to: str) -> None:
        """Within the store; above 5 GB in parts (s3fs 2025.3.0, _cp_file)."""
        self.fs.cp_file(_key(url), _key(to))

    def remove(self, url: str) -> None:
        """`rm_file` takes the name as it is, `rm` would expand `*`; the store does not mind if it is not there."""
        self.fs.rm_file(_key(url))

    def refusal(self, error: Exception) -> str:
        """s3fs keeps the store's answer as the cause of the OSError it raises (s3fs 2025.3.0, errors.py)."""
        response = getattr(error.__cause__ or error, "response", None)
        code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
        return _REFUSALS.get(code) or _REFUSALS.get(type(error).__name__, "")

    def _info(self, url: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self.fs.info(_key(url))
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None


def _key(url: str) -> str:
    """`bucket/key`, whatever the scheme."""
    return url.split("://", 1)[1]


def part_nbytes(nbytes: int) -> int:
    """Size of the parts of a file: more than 16 MiB only where there would be too many parts."""
    least = -(-nbytes // _MOST_PARTS)
    return max(PART_NBYTES, -(-least // (1 << 20)) << 20)


def etag(path: str) -> str:
    """The ETag that an object has after `Fsspec.put`."""
    nbytes = os.path.getsize(path)
    part = part_nbytes(nbytes)
    with open(path, "rb") as stream:
        if nbytes < 2 * part:
            return str(_md5(stream.read(nbytes)).hexdigest())
        digests = []
        for start in range(0, nbytes, part):
            digest = _md5()
            for at in range(start, min(start + part, nbytes), _BUFFER_NBYTES):
                digest.update(stream.read(min(_BUFFER_NBYTES, nbytes - at)))
            digests.append(digest.digest())
    return f"{_md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)
