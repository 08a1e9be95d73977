"""A checkpoint whose tensors have their rows or columns in another order, reordered when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from weightworks.store.tensorfile import TensorSpec


class Rows(Protocol):
    """What is read from: a checkpoint, or a view of one."""

    @property
    def specs(self) -> list[TensorSpec]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor: ...


class PermutedView:
    """``source`` with some tensors reordered. ``orders``: by name, an axis and, int64 [its length], what comes to each place."""

    def __init__(self, source: Rows, orders: Mapping[str, tuple[int, torch.Tensor]]) -> None:
        self.source, self.orders = source, orders

    @property
    def specs(self) -> list[TensorSpec]:
        return self.source.specs

    def is_packed(self, name: str) -> bool:
        """Whether the tensor comes as [out, in] though its layer holds it the other way."""
        return is_packed(self.source, name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor."""
        tensor = self.source.read(name, dtype)
        if name not in self.orders:
            return tensor
        axis, order = self.orders[name]
        return tensor.index_select(axis, order)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of the reordered tensor; no others are read."""
        if name not in self.orders:
            return self.source.read_rows(name, start, stop, dtype)
        axis, order = self.orders[name]
        if axis != 0:
            return self.source.read_rows(name, start, stop, dtype).index_select(axis, order)
        parts = [self.source.read_rows(name, first, last, dtype) for first, last in runs(order[start:stop].tolist())]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def is_packed(source: object, name: str) -> bool:
    """Whether ``source`` decodes the tensor from packed codes."""
    asked = getattr(source, "is_packed", None)
    return bool(asked(name)) if asked is not None else False


def runs(order: list[int]) -> Iterator[tuple[int, int]]:
    """``order`` as stretches of neighbours, (first, last + 1) each."""
    start = 0
    for place in range(1, len(order) + 1):
        if place == len(order) or order[place] != order[place - 1] + 1:
            yield order[start], order[place - 1] + 1
            start = place
