"""Tasks on a Ray cluster: spread over its machines, repeated by Ray when a worker dies. Needs the extra ``ray``."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from weightworks.engine.executor import WAITING, Executor, WorkerError, attempt, portable, settle
from weightworks.errors import ResourceError, UsageError

RETRIES = 3  # times that Ray repeats a task whose worker died
REACHED = 10.0  # seconds to wait for an answer of a cluster's first machine
HANDED_ON = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")  # variables that say where models lie


@dataclass(frozen=True)
class Share:
    """What every task gets: processors, cards, variables. Numbers depend on the count of threads, so it is the same
    everywhere."""

    processors: int
    cards: int
    variables: tuple[tuple[str, str], ...]

    def start(self, function: Callable[[Any], Any], task: Any, memory: int | None) -> Any:
        """Hand a task to Ray; returns the reference to its answer."""
        import ray

        remote = ray.remote(_work).options(
            num_cpus=self.processors,
            num_gpus=self.cards,
            memory=memory,
            max_retries=RETRIES,
            name=getattr(function, "__name__", "task"),
            runtime_env={"env_vars": dict(self.variables)},
        )
        return remote.remote(function, task, os.getcwd())


class OnRay:
    """An executor on the cluster at ``address`` (``auto``: the one this machine belongs to; None: a new local one).

    All machines must see models and workspace under the same paths. Each task gets as many threads as this process would
    use, and asks Ray for as many processors.
    """

    slots: int | None = None  # Ray decides

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError(
                "--executor ray: the package ray is not installed", hint="pip install 'weightworks[ray]'"
            ) from None
        self._ray = ray
        self._started = not ray.is_initialized()
        self._tasks: dict[Any, Future[Any]] = {}
        if self._started:
            try:
                _reach(address)
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                )
            except (OSError, ValueError) as error:
                raise ResourceError(
                    f"--ray-address {address}: no cluster answers ({error})",
                    hint="start one with: ray start --head; for one that asks for a token, set RAY_AUTH_MODE and RAY_AUTH_TOKEN",
                ) from None
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        variables = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
        variables |= {"OMP_NUM_THREADS": str(threads), WAITING: os.environ.get(WAITING, "PASSIVE")}
        # What no machine has would be waited for without end.
        processors = min(threads, max(int(resources.get("CPU", 0)) for resources in machines))
        self._memory = max(int(resources.get("memory", 0)) for resources in machines)
        self._share = Share(processors, int(any(found.get("GPU") for found in machines)), tuple(variables.items()))
        self.parts: Callable[[], Executor] | None = partial(InTask, self._share)

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        reference = self._share.start(function, task, min(peak_bytes or 0, self._memory) or None)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._tasks[reference] = future

        def hand_on(done: Future[Any]) -> None:
            self._tasks.pop(reference, None)
            error = done.exception()
            settle(future, _failed(error) if error is not None else pickle.loads(done.result()))

        reference.future().add_done_callback(hand_on)
        return future

    def close(self) -> None:
        for reference in list(self._tasks):
            with suppress(self._ray.exceptions.RayError, RuntimeError, ValueError):  # it may be over, the cluster gone
                self._ray.cancel(reference, force=True)
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()


class InTask:
    """An executor for the parts of a Ray task, used inside it.

    Parts ask for processors alone: memory and cards that the task holds while it waits for them would never come free.
    Its processors do, whenever it waits.
    """

    parts: Callable[[], Executor] | None = None

    def __init__(self, share: Share) -> None:
        import ray

        self._share = Share(share.processors, 0, share.variables)
        self.slots: int | None = max(1, int(ray.cluster_resources().get("CPU", 1)) // max(share.processors, 1))
        self._awaited: list[_Awaited] = []

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        self._awaited = [future for future in self._awaited if not future.done()]
        self._awaited.append(_Awaited(self._share.start(function, task, None)))
        return self._awaited[-1]

    def close(self) -> None:
        import ray

        for future in self._awaited:
            if not future.done():
                ray.cancel(future.reference, force=True)


class _Awaited(Future[Any]):
    """The future of a part; whoever asks for its result waits as Ray wants it, so that processors come free."""

    def __init__(self, reference: Any) -> None:
        super().__init__()
        self.reference = reference
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> Any:
        import ray

        if not self.done():
            try:
                settle(self, pickle.loads(ray.get(self.reference, timeout=timeout)))
            except ray.exceptions.GetTimeoutError:
                raise TimeoutError from None
            except ray.exceptions.RayError as error:
                settle(self, _failed(error))
        return super().result()


def _failed(error: BaseException) -> tuple[bool, Any]:
    """What a task came to that Ray gave up."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return False, WorkerError(f"the Ray task failed: {text[-1]}")


def _reach(address: str | None) -> None:
    """Try whether anybody listens at ``host:port``: Ray itself would go on trying for many minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED).close()


def _work(function: Callable[[Any], Any], task: Any, folder: str) -> bytes:
    """What a worker does. Errors are answers, not crashes: Ray must not repeat what will fail again."""
    with suppress(OSError):  # relative paths mean what they mean where the run was started
        os.chdir(folder)
    return portable(attempt(function, task))
