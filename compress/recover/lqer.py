"""What rounding lost, won back by a low-rank adapter beside the quantized model: solved, not trained.

Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction for LLMs" (arXiv:2402.02446), and Zhang et al., "QERA: an
Analytical Framework for Quantization Error Reconstruction" (arXiv:2410.06040), theorem 1. With E = W - Q [out, in] what rounding
lost of a weight and R = E[x x'] the moments of its inputs, BA is the matrix of its rank for which E[|(E - BA) x|^2] is least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from compress.schemes import ALWAYS_IGNORED, Patterns
from weightworks.options import Options as Base
from weightworks.stream.gram import Gram

if TYPE_CHECKING:
    from weightworks.stream.whole import Outline, Subset

PAPER = "Zhang et al. 2024, arXiv:2402.02446; Zhang et al. 2024, arXiv:2410.06040"
VERSION = 1


class Options(Base):
    """Options of low-rank error reconstruction."""

    rank: int = Field(32, ge=1, description="rank of the adapter of every layer")
    weigh: Literal["exact", "diagonal", "none"] = Field(
        "exact",
        description="what errors are weighed by: all moments of the inputs (QERA), each input's own, or nothing (LQER)",
    )
    ignore: Patterns = Field(
        default=[],
        description="layers without an adapter: globs, or regular expressions after re: (routers always are)",
    )

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]


def low_rank(error: torch.Tensor, moments: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """B [out, rank], A [rank, in], and the share of tr(E R E') that is left of ``error`` E [out, in]; R is ``moments`` [in, in].

    The leading left singular vectors U of E R^(1/2) are eigenvectors of E R E', and B = U, A = U'E solves the problem (Eckart
    and Young 1936): U A R^(1/2) is the best approximation of E R^(1/2). No root of R is taken, nor its inverse. What a rank
    beyond the shorter side adds is zero.
    """
    e, r = error.double(), moments.double()
    values, basis = torch.linalg.eigh(e @ r @ e.T)  # rising
    kept = min(rank, *error.shape)
    u = basis[:, -kept:].flip(1)
    b, a = torch.zeros(error.shape[0], rank), torch.zeros(rank, error.shape[1])
    b[:, :kept], a[:kept] = u, u.T @ e
    total = float(values.clamp(min=0).sum())
    return b, a, float(values[:-kept].clamp(min=0).sum()) / total if total else 0.0


class Method:
    """Error reconstruction as a method that makes an adapter from the original's weights."""

    masks = False  # it makes none
    keeps_adapter = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> None:
        return None

    def subset(self, outline: Outline) -> Subset:
        from compress.recover._training import holdable
        from weightworks.stream.whole import Subset

        held, fallbacks = holdable(outline, dict.fromkeys(outline.linears))
        added = self.options.rank * sum(sum(outline.linears[name].shape) for name in held)
        return Subset((), held, added, tuple(fallbacks))

    def held(self, columns: int) -> int:
        """Bytes of the moments of an input."""
        return 4 * columns**2

    def working(self, columns: int) -> int:
        """Bytes of them in float64."""
        return 16 * columns**2

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def factors(self, error: torch.Tensor, statistics: Gram) -> tuple[torch.Tensor, torch.Tensor, float]:
        """B, A and what is left, by the inputs seen; the statistics are not used up."""
        moments = statistics.moments() / max(statistics.tokens, 1)
        if self.options.weigh == "none" or not statistics.tokens:
            moments = torch.eye(len(moments))
        elif self.options.weigh == "diagonal":
            moments = moments.diagonal().diag()
        return low_rank(error, moments, self.options.rank)
