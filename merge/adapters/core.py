"""Core space: adapters in shared orthonormal bases, their small cores merged by any merge method, exactly."""

from __future__ import annotations

import torch
from pydantic import Field

from merge.adapters._factors import decomposed, split
from weightworks.stage.adapting import CombineOptions, Cores, Factors, Made, Updates

PAPER = "Panariello et al. 2025, arXiv:2509.17786"
VERSION = 1


class Options(CombineOptions):
    """Options of merges in core space."""

    using: str = Field("ties", description="the merge method for the cores, such as ties, dare or task_arithmetic")
    using_options: list[str] = Field(
        default=[], description="an option of that method as NAME=VALUE, such as density=0.2; may be repeated"
    )
    rank: int | None = Field(None, ge=1, description="rank of the result; default: all that the merge made")


class Method:
    """U spans the columns of all B_i, V the rows of all A_i, so U C_i V = B_i A_i with C_i = U^T B_i A_i V^T.

    Adapters are brought to their singular form first: U and V then depend on the updates alone, not on how each is split.
    """

    BASE, LINEAR = "optional", False

    def __init__(self, options: Options) -> None:
        self.options = options

    def project(self, updates: Updates) -> Cores:
        parts = [split(*decomposed(part)) for part in updates.parts]
        u = _basis(torch.cat([part.b for part in parts], 1))  # [rows, p]
        v = _basis(torch.cat([part.a for part in parts]).T).T  # [q, columns]
        cores = [torch.zeros(u.shape[1], v.shape[0], dtype=u.dtype)] * updates.count
        for number, part in zip(updates.adapters, parts, strict=True):
            cores[number] = (u.T @ part.b) @ (part.a @ v.T)
        return Cores(u, v, tuple(cores))

    def restore(self, cores: Cores, merged: torch.Tensor) -> Made:
        u, sigma, v = decomposed(Factors(cores.u @ merged, cores.v))
        rank = max(1, int((sigma > sigma[0] * 1e-12).sum()))  # what is below came of rounding
        rank = min(rank, self.options.rank or rank)
        return Made(split(u[:, :rank], sigma[:rank], v[:rank]))


def _basis(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of ``columns`` [n, k], strongest directions first, signs by the largest entry."""
    u, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
    u = u[:, : max(1, int((sigma > sigma[0] * 1e-12).sum()))]
    return u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
