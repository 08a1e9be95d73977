"""A merge in memory, for tests of a method by itself."""

from __future__ import annotations

from weightworks.engine.inmemory import Tensors, merged

__all__ = ["Tensors", "merged"]
