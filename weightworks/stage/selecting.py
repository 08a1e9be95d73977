"""The shape of a method that chooses rows of a data set to train on: what it is told of them, and what it answers.

A method module defines ``Options`` (a ``budget`` among them), ``PAPER``, ``VERSION`` and a class ``Method``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from weightworks.options import Options

CHOSEN, NO_ROOM = "chosen", "no room in the budget"  # what became of a row; a method may have reasons of its own


class Table(Protocol):
    """Float32 rows that may be too many for memory."""

    shape: tuple[int, int]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop``, [n, width]."""


@dataclass(frozen=True)
class Pool:
    """The rows that can be trained on, in the order of the data set.

    ``texts`` are prompt and answer of each; ``tokens`` int64 [n, 2] counts those of prompt and answer. ``embeddings`` [n, d] say
    where the prompts lie, ``degradation`` float64 [n] how far the model's predictions of the answers are from the original's
    (nats a token); both are None for a method that does without.
    """

    texts: Sequence[str]
    tokens: torch.Tensor
    seed: int
    embeddings: Table | None = None
    degradation: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class Choice:
    """A method's answer: the rows chosen, best first, and what it knows of all rows.

    ``scores`` are columns by name, a value a row; ``outcomes`` say of each row that it is :data:`CHOSEN`, or why not. ``facts``
    are figures for the report; ``shortfalls`` say what could not be done as asked.
    """

    order: list[int]
    outcomes: list[str]
    scores: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    shortfalls: list[str] = field(default_factory=list)


class Selecting(Protocol):
    """A method that chooses rows. One that ``measures`` needs embeddings and degradation, and so the original model; its
    options say by ``embedding`` what prompts are embedded by."""

    options: Options
    measures: bool

    def select(self, pool: Pool, count: int, say: Callable[[str], None]) -> Choice:
        """Choose at most ``count`` rows. ``say`` takes lines for people."""
