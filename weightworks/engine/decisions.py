"""What is decided when bits are chosen layer by layer: sizes and expected losses of every choice, and what a plan comes to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from weightworks.engine.allocation import Plan, front
from weightworks.engine.job import Job, packed_bytes
from weightworks.engine.units import Unit, common
from weightworks.errors import MethodError
from weightworks.store.packing import Scheme

CURVE = 80  # points of the curve that is kept


class Problem:
    """The decisions of a job, a scheme each, with the sizes and costs of their choices.

    A decision is on one unit; that on experts is on those of all blocks, which transformers loads by one scheme.
    """

    def __init__(self, job: Job, units: Sequence[Unit]) -> None:
        assert job.budget is not None
        self.job, self.units, self.all = job, units, job.budget.choices
        self.decisions = self._decisions()
        members = [[units[place] for place in one] for one in self.decisions]
        linears = [[job.linears[name] for unit in one for name in unit.tensors] for one in members]
        self.fitting = [common(job.choices, one) for one in linears]
        if not all(self.fitting):
            raise MethodError(
                f"{job.label}: of the choices {named_all(job)} none fits all layers that share a scheme",
                hint="add --bit-choices whose group size divides all their widths",
            )
        self.sizes = [
            [sum(packed_bytes(linear, self.all[number]) for linear in one) for number in fitting]
            for one, fitting in zip(linears, self.fitting, strict=True)
        ]
        self.costs = [
            [sum(unit.cost(number) for unit in one) for number in fitting]
            for one, fitting in zip(members, self.fitting, strict=True)
        ]
        self.pairs = [self._together(place) for place in range(len(members) - 1)] if job.budget.neighbours else None

    def _decisions(self) -> list[list[int]]:
        """Numbers of units by decision, in the order of the model."""
        found: list[list[int]] = []
        experts: list[int] = []
        for place, unit in enumerate(self.units):
            if self.job.linears[unit.tensors[0]].piece.expert is None:
                found.append([place])
                continue
            if not experts:
                found.append(experts)
            experts.append(place)
        return found

    def _together(self, place: int) -> np.ndarray:
        """What choices of a decision and the next cost together; nothing but for units that follow each other."""
        one, other = self.decisions[place], self.decisions[place + 1]
        shape = len(self.fitting[place]), len(self.fitting[place + 1])
        if len(one) > 1 or len(other) > 1 or other[0] != one[0] + 1:
            return np.zeros(shape)
        roots = [
            np.sqrt([self.units[unit].errors[number] or 0.0 for number in fitting])
            for unit, fitting in ((one[0], self.fitting[place]), (other[0], self.fitting[place + 1]))
        ]
        return self.units[one[0]].beyond * np.outer(*roots)

    def plans(self) -> list[Plan]:
        """All allocations that no other beats, by rising size."""
        return front(self.sizes, self.costs, self.pairs)

    def numbers(self, plan: Plan) -> list[int]:
        """The number of the choice of each unit."""
        found = dict[int, int]()
        for decision, fitting, choice in zip(self.decisions, self.fitting, plan.choices, strict=True):
            found |= dict.fromkeys(decision, fitting[choice])
        return [found[place] for place in range(len(self.units))]

    def schemes(self, plan: Plan) -> dict[str, Scheme]:
        """The scheme of each weight."""
        pairs = zip(self.units, self.numbers(plan), strict=True)
        return {name: self.all[number] for unit, number in pairs for name in unit.tensors}

    def told(self, plan: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
        """A plan for the report: what it takes and should cost, unit by unit, among all plans and the uniform ones."""
        scale = 8 / weights_of(self.job)
        rows = [
            {"tensors": list(unit.tensors), "choice": named(self.all[number]), "alpha": unit.alpha,
             "error": unit.errors[number], "expected": unit.cost(number), "beyond": unit.beyond}
            for unit, number in zip(self.units, self.numbers(plan), strict=True)
        ]  # fmt: skip
        thinned = plans[:: max(1, len(plans) // CURVE)]
        return {
            "bits_a_weight": plan.size * scale,
            "expected_increase": math.expm1(plan.cost),
            "choices": [named(one) for one in self.all],
            "units": rows,
            "curve": [[one.size * scale, math.expm1(one.cost)] for one in thinned],
            "uniform": list(self._uniform(scale)),
        }

    def _uniform(self, scale: float) -> Iterator[dict[str, Any]]:
        """What every choice takes and should cost if all weights have it."""
        for number, scheme in enumerate(self.all):
            if not all(number in fitting for fitting in self.fitting):
                continue
            places = [fitting.index(number) for fitting in self.fitting]
            cost = sum(costs[place] for costs, place in zip(self.costs, places, strict=True))
            total = sum(sizes[place] for sizes, place in zip(self.sizes, places, strict=True))
            if self.pairs is not None:
                cost += sum(float(one[pair]) for one, pair in zip(self.pairs, pairwise(places), strict=True))
            yield {"choice": named(scheme), "bits_a_weight": total * scale, "expected_increase": math.expm1(cost)}


def weights_of(job: Job) -> int:
    """How many weights are quantized."""
    return sum(math.prod(linear.shape) for linear in job.linears.values())


def named(scheme: Scheme) -> str:
    """A choice as it is typed."""
    return f"{scheme.bits}g{scheme.group_size}"


def named_all(job: Job) -> str:
    assert job.budget is not None
    return ",".join(map(named, job.budget.choices))
