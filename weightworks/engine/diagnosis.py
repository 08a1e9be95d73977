"""What the task vectors of a merge look like, before anything is written: sizes, directions, conflicts.

Figures are of an even sample of the rows of every tensor, exact where a tensor is small.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from weightworks.engine.machine import one_thread
from weightworks.engine.mergejob import MergeJob
from weightworks.engine.mergeplan import Part

SAMPLE = 1 << 17  # elements of a tensor that are looked at
STRETCHES = 4  # places of a tensor they come from


@dataclass
class Figures:
    """Sums over elements looked at, for N models: ``dots`` float64 [N, N] of task vectors; counts of elements.

    ``small`` [N]: deltas that are not zero and below half a unit in the last place of the base's dtype there. ``zero``
    [N]: equal to the base. ``conflicts``: elements where two models moved in opposite directions, of ``moved``, where two
    moved at all. ``seen`` of ``total`` elements were looked at.
    """

    dots: torch.Tensor
    small: torch.Tensor
    zero: torch.Tensor
    conflicts: int = 0
    moved: int = 0
    seen: int = 0
    total: int = 0

    @classmethod
    def none(cls, count: int) -> Figures:
        return cls(torch.zeros(count, count, dtype=torch.float64), torch.zeros(count), torch.zeros(count))

    def whole(self) -> Figures:
        """The figures scaled up from the elements seen to all of the tensor."""
        scale = self.total / max(self.seen, 1)
        counts = round(self.conflicts * scale), round(self.moved * scale)
        return Figures(self.dots * scale, self.small * scale, self.zero * scale, *counts, self.total, self.total)

    def __add__(self, other: Figures) -> Figures:
        return Figures(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def facts(self) -> dict[str, Any]:
        """Norms of task vectors, cosines of pairs, and shares, as JSON-compatible data."""
        dots = self.whole().dots
        norms = [math.sqrt(max(float(value), 0.0)) for value in dots.diagonal()]
        pairs = itertools.combinations(range(len(norms)), 2)
        return {
            "delta_norms": norms,
            "cosines": [float(dots[i, j]) / max(norms[i] * norms[j], 1e-300) for i, j in pairs],
            "sign_conflicts": self.conflicts / max(self.moved, 1),
            "below_half_ulp": [float(count) / max(self.seen, 1) for count in self.small],
            "density": [1 - float(count) / max(self.seen, 1) for count in self.zero],
        }


@dataclass
class Diagnosis:
    """Figures by tensor; ``facts`` are of all together."""

    tensors: dict[str, Figures] = field(default_factory=dict)

    def of(self, name: str) -> dict[str, Any]:
        """What the report tells of one tensor."""
        return self.tensors[name].facts() if name in self.tensors else {}

    def facts(self) -> dict[str, Any]:
        """What the report tells of all, and of how many elements it was seen."""
        if not self.tensors:
            return {}
        figures = list(self.tensors.values())
        total = functools.reduce(operator.add, (one.whole() for one in figures))
        return {**total.facts(), "looked_at": sum(one.seen for one in figures), "elements": total.total}


@torch.no_grad()
def diagnose(job: MergeJob) -> Diagnosis:
    """Look at every tensor that will be merged; of models without a base, deltas are from their mean."""
    with one_thread():  # a sample is too little to be divided
        complete = [part for part in job.merged if tuple(number for number, _ in part.models) == job.members]
        return Diagnosis({part.spec.name: look(job, part) for part in complete})


def look(job: MergeJob, part: Part) -> Figures:
    """The figures of one tensor."""
    shape = part.spec.shape or (1,)
    figures = Figures.none(len(part.models))
    figures.total = math.prod(shape)
    dtype = part.spec.dtype
    for start, stop in stretches(shape):
        models = [
            job.read(job.models[number], name, start, stop) if name in job.models[number].tensors else None
            for number, name in part.models
        ]
        base = job.read(job.base, part.base, start, stop) if job.base and part.base else None
        present = [model for model in models if model is not None]
        centre = base if base is not None else torch.stack(present).mean(0)
        deltas = torch.stack([torch.zeros_like(centre) if model is None else model - centre for model in models])
        flat = deltas.flatten(1)  # [N, elements]
        figures.dots += (flat @ flat.T).double().cpu()
        zero = flat == 0
        figures.zero += zero.sum(1).cpu()
        figures.small += ((flat.abs() < half_ulp(centre.flatten(), dtype)) & ~zero).sum(1).cpu()
        up, down = (flat > 0).sum(0), (flat < 0).sum(0)
        figures.conflicts += int(((up > 0) & (down > 0)).sum())
        figures.moved += int((up + down > 1).sum())
        figures.seen += centre.numel()
    return figures


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance to the next value of ``dtype``, for float32 ``values``: a change below it is rounded away."""
    digits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}.get(dtype, 24)
    exponent = values.abs().clamp(min=1e-30).view(torch.int32) & 0x7F800000  # of a float32, the rest of its bits zero
    return exponent.view(torch.float32) * 2.0**-digits


def stretches(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Rows to look at, as (start, stop): all of a small tensor, else a few stretches evenly apart."""
    row = max(math.prod(shape[1:]), 1)
    wanted = max(1, SAMPLE // row)
    if wanted >= shape[0]:
        return [(0, shape[0])]
    count = min(STRETCHES, wanted)
    rows = wanted // count
    gap = shape[0] // count
    return [(k * gap, k * gap + rows) for k in range(count)]
