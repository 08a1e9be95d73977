"""What a model is trained on: windows of text or examples with their answers, in a seeded order, and others held out.

A window is learned whole, of an example only the answer. Nothing is padded before it is put into a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from weightworks.errors import CalibrationError
from weightworks.stream.calibration import Calibration

HELD_OUT = 4  # at most one row in so many is held out
IGNORED = -100  # stands for a token that is not learned, as cross_entropy has it


def keyed(seed: int, name: str) -> torch.Generator:
    """A generator of its own for ``name``: what others draw does not change it."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class Batch:
    """Rows side by side, int64 [n, longest]: ``tokens``, 0 where a row has ended, and ``labels``, IGNORED where nothing is
    learned. Tokens are seen by those after them alone, so what follows a row does not matter. ``places`` are the rows'."""

    tokens: torch.Tensor
    labels: torch.Tensor
    places: tuple[int, ...]

    @property
    def learned(self) -> int:
        """Tokens that are predicted: those learned, but the first of a row."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def padded(self, length: int) -> Batch:
        """The same with rows of ``length``."""
        more = (0, length - self.tokens.shape[1])
        pad = torch.nn.functional.pad
        return Batch(pad(self.tokens, more), pad(self.labels, more, value=IGNORED), self.places)

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.labels.to(device), self.places)

    def parts(self, count: int) -> Iterator[Batch]:
        """The same in at most so many parts."""
        start = 0
        for tokens, labels in zip(self.tokens.chunk(count), self.labels.chunk(count), strict=True):
            yield Batch(tokens, labels, self.places[start : start + len(tokens)])
            start += len(tokens)


@dataclass(frozen=True)
class Rows:
    """Rows of tokens end to end: ``tokens`` int32 [t], ``learned`` bool [t], row i from ``starts[i]`` to ``starts[i + 1]``."""

    tokens: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Rows:
        """Rows of tokens, each with what of it is learned."""
        lengths = torch.tensor([0, *(len(tokens) for tokens, _ in rows)])
        tokens = torch.tensor([token for row, _ in rows for token in row], dtype=torch.int32)
        learned = torch.tensor([one for _, flags in rows for one in flags], dtype=torch.bool)
        return cls(tokens, learned, lengths.cumsum(0))

    @classmethod
    def windows(cls, tokens: torch.Tensor) -> Rows:
        """Windows int64 [n, seq], learned whole."""
        count, length = tokens.shape
        flat = tokens.flatten().int()
        return cls(flat, torch.ones_like(flat, dtype=torch.bool), torch.arange(count + 1) * length)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def longest(self) -> int:
        return int(self.starts.diff().max())

    def batch(self, places: Sequence[int]) -> Batch:
        """The rows at ``places``."""
        spans = [(int(self.starts[place]), int(self.starts[place + 1])) for place in places]
        longest = max(stop - start for start, stop in spans)
        tokens = torch.zeros(len(spans), longest, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        for row, (start, stop) in enumerate(spans):
            tokens[row, : stop - start] = self.tokens[start:stop]
            labels[row, : stop - start] = self.tokens[start:stop].long().masked_fill(~self.learned[start:stop], IGNORED)
        return Batch(tokens, labels, tuple(places))

    def batches(self, size: int) -> Iterator[Batch]:
        """All rows in their order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))


@dataclass(frozen=True)
class Lessons:
    """Rows to train on, and ``held_out`` ones that are not. ``source`` says where they are from, ``requested`` how many were
    asked for, ``seq_len`` how many tokens a row may have; ``dropped`` counts rows of a data set left out, by reason."""

    rows: Rows
    held_out: Rows
    source: str
    requested: int
    seq_len: int
    seed: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, text: Calibration, held_out: int, seed: int) -> Lessons:
        """The windows of ``text``, ``held_out`` of them set aside, at most a quarter; a seeded choice."""
        count = text.tokens.shape[0]
        aside = torch.zeros(count, dtype=torch.bool)
        aside[torch.randperm(count, generator=keyed(seed, "held out"))[: set_aside(count, held_out, text.source)]] = (
            True
        )
        rows, others = Rows.windows(text.tokens[~aside]), Rows.windows(text.tokens[aside])
        return cls(rows, others, text.source, text.requested, text.tokens.shape[1], seed)

    @property
    def digest(self) -> str:
        """sha256 of all that is learned and measured."""
        parts = (self.rows, self.held_out)
        tensors = [tensor for part in parts for tensor in (part.tokens, part.learned, part.starts)]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    def told(self, asked: int) -> str:
        """The rows in words, ``asked`` being the tokens a row that were asked for."""
        count = len(self.rows)
        text = f"{count} rows of at most {self.rows.longest} tokens from {self.source}, {len(self.held_out)} more to measure by"
        if count + len(self.held_out) < self.requested:
            text += f" (asked for {self.requested}, there are no more)"
        if self.dropped:
            text += "; left out: " + ", ".join(f"{number} {reason}" for reason, number in self.dropped.items())
        return text + (f" (asked for {asked} tokens, the model takes no more)" if self.seq_len < asked else "")

    def facts(self) -> dict[str, Any]:
        """What the report says of them."""
        return {
            "source": self.source,
            "windows": len(self.rows),
            "windows_requested": self.requested,
            "windows_held_out": len(self.held_out),
            "seq_len": self.seq_len,
            "tokens": self.rows.tokens.numel(),
            "tokens_learned": int(self.rows.learned.sum()),
            "digest": self.digest,
            **({"dropped": dict(self.dropped)} if self.dropped else {}),
        }

    def batch(self, step: int, size: int) -> Batch:
        """The rows of a step."""
        return self.rows.batch(self.places(step, size))

    def places(self, step: int, size: int) -> list[int]:
        """Their places: all rows come once, in random order, then again in another."""
        count = len(self.rows)
        numbers = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {number // count for number in numbers}}
        return [orders[number // count][number % count] for number in numbers]

    def passed(self, steps: int, size: int) -> int:
        """Tokens in the rows of so many steps."""
        epochs, rest = divmod(steps * size, len(self.rows))
        lengths = self.rows.starts.diff()
        return epochs * int(lengths.sum()) + int(lengths[self._order(epochs)[:rest]].sum())

    def _order(self, epoch: int) -> Sequence[int]:
        found: list[int] = torch.randperm(len(self.rows), generator=keyed(self.seed, f"epoch {epoch}")).tolist()
        return found


def set_aside(count: int, wanted: int, source: str) -> int:
    """How many of ``count`` rows are held out. Raises :class:`CalibrationError` where none would be left."""
    if count < 2:
        raise CalibrationError(
            f"{source}: {count} window or example is too little to train on: one is held out to measure the loss",
            hint="give a longer text, or a smaller --seq-len",
        )
    return min(wanted, max(1, count // HELD_OUT))
