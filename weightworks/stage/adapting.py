"""The shape of a method that makes a LoRA adapter: of several adapters, or of the difference of two checkpoints.

It works module by module, and a module's update is always meant as the product ``b @ a``: what a method does must not depend
on how that product is split, which adapters trained apart split differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field

from weightworks.options import Options
from weightworks.stage.merging import PerModelOptions


@dataclass(frozen=True)
class Factors:
    """The update ``b @ a`` of a module's weight: ``b`` [rows, rank], ``a`` [rank, columns], float64, all scaling in them."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def norm(self) -> float:
        """Frobenius norm of the product, by way of two thin QR factors: the product itself is never formed."""
        upper = torch.linalg.qr(self.b).R
        return float(torch.linalg.matrix_norm(upper @ torch.linalg.qr(self.a.T).R.T))

    @classmethod
    def stacked(cls, parts: Sequence[Factors]) -> Factors:
        """The sum of updates as one: B beside each other [rows, sum of ranks], A below each other."""
        return cls(torch.cat([part.b for part in parts], 1), torch.cat([part.a for part in parts]))

    def distance(self, other: Factors) -> float:
        """Frobenius norm of the difference of two updates."""
        return Factors.stacked([self, Factors(-other.b, other.a)]).norm


@dataclass(frozen=True)
class Updates:
    """What several adapters do to one module.

    ``parts`` are those of the adapters that have the module, in argument order, weights in them; ``adapters`` their numbers
    among the ``count`` there are. ``seed`` and ``name`` are what random choices may depend on.
    """

    name: str
    parts: tuple[Factors, ...]
    adapters: tuple[int, ...]
    count: int
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """The update a method made, and facts for the report."""

    factors: Factors
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cores:
    """The updates of all adapters to one module in shared bases: update i is ``u @ cores[i] @ v`` exactly.

    ``u`` is [rows, p] and ``v`` [q, columns], their columns and rows orthonormal; ``cores`` are [p, q], zero for an adapter that
    lacks the module.
    """

    u: torch.Tensor
    v: torch.Tensor
    cores: tuple[torch.Tensor, ...]


class AdapterOptions(Options):
    """Options of every method that makes an adapter."""

    out_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the adapter's tensors"
    )
    check: Literal["full", "files"] = Field(
        "full", description="before publishing: full scores it on the base where that is known, files reads it back"
    )


class CombineOptions(AdapterOptions, PerModelOptions):
    """Options of methods that make one adapter of several."""

    PER_MODEL: ClassVar[tuple[str, ...]] = ("weights",)

    weights: list[float] = Field(
        default=[], description="what each adapter's update is multiplied by, such as 0.5,0.5 or 1,-1; default: 1"
    )


class Combiner(Protocol):
    """A method that makes one adapter of several.

    ``LINEAR`` says that its result stands for the weighted sum of updates, ``BASE`` whether it needs the base ("required",
    "optional").
    """

    BASE: ClassVar[Literal["required", "optional"]]
    LINEAR: ClassVar[bool]
    options: Any

    def combine(self, updates: Updates) -> Made: ...


class Projector(Protocol):
    """A method that leaves the arithmetic to a merge: it gives small matrices for it, and takes what the merge made."""

    BASE: ClassVar[Literal["required", "optional"]]
    LINEAR: ClassVar[bool]
    options: Any

    def project(self, updates: Updates) -> Cores: ...

    def restore(self, cores: Cores, merged: torch.Tensor) -> Made:
        """The update ``u @ merged @ v``."""


class Extractor(Protocol):
    """A method that makes a low-rank update of the difference of two weights."""

    BASE: ClassVar[Literal["required", "optional"]]
    options: Any

    def extract(self, name: str, delta: torch.Tensor, seed: int) -> Made:
        """``delta`` is float32 [rows, columns], not to be changed."""
