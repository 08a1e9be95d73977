"""What both command lines share: spelling, errors to exit codes, interruption."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

import weightworks
from cli.render import emit, show, show_error
from weightworks.errors import WeightworksError, unreachable

INTERRUPTED = 130


def spell(arguments: list[str]) -> list[str]:
    """``--group_size`` as ``--group-size``: users of other tools type underscores."""
    spelled: list[str] = []
    for number, word in enumerate(arguments):
        if word == "--":
            return [*spelled, *arguments[number:]]
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return spelled


def guarded(function: Callable[..., int | None]) -> Callable[..., None]:
    """Run a command: errors raised on purpose become one sentence and their exit code, an interruption 130."""

    def run(*args: Any, **values: Any) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            code = function(*args, **values) or 0
        except WeightworksError as error:
            show_error(error)
            if values.get("json"):
                emit({"error": str(error), "hint": error.hint, "exit_code": error.exit_code})
            code = error.exit_code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except OSError as error:
            show_error(unreachable(error))
            code = 1
        except KeyboardInterrupt:
            show("interrupted; run the same command again to go on where it stopped")
            code = INTERRUPTED
        except MemoryError:
            show(
                "error: out of memory\n  hint: give a smaller --max-memory, so that activations go to disk, or --num-samples"
            )
            code = 1
        raise typer.Exit(code)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def version(wanted: bool) -> None:
    """``--version``."""
    if wanted:
        sys.stdout.write(f"weightworks {weightworks.__version__}\n")
        raise typer.Exit


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
