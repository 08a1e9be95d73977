"""Things that go wrong on purpose, in a process made for it: each function breaks something for the rest of its life."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def wrap(where: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function ``where`` (``package.module:Class.method``) by ``make(function)``."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, make(getattr(owner, name)))


def signal_at(where: str, number: int, *, sent: int = signal.SIGKILL, after: bool = False) -> None:
    """Send this process a signal at its ``number``-th call of ``where``, before or after the call."""
    calls = 0

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                os.kill(os.getpid(), sent)
            result = function(*args, **kwargs)
            if calls == number and after:
                os.kill(os.getpid(), sent)
            return result

        return called

    wrap(where, make)


def count_calls(where: str, report: str) -> None:
    """Write how often ``where`` was called into the file ``report``."""
    calls = 0

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            Path(report).write_text(str(calls))
            return function(*args, **kwargs)

        return called

    Path(report).write_text("0")
    wrap(where, make)


def read_only(folder: str) -> None:
    """``folder`` cannot be written (root may write anywhere, so permissions do not do)."""
    access = os.access

    def refuse(path: Any, mode: int, **options: Any) -> bool:
        return access(path, mode, **options) and not (mode & os.W_OK and Path(path) == Path(folder))

    os.access = refuse  # type: ignore[assignment]


def small_disk(free: int) -> None:
    """Every disk has ``free`` bytes left."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=free)  # type: ignore[assignment]


def forced_fallback() -> None:
    """No Hessian can be factored, so everything is rounded without compensation."""
    from compress.hessian import Factor

    def refuse(hessian: torch.Tensor, order: torch.Tensor, *, damp_percent: float) -> Factor:
        return Factor(None, damp_percent, ["not positive definite at any damping"])

    wrap("compress.quantize.gptq:factor", lambda function: refuse)


def flipped_byte() -> None:
    """The disk turns a bit of the last staged tensor before everything is read back."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def read_back(writer: Any) -> Any:
            path = writer.staging / next(iter(writer.shards))
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            return function(writer)

        return read_back

    wrap("weightworks.store.writer:CheckpointWriter.read_back", make)


def worse_reload() -> None:
    """Stock transformers sees other weights than the run did."""
    import dataclasses

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **kwargs: Any) -> Any:
            loaded = function(*args, **kwargs)
            return dataclasses.replace(loaded, losses=loaded.losses * 1.1)

        return load

    wrap("weightworks.engine.finish:stock_losses", make)


def planned(**changes: Any) -> None:
    """The estimate comes to other conclusions, such as ``on_disk=True`` on a machine with little memory."""
    import dataclasses

    wrap(
        "weightworks.plan.stage:estimate",
        lambda function: lambda *args, **kwargs: dataclasses.replace(function(*args, **kwargs), **changes),
    )


def constant(where: str, value: Any) -> None:
    """A constant of a module has another value."""
    wrap(where, lambda old: value)


def at_call(where: str, number: int, act: Callable[[], object]) -> None:
    """``act`` right before the ``number``-th call of ``where``."""
    calls = 0

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                act()
            return function(*args, **kwargs)

        return called

    wrap(where, make)


def changing(where: str, number: int, path: str) -> None:
    """Somebody writes into a file."""

    def write() -> None:
        data = bytearray(Path(path).read_bytes())
        data[-2] ^= 1
        Path(path).write_bytes(data)

    at_call(where, number, write)


def touched(where: str, number: int, path: str) -> None:
    """Somebody writes a file again as it was."""
    at_call(where, number, lambda: Path(path).write_bytes(Path(path).read_bytes()))


def vanishing(where: str, number: int, folder: str) -> None:
    """Somebody removes a folder."""
    at_call(where, number, lambda: shutil.rmtree(folder))


def clock(seconds: int) -> None:
    """The clock is set ahead or back while the command runs."""
    import time

    real, calls = time.time, 0

    def jumped() -> float:
        nonlocal calls
        calls += 1
        return real() + (seconds if calls > 1 else 0)

    time.time = jumped


def no_space(where: str, number: int) -> None:
    """The disk is full at the ``number``-th call of ``where``, and at no other."""
    import errno

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_call(where, number, fail)


def little_memory(more: int) -> None:
    """This process may take ``more`` bytes of address space on top of what it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
