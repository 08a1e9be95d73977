"""The shapes of methods that make a model smaller: fewer units in a block, fewer blocks, fewer experts.

A method says what goes; what tensors and configuration that means, and that nothing else changes, is the engine's.
``reduces`` tells the shapes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from weightworks.options import Options
from weightworks.stage.protocols import Statistics

Kind = Literal["channels", "heads"]
Mixture = Sequence[tuple[int, float]]  # what one block or expert is made of: (number in the source, weight), base first


@dataclass(frozen=True, slots=True)
class Part:
    """Units of one part of block ``block`` that can go: channels of a feed-forward part, or heads of attention.

    ``groups`` of ``heads`` each, of which ``kept_heads`` of ``kept_groups`` stay; a channel is a group of one. A head is
    ``size`` neighbouring inputs of the weight that writes to the block's stream.
    """

    block: int
    name: str
    kind: Kind
    groups: int
    heads: int
    size: int
    kept_groups: int
    kept_heads: int

    @property
    def count(self) -> int:
        return self.groups * self.heads

    @property
    def kept(self) -> int:
        return self.kept_groups * self.kept_heads


@dataclass
class Choice:
    """Which units of a part stay: ``heads`` int64 [kept_groups, kept_heads], ascending.

    ``weight`` [out, kept * size] float32 are new values of what stays of the writing weight; None leaves it. ``facts``
    and ``fallbacks`` are as in a :class:`weightworks.stage.protocols.Solution`.
    """

    heads: torch.Tensor
    weight: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)


class Narrowing(Protocol):
    """``reduces = "units"``: looks at the inputs of the weight that each part writes with, at gradients, or at both.

    ``kinds`` are those of units that go. With ``inputs`` off no text is sent through for statistics; with ``gradients``
    the method has ``trace`` and ``traced`` as in :class:`weightworks.stage.protocols.Gradientwise`.
    """

    options: Options
    kinds: Sequence[Kind]
    inputs: bool
    gradients: bool

    def stays(self, kind: Kind, groups: int, heads: int, size: int) -> tuple[int, int] | None:
        """How many groups stay of a part, and heads of each; None: parts of this kind are left alone."""

    def held(self, columns: int) -> int:
        """Bytes of the statistics of so many inputs."""

    def watch(self, columns: int, device: torch.device) -> Statistics:
        """Fresh statistics of the inputs of a writing weight."""

    def weigh(self, weight: torch.Tensor, traced: Any, axis: int) -> torch.Tensor:
        """What each row (``axis`` 0) or column (1) of float32 ``weight`` [out, in] is worth by its gradients."""

    def choose(self, part: Part, weight: torch.Tensor, statistics: Any, worth: torch.Tensor | None) -> Choice:
        """What stays of ``part``, whose writing weight is float32 ``weight`` [out, count * size].

        ``statistics`` is None without ``inputs``; ``worth`` float64 [groups, heads] is the sum of what :meth:`weigh` gave
        for all weights of the part, None without ``gradients``. What a group shares is dealt out to its heads.
        """


class Passing(Protocol):
    """What is kept of the hidden states that a block takes and gives."""

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take in a batch of both, [n, seq, hidden]."""

    def figure(self) -> Any:
        """What they come to: JSON-compatible data."""


class Depth(Protocol):
    """The unchanged model, for methods that decide about whole blocks."""

    @property
    def blocks(self) -> int: ...

    def removable(self, block: int) -> bool:
        """Whether the configuration can express a model without this block."""

    def alike(self, one: int, other: int) -> bool:
        """Whether two blocks have the same tensors, so that they can be added up."""

    def figures(self, make: Callable[[], Passing]) -> list[Any]:
        """What goes into each block and comes out, in one pass over the calibration windows."""

    def trial(
        self,
        mixtures: Sequence[Mixture],
        compare: Callable[[torch.Tensor, torch.Tensor], float],
        rows: int,
        length: int,
    ) -> float:
        """The mean over the first ``rows`` windows, cut to ``length`` tokens, of what ``compare`` says of the final
        hidden states [seq, hidden] of the model and of one whose blocks are ``mixtures``."""


@dataclass
class Shortened:
    """The blocks of the shorter model; ``rows`` of the report, ``facts`` of the whole."""

    mixtures: list[Mixture]
    rows: list[dict[str, Any]]


class Shortening(Protocol):
    """``reduces = "blocks"``."""

    options: Options

    def leaves(self, blocks: int) -> tuple[int, bool]:
        """How many of so many blocks stay at most, and whether exactly so many do; raises if that makes no sense."""

    def shorten(self, depth: Depth) -> Shortened:
        """Which blocks stay, and of what they are made."""


class Routing(Protocol):
    """What is kept of the tokens that a mixture of experts routes."""

    def add(self, logits: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, norms: torch.Tensor) -> None:
        """Take in a batch: router logits [tokens, experts]; for each token its experts ``index``, their ``weights`` and
        the ``norms`` of what they gave, [tokens, k] each."""


@dataclass
class Experts:
    """The experts of the smaller mixture, by ascending base; the router keeps the row of each base."""

    mixtures: list[Mixture]
    facts: dict[str, Any] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)


class Thinning(Protocol):
    """``reduces = "experts"``."""

    options: Options

    def leaves(self, experts: int) -> int:
        """How many of so many experts stay; raises if that makes no sense."""

    def watch(self, experts: int, device: torch.device) -> Routing:
        """Fresh statistics of a mixture."""

    def choose(self, statistics: Any, experts: int) -> Experts:
        """Which of so many experts stay, and of what they are made."""
