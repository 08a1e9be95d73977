"""Tasks on a Ray cluster: spread over its machines, repeated by Ray when a worker dies. Needs the extra ``ray``."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from weightworks.engine.executor import WorkerError, attempt, portable, settle
from weightworks.errors import ResourceError, UsageError

RETRIES = 3  # times that Ray repeats a task whose worker died
REACHED = 10.0  # seconds to wait for an answer of a cluster's first machine
HANDED_ON = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")  # variables that say where models lie


class OnRay:
    """An executor on the cluster at ``address`` (``auto``: the one this machine belongs to; None: a new local one).

    All machines must see models and workspace under the same paths. Numbers depend on the count of threads, so each task
    gets as many as this process would use, and asks Ray for as many processors.
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
                ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            except (OSError, ValueError) as error:
                raise ResourceError(
                    f"--ray-address {address}: no cluster answers ({error})", hint="start one with: ray start --head"
                ) from None
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        # What no machine has would be waited for without end.
        self._processors = min(threads, max(int(resources.get("CPU", 0)) for resources in machines))
        self._memory = max(int(resources.get("memory", 0)) for resources in machines)
        self._cards = 1 if any(resources.get("GPU") for resources in machines) else 0
        variables = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
        self._environment = {"env_vars": {**variables, "OMP_NUM_THREADS": str(threads)}}

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        remote = self._ray.remote(_work).options(
            num_cpus=self._processors,
            num_gpus=self._cards,
            memory=min(peak_bytes or 0, self._memory) or None,
            max_retries=RETRIES,
            name=getattr(function, "__name__", "task"),
            runtime_env=self._environment,
        )
        reference = remote.remote(function, task, os.getcwd())
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._tasks[reference] = future

        def hand_on(done: Future[Any]) -> None:
            self._tasks.pop(reference, None)
            if (error := done.exception()) is not None:
                text = str(error).strip().splitlines() or [type(error).__name__]
                settle(future, (False, WorkerError(f"the Ray task failed: {text[-1]}")))
            else:
                settle(future, pickle.loads(done.result()))

        reference.future().add_done_callback(hand_on)
        return future

    def close(self) -> None:
        for reference in list(self._tasks):
            with suppress(self._ray.exceptions.RayError, RuntimeError, ValueError):  # it may be over, the cluster gone
                self._ray.cancel(reference, force=True)
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()


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
