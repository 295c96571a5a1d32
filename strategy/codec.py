"""One strategy file's bytes to a `Document` and back; which form it is in is told by its content, never its suffix.

May import only strategy.{document,mindspore_json,mindspore_proto}.
"""

from __future__ import annotations

from typing import Literal

from strategy import mindspore_json, mindspore_proto
from strategy.document import Document

Form = Literal["protobuf", "json"]


def form_of(data: bytes) -> Form:
    """The form of a strategy file; no strategy in protobuf begins like a JSON object."""
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return "json" if text.startswith((b"{", b"[")) else "protobuf"


def form_for(path: str) -> Form:
    """The form that MindSpore expects in a file of this name: its readers go by the suffix."""
    return "json" if path.endswith(".json") else "protobuf"


def decode(data: bytes, path: str) -> Document:
    """Parse a strategy file of either form; InputError names `path`."""
    return mindspore_json.decode(data, path) if form_of(data) == "json" else mindspore_proto.decode(data, path)


def encode(document: Document, form: Form) -> bytes:
    """The file's bytes; equal documents give equal bytes."""
    return mindspore_json.encode(document) if form == "json" else mindspore_proto.encode(document)
