"""A fine-tuned checkpoint's difference from its base as a LoRA adapter: its leading singular directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from merge.adapters._factors import generator, leading, split
from weightworks.stage.adapting import AdapterOptions, Made

if TYPE_CHECKING:
    import torch

PAPER = "Eckart and Young 1936; randomised: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4"
VERSION = 1
RANK = 32  # what fine-tunes by LoRA commonly have


class Options(AdapterOptions):
    """Options of extraction."""

    rank: int | None = Field(
        None, ge=1, description="rank of every update, 32 unless --energy is given; with it, the largest rank allowed"
    )
    energy: float | None = Field(
        None, gt=0, le=1, description="share of each difference's squared norm to keep, such as 0.99"
    )
    keep_whole: bool = Field(
        False, description="save what cannot be a low-rank update (norms, embeddings) whole, as modules_to_save"
    )
    ignored: list[str] = Field(default=[], description="modules to leave out, as globs or re:REGEX; may be repeated")


class Method:
    """W - W_0 is U sigma V in singular form; B = U sqrt(sigma), A = sqrt(sigma) V, of as many directions as are asked for."""

    BASE = "required"

    def __init__(self, options: Options) -> None:
        self.options = options

    def extract(self, name: str, delta: torch.Tensor, seed: int) -> Made:
        rank, energy = self.options.rank, self.options.energy
        triplets = leading(delta, RANK if rank is None and energy is None else rank, energy, generator(seed, name))
        return Made(split(*(one.double() for one in triplets)))
