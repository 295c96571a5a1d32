"""The command line of run_mindformer.py: MindFormers' flags, our exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import click

from transform_ckpt.cli import run


def run_mindformer(work_path: str) -> int:
    """Run the job of sys.argv; the exit code.  `work_path` is where relative configs are looked for, too."""

    @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def command(words: Sequence[str]) -> None:
        from transform_ckpt.auto import job

        # launchers end ranks by SIGTERM; while MindSpore is in a collective no Python handler would ever run
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            job.main(list(words), work_path, _say)
        except SystemExit as stop:  # --help
            if stop.code:
                raise

    return run(sys.argv[1:], command)


def _say(line: str) -> None:
    """Logs of ranks are read while they grow."""
    print(line, flush=True)
