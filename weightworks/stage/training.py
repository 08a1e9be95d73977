"""The shape of a method that trains: what of a model it trains, what it does between rounds, and how the loop is to run.

The engine holds the model, feeds it, keeps masks and optimizer, saves and continues; a method only decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from weightworks.options import Options

if TYPE_CHECKING:
    from weightworks.stream.whole import Outline, Subset, Whole

RECONSTRUCTED = 128  # windows that blocks are trained on


@dataclass(frozen=True)
class Imitation:
    """What a whole model imitates of a teacher: the loss is a sum of three, each a mean over the tokens that are learned.

    ``text`` weighs the language model's loss, ``logits`` the divergence from the teacher's at a ``temperature``, ``states`` the
    relative distance of hidden states after every block. ``streamed``: the teacher passes all rows once, block by block, before
    the training, and its hidden states wait on disk; otherwise it is whole in memory and passes each batch.
    """

    text: float
    logits: float
    states: float
    temperature: float = 1.0
    streamed: bool = False


@dataclass(frozen=True)
class Regime:
    """How the loop runs. Of each of ``rounds`` rounds ``steps`` optimizer steps, a step on ``batch`` windows in ``parts``.

    ``decay`` is AdamW's, of matrices; ``clip`` the norm that gradients are scaled down to, 0 for none; ``held_out`` how many
    windows are set aside. After step ``remember`` of the first round (0: before its first) all trained values are put by, to
    go back to. With ``patience`` the held-out loss is looked at after every ``look`` steps; a round ends once so many looks in
    turn were no better than the best, and has the values of the best. ``own`` is how many bytes the method keeps of each weight
    that has a mask. ``recompute`` runs blocks again in the backward pass;
    None leaves it to the memory there is.

    With a ``window`` blocks are trained one after the other, in one round each, to give what the original's give: ``inputs``
    tells whose inputs a block gets, of the pruned model or the original, ``targets`` whether the original's block gets the
    same (local) or those of its own. Of a whole model, ``imitates`` says what it learns of a teacher beside the text.
    """

    steps: int
    batch: int
    rounds: int = 1
    parts: int = 1
    decay: float = 0.0
    clip: float = 0.0
    held_out: int = 16
    remember: int | None = None
    recompute: bool | None = None
    window: Literal["block", "attn", "mlp", "both"] | None = None
    inputs: Literal["sparse", "dense"] = "sparse"
    targets: Literal["local", "trajectory"] = "local"
    imitates: Imitation | None = None
    patience: int | None = None
    look: int = 10
    own: int = 1

    @property
    def windows(self) -> int:
        """As many as all steps take, each once, and those held out; blocks all read the same."""
        return (self.rounds * self.steps * self.batch if self.window is None else RECONSTRUCTED) + self.held_out


class Modelwise(Protocol):
    """A method that trains the whole model in memory.

    It keeps no state of its own: what must survive an interruption is in the model (``Whole.extra``) or in the facts that
    ``begin`` and ``end`` return, which are JSON-compatible, journalled, and part of the report.

    A method whose layers change as they are trained has ``approach(share, model)``, called before every step and after the
    last with the share of all steps that is done; it must come to the same from there alone, and from ``Whole.extra``.
    """

    options: Options

    def regime(self) -> Regime:
        """How the loop runs."""

    def subset(self, outline: Outline) -> Subset:
        """What is trained of what there is. Nothing is loaded yet."""

    def begin(self, number: int, model: Whole) -> dict[str, Any]:
        """Make ready for round ``number``: choose masks, go back to earlier values."""

    def rates(self, number: int, begun: Mapping[str, Any]) -> Sequence[float]:
        """The learning rate of each step of a round, given the facts of its beginning."""

    def end(self, number: int, model: Whole) -> dict[str, Any]:
        """What is to be told of a round that is over."""

    def told(self, weight: torch.Tensor, original: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """What is to be told of a pruned weight float32 [out, in] at the end, the checkpoint's beside it, and its mask."""
