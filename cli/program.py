"""The installed commands: a command line run to its end, and its process ended with it."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn

COLLECT_EVERY = 20_000  # objects between two looks for garbage: loading torch makes hundreds of thousands that stay


def compress() -> NoReturn:
    """Entry point of ``compress``."""
    from cli.compress_app import main

    run(main)


def merge() -> NoReturn:
    """Entry point of ``merge``."""
    from cli.merge_app import main

    run(main)


def weightworks() -> NoReturn:
    """Entry point of ``weightworks``."""
    from cli.umbrella import main

    run(main)


def run(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and leave without taking the interpreter apart object by object, which costs as long as loading it.

    What libraries have asked to be done at the end is done. An error that is no exit is raised as ever.
    """
    gc.set_threshold(COLLECT_EVERY)
    code = 0
    try:
        main()
    except SystemExit as leave:
        if leave.code is not None and not isinstance(leave.code, int):
            raise  # a message: the interpreter prints it
        code = leave.code or 0
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the reader has gone
            code = code or 1
    os._exit(code)
