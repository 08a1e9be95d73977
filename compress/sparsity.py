"""The options every pruning shares: how much goes, in what pattern, how that is shared out over the model."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.masks import Pattern
from compress.schemes import ALWAYS_IGNORED, IGNORE, Patterns
from weightworks.options import Options
from weightworks.stage.protocols import Target


class AmountOptions(Options):
    """How many weights are pruned, in what pattern, and where."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the weights removed; N:M implies it")
    pattern: str = Field(
        "unstructured", description="unstructured, or N:M: N of every M consecutive inputs are KEPT (2:4 keeps 2 of 4)"
    )
    ignore: Patterns = Field(default=[], description=IGNORE)

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, values: dict[str, Any]) -> dict[str, Any]:
        text = values.get("pattern")
        try:
            pattern = Pattern.parse(text) if isinstance(text, str) else None
        except ValueError:
            return values  # told by the field itself
        if pattern is None:
            return values
        if values.get("sparsity", pattern.sparsity) != pattern.sparsity:
            raise ValueError(
                f"pattern {text} means sparsity = {pattern.sparsity:g}, but {values['sparsity']} was given"
            )
        return {**values, "sparsity": pattern.sparsity}

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        Pattern.parse(value)
        return value

    @property
    def n_of_m(self) -> Pattern | None:
        """The N:M pattern; None if unstructured."""
        return Pattern.parse(self.pattern)

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]

    def keep(self, target: Target, count: int) -> int:
        """How many of ``count`` weights stay."""
        return count - round(count * self.sparsity) if target.keep is None else target.keep

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape [out, in] cannot have the pattern, or None."""
        pattern = self.n_of_m
        if pattern is None or shape[1] % pattern.of == 0:
            return None
        return f"width {shape[1]} is not a multiple of {pattern.of}, as the pattern {self.pattern} needs"


class SparsityOptions(AmountOptions):
    """Options of pruning single weights in one pass."""

    budget: Literal["uniform", "owl"] = Field(
        "uniform", description="share of each block: uniform, or owl: by its share of outliers (unstructured only)"
    )
    owl_range: float = Field(0.08, gt=0, lt=0.5, description="owl: how far a block's density may be from the mean")
    owl_outlier: float = Field(5.0, gt=1, description="owl: an outlier's score is above so many times the mean")
    repair: Literal["none", "dsnot"] = Field(
        "none", description="mask repair: dsnot swaps weights until each output's mean error is small"
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.n_of_m is not None and self.budget != "uniform":
            raise ValueError(
                f"pattern {self.pattern} takes the same share everywhere, so budget = {self.budget} cannot be"
            )
        return self
