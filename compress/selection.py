"""The options that all ways of choosing rows share."""

from __future__ import annotations

from pydantic import Field, field_validator

from weightworks.options import Options


class SelectionOptions(Options):
    """How much is chosen."""

    budget: float = Field(0.2, gt=0, description="rows to choose; below 1, the share of them that can be trained on")

    @field_validator("budget")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a number of rows, or a share below 1")
        return value

    def count(self, rows: int) -> int:
        """How many of ``rows`` are to be chosen: one at least."""
        return max(1, round(rows * self.budget)) if self.budget < 1 else int(self.budget)
