"""Diffusion maps: coordinates in which points are near that a random walk over neighbours soon joins.

Coifman & Lafon, "Diffusion maps" (2006). With A_ij = exp(-|e_i - e_j|^2 / (2 sigma^2)) and D the diagonal of its row sums, the
eigenpairs of D^-1/2 A D^-1/2 are (mu, u), the first of them trivial (mu = 1). A point's coordinates after t steps are
mu^t u / sqrt(D), in falling order of mu. Beyond some thousands of points a map of landmarks is made, and all others are put into
it by Nystroem's formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray; numpy loads late
DENSE = 600  # points of which all eigenpairs are found at once; of more, Lanczos finds the wanted ones


@dataclass(frozen=True)
class DiffusionMap:
    """A map of ``points`` [n, d]: kernel width ``sigma``, row sums ``degree`` [n], eigenvalues ``values`` [q] in falling order
    without the trivial one, unit eigenvectors ``vectors`` [n, q] of D^-1/2 A D^-1/2, and ``steps`` t. All float64."""

    points: Array
    sigma: float
    degree: Array
    values: Array
    vectors: Array
    steps: int

    @property
    def coordinates(self) -> Array:
        """Coordinates of the points themselves, [n, q]."""
        return self.vectors * self.values**self.steps / np.sqrt(self.degree)[:, None]

    def place(self, others: Array) -> Array:
        """Coordinates [m, q] of ``others`` [m, d] by Nystroem's formula; of a point itself they are its own.

        u / sqrt(D) is a right eigenvector of the walk P = D^-1 A, so that its value at x is the mean of the landmarks' under
        P(x, .), divided by mu.
        """
        kernel = gaussian(others, self.points, self.sigma)  # [m, n]
        walk = kernel / kernel.sum(1, keepdims=True)
        return walk @ (self.vectors / np.sqrt(self.degree)[:, None]) * self.values ** (self.steps - 1)


def diffusion_map(points: Array, dimensions: int, *, steps: int = 1, sigma: float | None = None) -> DiffusionMap:
    """The map of ``points`` [n, d] in ``dimensions`` coordinates (fewer where there are fewer points), ``steps`` t >= 1.

    ``sigma`` is the median distance of two points unless given. Each eigenvector's largest entry is positive. Raises
    :class:`ValueError` where all points are one.
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    points = np.asarray(points, dtype=np.float64)
    sigma = median_distance(points) if sigma is None else sigma
    if not sigma > 0:
        raise ValueError("all points are one: there is nothing to map")
    kernel = gaussian(points, points, sigma)
    degree = kernel.sum(1)
    kernel /= np.sqrt(np.outer(degree, degree))
    count = min(dimensions, len(points) - 2) + 1
    if len(points) <= DENSE:
        values, vectors = eigh(kernel, subset_by_index=(len(points) - count, len(points) - 1))
    else:
        start = np.random.default_rng(0).standard_normal(len(points))  # Lanczos begins at the same place every time
        values, vectors = eigsh(kernel, k=count, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")[1:]  # without the trivial one
    values, vectors = values[order], vectors[:, order]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(len(order))])
    return DiffusionMap(points, sigma, degree, values, vectors * signs, steps)


def gaussian(these: Array, those: Array, sigma: float) -> Array:
    """exp(-|a - b|^2 / (2 sigma^2)) of every a in ``these`` [m, d] and b in ``those`` [n, d]: [m, n]."""
    return np.exp(-squared_distances(these, those) / (2 * sigma**2))


def median_distance(points: Array) -> float:
    """The median of the n (n - 1) / 2 distances between two of ``points`` [n, d]."""
    upper = np.triu_indices(len(points), 1)
    return float(np.median(np.sqrt(squared_distances(points, points)[upper])))


def squared_distances(these: Array, those: Array) -> Array:
    """|a - b|^2 of every a in ``these`` [m, d] and b in ``those`` [n, d]: [m, n]."""
    these, those = np.asarray(these, np.float64), np.asarray(those, np.float64)
    centre = those.mean(0)  # what both share is taken away first: small differences of large numbers lose digits
    these, those = these - centre, those - centre
    products = -2 * these @ those.T
    products += (these**2).sum(1)[:, None] + (those**2).sum(1)
    if these.shape == those.shape and np.array_equal(these, those):
        np.fill_diagonal(products, 0.0)
    return np.maximum(products, 0.0, out=products)
