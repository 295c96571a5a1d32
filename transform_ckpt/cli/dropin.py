"""The command lines of scripts that this project replaces: their flags, this engine.

Like the originals they use argparse, abbreviations included; unlike them an unknown flag, a failed worker and a source
that is not whole end with an exit code that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from transform_ckpt.cli import run
from transform_ckpt.errors import InputError, UsageError, rank_ranges
from transform_ckpt.flags import boolean


def run_tool(parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace], None]) -> int:
    """Parse, run, and give the exit code; errors as in every other verb."""
    parser.add_argument("--overwrite", action="store_true", help="replace the destination once the new one is complete")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON on stdout")

    @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def command(words: Sequence[str]) -> None:
        try:
            arguments = parser.parse_args(list(words))
        except SystemExit as stop:
            if not stop.code:
                return
            raise UsageError("wrong flags, see above") from None
        body(arguments)

    return run(None, command)


def strategy_path(text: str | None, flag: str) -> str | None:
    """None for `None`, nothing, or no flag; a directory is merged into merged_ckpt_strategy.ckpt in it."""
    if not text or text == "None":
        return None
    if os.path.isdir(text):
        from strategy.merge import merged_strategy_file

        return merged_strategy_file(text)
    if not os.path.exists(text):
        raise InputError(f"{text}: not found: {flag} takes a strategy file, a directory of them, or None")
    return text


def _report(arguments: argparse.Namespace, lines: Sequence[str], result: dict[str, Any]) -> None:
    if arguments.as_json:
        print(json.dumps({"ok": True, **result}))
    else:
        print("\n".join(lines))


def _notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def transform_ckpt() -> int:
    """tools/transform_ckpt.py (MindFormers mindformers/tools/transform_ckpt.py)."""
    parser = argparse.ArgumentParser(description="Transform MindSpore checkpoints from one strategy to another.")
    parser.add_argument("--src_ckpt_strategy", default="", help="strategy of the source: file, directory or None")
    parser.add_argument("--dst_ckpt_strategy", default="", help="strategy of the result: file, directory or None")
    parser.add_argument("--src_ckpt_dir", required=True, help="directory of rank_0/ ...")
    parser.add_argument("--dst_ckpt_dir", required=True, help="where the result goes")
    parser.add_argument(
        "--prefix", default="checkpoint_", help="result is rank_N/{prefix}N.ckpt (.safetensors from safetensors)"
    )

    def body(arguments: argparse.Namespace) -> None:
        from transform_ckpt import api
        from transform_ckpt.cli.progress import progress

        source = strategy_path(arguments.src_ckpt_strategy, "--src_ckpt_strategy")
        target = strategy_path(arguments.dst_ckpt_strategy, "--dst_ckpt_strategy")
        with progress("transform") as show:
            result = api.convert(
                arguments.src_ckpt_dir,
                arguments.dst_ckpt_dir,
                src_strategy=source,
                dst_strategy=target,
                prefix=arguments.prefix,
                run_options=api.RunOptions(overwrite=arguments.overwrite, progress=show),
            )
        _notes(result.notes)
        lines = [
            f"src_ckpt_strategy: {source}",
            f"dst_ckpt_strategy: {target}",
            f"src_ckpt_dir: {arguments.src_ckpt_dir}",
            f"dst_ckpt_dir: {result.dst} ({result.files} files, {result.write_nbytes:,} bytes)",
            "......Transform succeed!......",
        ]
        _report(arguments, lines, {"dst": result.dst, "files": result.files, "write_nbytes": result.write_nbytes})

    return run_tool(parser, body)


def transform_checkpoint() -> int:
    """tools/transform_checkpoint.py (MindFormers mindformers/tools/ckpt_transform/transform_checkpoint.py)."""
    parser = argparse.ArgumentParser(description="Transform MindSpore checkpoints, all ranks or one process's share.")
    parser.add_argument("--src_checkpoint", required=True, help="file, directory of files, or directory of rank_0/ ...")
    parser.add_argument("--dst_checkpoint_dir", help="default: ./transformed_checkpoint")
    parser.add_argument("--src_strategy", help="strategy of the source: file, directory or None")
    parser.add_argument("--dst_strategy", help="strategy of the result: file, directory or None")
    parser.add_argument("--prefix", default="checkpoint_", help="result is {name}/rank_N/{prefix}N.ckpt")
    parser.add_argument(
        "--rank_id", type=int, help="this process's rank: only its share of the target ranks is written"
    )
    parser.add_argument("--world_size", type=int, help="number of target ranks; checked against the strategy")
    parser.add_argument("--transform_process_num", type=int, default=1, help="number of processes")
    parser.add_argument("--transform_by_rank", type=boolean, default=False, help="accepted; the result is the same")
    return run_tool(parser, _transform_checkpoint)


def _transform_checkpoint(arguments: argparse.Namespace) -> None:
    from transform_ckpt import api
    from transform_ckpt.coordinate import MARK, run_ranks
    from transform_ckpt.sharing import named_sources, share

    source = strategy_path(arguments.src_strategy, "--src_strategy")
    target = strategy_path(arguments.dst_strategy, "--dst_strategy")
    strategy = api.read_strategy(target)
    world = strategy.world if strategy else 1
    if arguments.world_size not in (None, world):
        raise InputError(
            f"--world_size {arguments.world_size}, but {target or 'complete weights'} means {world}: "
            "give the strategy of the job that will load the result"
        )
    ranks = share(world, arguments.transform_process_num, arguments.rank_id)
    out = arguments.dst_checkpoint_dir or os.path.join(os.getcwd(), "transformed_checkpoint")
    results: list[dict[str, Any]] = []
    for name, path in named_sources(arguments.src_checkpoint).items():
        plan = api.plan(path, src_strategy=source, dst_strategy=strategy, prefix=arguments.prefix)
        alone = arguments.rank_id is None
        options = api.RunOptions(workers=arguments.transform_process_num if alone else 1, overwrite=arguments.overwrite)
        dst = os.path.join(out, name)
        complete = run_ranks(plan, dst, ranks, options) if ranks else False
        _notes(plan.notes)
        if ranks:
            mark = os.path.join(dst, MARK.format(arguments.rank_id or 0))
            with open(mark, "w", encoding="utf-8"):
                pass
        results.append({"name": name, "dst": dst, "ranks": list(ranks), "complete": complete})
    lines = [f"{r['dst']}: {_share_text(r['ranks'], complete=bool(r['complete']))}" for r in results]
    _report(arguments, [*lines, "......Transform finished!......"], {"results": results})


def _share_text(ranks: Sequence[int], *, complete: bool) -> str:
    if not ranks:
        return "no target rank is this process's share"
    return f"ranks {rank_ranges(ranks)}" + ("" if complete else "; others are not there yet")
