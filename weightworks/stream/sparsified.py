"""A model whose small activations are taken for zero: thresholds put on it as hooks, and what they do counted.

A threshold is of the ``inputs`` of a layer (one number) or of the ``outputs`` of a module (one a channel). Values of magnitude
at most the threshold become zero. Nothing is saved by that here: engines would need kernels that skip zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

INPUTS, OUTPUTS = "inputs.", "outputs."  # NAME of a module follows


@dataclass
class Counted:
    """Zeros and values seen at each threshold, by its name."""

    zeros: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, x: torch.Tensor) -> None:
        self.zeros[name] = self.zeros.get(name, 0) + int((x == 0).sum())
        self.values[name] = self.values.get(name, 0) + x.numel()

    def shares(self) -> dict[str, float]:
        """The share of zeros at each threshold."""
        return {name: self.zeros[name] / max(self.values[name], 1) for name in self.zeros}


def cut(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """``x`` [..., channels] with zero where its magnitude is at most ``threshold``, a number or one a channel."""
    return torch.where(x.abs() <= threshold.to(x.device), torch.zeros((), dtype=x.dtype, device=x.device), x)


@contextmanager
def sparsified(model: nn.Module, thresholds: Mapping[str, torch.Tensor], *, count: bool = True) -> Iterator[Counted]:
    """``model`` with ``thresholds`` by name (``inputs.MODULE``, ``outputs.MODULE``) for the time of the context."""
    counted, handles = Counted(), []

    def before(name: str, threshold: torch.Tensor) -> Any:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = cut(given[0], threshold)
            if count:
                counted.add(name, x)
            return (x, *given[1:])

        return hook

    def after(name: str, threshold: torch.Tensor) -> Any:
        def hook(_: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
            x = cut(output, threshold)
            if count:
                counted.add(name, x)
            return x

        return hook

    try:
        for name, threshold in thresholds.items():
            if name.startswith(INPUTS):
                module = model.get_submodule(name.removeprefix(INPUTS))
                handles.append(module.register_forward_pre_hook(before(name, threshold)))
            else:
                module = model.get_submodule(name.removeprefix(OUTPUTS))
                handles.append(module.register_forward_hook(after(name, threshold)))
        yield counted
    finally:
        for handle in handles:
            handle.remove()
