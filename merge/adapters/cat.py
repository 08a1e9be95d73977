"""The weighted sum of adapters, exactly: their factors beside each other, so that ranks add up."""

from __future__ import annotations

from weightworks.stage.adapting import CombineOptions, Factors, Made, Updates

PAPER = "add_weighted_adapter of PEFT, combination 'cat'; negation and analogy: Zhang et al. 2023, arXiv:2306.14870"
VERSION = 1


class Options(CombineOptions):
    """Options of the exact sum: weights alone; -1 negates an adapter, 1,1,-1 is an analogy."""


class Method:
    """sum_i w_i B_i A_i = [B_1 .. B_N] [w_1 A_1; ..; w_N A_N].

    Every B_i stays as it is bit for bit, and A_i too where its weight and scaling make a power of two.
    """

    BASE, LINEAR = "optional", True

    def __init__(self, options: Options) -> None:
        self.options = options

    def combine(self, updates: Updates) -> Made:
        return Made(Factors.stacked(updates.parts))
