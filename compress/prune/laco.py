"""LaCo, layer collapse: from the top, blocks are added up into the one before them as long as the model stays alike.

Yang et al., "LaCo: Large Language Model Pruning via Layer Collapse" (arXiv:2402.11187), algorithm 1. A merge of m blocks
into block l is theta_l + sum over k of (theta_l+k - theta_l), as the paper writes it; the authors' code takes the running
sum off and so ends with the last block alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from weightworks.errors import MethodError
from weightworks.options import Options as BaseOptions
from weightworks.stage.reducing import Depth, Mixture, Shortened

PAPER = "Yang et al. 2024, arXiv:2402.11187"
VERSION = 1


class Options(BaseOptions):
    """Options of LaCo; names in the paper: C, I, L, H, T."""

    merge_layers: int = Field(7, ge=2, description="blocks that become one in a merge, at most (C)")
    interval: int = Field(1, ge=1, description="blocks to go down after a merge (I)")
    lowest_layer: int = Field(1, ge=0, description="lowest block that others are added to (L); the first has number 0")
    highest_layer: int | None = Field(
        None, ge=2, description="merges begin this many blocks from the bottom (H); default: all"
    )
    threshold: float = Field(
        0.45, gt=-1, lt=1, description="a merge stays if final hidden states are so alike (T), a cosine"
    )
    sentences: int = Field(5, ge=1, description="calibration windows that merges are tried on")
    sentence_length: int = Field(64, ge=2, description="tokens of each")


class Method:
    """Depth pruning by adding blocks up."""

    reduces = "blocks"

    def __init__(self, options: Options) -> None:
        self.options = options

    def leaves(self, blocks: int) -> tuple[int, bool]:
        if self.options.lowest_layer > blocks - 2:
            raise MethodError(
                f"prune.laco: the model has {blocks} blocks, so none is above block {self.options.lowest_layer}",
                hint="lower --lowest-layer",
            )
        return blocks, False

    def shorten(self, depth: Depth) -> Shortened:
        options, rows = self.options, list[dict[str, Any]]()
        found: list[Mixture] = [[(block, 1.0)] for block in range(depth.blocks)]
        low = options.lowest_layer
        place = max(low, min(options.highest_layer or depth.blocks, depth.blocks) - options.merge_layers)
        while place >= low:
            count = min(options.merge_layers - 1, len(found) - 1 - place)
            merged = collapsed(found, place, count)
            if count < 1 or not _possible(depth, merged[place]):
                place -= 1
                continue
            value = depth.trial(merged, similarity, options.sentences, options.sentence_length)
            good = value > options.threshold
            blocks = [block for block, _ in merged[place]]
            rows.append({"block": found[place][0][0], "with": blocks[1:], "similarity": value, "merged": good})
            found = merged if good else found
            place = min(place - options.interval, len(found) - options.merge_layers) if good else place - 1
        if len(found) == depth.blocks:
            best = max((row["similarity"] for row in rows), default=float("nan"))
            raise MethodError(
                f"prune.laco: no merge keeps final hidden states as alike as {options.threshold}; the best came to {best:.3f}",
                hint="lower --threshold, or --merge-layers",
            )
        return Shortened(found, rows)


def collapsed(found: Sequence[Mixture], place: int, count: int) -> list[Mixture]:
    """``found`` with the ``count`` mixtures after ``place`` added to the one there: c_l + sum of (c_l+k - c_l)."""
    weights: dict[int, float] = {}
    for mixture, factor in [(found[place], 1.0 - count), *((one, 1.0) for one in found[place + 1 : place + 1 + count])]:
        for block, weight in mixture:
            weights[block] = weights.get(block, 0.0) + factor * weight
    return [*found[:place], list(weights.items()), *found[place + 1 + count :]]


def similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    """The cosine of all final hidden states [seq, hidden] of a window, as one vector."""
    return float(torch.nn.functional.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0))


def _possible(depth: Depth, mixture: Mixture) -> bool:
    """Whether blocks can be added up, and those that vanish can go."""
    (base, _), *others = mixture
    return all(depth.alike(base, block) and depth.removable(block) for block, _ in others)
