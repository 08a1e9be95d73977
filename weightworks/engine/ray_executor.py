"""Tasks on a Ray cluster: spread over its machines, repeated by Ray when a worker dies. Needs the extra ``ray``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from weightworks.engine.executor import WorkerError
from weightworks.errors import ResourceError, UsageError, WeightworksError

RETRIES = 3  # times that Ray repeats a task whose worker died


class OnRay:
    """An executor on the cluster at ``address`` (``auto``: the one this machine belongs to; None: a new local one).

    All machines must see the workspace under the same path. Numbers depend on the count of threads, so each task gets
    as many as this process would use, and asks Ray for as many processors.
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
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        variables = {"OMP_NUM_THREADS": str(self.threads), "RAY_memory_monitor_refresh_ms": "0"}
        if self._started:
            try:
                ray.init(
                    address=address,
                    runtime_env={"env_vars": variables},
                    log_to_driver=False,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                )
            except ConnectionError as error:
                raise ResourceError(
                    f"--ray-address {address}: no cluster answers ({error})", hint="start one with: ray start --head"
                ) from None
        widest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        self._processors = min(self.threads, int(widest))

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        remote = self._ray.remote(_guarded).options(
            num_cpus=self._processors,
            memory=peak_bytes,
            max_retries=RETRIES,
            name=getattr(function, "__name__", "task"),
        )
        answer = remote.remote(function, task).future()
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def hand_on(done: Future[Any]) -> None:
            error = done.exception()
            if error is not None:
                future.set_exception(WorkerError(f"the Ray task failed: {str(error).strip().splitlines()[-1]}"))
                return
            good, value = done.result()
            if good:
                future.set_result(value)
            else:
                future.set_exception(value)

        answer.add_done_callback(hand_on)
        return future

    def close(self) -> None:
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()


def _guarded(function: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    """Errors raised on purpose are answers, not crashes: Ray must not repeat what will fail again."""
    try:
        return True, function(task)
    except WeightworksError as error:
        return False, error
