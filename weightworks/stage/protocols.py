"""The shapes of work a method can have, and what passes between a method and its engine.

A method module defines ``Options``, ``PAPER``, ``VERSION`` and a class ``Method`` of one of these shapes; the engine
does the reading, logging and saving. Protocols, not base classes: nothing is inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightworks.options import Options
from weightworks.stage.settings import Settings
from weightworks.store.packing import Encoded, Scheme

if TYPE_CHECKING:
    from weightworks.store.factors import Factors


@dataclass(frozen=True, slots=True)
class Target:
    """What a method must know of the place its result is stored in.

    ``name`` is the checkpoint tensor; ``scale_dtype`` the dtype scales are stored in; ``min_zero`` the smallest zero
    point the container can hold. ``block`` is the number of the decoder block it is in. ``keep`` is how many of its
    weights stay, where surveys have shared that out over the model; ``found`` is what else they found of it. ``dtype`` is
    that of a dense result. ``scheme`` is the weight's own, where not all have that of the method.
    """

    name: str
    scale_dtype: torch.dtype
    min_zero: int = 0
    block: int = 0
    keep: int | None = None
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)  # read when first made: torch loads late
    found: Any = None
    scheme: Scheme | None = None


@dataclass
class Solution:
    """A method's answer for one weight: the new weight, figures for the report, and what fell short.

    ``weight`` is quantized, or a dense float32 [out, in]. ``facts`` are figures by name. ``fallbacks`` say in words where
    the method could not be applied as asked: they reach the report, the model card, and ``--strict``. ``mask`` bool
    [out, in] of a method that prunes is True where a weight is kept; where it is not, ``weight`` is zero. ``factors`` are
    what ``weight`` is the product of, in the target's dtype, of a method that is :class:`Factoring`.
    """

    weight: Encoded | torch.Tensor
    facts: dict[str, Any] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    mask: torch.Tensor | None = None
    factors: Factors | None = None

    def dense(self) -> torch.Tensor:
        """The weight in float32 [out, in]."""
        return self.weight if isinstance(self.weight, torch.Tensor) else self.weight.dequantize()


class Statistics(Protocol):
    """What a blockwise method keeps of the inputs of a group of linears."""

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs [tokens, in]."""


class Blockwise(Protocol):
    """A method that looks at the inputs of each linear of a block, then replaces its weight.

    One whose statistics take other than the 4 in^2 bytes of a matrix of second moments says so by ``held(columns)``, one
    that needs more beside them while it solves by ``working(columns)``. With ``together = True`` all inputs of a block are
    watched before any of its weights is replaced, in one pass where memory allows; else a linear is watched when those it
    depends on have their new weights. With ``paired = True`` statistics get inputs in pairs, ``add(inputs, unrounded)``:
    the second [tokens, in] is what the unchanged model makes of the same tokens, None where it need not be of the same.
    """

    options: Options

    def scheme(self) -> Scheme | None:
        """How results are quantized; None if they are dense."""

    def watch(self, columns: int, device: torch.device) -> Statistics:
        """Fresh statistics for a group of linears with ``columns`` inputs."""

    def solve(self, weights: list[torch.Tensor], statistics: Any, targets: Sequence[Target]) -> list[Solution]:
        """New weights for float32 ``weights`` [out, in] that read the same input; the list and the statistics may be used up."""


class Gradients(Protocol):
    """What a method of gradients keeps of those of one weight."""

    def add(self, gradient: torch.Tensor) -> None:
        """Take in the gradient [out, in] of the mean loss of one calibration window."""


class Gradientwise(Protocol):
    """A method that looks at the gradients of the unchanged model's loss, one a calibration window."""

    options: Options

    def scheme(self) -> Scheme | None:
        """How results are quantized; None if they are dense."""

    def traced(self, elements: int, count: int) -> int:
        """Bytes that :meth:`trace` takes."""

    def trace(self, elements: int, count: int, device: torch.device) -> Gradients:
        """A place for ``count`` gradients of a weight of so many elements."""

    def answer(self, weight: torch.Tensor, traced: Any, target: Target) -> Solution:
        """The new weight for float32 ``weight`` [out, in]; what was traced may be used up."""


def by_gradients(method: Any) -> bool:
    """Whether a method looks at gradients; one of another shape that can says by ``gradients`` whether it does."""
    return hasattr(method, "trace") and bool(getattr(method, "gradients", True))


class Tensorwise(Protocol):
    """A method that needs nothing but the weight itself."""

    options: Options

    def scheme(self) -> Scheme | None:
        """How results are quantized; None if they are dense."""

    def apply(self, weight: torch.Tensor, target: Target) -> Solution:
        """The new weight for float32 ``weight`` [out, in]."""


@dataclass(frozen=True)
class Survey:
    """A pass over the whole model before any weight is changed, for methods that share something out over it.

    A method that needs some has ``surveys()``, which lists them in the order they are made; the last one's finding is, by
    tensor, how many weights stay (``Target.keep``), or else what the method wants to know (``Target.found``). Figures and
    findings are JSON-compatible: they are journalled.

    ``look(weights, statistics, targets, found)`` gives the figures of a block's linears (float32 [out, in], read when
    indexed), ``found`` being the finding of the survey before, None at first. ``statistics`` holds what ``watch`` made
    of their inputs in the unchanged model. Without ``watch`` no model is run, and each linear is looked at by itself.
    ``conclude(figures, found)`` makes the finding out of the figures of all looks, in the order of the model.
    """

    look: Callable[[Sequence[torch.Tensor], Sequence[Any], Sequence[Target], Any], Any]
    conclude: Callable[[Sequence[Any], Any], Any]
    watch: Callable[[int, torch.device], Statistics] | None = None


class Pruning(Protocol):
    """What a method that prunes has beside its shape, :class:`Blockwise`, :class:`Gradientwise` or :class:`Tensorwise`."""

    masks: bool
    """True: its solutions have masks, which are kept beside the weights."""

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape [out, in] cannot be pruned as asked, or None."""

    def surveys(self) -> Sequence[Survey]:
        """What must be known of the whole model first."""


class Factoring(Protocol):
    """What a method has whose results are products of factors, which are kept beside the weights."""

    def factored(self, shape: tuple[int, int]) -> int:
        """The side of the blocks of the factors of a weight of this shape [out, in]."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be scored: what the report calls it, and its folder or hub id."""

    name: str
    model: str


class Scorer(Protocol):
    """A method that measures models and changes none."""

    options: Options

    def files(self) -> list[Path]:
        """Every local file, models apart, whose content the result depends on."""

    def score(
        self, subjects: Sequence[Subject], baseline: str, settings: Settings, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Measure all ``subjects`` in the same way and compare them with the one named ``baseline``.

        Returns JSON-compatible data: ``metrics``, by name whether ``better`` is "lower" or "higher" and whether ``change``
        is "relative" or "absolute"; ``baseline``; and ``models``, in the order of ``subjects``: ``model`` (its name),
        ``content`` (the checkpoint's digest), ``bytes``, and ``metrics``, by name ``value`` with its standard ``error`` and
        ``change`` against the baseline with ``change_error``. An error is None where it is not known, a change where the
        two models cannot be compared. What else a method has to tell stands beside these. Of ``settings`` device, seed,
        max_memory, trust_remote_code and allow_pickle count. ``say`` takes lines for people.
        """
