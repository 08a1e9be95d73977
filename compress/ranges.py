"""The largest magnitudes of weights and inputs, for formats with a scale a tensor (NVFP4), and layers that share one.

Serving engines multiply layers that read the same input (q, k, v; gate, up) as one matrix, which has one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightworks.stage.protocols import Survey, Target
from weightworks.store.floats import FloatScheme
from weightworks.store.packing import Scheme

UNSEEN = "saw no inputs, their scale is 1"


class Largest:
    """The largest magnitude of the inputs of a linear; 0 before any was seen. What is not finite is passed over."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.value = torch.zeros((), device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs [tokens, in]."""
        top = inputs.abs().amax().float()
        self.value = torch.where(torch.isfinite(top), torch.maximum(self.value, top), self.value)


def needed(scheme: Scheme) -> bool:
    """Whether a scheme has scales a tensor."""
    return isinstance(scheme, FloatScheme) and scheme.scales == "E4M3"


def survey(scheme: Scheme) -> Survey:
    """The pass that finds them: by tensor ``weight`` and, if inputs are rounded, ``inputs``; layers of one part share them."""
    return Survey(_look, _conclude, Largest if scheme.inputs is not None else None)


def _look(weights: Sequence[torch.Tensor], statistics: Sequence[Any], targets: Sequence[Target], found: Any) -> Any:
    return [
        [target.name, float(weights[place].abs().max()), 0.0 if seen is None else float(seen.value)]
        for place, (target, seen) in enumerate(zip(targets, statistics, strict=True))
    ]


def _conclude(figures: Sequence[Any], found: Any) -> Any:
    rows = [row for part in figures for row in part]
    tops: dict[str, float] = {}
    for name, weight, _ in rows:
        tops[part_of(name)] = max(weight, tops.get(part_of(name), 0.0))
    return {name: {"weight": tops[part_of(name)], "inputs": inputs} for name, _, inputs in rows}


def part_of(name: str) -> str:
    """The part of the block that a layer's weight ``name`` is in: ``model.layers.0.self_attn`` of its ``q_proj.weight``."""
    return name.removesuffix(".weight").rpartition(".")[0]
