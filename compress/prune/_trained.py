"""What methods have in common that prune single weights while the model is trained."""

from __future__ import annotations

from collections.abc import Sequence

from compress.training import Trainer
from weightworks.stage.protocols import Survey


class TrainedPruner(Trainer):
    """A modelwise method that makes masks."""

    masks = True

    def surveys(self) -> Sequence[Survey]:
        return []

    def refusal(self, shape: tuple[int, int]) -> str | None:
        refusal: str | None = self.options.refusal(shape)
        return refusal
