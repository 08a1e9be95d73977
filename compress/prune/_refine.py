"""The best values of the weights that stay, for a mask that is settled: least squares by conjugate gradients.

A sweep makes up for a pruned weight in the columns after it alone. The columns before could help too: for row w of W and
kept columns K the best values are w' = w_K + w_P H_PK inv(H_KK). All rows are solved side by side, each with its own K, by
the method of conjugate gradients with the diagonal of H as preconditioner; a step costs one product with H.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from weightworks.stream.gram import bfloat16_products

COARSE = 8  # steps up to which products may be of bfloat16: what that costs is far less than a step wins
BAND = 1 << 21  # weights at a time: rows are independent, and six of their size are held


def refine(result: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, steps: int) -> None:
    """Improve ``result`` [out, in], zero outside ``mask``, in place so that tr(E H E') falls, E = result - weight.

    ``hessian`` [in, in] is damped. Every step lowers the loss of every row, until the products can tell no more.
    """
    height = max(1, BAND // weight.shape[1])
    with bfloat16_products() if steps <= COARSE else nullcontext():
        for new, old, kept in zip(result.split(height), weight.split(height), mask.split(height), strict=True):
            _descend(new, old, kept, hessian, steps)


def _descend(result: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor, steps: int) -> None:
    """:func:`refine` for a band of rows."""
    shrink = 1 / hessian.diagonal()  # [in]
    residual = torch.sub(weight, result) @ hessian  # [out, in]
    residual *= kept
    scaled = residual * shrink
    direction = scaled.clone()
    power = (residual * scaled).sum(1)  # [out]
    floor = power * 1e-9
    step = torch.empty_like(residual)
    for number in range(steps):
        torch.mm(direction, hessian, out=step)
        step *= kept
        length = torch.where(power > floor, power / (direction * step).sum(1).clamp(min=1e-30), 0.0)[:, None]
        result.addcmul_(length, direction)
        if number + 1 == steps:
            break
        residual.addcmul_(length, step, value=-1)
        torch.mul(residual, shrink, out=scaled)
        before, power = power, (residual * scaled).sum(1)
        torch.addcmul(scaled, (power / before.clamp(min=1e-30))[:, None], direction, out=direction)
