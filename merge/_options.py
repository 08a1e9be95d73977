"""Options that several merges share: weights that are divided by their sum, and the forms of one method."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from weightworks.errors import MethodError
from weightworks.stage.mergekit import Mergekit
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
    """Options of merges that first make the task vectors sparse, and may then let the models vote on signs.

    The share that is kept is the option ``density`` of each of them.
    """

    PER_MODEL: ClassVar[tuple[str, ...]] = ("weights", "densities")

    densities: list[float] = Field(default=[], description="a density for each model, in place of one for all")
    scaling: float = Field(1.0, description="lambda: what the merged task vector is multiplied by")
    vectors: Literal["whole", "sparse"] = Field(
        "whole", description="norms and biases: whole, or made sparse as matrices are; mergekit: sparse"
    )
    election: Literal["none", "plain", "weighted"] = Field(
        "plain",
        description="keep of each weight only what agrees with the elected sign: plain elects the sign of the sum, "
        "weighted (mergekit) of the weighted sum, none keeps all",
    )

    @field_validator("densities")
    @classmethod
    def _shares(cls, densities: list[float]) -> list[float]:
        if not all(0 < density <= 1 for density in densities):
            raise ValueError("each density must be greater than 0 and at most 1")
        return densities

    def density_of(self, model: int) -> float:
        """The density of the task vector of one model."""
        if not self.densities:
            return float(self.density)  # type: ignore[attr-defined]  # each method declares its own, with its default
        return self.densities[model if len(self.densities) > 1 else 0]

    @property
    def dense(self) -> bool:
        """Whether all task vectors stay as they are."""
        return all(self.density_of(model) == 1 for model in range(max(len(self.densities), 1)))

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


def sparse(rescale: str | None = None, each: Mapping[str, str] | None = None, **options: Any) -> Mergekit:
    """A method of what mergekit calls generalized task arithmetic, by ``options`` of ours.

    ``rescale`` is ours for its ``rescale: true``, None if that is not supported, as for methods that are not random;
    ``each`` are more parameters of each model.
    """
    random = "random numbers are a function of seed, tensor, model and place, so they are others than mergekit's"
    ties = "changes as large as the threshold are all kept; mergekit keeps some of them, so that their number comes out"
    return Mergekit(
        {"normalize": "normalize", "lambda": "scaling", "int8_mask": None, "rescale": "rescale" if rescale else None},
        {"weight": "weights", "density": "densities", **(each or {})},
        values={"rescale": {False: "none", True: rescale} if rescale else {False: None}},
        needed=("weight",),
        options=options,
        differs=random if rescale else ties,
    )


def called(model: int) -> str:
    """What surveys call the figures of one model."""
    return f"model {model}"


def number_of(name: str) -> int:
    """The model that is :func:`called` so."""
    return int(name.removeprefix("model "))


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
