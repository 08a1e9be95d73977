"""Activating while pruning: part of what a round prunes are negative weights that training has hardly moved.

Each of them gone raises what a ReLU sees, so fewer units are silent (the rule of AP, "activate-while-pruning", as its authors'
code has it: of the 20 % that a round takes, a tenth).
"""

from __future__ import annotations

import torch

from weightworks.errors import MethodError

RECTIFIED = ("relu", "relu2", "relu_squared", "relu6")


def refuse_others(config: object, label: str) -> None:
    """Raise :class:`MethodError` for a model whose units are not rectified; ``config`` is that of transformers."""
    keys = ("hidden_act", "activation_function", "hidden_activation", "activation")
    found = {key: value for key in keys if (value := getattr(config, key, None)) is not None}
    if not any(value in RECTIFIED for value in found.values()):
        told = ", ".join(f"{key} = {value}" for key, value in found.items()) or "no activation is named"
        raise MethodError(
            f"{label}: activate is for models with ReLU, whose silent units it wakes; in config.json {told}",
            hint="leave --activate out",
        )


def without_still(mask: torch.Tensor, weight: torch.Tensor, start: torch.Tensor, count: int) -> torch.Tensor:
    """``mask`` bool [out, in] narrowed by ``count``: of the negative weights those that are nearest to ``start``, ties by index,
    and where there are not enough of them the smallest of the others."""
    moved = (weight - start).abs().masked_fill_(~(mask & (weight < 0)), torch.inf).flatten()
    number = min(count, int(moved.isfinite().sum()))
    narrowed = mask.flatten().clone()
    narrowed[torch.sort(moved, stable=True).indices[:number]] = False
    if number < count:
        rest = weight.abs().flatten().masked_fill(~narrowed, torch.inf)
        narrowed[torch.sort(rest, stable=True).indices[: count - number]] = False
    return narrowed.view_as(mask)
