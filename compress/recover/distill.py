"""Distillation of the original: a pruned model learns to say what the original says, and to think as it does.

Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531): the divergence from the distribution of the
next token that the original gives. Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models"
(SquareHead, arXiv:2310.06927): the relative distance of hidden states after every block. The language model's own loss may be
added. What is trained is any of PERP's parts, or all weights; masks are held.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.recover._training import Recovery, RecoveryOptions
from weightworks.stage.training import Imitation, Regime

PAPER = "Hinton et al. 2015, arXiv:1503.02531; Kurtic et al. 2023, arXiv:2310.06927"
VERSION = 1


class Options(RecoveryOptions):
    """Options of distillation."""

    logits_weight: float = Field(
        1.0,
        ge=0,
        description="of the divergence from the teacher's next token: T^2 KL(teacher || model) at temperature T",
    )
    states_weight: float = Field(
        1.0,
        ge=0,
        description="of the relative squared distance to the teacher's hidden states, the mean over all blocks",
    )
    text_weight: float = Field(0.0, ge=0, description="of the language model's loss")
    temperature: float = Field(1.0, gt=0, le=100, description="what logits are divided by before they are compared")
    teacher_in: Literal["memory", "disk"] = Field(
        "memory",
        description="where the teacher is: memory: whole, it passes every batch; disk: it passes all rows once, block by "
        "block, and its hidden states wait on disk",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.logits_weight + self.states_weight:
            raise ValueError("logits_weight and states_weight are 0: nothing of the teacher is imitated")
        return self


class Method(Recovery):
    """Distillation as a modelwise method."""

    def __init__(self, options: Options) -> None:
        self.options: Options = options

    def regime(self) -> Regime:
        options = self.options
        imitates = Imitation(
            text=options.text_weight,
            logits=options.logits_weight,
            states=options.states_weight,
            temperature=options.temperature,
            streamed=options.teacher_in == "disk",
        )
        return options.regime(imitates=imitates)
