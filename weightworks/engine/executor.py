"""Where tasks are done: in this process, in others of this machine, or on a Ray cluster. One contract: ``submit``.

A task is a function of a module and one picklable argument. Its result does not depend on where or beside what it ran.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from typing import Any, Protocol

from weightworks.errors import WeightworksError

WAITING = "OMP_WAIT_POLICY"  # how threads that compute wait for one another
FAULT = "this is a fault of the program; please report it"


class WorkerError(WeightworksError):
    """A worker process ended without an answer, or with an error that nobody raised on purpose."""


class Executor(Protocol):
    """Does tasks."""

    slots: int | None  # tasks at once; None: the executor's own scheduler decides
    parts: Callable[[], Executor] | None  # makes, where a task runs, an executor for parts of it; None: it has none

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        """Have ``function(task)`` done; ``peak_bytes`` is the memory it is expected to take."""

    def close(self) -> None:
        """Leave; running tasks are ended."""


class Here:
    """One task at a time, in this process, done when submitted."""

    slots: int | None = 1
    parts: Callable[[], Executor] | None = None

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        settle(future, attempt(function, task))
        return future

    def close(self) -> None:
        pass


class Processes:
    """Each task in a process of its own, ``slots`` at a time, forked from one that has the modules ``preload`` loaded.

    A process that dies takes nothing with it but its task; if this process dies, they all do. Each task uses all
    processors, so their threads must not spin while they wait for one another: that takes ten times as long.
    """

    parts: Callable[[], Executor] | None = None

    def __init__(self, slots: int, preload: Sequence[str] = ("weightworks.engine.preload",)) -> None:
        self.slots: int | None = slots
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        with _patient():
            ensure_running()  # it loads them while this process does other things
        self._threads = ThreadPoolExecutor(slots)
        self._running: set[Any] = set()
        self._guard, self._closed = threading.Lock(), False

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        return self._threads.submit(self._do, function, task)

    def _do(self, function: Callable[[Any], Any], task: Any) -> Any:
        mine, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(theirs, function, task), daemon=True)
        with mine, theirs:
            with self._guard:  # none may start once the running ones are ended
                if self._closed:
                    raise WorkerError("ended before it began")
                process.start()
                self._running.add(process)
            theirs.close()
            try:
                answer = mine.recv_bytes()
            except (EOFError, OSError):  # it ended before, or in the middle of, its answer
                answer = None
            process.join()
            self._running.discard(process)
        if answer is None:
            raise WorkerError(
                f"the worker process {_end(process.exitcode)}", hint="run it again: finished work is kept"
            )
        good, value = pickle.loads(answer)
        if not good:
            raise value
        return value

    def close(self) -> None:
        with self._guard:
            self._closed = True
            for process in self._running:
                with suppress(OSError, ValueError):
                    process.kill()
        self._threads.shutdown(cancel_futures=True)


def in_order(executor: Executor, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """Results of ``function`` on ``tasks``, in their order; at most two for each slot are under way or waiting."""
    under_way: deque[Future[Any]] = deque()
    for task in tasks:
        under_way.append(executor.submit(function, task))
        if len(under_way) >= 2 * (executor.slots or 1):
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def attempt(function: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    """``(True, result)`` of a task, or ``(False, error)``: errors raised on purpose as they are, others in one sentence."""
    try:
        return True, function(task)
    except WeightworksError as error:
        return False, error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        return False, WorkerError(text, hint="" if isinstance(error, OSError) else FAULT)


def settle(future: Future[Any], outcome: tuple[bool, Any]) -> None:
    """Let a future have what :func:`attempt` came to."""
    good, value = outcome
    if good:
        future.set_result(value)
    else:
        future.set_exception(value)


def portable(outcome: tuple[bool, Any]) -> bytes:
    """An outcome pickled, so that it can be read again: what cannot be sent is told of in words."""
    try:
        text = pickle.dumps(outcome)
        pickle.loads(text)
    except Exception as error:  # pickling and unpickling run code of others, which may raise anything
        good, value = outcome
        told = f"{type(value).__name__}: {value}" if not good else f"its result cannot be sent: {error}"
        hint = value.hint if isinstance(value, WeightworksError) else FAULT
        return pickle.dumps((False, WorkerError(told, hint=hint)))
    return text


@contextmanager
def _patient() -> Iterator[None]:
    """Let processes started meanwhile put waiting threads to sleep, unless the user said otherwise."""
    before = os.environ.get(WAITING)
    os.environ.setdefault(WAITING, "PASSIVE")
    try:
        yield
    finally:
        if before is None:
            del os.environ[WAITING]


def _answer(pipe: Connection, function: Callable[[Any], Any], task: Any) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that started this one ends it
    _die_with_parent()
    pipe.send_bytes(portable(attempt(function, task)))


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no answer"


def _die_with_parent() -> None:
    """See to it that this process ends when the run does.

    The system (Linux) ends it with the process it was forked from, which ends with the run. The thread does the same
    where the system does not, and for a run that ended before the request.
    """
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
