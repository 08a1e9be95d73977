"""Options that several merges share: weights that are divided by their sum, and the forms of one method."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from weightworks.errors import MethodError
from weightworks.stage.merging import MergeOptions, WeightedOptions

CANCELLED = 1e-6  # weights whose sum is smaller than this share of them stand for no average


class SumOptions(WeightedOptions):
    """Options of weighted sums, which may be divided by the sum of the weights."""

    normalize: bool = Field(True, description="divide the weighted sum by the sum of the weights")

    @model_validator(mode="after")
    def _weights_have_a_sum(self) -> Self:
        if self.normalize and self.weights and cancel(self.weights):
            raise ValueError(f"the weights {self.weights} sum to zero, by which nothing can be divided")
        return self


class FormOptions(SumOptions):
    """Options of a method that is known in several forms. ``form`` gives defaults to others, which may still be set."""

    FORMS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "mergekit": {}}

    form: Literal["paper", "mergekit"] = Field(
        "paper", description="whose defaults the other options have: the paper's, or those of mergekit"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_form(cls, values: Any) -> Any:
        return {**cls.FORMS.get(values.get("form", "paper"), {}), **values} if isinstance(values, dict) else values


class SparseOptions(FormOptions):
    """Options of merges that first make the task vectors sparse, and may then let the models vote on signs."""

    scaling: float = Field(1.0, description="lambda: what the merged task vector is multiplied by")
    vectors: Literal["whole", "sparse"] = Field(
        "whole", description="norms and biases: whole, or made sparse as matrices are; mergekit: sparse"
    )
    election: Literal["none", "plain", "weighted"] = Field(
        "plain",
        description="keep of each weight only what agrees with the elected sign: plain elects the sign of the sum, "
        "weighted (mergekit) of the weighted sum, none keeps all",
    )

    def spares(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of ``shape`` is merged whole."""
        return self.vectors == "whole" and len(shape) == 1


class MatrixOptions(MergeOptions):
    """Options of merges that decompose matrices, and treat some of them as they do vectors."""

    plain: list[str] = Field(
        default=["*embed*", "*wte*", "*wpe*", "*lm_head*"],
        description="matrices that are treated as vectors are: embeddings are no linear maps, heads are large; globs",
    )

    def decomposed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor ``name`` of ``shape`` is a matrix to be decomposed."""
        return len(shape) == 2 and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.plain)


def weights_of(options: MergeOptions, count: int) -> list[float]:
    """The weight of each of ``count`` models; 1 where none is given."""
    return options.each("weights", count) or [1.0] * count


def shares_of(options: SumOptions, count: int) -> list[float]:
    """The weights, divided by their sum if they are to be normalized.

    Raises :class:`MethodError` if they cancel, as those of the models that have a tensor may although all together do not.
    """
    weights = weights_of(options, count)
    if not options.normalize:
        return weights
    if cancel(weights):
        raise MethodError(
            f"the weights {weights} sum to zero, by which nothing can be divided",
            hint="choose other --weights; with --on-missing skip-model, such that no selection of them sums to zero",
        )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def cancel(weights: Sequence[float]) -> bool:
    """Whether the sum of ``weights`` is nothing but rounding."""
    return abs(math.fsum(weights)) <= CANCELLED * sum(map(abs, weights))
