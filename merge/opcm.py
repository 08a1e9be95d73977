"""OPCM: merge models one after another, each projected so that it does not undo what the earlier ones brought.

The merge of t models is kept as S_t = S_{t-1} + tau'_t, tau'_t the task vector less what lies in the principal directions of
S_{t-1}, and is theta_0 + S_t n / ||S_t|| with n the mean norm of the task vectors: the recursion of the paper without its
rescaling at every step, whose roundings add up. S lies in float32 beside the result, so that a later model can be added
without the earlier ones (``--continue-from``). Order matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from merge._options import MatrixOptions
from merge._spectra import significant
from weightworks.stage.merging import STATE, Slab, Survey

PAPER = "Tang et al. 2025, arXiv:2501.09522"
VERSION = 1


class Options(MatrixOptions):
    """Options of OPCM."""

    alpha: float = Field(
        0.5, ge=0, le=1, description="share of the singular values' sum that is protected; 1: all of them, 0: none"
    )
    diagonal: bool = Field(
        True,
        description="remove the diagonal of the projection too; the released code of the paper means to and does not",
    )


class Method:
    """theta_0 + S_T n / ||S_T||, by S_t = lambda_t Delta_t of the paper."""

    BASE, LEAST, MOST = "required", 1, None
    STATE = CONTINUES = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """S of every tensor, and the norms that the scale follows from."""
        return [Survey(self._accumulate, self._scale, scope="model", whole=self.options.decomposed)]

    def _accumulate(self, slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        """S after all models of this run, and squares of norms: of S, and of each task vector."""
        total = slab.state
        for delta in slab.deltas:
            if total is None:
                total = delta.clone()
            elif self.options.decomposed(slab.name, slab.shape):
                total = total + projected(delta, total, alpha=self.options.alpha, diagonal=self.options.diagonal)
            else:
                total = total + delta
        assert total is not None
        squares = [torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2 for delta in slab.deltas]
        return {
            STATE: total,
            "merged": torch.linalg.vector_norm(total, dtype=torch.float64) ** 2,
            "tasks": torch.stack(squares),
        }

    def _scale(self, sums: Mapping[str, torch.Tensor], found: Any) -> Any:
        """The norms of all task vectors so far, the scale n / ||S||, and lambda_t = ||S|| / n of the paper."""
        norms = [*(found or {}).get("norms", []), *sums["tasks"].sqrt().tolist()]
        mean, merged = math.fsum(norms) / len(norms), math.sqrt(float(sums["merged"]))
        return {
            "norms": norms,
            "scale": mean / merged if merged > 0 else 0.0,
            "lambda": merged / mean if mean > 0 else 0.0,
        }

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        assert slab.state is not None
        return slab.base.add_(slab.state, alpha=found["scale"])


def projected(delta: torch.Tensor, merged: torch.Tensor, *, alpha: float, diagonal: bool) -> torch.Tensor:
    """``delta`` [m, n] without its part in the leading singular directions of ``merged`` [m, n].

    With merged = U diag(sigma) V' and P = U' delta V, P[:r, :r] is removed, r the first index whose singular values sum to more
    than ``alpha`` of all, and with ``diagonal`` the rest of P's diagonal. All else of the full P stays, so the thin
    decomposition is enough: tau' = tau - U_r P_rr V_r' - sum_{i >= r} p_ii u_i v_i', over i with sigma_i > 0: which vectors
    stand at the others is arbitrary.
    """
    u, sigma, vt = torch.linalg.svd(merged, full_matrices=False)  # [m, k], [k], [k, n]
    known = significant(sigma)
    if known == 0:
        return delta
    u, sigma, vt = u[:, :known], sigma[:known], vt[:known]
    rank = protected(sigma, alpha)
    p = u.T @ delta @ vt.T  # [k, k]
    removed = torch.zeros_like(p)
    removed[:rank, :rank] = p[:rank, :rank]
    if diagonal:
        removed.diagonal().copy_(p.diagonal())
    return delta - u @ removed @ vt


def protected(sigma: torch.Tensor, alpha: float) -> int:
    """The first index at which ``sigma`` [k], summed, exceeds ``alpha`` of its sum: so many directions are protected."""
    sums = sigma.double().cumsum(0)
    if alpha >= 1 or sums[-1] == 0:  # no sum exceeds all: protect all there is (the released code protects none)
        return int(torch.count_nonzero(sigma))
    return int(torch.searchsorted(sums, alpha * sums[-1], right=True))
