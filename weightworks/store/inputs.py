"""How the inputs of quantized layers are rounded, where engines multiply in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class InputScheme:
    """Elements of ``kind``, and ``group_size`` neighbouring inputs of a token (-1: all) that share a scale, found as the
    layer runs. ``scales`` says how these are rounded, as in weights: E4M3 ones lie under a scale of the layer that is found
    before."""

    kind: Literal["INT8", "E4M3", "E2M1"]
    group_size: int = -1
    scales: Literal["plain", "E8M0", "E4M3"] = "plain"

    def __str__(self) -> str:
        per = "one scale a token" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.kind}{'' if self.scales == 'plain' else f' with {self.scales} scales'}, {per}"
