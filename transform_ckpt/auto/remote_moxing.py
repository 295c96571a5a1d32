"""Object storage by moxing, the client of ModelArts.

Facts: "mox.file API document" (class and function list of `moxing.framework.file`) and the sample code in Huawei
Cloud's ModelArts documentation (MoXing, "Sample Code for Common Operations"); how MindFormers 1.9.0 uses it:
tools/cloud_adapter/cloud_adapter.py and tools/ckpt_transform/transform_checkpoint.py.  moxing is on no package index:
nothing here has been run against the real one.  Imports nothing of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_DOCUMENTED_ERRORS = (
    "MoxFileNameDuplicateException",
    "MoxFileNotExistsException",
    "MoxFileReadException",
    "MoxFileRespException",
)


@dataclass(frozen=True, slots=True)
class Moxing:
    """`file` is the module `moxing.file`.

    Files go one by one through `copy`, not in trees through `copy_parallel`: that one copies what is there already, and
    writes whatever names the bucket holds.
    """

    file: Any

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """moxing's own errors derive from Exception; cloud_adapter.py expects FileNotFoundError and RuntimeError."""
        own = (getattr(self.file, name, None) for name in _DOCUMENTED_ERRORS)
        return (OSError, RuntimeError, *(error for error in own if isinstance(error, type)))

    def names(self, url: str) -> list[str]:
        """`list_directory(url, recursive=True)` gives files and directories; a directory is what others lie in."""
        if not self.file.exists(url):
            return []
        found = [str(name) for name in self.file.list_directory(url, recursive=True)]
        folders = {name[:at] for name in found for at, letter in enumerate(name) if letter == "/"}
        return [name for name in found if name not in folders and not name.endswith("/")]

    def size(self, url: str) -> int | None:
        """`get_size(url)`; 0 is also what a directory has."""
        if not self.file.exists(url) or self.file.is_directory(url):
            return None
        return int(self.file.get_size(url))

    def same(self, path: str, url: str) -> bool:
        """Never certain: moxing tells sizes, and checkpoints of two steps have the same."""
        return False

    def read(self, url: str) -> bytes:
        """`read(url, binary=True)`."""
        return bytes(self.file.read(url, binary=True))

    def write(self, url: str, data: bytes) -> None:
        """`write(url, data, binary=True)` replaces an existing object."""
        self.file.write(url, data, binary=True)

    def get(self, url: str, path: str) -> None:
        """`copy(src_url, dst_url)` downloads one object."""
        self.file.copy(url, path)

    def put(self, path: str, url: str) -> None:
        """`copy(src_url, dst_url)` uploads one file."""
        self.file.copy(path, url)

    def copy(self, url: str, to: str) -> None:
        """`copy(src_url, dst_url)` with two urls copies within the store."""
        self.file.copy(url, to)

    def remove(self, url: str) -> None:
        """`remove(url)` removes one object."""
        if self.file.exists(url):
            self.file.remove(url)

    def refusal(self, error: Exception) -> str:
        """By the response that a `MoxFileRespException` carries as `resp`: its `status` and `errorCode`."""
        response = getattr(error, "resp", None)
        if getattr(response, "errorCode", None) == "NoSuchBucket":
            return "the bucket does not exist: create it, or correct remote_save_url"
        if getattr(response, "status", None) in {401, 403}:
            return f"access is refused ({error}): give the training job's agency read and write access to this bucket"
        return ""
