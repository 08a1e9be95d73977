"""DSnoT, the repair of a mask: swap pruned and kept weights until the mean error of each output is small.

Zhang et al., "Dynamic Sparse No Training" (arXiv:2310.08915), algorithm 1. No weight changes its value, no row its count.
"""

from __future__ import annotations

import torch

from compress.columns import Columns
from compress.masks import Pattern

CYCLES = 50  # swaps a row at most
ENOUGH = 0.1  # of a mean error, in units of the output; both are the paper's


def repaired(
    mask: torch.Tensor, weight: torch.Tensor, columns: Columns, pattern: Pattern | None
) -> tuple[torch.Tensor, int]:
    """``mask`` bool [out, in] of ``weight`` [out, in] with swaps made, and how many they were.

    S_ij = W_ij mean(x_j); E_i = sum of S_ij over pruned j. A swap grows the pruned weight with the largest
    sign(E_i) S_ij / var(x_j), and drops, of the kept weights with sign(S_ij) = -sign(E_i), the one with the lowest
    |W_ij| rms(x_j); under a ``pattern``, one of the same group. A swap that would not bring E_i nearer to zero is not
    made, and the weight it would have grown is not tried again (the paper makes such swaps too).
    """
    mean, variance = columns.moments()
    mask, swaps = mask.clone(), 0
    signal, cost = weight * mean, weight.abs() * columns.norms()  # [out, in]
    gain = signal / variance.clamp(min=torch.finfo(torch.float32).tiny)
    error = signal.masked_fill(mask, 0).sum(1)  # [out]
    tried = mask.clone()  # what cannot be grown: kept, or of no use
    for _ in range(CYCLES):
        rows = (error.abs() > ENOUGH).nonzero().flatten()
        if rows.numel() == 0:
            break
        sign = error[rows].sign()[:, None]
        grow = (sign * gain[rows]).masked_fill(tried[rows], -torch.inf).argmax(1)  # [rows]
        able = mask[rows] & (sign * signal[rows] < 0)
        if pattern is not None:
            able &= torch.arange(weight.shape[1], device=weight.device) // pattern.of == (grow // pattern.of)[:, None]
        lowest, drop = cost[rows].masked_fill(~able, torch.inf).min(1)
        after = error[rows] - signal[rows, grow] + signal[rows, drop]
        good = torch.isfinite(lowest) & ~tried[rows, grow] & (after.abs() < error[rows].abs())
        tried[rows, grow] = True
        if not good.any() and bool(tried[rows].all()):
            break
        rows, grow, drop = rows[good], grow[good], drop[good]
        mask[rows, grow], mask[rows, drop] = True, False
        tried[rows, drop] = False
        error[rows] = after[good]
        swaps += rows.numel()
    return mask, swaps
