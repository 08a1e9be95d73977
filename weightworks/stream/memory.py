"""Freed memory given back to the system; memory that ran out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = 64 << 20  # bytes that may lie free at the end of the heap
SMALL, LARGE = 1 << 20, 32 << 20  # bytes; the larger is what glibc's own threshold grows to


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, in Python, on a device, or in torch's allocator, which raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release() -> None:
    """Return what has been freed: glibc's allocator keeps hundreds of megabytes of temporaries otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def kept_for_reuse() -> Iterator[None]:
    """Freed blocks of up to megabytes stay with the process: a loop that needs the same again does not pay its page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, LARGE)
    mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, 2 * LARGE)
        release()


@contextmanager
def released_at_once() -> Iterator[None]:
    """Blocks of a megabyte and more go back to the system when they are freed; each new one costs its page faults."""
    release()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, LARGE)
