"""Parameter-efficient retraining after pruning: biases, norms and masked low-rank adapters are trained, every zero stays.

Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs" (arXiv:2312.15230). The loss is the language
model's own. Adapters are added to the weights at the end, in float32, under the mask: the result is a checkpoint like the
one that was pruned.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.recover._training import Recovery, RecoveryOptions, WindowOptions
from weightworks.stage.training import Regime

PAPER = "Zimmer et al. 2023, arXiv:2312.15230"
VERSION = 1


class Options(RecoveryOptions, WindowOptions):
    """Options of PERP."""

    mode: Literal["retrain", "reconstruct"] = Field(
        "retrain",
        description="retrain: the whole model, on the language model's loss; reconstruct: block after block, to give what the "
        "original's give (needs a teacher; one block in memory at a time)",
    )

    @model_validator(mode="after")
    def _merges(self) -> Self:
        if self.adapter == "lora" and self.mode == "reconstruct":
            raise ValueError("adapter lora is not merged, so no block can be written: take mode retrain")
        if self.mode == "reconstruct":
            self.no_patience()
        return self


class Method(Recovery):
    """PERP as a modelwise method."""

    def __init__(self, options: Options) -> None:
        self.options: Options = options

    @property
    def by_blocks(self) -> bool:
        return self.options.mode == "reconstruct"

    def regime(self) -> Regime:
        options = self.options
        if not self.by_blocks:
            return options.regime()
        return options.regime(window=options.window, inputs=options.inputs, targets=options.targets)
