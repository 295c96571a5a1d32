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


class Numbers(_IntType):
    """`1,3`: numbers with commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers in order."""
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", str(value)):
            self.fail(f"{value!r} are no numbers: write 1,3", param, ctx)
        return tuple(int(part) for part in str(value).split(","))


class Iteration(_IntType):
    """A number, or the word release."""

    name = "n|release"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number or the word."""
        if value != "release" and not re.fullmatch(r"\d{1,12}", str(value)):
            self.fail(f"{value!r} is neither a number nor release", param, ctx)
        return value if value == "release" else int(value)


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
    click.option("--no-optimizer", is_flag=True, help="Drop optimizer states (adam_m., exp_avg., distrib_optim ...)."),
    click.option("--carry", multiple=True, metavar="PATTERN", help="Names that may be in no strategy (repeatable)."),
    allow_missing_flag,
)

_SIZE = click.IntRange(min=1)

megatron_flags = together(
    *(
        click.option(f"--{name}", type=_SIZE, help=f"Megatron destination: {what} (default: the source's).")
        for name, what in (
            ("tp", "tensor parallel size"),
            ("pp", "pipeline parallel size"),
            ("ep", "expert parallel size"),
            ("etp", "expert tensor parallel size"),
            ("cp", "context parallel size"),
            ("dp", "data parallel size, which buckets are padded for"),
        )
    ),
    click.option("--layers-per-virtual-stage", type=_SIZE, help="Layers of each chunk: interleaved pipeline stages."),
    click.option("--num-layer-list", type=Numbers(), help="Layers of each stage, as 1,3."),
    click.option("--noop-layers", type=Numbers(), help="Layers without tensors, numbered among all."),
    click.option("--decoder-first-pipeline-num-layers", type=_SIZE, help="Layers of the first stage."),
    click.option("--decoder-last-pipeline-num-layers", type=_SIZE, help="Layers of the last stage."),
    click.option("--schedule", type=click.Choice(["dualpipev"]), help="MindSpeed's schedule that moves layers."),
    click.option("--vocab-divisible-by", type=_SIZE, help="Pad the vocabulary to a multiple of this times TP."),
    click.option("--impl", type=click.Choice(["local", "te", "mindspeed"]), help="Names of modules."),
    click.option("--experts", type=click.Choice(["sequential", "grouped"]), help="How experts are stored."),
    click.option("--iteration", type=Iteration(), help="Which iteration of SRC, and what DST calls it."),
    click.option(
        "--container",
        "megatron_container",
        type=click.Choice(["list", "coalesced"]),
        help="distrib_optim.pt of megatron-core 0.6, or of 0.7 and later (default: the source's).",
    ),
    click.option("--megatron-core-version", metavar="0.16.1", help="Whose rules the optimizer's buffers follow."),
    click.option("--bucket-size", type=_SIZE, help="--ddp-bucket-size of the run, in elements."),
    click.option("--param-map-path", metavar="DIR", type=PATH, help="param_map/ of the run, or pt_meta/."),
    *(
        click.option(f"--src-{name}", type=_SIZE, help=f"What args of SRC lacks: {name.upper()}.")
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")
    ),
    click.option("--num-layers", type=_SIZE, help="What args of SRC lacks: layers, noop ones included."),
    click.option("--num-experts", type=_SIZE, help="What args of SRC lacks: experts."),
    click.option("--src-num-layer-list", type=Numbers(), help="Layers of each stage of SRC."),
    click.option("--src-noop-layers", type=Numbers(), help="Layers of SRC without tensors."),
    click.option(
        "--naming", type=click.Choice(["mcore", "legacy", "mindspeed"]), help="Names of a MindSpore destination."
    ),
    click.option(
        "--megatron-shards", is_flag=True, help="MindSpore files of Megatron's TP shards, as convert_pt2ckpt writes."
    ),
    click.option(
        "--optimizer-names",
        type=click.Choice(["exp_avg", "adam"]),
        help="exp_avg./exp_avg_sq. (default) or adam_m./adam_v. in MindSpore.",
    ),
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
