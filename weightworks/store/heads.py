"""A checkpoint seen with another output head: that of its embedding, where it has none, or none, where it has a copy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from weightworks.store.tensorfile import TensorSpec
from weightworks.store.vocabulary import Reader

PIECE = 1 << 22  # elements compared at a time


class HeadView:
    """``reader`` without the tensors ``hidden``, and with ``copies``: tensors that are others of it, by their names."""

    def __init__(
        self, reader: Reader, *, hidden: frozenset[str] = frozenset(), copies: Mapping[str, str] | None = None
    ) -> None:
        self.reader, self.hidden, self.copies = reader, hidden, dict(copies or {})

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """All tensors that are to be seen."""
        known = {spec.name: spec for spec in self.reader.specs}
        made = [TensorSpec(name, known[of].shape, known[of].dtype) for name, of in self.copies.items()]
        return [*(spec for spec in known.values() if spec.name not in self.hidden), *made]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.reader.read(self.copies.get(name, name), dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.reader.read_rows(self.copies.get(name, name), start, stop, dtype)


def equal(reader: Reader, one: str, other: str) -> bool:
    """Whether two tensors are the same bit for bit; a few rows are read at a time."""
    shapes = {spec.name: spec.shape for spec in reader.specs}
    if shapes[one] != shapes[other]:
        return False
    rows, *rest = shapes[one]
    step = max(1, PIECE // max(rest[0] if rest else 1, 1))
    return all(
        torch.equal(
            reader.read_rows(one, start, min(start + step, rows)),
            reader.read_rows(other, start, min(start + step, rows)),
        )
        for start in range(0, rows, step)
    )
