"""The Gram matrix X'X of a linear layer's inputs, accumulated over batches in float32.

Wide ones on the CPU are accumulated in place through scipy's BLAS: a symmetric rank-k update costs half a matrix product.
Inputs in bfloat16 go through the processor's bfloat16 units where it has them, half of the product, band by band.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

TILE = 1024  # rows handled at a time by in-place helpers; a tile pair stays in the cache
WIDE = 1024  # from here on scipy pays; below, waking its thread pool beside torch's costs more than it saves
BAND = 512  # rows of the triangle at a time: more of it is left out, and products are still large


class Gram:
    """X'X [in, in] in float32, accumulated over batches of inputs.

    ``tokens`` counts the rows seen, ``dropped`` those of batches left out because they held NaN or infinity.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0
        self.dropped = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add X'X of ``inputs`` [tokens, in]."""
        exact = inputs.dtype == torch.bfloat16
        x = inputs.to(self.matrix.device, torch.float32)
        if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
            self.dropped += x.shape[0]
            return
        self.tokens += x.shape[0]
        if exact and through_scipy(self.matrix):
            with bfloat16_products():
                for start in range(0, len(self.matrix), BAND):
                    stop = start + BAND
                    self.matrix[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
            return
        if not through_scipy(self.matrix):
            self.matrix.addmm_(x.T, x)
            return
        from scipy.linalg.blas import ssyrk

        # Fortran's upper triangle is the lower one of our row-major matrix.
        ssyrk(1.0, x.contiguous().numpy().T, beta=1.0, c=self.matrix.numpy().T, lower=0, overwrite_c=1)

    def moments(self) -> torch.Tensor:
        """X'X [in, in], symmetric; a copy."""
        matrix = self.matrix.clone()
        if through_scipy(matrix):
            mirror(matrix)
        return matrix

    def mean(self, factor: float = 1.0) -> torch.Tensor:
        """``factor`` X'X / n [in, in], symmetric. The storage is this object's own, which ends with it."""
        matrix, self.matrix = self.matrix, torch.empty(0)
        if through_scipy(matrix):
            mirror(matrix)
        return matrix.mul_(factor / max(self.tokens, 1))


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Products of float32 matrices on the CPU round their inputs to bfloat16 and add up in float32.

    Of numbers that are bfloat16 already they are exact but for the order of sums. Without such units nothing changes.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # added to the module at run time
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def through_scipy(matrix: torch.Tensor) -> bool:
    """Whether scipy's routines work on ``matrix``."""
    return matrix.device.type == "cpu" and matrix.shape[0] >= WIDE


def mirror(matrix: torch.Tensor) -> None:
    """Copy the strict lower triangle onto the upper."""
    for start in range(0, matrix.shape[0], TILE):
        stop = start + TILE
        tile = matrix[start:stop, start:stop]
        tile.copy_(tile.tril() + tile.tril(-1).T)
        matrix[start:stop, stop:].copy_(matrix[stop:, start:stop].T)
