"""LoRA-LEGO: the rank-one units of all adapters clustered, each cluster's centre a unit of the result."""

from __future__ import annotations

import hashlib

import numpy
import torch
from pydantic import Field

from merge.adapters._factors import balanced, decomposed, split
from weightworks.stage.adapting import CombineOptions, Factors, Made, Updates

PAPER = "Zhao et al. 2024, arXiv:2409.16167; how units are brought to one form, and both reweightings, are our reading"
VERSION = 1
RESTARTS, SWEEPS = 10, 100


class Options(CombineOptions):
    """Options of LoRA-LEGO."""

    rank: int | None = Field(None, ge=1, description="units of the result; default: the largest rank of the adapters")
    canonical: bool = Field(
        False, description="take singular directions as units, so that the result depends on the updates alone"
    )
    parameter_reweight: bool = Field(True, description="give a centre's halves the mean norm of its members' halves")
    output_reweight: bool = Field(True, description="multiply the update by sqrt(mean rank of the adapters / rank)")


class Method:
    """A unit is a row of A with its column of B. (c a, b / c) and (-a, -b) are the same unit: halves are given equal norms,
    and the largest entry of a is made positive, before units [a; b] are clustered by k-means.
    """

    BASE, LINEAR = "optional", False

    def __init__(self, options: Options) -> None:
        self.options = options

    def combine(self, updates: Updates) -> Made:
        options = self.options
        parts = [split(*decomposed(part)) if options.canonical else part for part in updates.parts]
        a, b = units(Factors.stacked(parts))
        k = options.rank or max(part.rank for part in updates.parts)
        if len(a) == 0:  # adapters that change nothing
            rows, columns = updates.parts[0].b.shape[0], updates.parts[0].a.shape[1]
            return Made(Factors(a.new_zeros(rows, 1), a.new_zeros(1, columns)))
        k = min(k, len(a))
        labels = clusters(torch.cat([a, b], 1), k, seed=_seed(updates))
        a, b = centres(a, labels, k, options.parameter_reweight), centres(b, labels, k, options.parameter_reweight)
        if options.output_reweight:
            mean = sum(part.rank for part in updates.parts) / len(updates.parts)
            a, b = a * (mean / k) ** 0.25, b * (mean / k) ** 0.25
        return Made(Factors(b.T, a), {"units": len(labels)})


def units(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves a [N, columns] and b [N, rows] of the units that are not zero, in their one form."""
    even = balanced(factors)
    a, b = even.a, even.b.T
    alive = a.abs().amax(1) > 0
    a, b = a[alive], b[alive]
    sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    return a * sign, b * sign


def centres(halves: torch.Tensor, labels: torch.Tensor, k: int, reweight: bool) -> torch.Tensor:
    """Means of the clusters [k, width]; with ``reweight``, of the mean norm of their members."""
    belongs = torch.nn.functional.one_hot(labels, k).to(halves.dtype).T  # [k, N]
    count = belongs.sum(1, keepdim=True)
    mean = belongs @ halves / count
    if not reweight:
        return mean
    wanted = belongs @ torch.linalg.vector_norm(halves, dim=1, keepdim=True) / count
    length = torch.linalg.vector_norm(mean, dim=1, keepdim=True)
    return torch.where(length > 0, mean * wanted / length.clamp(min=1e-300), mean)


def clusters(points: torch.Tensor, k: int, *, seed: int) -> torch.Tensor:
    """Labels [N] of ``points`` [N, width] float64 by k-means in Euclidean distance: the best of ten k-means++ starts."""
    if k == len(points):
        return torch.arange(k)
    if points.shape[1] > len(points):
        points = torch.linalg.qr(points.T).R.T  # distances stay the same, and N coordinates suffice
    x, draws = points.numpy(), numpy.random.default_rng(seed)
    best = min((_lloyd(x, _seeds(x, k, draws)) for _ in range(RESTARTS)), key=lambda found: found[0])
    return torch.from_numpy(best[1])


def _distances(x: numpy.ndarray, centre: numpy.ndarray) -> numpy.ndarray:
    """Squared distances [N, k]."""
    lengths = numpy.square(x).sum(1)[:, None] + numpy.square(centre).sum(1)
    return numpy.maximum(lengths - 2 * (x @ centre.T), 0.0)


def _seeds(x: numpy.ndarray, k: int, draws: numpy.random.Generator) -> numpy.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007): each next start is drawn by its squared distance to those there are."""
    chosen = [int(draws.integers(len(x)))]
    nearest = _distances(x, x[chosen])[:, 0]
    while len(chosen) < k:
        total = nearest.sum()
        # Where all points left lie on starts, the first that is none will do.
        spare = next(number for number in range(len(x)) if number not in chosen)
        following = int(draws.choice(len(x), p=nearest / total)) if total > 0 else spare
        chosen.append(following)
        nearest = numpy.minimum(nearest, _distances(x, x[[following]])[:, 0])
    return x[chosen]


def _lloyd(x: numpy.ndarray, centre: numpy.ndarray) -> tuple[float, numpy.ndarray]:
    """Sum of squared distances and labels once no label changes; an empty cluster takes the point farthest from its own."""
    labels = numpy.full(len(x), -1)
    for _ in range(SWEEPS):
        far = _distances(x, centre)
        found = far.argmin(1)
        for empty in sorted(set(range(len(centre))) - set(found.tolist())):
            counts = numpy.bincount(found, minlength=len(centre))
            own = numpy.where(counts[found] > 1, far[numpy.arange(len(x)), found], -1.0)
            found[own.argmax()] = empty
        if (found == labels).all():
            break
        labels = found
        centre = numpy.stack([x[labels == number].mean(0) for number in range(len(centre))])
    return float(_distances(x, centre)[numpy.arange(len(x)), labels].sum()), labels


def _seed(updates: Updates) -> int:
    return int.from_bytes(hashlib.sha256(f"{updates.seed}\0{updates.name}".encode()).digest()[:8], "little")
