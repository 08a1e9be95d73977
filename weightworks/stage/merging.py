"""The shape of a merge: what a method is given of each tensor, what it may ask of all of them first, what it returns.

A merge never sees a model. It is handed *slabs*: some rows of one tensor, of every model, in float32. Arithmetic on a slab
must be the same whatever rows it holds, unless the method asks for whole tensors (``WHOLE``). Figures that need more than
a slab, such as norms and thresholds, come from surveys that the engine runs first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy
import torch
from pydantic import Field, field_validator

from weightworks.options import Options

LANES = 8  # 32-bit numbers in one step of the counter of Philox 4x64
STATE = "state"  # the figure of a survey that is kept for the tensor, not added up


class PerModelOptions(Options):
    """Options of which those named in ``PER_MODEL`` hold one value for all models, or one for each."""

    PER_MODEL: ClassVar[tuple[str, ...]] = ()

    def each(self, name: str, count: int) -> list[float]:
        """Option ``name`` for each of ``count`` models."""
        values: list[float] = list(getattr(self, name))
        return values * count if len(values) == 1 else values

    def lengths(self, count: int) -> list[str]:
        """What is wrong with the number of values of options that are given model by model, a sentence each."""
        return [
            f"{name.replace('_', '-')} has {given} values, for {count} models (give one for all, or one for each)"
            for name in self.PER_MODEL
            if (given := len(getattr(self, name))) not in (0, 1, count)
        ]

    def only(self, models: Sequence[int], count: int) -> Self:
        """The options for ``models``, numbers among the ``count`` of the merge."""
        update: dict[str, Any] = {}
        for name in self.PER_MODEL:
            values = getattr(self, name)
            if len(values) == count > 1:
                update[name] = [values[model] for model in models]
        return self.model_copy(update=update)


class MergeOptions(PerModelOptions):
    """Options that every merge has."""

    on_missing: Literal["error", "base", "skip-model"] = Field(
        "error",
        description="when a model lacks a tensor: refuse, let the base stand for it, or merge the others without it",
    )
    vocabulary: Literal["base", "union"] = Field(
        "base",
        description="where tokenizers differ rows are matched by token: those of the base, or of the first model, or of all",
    )
    out_dtype: Literal["same", "float32", "bfloat16", "float16"] = Field(
        "same", description="dtype of the result; same: tensor by tensor that of the base, or of the first model"
    )
    align: bool = Field(
        False, description="first put units and heads of each model in the order that fits the base, or the first model"
    )
    renormalise: str | None = Field(
        None,
        description="a text, or builtin: scale rows so that layers' outputs vary on it as those of the models do (REPAIR)",
    )
    check: Literal["full", "files"] = Field(
        "full", description="before publishing: full loads the result with stock transformers, files reads it back"
    )


class WeightedOptions(MergeOptions):
    """Options of merges in which each model has a weight."""

    PER_MODEL: ClassVar[tuple[str, ...]] = ("weights",)

    weights: list[float] = Field(default=[], description="a weight for each model, such as 0.5,0.3,0.2; default: equal")


class StatisticsOptions(WeightedOptions):
    """Options of merges that read statistics of the models (``SIDE``)."""

    statistics: list[str] = Field(
        default=[], description="a file of compress stats for each model, in their order; once for each file"
    )

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: list[float]) -> list[float]:
        if any(weight <= 0 for weight in weights):
            raise ValueError("weights multiply importances, so each must be greater than 0")
        return weights

    def files(self) -> list[Path]:
        """The files, for what depends on their content."""
        return [Path(path).expanduser() for path in self.statistics]


@dataclass(frozen=True)
class Slab:
    """Rows ``start:start + rows`` of the tensor ``name``, whose whole ``shape`` is [out, ...], of every model.

    ``models`` are float32 [rows, ...] in argument order, ``base`` is the same of the base or None. A tensor without
    axes comes as one of shape [1]; vectors come whole, so that a method may rank or normalize their elements. ``state``
    is what a survey kept of these rows, ``side`` each model's statistics of the tensor (``Method.SIDE``): by kind, of these
    rows if they are of the tensor's shape; empty where there are none. Tensors may be used up, but each is handed to one
    call only.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    models: tuple[torch.Tensor, ...]
    base: torch.Tensor | None = None
    keys: Sequence[str] = ()
    seed: int = 0
    state: torch.Tensor | None = None
    side: tuple[Mapping[str, torch.Tensor], ...] = ()

    @cached_property
    def deltas(self) -> tuple[torch.Tensor, ...]:
        """The task vectors: each model less the base, float32 [rows, ...]."""
        assert self.base is not None, "only methods that need a base ask for deltas"
        return tuple(model - self.base for model in self.models)

    @property
    def matrix(self) -> bool:
        """Whether the tensor is a matrix; vectors (norms, biases) are often treated more gently."""
        return len(self.shape) == 2

    def uniform(self, model: int) -> torch.Tensor:
        """Random numbers in [0, 1), float32 of the shape of ``models[model]``.

        Each is a function of the seed, the tensor, the model's content and the place in the tensor: neither the order
        of the work nor that of the models changes it. Generator: Philox 4x64 by its counter (Salmon et al. 2011).
        """
        like = self.models[model]
        row = like[0].numel() if like.dim() else 1
        first, count = self.start * row, like.numel()
        skip = first % LANES
        key = hashlib.sha256(f"{self.seed}\0{self.name}\0{self.keys[model]}".encode()).digest()[:16]
        philox = numpy.random.Philox(key=int.from_bytes(key, "little"), counter=first // LANES)
        drawn = philox.random_raw(-(-(skip + count) // 2)).view(numpy.uint32)[skip : skip + count]
        numbers = numpy.multiply(drawn >> 8, 2.0**-24, dtype=numpy.float32)
        return torch.from_numpy(numbers).reshape(like.shape).to(like.device)


def _nothing(sums: Mapping[str, torch.Tensor], found: Any) -> Any:
    return {name: value.tolist() for name, value in sums.items()}


@dataclass(frozen=True)
class Survey:
    """A pass over slabs before merging.

    ``look(slab, found)`` returns figures by name, int64 or float64 tensors, which are added up over the slabs of a tensor
    or, with ``scope="model"``, of all tensors in order of their names. ``conclude(sums, found)`` makes of them what is handed
    as ``found`` to the next survey and to ``merge``: JSON-compatible data, so that an interrupted run remembers it.
    With ``whole`` slabs are whole tensors, or those of which ``whole(name, shape)`` is true. A figure called ``state`` is no
    sum: it is kept for its rows (float32, of their shape) and handed to later calls as ``slab.state``.
    """

    look: Callable[[Slab, Any], Mapping[str, torch.Tensor]]
    conclude: Callable[[Mapping[str, torch.Tensor], Any], Any] = field(default=_nothing)
    scope: Literal["tensor", "model"] = "tensor"
    whole: bool | Callable[[str, tuple[int, ...]], bool] = False


def is_whole(asking: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a survey or a method wants the tensor ``name`` of ``shape`` in one slab: by its ``whole``, else ``WHOLE``."""
    asked = getattr(asking, "whole", getattr(asking, "WHOLE", False))
    return bool(asked(name, shape) if callable(asked) else asked)


class Merger(Protocol):
    """A merge of several models of one architecture, tensor by tensor.

    Besides what is below, the class says: ``BASE``, whether a base is "required", "optional" or "refused"; ``LEAST`` and
    ``MOST`` (None: any number), how many models it takes. It may say ``WHOLE = True``: slabs are whole tensors; or have
    ``whole(name, shape)``, which says it of each. ``SIDE = "gram"`` asks for statistics of that kind, a file for each
    model, which the option ``statistics`` names (:class:`StatisticsOptions`); what it says of whole tensors then holds for
    those that have statistics, and it has ``files()``, that of its options. ``STATE = True``: what its survey keeps of
    every tensor stays beside the result. ``CONTINUES = True``: a merge can take up another one that is finished: its
    first survey then sees the other's state and, as ``found``, what the other concluded.

    A method that looks at held-out text first has two functions more, and no surveys: ``held_out(count) -> HeldOut | None``,
    what it wants for so many models, None: nothing; ``fit(bench: Bench) -> Fit``, which makes its choice.
    """

    BASE: ClassVar[Literal["required", "optional", "refused"]]
    LEAST: ClassVar[int]
    MOST: ClassVar[int | None]
    options: Any

    def surveys(self) -> Sequence[Survey]:
        """The passes that are needed first, in order; most methods need none and leave this out."""

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        """The merged rows, float32 or float64 of the shape of ``slab.models[0]``; cast once by the engine.

        ``found`` is what the last survey concluded, None if there is none.
        """


@dataclass(frozen=True)
class HeldOut:
    """What a method wants of held-out text before it merges: the ``text`` to choose by, and one to ``report`` on.

    Windows are of ``tokens`` in all at most (None: the whole text). ``scores`` is how often a model is scored on it,
    ``whole`` whether all models are held in memory at once.
    """

    text: str
    report: str | None
    tokens: int | None
    scores: int
    whole: bool = False


class Whole(Protocol):
    """All models in memory, for methods that need gradients.

    ``stacks`` are their parameters, float32 [N, ...]; ``blocks`` says which block a parameter is in, ``tensors`` which
    tensors of the checkpoint make it. ``windows`` int64 [n, seq] are the held-out text.
    """

    stacks: Mapping[str, torch.Tensor]
    blocks: Mapping[str, str]
    tensors: Mapping[str, Sequence[str]]
    windows: torch.Tensor

    def logits(self, parameters: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq, vocabulary] for ``tokens`` [batch, seq] of the model with ``parameters``."""


class Bench(Protocol):
    """Where a method tries merges on held-out text; nothing is written for it but the scores, each taken once."""

    names: Sequence[str]

    def perplexity(self, members: Sequence[int], found: Any = None) -> float:
        """That of what the method makes of ``members`` (numbers of models) with ``found``, rounded as it would be stored.

        NaN if a tensor of theirs holds NaN or infinity.
        """

    def whole(self, members: Sequence[int]) -> Whole:
        """``members`` in memory."""


@dataclass(frozen=True)
class Fit:
    """What came of it: the ``members`` to merge, in argument order, ``found`` as the first survey or ``merge`` is handed it.

    ``facts`` go to the report: JSON-compatible data, ``lines`` among them what a person is told.
    """

    members: Sequence[int]
    found: Any
    facts: Mapping[str, Any]
