"""ShortGPT, depth pruning: the blocks that change their hidden states least are dropped.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (arXiv:2403.03853).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from weightworks.errors import MethodError
from weightworks.options import Options as BaseOptions
from weightworks.stage.reducing import Depth, Shortened

PAPER = "Men et al. 2024, arXiv:2403.03853"
VERSION = 1


class Options(BaseOptions):
    """Options of depth pruning."""

    sparsity: float = Field(0.25, gt=0, lt=1, description="share of the blocks dropped, rounded to whole ones")
    layers: int | None = Field(None, ge=1, description="number of blocks dropped, in place of a share")

    def dropped(self, blocks: int) -> int:
        """How many of so many blocks go."""
        return round(blocks * self.sparsity) if self.layers is None else self.layers

    @property
    def amount(self) -> str:
        """What a folder is called after: ``s25``, or ``without-2``."""
        return f"s{100 * self.sparsity:g}" if self.layers is None else f"without-{self.layers}"


class Method:
    """Depth pruning by block influence."""

    reduces = "blocks"

    def __init__(self, options: Options) -> None:
        self.options = options

    def leaves(self, blocks: int) -> tuple[int, bool]:
        dropped = self.options.dropped(blocks)
        if not 0 < dropped < blocks:
            raise MethodError(
                f"prune.shortgpt: {dropped} of {blocks} blocks would be dropped; 1 to {blocks - 1} can be",
                hint="choose --layers",
            )
        return blocks - dropped, True

    def shorten(self, depth: Depth) -> Shortened:
        influence = [float(figure) for figure in depth.figures(Influence)]
        able = [block for block in range(depth.blocks) if depth.removable(block)]
        gone = set(sorted(able, key=lambda block: influence[block])[: self.options.dropped(depth.blocks)])
        rows: list[dict[str, Any]] = [
            {"block": block, "influence": value, "dropped": block in gone} for block, value in enumerate(influence)
        ]
        return Shortened([[(block, 1.0)] for block in range(depth.blocks) if block not in gone], rows)


class Influence:
    """BI = 1 - mean over tokens of cos(h, h'), h and h' being what goes into a block and comes out (equation 1).

    All tokens count, the first of a window too.
    """

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # [n, seq]
        self.total += cosine.sum(dtype=torch.float64).cpu()
        self.tokens += cosine.numel()

    def figure(self) -> float:
        return 1 - float(self.total) / self.tokens
