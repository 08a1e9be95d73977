"""Tensors dealt to workers: the same bytes for any executor and number of workers, in whatever portions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from places import on_one_thread, two_blocks

from weightworks.engine import tensorwise
from weightworks.engine.executor import Executor, Here, Processes, in_order
from weightworks.engine.tensorwise import LayerTask, batches
from weightworks.errors import ResourceError
from weightworks.plan.keys import environment
from weightworks.plan.stage import run_stage
from weightworks.plan.task import Alike
from weightworks.stage.settings import Settings
from weightworks.store.sources import file_digest

OPTIONS = {"bits": 4, "group_size": 64, "ignore": ["lm_head", "*.mlp.*"]}


class Counted(Here):
    """Counts the tasks, and how many are under way."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.tasks: list[LayerTask] = []

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        self.tasks.append(task)
        return super().submit(function, task)


def rounded(model: Path, target: Path, executor: Executor | None = None) -> dict[str, str]:
    """Digests of all files of the rounded model."""
    run_stage("quantize", "rtn", str(model), OPTIONS, Settings(), output_dir=target, executor=executor)
    return {path.name: file_digest(path) for path in sorted(target.iterdir())}


@pytest.fixture(scope="module")
def model(one_thread: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model, and as many threads here as at the workers: the sums in the report depend on it."""
    with on_one_thread():
        yield two_blocks(tiny_llama, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes."""
    return rounded(model, tmp_path_factory.mktemp("alone") / "out")


@pytest.mark.parametrize(("slots", "most", "tasks"), [(1, 1 << 30, 4), (50, 1 << 30, 8), (1, 1, 8)])
def test_any_number_of_workers(
    model: Path,
    alone: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
    most: int,
    tasks: int,
) -> None:
    """Eight weights; each of the workers is meant to have four tasks, if there are as many weights."""
    monkeypatch.setattr(tensorwise, "TASK_BYTES", most)
    executor = Counted(slots)
    assert rounded(model, tmp_path / "out", executor) == alone
    assert len(executor.tasks) == pytest.approx(tasks, abs=1)
    assert sum(len(task.tensors) for task in executor.tasks) == 8
    assert all(len(task.job) < 4000 for task in executor.tasks)  # no tensors travel


def test_processes_of_their_own(model: Path, alone: dict[str, str], tmp_path: Path) -> None:
    workers = Processes(2)
    try:
        assert rounded(model, tmp_path / "out", Alike(workers, environment())) == alone
    finally:
        workers.close()


def test_a_worker_of_another_kind_refuses(model: Path, tmp_path: Path) -> None:
    executor = Alike(Here(), {**environment(), "processor": "a newer one"})
    with pytest.raises(ResourceError, match=r"another than the run was planned for \(processor: a newer one -> "):
        rounded(model, tmp_path / "out", executor)
    assert not (tmp_path / "out").exists()


def test_batches() -> None:
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 5, "f": 1}
    assert list(batches(sizes, 6)) == [("a", "b"), ("c",), ("d", "e"), ("f",)]
    assert list(batches(sizes, 0)) == [(name,) for name in sizes]
    assert list(batches(sizes, 100)) == [tuple(sizes)]
    assert list(batches({}, 5)) == []


def test_results_come_in_order_and_few_at_a_time() -> None:
    class Later:
        """Does nothing until it is asked."""

        slots, parts = 3, None
        open = most = 0

        def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
            self.open += 1
            self.most = max(self.most, self.open)
            later = self

            class Asked(Future[Any]):
                def result(self, timeout: float | None = None) -> Any:
                    later.open -= 1
                    return function(task)

            return Asked()

        def close(self) -> None:
            pass

    executor = Later()
    assert list(in_order(executor, str, range(20))) == [str(number) for number in range(20)]
    assert (executor.open, executor.most) == (0, 6)
