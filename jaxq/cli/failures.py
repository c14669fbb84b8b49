"""How a command fails: one or two lines and an exit code, no traceback."""

import errno
import functools
from collections.abc import Callable
from typing import Any

import typer

from jaxq.cli.screen import errors

FAILED = 1
FELL_BACK = 3  # done, but calibration could not help some weights
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# What bad input, files and machines raise; its message is written for the user.
EXPECTED = (ValueError, TypeError, OSError, MemoryError, NotImplementedError)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that says in a line why it failed, unless ``debug`` is set."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt as stop:
            notes = getattr(stop, "__notes__", None) or ["nothing half-written is left"]
            _say("interrupted", notes[0])
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if debug:
                raise
            _say("error", _explain(error))
            raise typer.Exit(FAILED) from None

    return run


def _explain(error: Exception) -> str:
    """Return what to print for an exception."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}: make room, or write elsewhere"
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller model or a shorter --window"
    if isinstance(error, EXPECTED):
        return str(error) or type(error).__name__
    return (
        f"unexpected {type(error).__name__}: {error} "
        f"(this is a bug in jaxq; --debug shows where)"
    )


def _say(what: str, message: str) -> None:
    console = errors()
    console.print(f"[bold red]{what}:[/]", end=" ")
    console.print(message, markup=False, highlight=False, soft_wrap=True)
