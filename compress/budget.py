"""The options of quantizers that choose bits layer by layer, under a budget."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from weightworks.options import Options
from weightworks.stage.budget import Budget, parse_budget, parse_increase
from weightworks.store.packing import IntScheme

CHOICE = re.compile(r"([2348])(?:g(-1|[1-9]\d*))?")  # 2g32


class BudgetOptions(Options):
    """Options of a budget."""

    budget: str | None = Field(
        None,
        description="choose bits layer by layer, so that perplexity rises least while weights take at most so many bits each, "
        "scales included (3.5bpw), or weight files so many bytes (2.5GB, 800MiB)",
    )
    max_perplexity_increase: str | None = Field(
        None,
        description="choose bits layer by layer, so that weights take least while perplexity on calibration windows held "
        "out rises by at most so much (2%)",
    )
    bit_choices: str = Field(
        "2,3g-1,3,3g64,4,8",
        description="what is chosen from: bits, each with a group size if not --group-size, such as 2g32,3,4g128",
    )
    inter_layer: bool = Field(
        False, description="budgets count what the errors of neighbouring layers do together, measured pair by pair"
    )

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        if value is not None:
            parse_budget(value)
        return value

    @field_validator("max_perplexity_increase")
    @classmethod
    def _increase(cls, value: str | None) -> str | None:
        if value is not None:
            parse_increase(value)
        return value

    @field_validator("bit_choices")
    @classmethod
    def _choices(cls, value: str) -> str:
        words = [word.strip() for word in value.split(",")]
        wrong = [word for word in words if not CHOICE.fullmatch(word)]
        if wrong or len(set(words)) < len(words):
            raise ValueError(
                "must be different bits out of 2, 3, 4 and 8 with commas between, such as 2,3,4 or 2g32,3g64"
            )
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.budget is not None and self.max_perplexity_increase is not None:
            raise ValueError(
                "budget and max_perplexity_increase exclude each other: one bounds bytes, the other the loss"
            )
        return self

    @property
    def budgeted(self) -> bool:
        """Whether bits are chosen layer by layer."""
        return self.budget is not None or self.max_perplexity_increase is not None

    def chosen_by(self, group_size: int, *, symmetric: bool) -> Budget | None:
        """The budget, choices without a group size having the one given; None if there is none."""
        if not self.budgeted:
            return None
        bits, nbytes = (None, None) if self.budget is None else parse_budget(self.budget)
        share = None if self.max_perplexity_increase is None else parse_increase(self.max_perplexity_increase)
        found = [CHOICE.fullmatch(word.strip()) for word in self.bit_choices.split(",")]
        pairs = [(int(one[1]), int(one[2] or group_size)) for one in found if one is not None]
        choices = tuple(IntScheme(count, size, symmetric) for count, size in dict.fromkeys(pairs))
        return Budget(choices, bits, nbytes, share, self.inter_layer)
