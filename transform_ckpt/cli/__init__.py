"""The command line: one file per verb, imported when it is called.  stdout is the result, stderr everything else."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import os
import signal
import sys
from typing import Any, NoReturn, TextIO

import click

from transform_ckpt.errors import TransformError
from transform_ckpt.version import VERSION

VERBS = ("convert", "plan", "inspect", "verify", "diff", "layout", "doctor", "formats")
INTERRUPTED, TERMINATED = 130, 143
_CONTINUE = "what is done is kept: run the same command again to continue"


class _Terminated(BaseException):
    """SIGTERM arrived."""


class _LazyVerbs(click.Group):
    """Verbs by name; the module of a verb is imported when it is used or listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"transform_ckpt.cli.{cmd_name}").command
        return command


@click.group(cls=_LazyVerbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(VERSION, prog_name="transform-ckpt")
def cli() -> None:
    """Transform large-model training checkpoints: any strategy, any layout, proven complete.

    Exit codes: 0 done; 2 usage or destination occupied; 3 input invalid or unsupported; 4 plan ambiguous or incomplete;
    5 I/O; 6 verify or diff found differences; 7 partial, run again to continue; 130 SIGINT; 143 SIGTERM.
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    leave(run(arguments))


def leave(code: int) -> NoReturn:
    """End the process at once: taking a large plan apart, object by object, costs more than a small conversion."""
    atexit._run_exitfuncs()  # noqa: SLF001 - what sys.exit would do
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    os._exit(code)


def _terminate(_number: int, _frame: Any) -> None:
    raise _Terminated


def run(arguments: list[str] | None = None, command: click.Command = cli) -> int:
    """Run a command and give its exit code; every expected error is one message, without a traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    if not sys.platform.startswith("linux"):
        print(f"error: transform-ckpt runs on Linux only, this is {sys.platform}", file=sys.stderr)
        return 3
    outer = sys.stdout
    if isinstance(outer, io.TextIOWrapper):  # None when it is closed
        outer.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
        sys.stdout = _Patient(outer)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        found = command.main(args=words, prog_name="transform-ckpt", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.ClickException, TransformError, OSError, KeyboardInterrupt, click.Abort, _Terminated) as error:
        message, code = _explain(error)
        return _failed(words, message, code)
    finally:
        sys.stdout = outer
        signal.signal(signal.SIGTERM, previous)
    return found if isinstance(found, int) else 0


def _explain(error: BaseException) -> tuple[str, int]:
    """Message and exit code of everything that is not a fault of this program."""
    match error:
        case click.UsageError():
            context = error.ctx
            usage = f"{context.get_usage()}\n" if context is not None else ""
            return f"{error.format_message()}\n{usage}".rstrip(), 2
        case click.ClickException():
            return error.format_message(), 2
        case TransformError():
            return str(error), error.exit_code
        case OSError():
            from transform_ckpt.formats.files import storage_error

            found = storage_error(str(error.filename or "standard output"), error, "running")
            return str(found), found.exit_code
        case _Terminated():
            return f"terminated; {_CONTINUE}", TERMINATED
        case _:
            return f"interrupted; {_CONTINUE}", INTERRUPTED


def _failed(words: list[str], message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    try:
        if "--json" in words:
            print(json.dumps({"ok": False, "exit_code": code, "error": message}), flush=True)
    except OSError:
        pass  # it was said on stderr
    return code


class _Patient:
    """stdout, whose reader may have heard enough (`| head`): that is no error, and does not change the exit code."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._close(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._close(error)

    def _close(self, error: OSError) -> None:
        with open(os.devnull, "wb") as sink:  # or the interpreter would try again when it ends
            os.dup2(sink.fileno(), self._stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
