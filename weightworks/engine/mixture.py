"""A merge that is not written: its tensors are made when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from weightworks.engine.mergejob import MergeJob
from weightworks.engine.mergeplan import Part
from weightworks.engine.merging import slabs
from weightworks.store.dense import DenseView


class MergedView(DenseView):
    """What ``job`` would write, as a checkpoint to read from: the same names and the same values, rounded in the same way.

    ``make`` gives the rows of a part in float32; by default they are the method's, handed ``found`` with each slab, and its
    surveys are not run. One tensor is in memory at a time, beside the rows it is made of. Names, and what has no place in the
    merge, are those of the reference.
    """

    def __init__(
        self, job: MergeJob, found: Any = None, make: Callable[[Part], Iterable[torch.Tensor]] | None = None
    ) -> None:
        super().__init__(job.checkpoint)
        self.job, self.found, self.make = job, found, make or self._made
        self.parts = {part.spec.name: part for part in job.parts}

    @torch.no_grad()
    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The merged tensor, in the dtype it would be stored in, or cast to ``dtype`` after that."""
        part = self.parts[name]
        if part.method is None:
            return self.job.reference.reader.read(name, dtype)
        rows = [one.to(part.spec.dtype) for one in self.make(part)]
        merged = (torch.cat(rows) if len(rows) > 1 else rows[0]).reshape(part.spec.shape)
        return merged if dtype is None else merged.to(dtype)

    def _made(self, part: Part) -> Iterator[torch.Tensor]:
        method: Any = part.method  # a part without one is not made
        return (method.merge(slab, self.found) for slab in slabs(self.job, part, method))

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of the merged tensor; it is made whole for them."""
        return self.read(name, dtype)[start:stop]
