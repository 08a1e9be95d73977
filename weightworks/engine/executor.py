"""Where tasks are done: in this process, in others of this machine, or on a Ray cluster. One contract: ``submit``.

A task is a function of a module and one picklable argument. Its result does not depend on where or beside what it ran.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from weightworks.errors import WeightworksError


class WorkerError(WeightworksError):
    """A worker process ended without an answer, or with an error that nobody raised on purpose."""


class Executor(Protocol):
    """Does tasks."""

    slots: int | None  # tasks at once; None: the executor's own scheduler decides

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        """Have ``function(task)`` done; ``peak_bytes`` is the memory it is expected to take."""

    def close(self) -> None:
        """Leave; running tasks are ended."""


class Here:
    """One task at a time, in this process, done when submitted."""

    slots: int | None = 1

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(task))
        except Exception as error:  # handed on: whoever asks for the result gets it
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class Processes:
    """Each task in a process of its own, ``slots`` at a time, forked from one that has the libraries loaded.

    A process that dies takes nothing with it but its task; if this process dies, they all do.
    """

    def __init__(self, slots: int) -> None:
        self.slots: int | None = slots
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["weightworks.engine.preload"])
        self._threads = ThreadPoolExecutor(slots)
        self._running: set[Any] = set()

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        return self._threads.submit(self._do, function, task)

    def _do(self, function: Callable[[Any], Any], task: Any) -> Any:
        mine, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(theirs, function, task), daemon=True)
        process.start()
        self._running.add(process)
        theirs.close()
        try:
            answer = mine.recv()
        except EOFError:
            answer = None
        finally:
            process.join()
            self._running.discard(process)
            mine.close()
        if answer is None:
            raise WorkerError(
                f"the worker process {_end(process.exitcode)}", hint="run it again: finished work is kept"
            )
        good, value = answer
        if not good:
            raise value
        return value

    def close(self) -> None:
        for process in list(self._running):
            with suppress(OSError, ValueError):
                process.kill()
        self._threads.shutdown(cancel_futures=True)


def _answer(pipe: Connection, function: Callable[[Any], Any], task: Any) -> None:
    """What a worker process does."""
    _die_with_parent()
    try:
        pipe.send((True, function(task)))
    except WeightworksError as error:
        pipe.send((False, error))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        pipe.send((False, WorkerError(text, hint="this is a fault of the program; please report it")))


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no answer"


def _die_with_parent() -> None:
    """Ask the system (Linux) to end this process when the one that started it ends."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
