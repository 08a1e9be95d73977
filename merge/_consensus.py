"""Task vectors put together, all of them or those that agree in sign (Yadav et al. 2023, arXiv:2306.01708, section 3).

tau_i [rows, ...] is the task vector of model i, w_i its weight, gamma the elected sign of every element. Everything is
done in place: at most two tensors are made besides the task vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightworks.stage.merging import Slab

NOTHING = 1e-8  # sums of agreeing weights below this are no divisor; mergekit's figure


def taken(slab: Slab) -> list[torch.Tensor]:
    """The task vectors, in the memory of ``slab.models``, which are used up."""
    assert slab.base is not None
    return [model.sub_(slab.base) for model in slab.models]


def trim(delta: torch.Tensor, threshold: float) -> torch.Tensor:
    """``delta`` with all of lesser magnitude than ``threshold`` set to zero, in place."""
    if threshold <= 0:
        return delta
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).item()  # hardshrink keeps what is greater
    return torch.hardshrink(delta, below, out=delta)


def fuse(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    election: str,
    normalize: bool,
    tied: float = 0.0,
) -> torch.Tensor:
    """sum_i w_i tau_i over the models that agree with the elected sign, or over all if ``election`` is "none".

    "plain" elects gamma = sgn(sum_i tau_i), and where the sum is zero ``tied``: 1, -1, or 0 for neither. "weighted"
    elects gamma = sgn(sum_i w_i tau_i), positive where the sum is zero, and looks at the signs of w_i tau_i. With
    ``normalize`` the sum is divided by that of the weights of the models that agree, at each element; a model whose
    tau_i is zero there does not. Where no model agrees the result is zero. ``deltas`` are used up.
    """
    if election == "weighted":
        scaled(deltas, weights)
        signs = elected(deltas, 1.0)
        return agreeing(deltas, [1.0] * len(deltas), weights, signs, normalize=normalize)
    if election == "plain":
        return agreeing(deltas, weights, weights, elected(deltas, tied), normalize=normalize)
    scaled(deltas, weights)
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    return total.div_(sum(weights)) if normalize else total


def elected(deltas: Sequence[torch.Tensor], tied: float) -> torch.Tensor:
    """The sign of the sum of ``deltas``, ``tied`` where that is zero."""
    signs = deltas[0].clone()
    for delta in deltas[1:]:
        signs.add_(delta)
    signs.sign_()
    return signs if tied == 0 else signs.add_(tied / 2).sign_()


def agreeing(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    shares: Sequence[float],
    signs: torch.Tensor,
    *,
    normalize: bool,
) -> torch.Tensor:
    """sum_i w_i tau_i over the models whose sign is ``signs``, divided by the sum of their ``shares``; uses up all."""
    total = torch.zeros_like(signs)
    divisor = torch.zeros_like(signs) if normalize else None
    for delta, weight, share in zip(deltas, weights, shares, strict=True):
        total.add_(delta.mul_(signs).clamp_(min=0), alpha=weight)
        if divisor is not None:
            divisor.add_(delta.sign_(), alpha=share)
    if divisor is not None and min(shares) >= 0:
        total.div_(torch.threshold_(divisor, NOTHING, 1.0))  # several times faster than a mask
    elif divisor is not None:
        total.div_(divisor.masked_fill_(divisor.abs() < NOTHING, 1.0))
    return total.mul_(signs)


def scaled(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
    """Each of ``deltas`` times its weight, in place."""
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1:
            delta.mul_(weight)
