"""The second-order statistics of a linear layer: H = (2/n) X'X, and the Cholesky factor of its inverse that sweeps need.

Shared by every method that compensates errors (GPTQ, SparseGPT). Wide ones on the CPU run in place through scipy's BLAS
and LAPACK: a symmetric rank-k update costs half a matrix product, and an 8192-wide H is held once, not three times.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from weightworks.stream import gram

DAMP_STEP = 0.01  # added to the damping after a failed factorisation (GPTQModel's ladder)
FLOOR_STEPS = 6  # then diagonal floors 1e-6 * 10^k of the largest diagonal entry, k = 0 .. 6


class Hessian(gram.Gram):
    """H [in, in] in float32, accumulated over batches of inputs."""

    def finish(self) -> torch.Tensor:
        """H = (2/n) X'X [in, in], symmetric. The storage is this object's own, which ends with it."""
        return self.mean(2.0)


class Drifted(Hessian):
    """H of the inputs X of a rounded model, and D = (2/n) (X0 - X)' X [in, in], X0 being those of the unchanged one.

    ``unpaired`` counts the inputs that came without their pair and are in H alone.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self.drift = torch.zeros_like(self.matrix)
        self.unpaired = 0

    def add(self, inputs: torch.Tensor, unrounded: torch.Tensor | None = None) -> None:
        """Add a batch of inputs [tokens, in] and what the unchanged model makes of the same tokens."""
        dropped = self.dropped
        if unrounded is not None and not torch.isfinite(unrounded).all():
            self.dropped += len(inputs)
            return
        super().add(inputs)
        if self.dropped > dropped:
            return
        if unrounded is None:
            self.unpaired += len(inputs)
            return
        x = inputs.to(self.drift)
        self.drift.addmm_((unrounded.to(x) - x).T, x)

    def finish_drift(self) -> torch.Tensor:
        """D [in, in]. The storage is this object's own, which ends with it."""
        drift, self.drift = self.drift, torch.empty(0)
        return drift.mul_(2 / max(self.tokens, 1))


def drift(pairs: torch.Tensor, lower: torch.Tensor, order: torch.Tensor, share: float) -> torch.Tensor:
    """P = share triu(D L, 1) L' [in, in], strictly upper, both in sweep ``order`` [in]; D is ``pairs``, which is used up.

    Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (arXiv:2504.02692): once column j is
    fixed, w_j (X0 - X)_j is an error of the output that the columns after j can still make up for, and w_j P_j is how.
    """
    permute_(pairs, order)
    return (pairs @ lower).triu_(1).mul_(share) @ lower.T


@dataclass
class Factor:
    """The lower Cholesky factor L [in, in] of the damped inverse, ``inv(H + damping) = L L'``, and what it took.

    ``damping`` is the fraction of the mean diagonal that was added; ``steps`` lists the fallbacks taken, in words;
    ``lower`` is None when nothing worked, and the method must round without compensation.
    """

    lower: torch.Tensor | None
    damping: float
    steps: list[str] = field(default_factory=list)


def factor(hessian: torch.Tensor, order: torch.Tensor, *, damp_percent: float) -> Factor:
    """Damp and factor ``hessian`` [in, in] with rows and columns in ``order`` [in]; its storage is used up.

    The failure ladder: damping in steps of 0.01 up to 1, then diagonal floors up to the largest diagonal entry, then
    None. Every step taken is named.
    """
    permute_(hessian, order.flip(0))  # reversed, for inverse_cholesky_
    diagonal = hessian.diagonal().clone()
    if not torch.isfinite(diagonal.sum()):
        return Factor(None, damp_percent, ["statistics are not finite"])
    damping, mean, raised = damp_percent, diagonal.mean(), ""
    while damping <= 1.0:
        hessian.diagonal().copy_(diagonal + damping * mean)
        if inverse_cholesky_(hessian):
            return Factor(hessian, damping, [raised] if raised else [])
        gram.mirror(hessian)
        damping = round(damping + DAMP_STEP, 6)
        raised = f"damping raised from {damp_percent:g} to {damping:g}"
    for power in range(FLOOR_STEPS + 1):
        floor = float(diagonal.max()) * 1e-6 * 10**power
        hessian.diagonal().copy_((diagonal + mean).clamp(min=floor))
        if inverse_cholesky_(hessian):
            return Factor(hessian, 1.0, [f"damping raised from {damp_percent:g} to 1, diagonal floor {floor:.2g}"])
        gram.mirror(hessian)
    return Factor(None, 1.0, ["not positive definite at any damping"])


def inverse_cholesky_(reversed_hessian: torch.Tensor) -> bool:
    """Overwrite K = J H J (J reverses the order) with the lower L of ``inv(H) = L L'``; False if H is not definite.

    K = M M' gives inv(H) = J inv(M)' inv(M) J = (J inv(M)' J)(J inv(M)' J)', and J inv(M)' J is lower triangular. One
    Cholesky and one triangular inverse, 2/3 n^3 operations, where Cholesky, inverse, Cholesky takes 4/3 n^3. On failure
    the strict lower triangle still holds K's.
    """
    if not gram.through_scipy(reversed_hessian):
        lower, info = torch.linalg.cholesky_ex(reversed_hessian)
        if int(info):
            return False
        eye = torch.eye(lower.shape[0], device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        reversed_hessian.copy_(inverse.T.flip(0, 1))
        return True
    from scipy.linalg import lapack

    fortran = reversed_hessian.numpy().T  # its lower triangle is our upper one
    _, info = lapack.spotrf(fortran, lower=1, clean=0, overwrite_a=1)
    if info:
        return False
    _, info = lapack.strtri(fortran, lower=1, overwrite_c=1)
    if info or not torch.isfinite(reversed_hessian.diagonal().sum()):
        return False
    # Our upper triangle now holds inv(M)'; reversing the buffer reverses both axes at once.
    _reverse_(reversed_hessian.view(-1))
    _clear_upper(reversed_hessian)
    return True


def permute_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """``matrix[order][:, order]`` in place, a band of rows, then of columns, at a time."""
    for start in range(0, matrix.shape[0], gram.TILE):
        band = matrix[start : start + gram.TILE]
        band.copy_(band[:, order])
    for start in range(0, matrix.shape[0], gram.TILE):
        band = matrix[:, start : start + gram.TILE]
        band.copy_(band[order])


def _clear_upper(matrix: torch.Tensor) -> None:
    """Zero the strict upper triangle."""
    for start in range(0, matrix.shape[0], gram.TILE):
        stop = start + gram.TILE
        matrix[start:stop, start:stop].tril_()
        matrix[start:stop, stop:].zero_()


def _reverse_(flat: torch.Tensor) -> None:
    """Reverse a vector in place, a few megabytes at a time."""
    size, step = flat.numel(), gram.TILE * gram.TILE
    for start in range(0, size // 2, step):
        stop = min(start + step, size // 2)
        head, end = flat[start:stop].clone(), flat[size - stop : size - start]
        flat[start:stop].copy_(end.flip(0))
        end.copy_(head.flip(0))
