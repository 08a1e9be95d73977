"""What tests have workers of a cluster do beside their tasks. Workers import this file, so it is light."""

from __future__ import annotations

import os
import re
import signal
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults import wrap
from weightworks.engine.executor import Executor

PATIENCE = 120.0  # seconds for another worker to start, on a busy machine
PARTS = "parts"


@dataclass(frozen=True)
class Event:
    """What happens at a task: a worker is killed at its ``number``-th call of ``kill``, once; before they begin, workers
    wait until ``meet`` of them are at this task, or at all that are told of in ``place``."""

    kill: str | None = None
    number: int = 1
    meet: int = 0
    place: str = ""


class Eventful:
    """``executor``, at whose workers ``events`` happen: by stage, or ``parts`` of any stage. ``folder`` tells of them."""

    def __init__(self, executor: Executor, folder: Path, events: Mapping[str, Event], part: bool = False) -> None:
        self.executor, self.folder, self.events, self.part = executor, folder, events, part
        self.slots = executor.slots
        self.parts = partial(_parts, executor.parts, folder, events) if executor.parts is not None else None

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        name = PARTS if self.part else task.task.stage if function.__name__ == "produce" else ""
        event = self.events.get(name, Event())
        order = (function, task, self.folder / (event.place or name), event)
        return self.executor.submit(_eventfully, order, peak_bytes=peak_bytes)

    def close(self) -> None:
        self.executor.close()


def _parts(make: Callable[[], Executor], folder: Path, events: Mapping[str, Event]) -> Eventful:
    return Eventful(make(), folder, events, part=True)


def _eventfully(order: tuple[Callable[[Any], Any], Any, Path, Event]) -> Any:
    function, task, folder, event = order
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tries").open("a") as file:
        told = re.sub(r" at 0x\w+", "", repr(task))  # functions lie elsewhere in every process
        file.write(f"{os.getpid()} {zlib.crc32(told.encode())}\n")
    if event.kill is not None and not (folder / "killed").exists():
        wrap(event.kill, partial(_deadly, event.number, folder / "killed"))
    end = time.monotonic() + PATIENCE
    while event.meet and len(tries(folder)) < event.meet:
        if time.monotonic() > end:
            raise TimeoutError("the others did not come")
        time.sleep(0.01)
    return function(task)


def _deadly(number: int, note: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not note.exists():
            note.write_text(str(os.getpid()))  # now and by this hand: a worker that ends otherwise leaves no note
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return called


def tries(folder: Path) -> set[int]:
    """The processes that began the tasks of ``folder``."""
    return {process for process, _ in begun(folder)}


def begun(folder: Path) -> list[tuple[int, str]]:
    """The process and the task of every beginning, in order."""
    pairs = (line.split() for line in (folder / "tries").read_text().splitlines())
    return [(int(process), task) for process, task in pairs]
