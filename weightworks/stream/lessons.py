"""What a model is trained on: windows of text in a seeded order, and others held out to measure the loss on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.errors import CalibrationError
from weightworks.stream.calibration import Calibration

HELD_OUT = 10  # at most one window in so many is held out


def keyed(seed: int, name: str) -> torch.Generator:
    """A generator of its own for ``name``: what others draw does not change it."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class Lessons(Calibration):
    """Windows to train on, int64 [windows, seq], and ``held_out`` ones, int64 [h, seq], that are not."""

    held_out: torch.Tensor
    seed: int

    @classmethod
    def of(cls, text: Calibration, held_out: int, seed: int) -> Lessons:
        """``text`` with ``held_out`` of its windows set aside, at most a tenth; a seeded choice."""
        count = text.tokens.shape[0]
        if count < 2:
            raise CalibrationError(
                f"{text.source}: {count} window is too little to train on: one is held out to measure the loss",
                hint="give a longer text, or a smaller --seq-len",
            )
        order = torch.randperm(count, generator=keyed(seed, "held out"))
        aside = min(held_out, max(1, count // HELD_OUT))
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[order[:aside]] = True
        return cls(text.tokens[~chosen], text.source, text.requested, text.tokens[chosen], seed)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes() + self.held_out.numpy().tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        facts = super().facts()
        return {**facts, "windows_held_out": self.held_out.shape[0]}

    def batch(self, step: int, size: int) -> torch.Tensor:
        """The windows of a step, int64 [size, seq]: all windows come once, in random order, then again in another."""
        count = self.tokens.shape[0]
        places = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return self.tokens[[int(orders[place // count][place % count]) for place in places]]

    def _order(self, epoch: int) -> Sequence[int]:
        return torch.randperm(self.tokens.shape[0], generator=keyed(self.seed, f"epoch {epoch}")).tolist()
