"""Freed memory given back to the system."""

from __future__ import annotations

import ctypes


def release() -> None:
    """Return what has been freed: glibc's allocator keeps hundreds of megabytes of temporaries otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
