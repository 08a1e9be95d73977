"""Block-wise fine-tuning: all kept weights of a block are trained to give what the original's block gives, one block at a time.

Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs" (arXiv:2402.12419). The loss is the mean squared error of
the outputs of a block; masks are held. In memory are one block and the original's beside it.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.rates import SCHEDULES
from compress.recover._training import Recovery, WindowOptions
from compress.schemes import ALWAYS_IGNORED, Patterns
from weightworks.stage.training import Regime

PAPER = "Guo et al. 2024, arXiv:2402.12419"
VERSION = 1


class Options(WindowOptions):
    """Options of block-wise fine-tuning."""

    steps: int = Field(160, ge=1, description="optimizer steps, of each block")
    schedule: Literal["ft", "lrw", "slr", "clr", "llr"] = Field("llr", description=SCHEDULES)
    lr: float = Field(2e-4, gt=0, description="highest learning rate (AdamW)")
    ignore: Patterns = Field(
        default=[], description="layers left as they are: globs, or regular expressions after re: (routers always are)"
    )

    @model_validator(mode="after")
    def _by_blocks(self) -> Self:
        self.no_patience()
        return self

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]


class Method(Recovery):
    """Block-wise fine-tuning as a modelwise method."""

    by_blocks = True
    parts = ("weights",)

    def __init__(self, options: Options) -> None:
        self.options: Options = options

    def regime(self) -> Regime:
        options = self.options
        return options.regime(window=options.window, inputs=options.inputs, targets=options.targets)
