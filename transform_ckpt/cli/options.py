"""Flags that several verbs share, declared once."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from transform_ckpt.errors import DifferenceError

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = ("hf", "megatron", "torch_dist", "mindspore")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

if TYPE_CHECKING:
    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType  # older versions of click (8.3 and before) cannot be subscripted

PATH = click.Path(readable=False)
"""What cannot be read is said by what tries to read it, with exit code 5."""


class Size(_IntType):
    """`1G`, `512M`, `300MB`, a plain number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes from the user's text."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if not match or len(match[1]) > 18:
            self.fail(f"{value!r} is not a size: write 512M or 2G", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].upper()])


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several decorators as one, the first on top."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


allow_missing_flag = click.option(
    "--allow-missing",
    multiple=True,
    metavar="PATTERN",
    help="Names that a strategy lists and no file needs to hold (repeatable).",
)

json_flag = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")

plan_flags = together(
    click.option("--from", "from_format", type=click.Choice(FORMATS), help="Source format; detected when absent."),
    click.option("--to", "to_format", type=click.Choice(FORMATS), required=True, help="Destination format."),
    click.option("--src-strategy", metavar="FILE|DIR", help="Strategy of SRC; absent or None: complete weights."),
    click.option("--dst-strategy", metavar="FILE|DIR", help="Strategy of DST; absent or None: complete weights."),
    click.option(
        "--dst-parallel",
        metavar="dp=2,mp=4,pp=2,...",
        help="Generate the strategy of DST by rule (keys: docs/resharding.md); written to DST/strategy.",
    ),
    click.option("--step", type=int, help="Which step, where SRC holds several (default: the highest all ranks have)."),
    click.option("--format", "container", type=click.Choice(["ckpt", "safetensors"]), help="Default: the source's."),
    click.option("--prefix", default="checkpoint_", show_default=True, help="Output is rank_I/{prefix}I.{format}."),
    click.option("--unified", is_flag=True, help="Complete weights as part files with param_name_map.json."),
    click.option("--checkpoint-2", "checkpoint_2", is_flag=True, help="Write a MindFormers Checkpoint 2.0 directory."),
    click.option("--crc", is_flag=True, help="Write the crc_check trailer of .ckpt files."),
    click.option("--no-optimizer", is_flag=True, help="Drop optimizer states (adam_m., adam_v., accu_grads. ...)."),
    click.option("--carry", multiple=True, metavar="PATTERN", help="Names that may be in no strategy (repeatable)."),
    allow_missing_flag,
)

run_flags = together(
    click.option("--workers", type=int, default=0, help="Processes (default: cores)."),
    click.option("--memory", type=Size(), default="1G", show_default=True, help="Memory bound of each process."),
    click.option("--overwrite", is_flag=True, help="Replace DST after the new output is complete."),
    click.option("--no-resume", is_flag=True, help="Start over instead of continuing DST.partial."),
    click.option("--fsync", is_flag=True, help="Make the output durable before it gets its final name."),
    click.option("--verify", is_flag=True, help="Read the output and every replica again and compare."),
)


def end_with_differences(message: str, *, as_json: bool) -> NoReturn:
    """Exit code 6: as an error message, or beside the JSON that says it already."""
    if not as_json:
        raise DifferenceError(message)
    print(f"error: {message}", file=sys.stderr)
    click.get_current_context().exit(DifferenceError.exit_code)


def human(nbytes: float) -> str:
    """`1.62 GB`: decimal units, three digits."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.3g} {unit}" if unit != "bytes" else f"{nbytes:.0f} bytes"
        nbytes /= 1000
    raise AssertionError
