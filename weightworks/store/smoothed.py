"""A checkpoint in which norms have handed part of their scale on to the weights they feed, computed as it is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView


class SmoothedView(DenseView):
    """``replaced`` stand for tensors of the checkpoint, as stored; the columns of weights [out, in] are multiplied by
    ``columns`` float32 [in], their rows by ``rows`` [out]."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        replaced: Mapping[str, torch.Tensor],
        columns: Mapping[str, torch.Tensor],
        rows: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self.replaced, self.columns, self.rows = replaced, columns, dict(rows or {})

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor; a weight that is multiplied comes in float32 unless told otherwise."""
        if name in self.replaced:
            tensor = self.replaced[name]
        elif name in self.columns or name in self.rows:
            tensor = super().read(name, torch.float32)
            tensor = tensor * self.columns[name] if name in self.columns else tensor
            tensor = tensor * self.rows[name][:, None] if name in self.rows else tensor
        else:
            return super().read(name, dtype)
        return tensor if dtype is None else tensor.to(dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of it."""
        if name in self.replaced or name in self.columns or name in self.rows:
            return self.read(name, dtype)[start:stop]
        return super().read_rows(name, start, stop, dtype)
