"""Spectral clustering by non-negative factors of a similarity, and a rule for how many clusters there are.

S [n, n] is what points have in common, max(0, cosine) of their diffusion coordinates. S ~ U V with U [n, K], V [K, n] >= 0 of
least squared error, by hierarchical alternating least squares (Cichocki & Phan 2009) from the start that S itself gives
(Boutsidis & Gallopoulos 2008): no chance is in it. A point is in the cluster argmax_k U_ik. The error never grows with K, so it
cannot choose K by itself: what is made smallest is |S - U V|^2 / |S|^2 + K log n / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray; numpy loads late
SWEEPS = 60  # of alternating least squares: the error changes by less than 1e-3 of itself afterwards
TINY = 1e-12
FEWEST, MOST = 2, 20  # clusters that are tried


@dataclass(frozen=True)
class Factors:
    """``u`` [n, K] and ``v`` [K, n] >= 0; ``error`` is |S - U V|^2 / |S|^2 (Frobenius)."""

    u: Array
    v: Array
    error: float

    @property
    def labels(self) -> Array:
        """The cluster of each point, int64 [n]: the first of its largest parts."""
        return self.u.argmax(1)


@dataclass(frozen=True)
class Clustering:
    """The factors chosen, and the error of every K that was tried: larger ones could not have been better."""

    factors: Factors
    errors: dict[int, float]


def similarity(coordinates: Array, others: Array | None = None) -> Array:
    """max(0, cosine) of ``coordinates`` [n, q] and ``others`` [m, q], or of all pairs of the former: [n, m]."""
    these = _unit(coordinates)
    return np.maximum(these @ (these if others is None else _unit(others)).T, 0.0)


def cluster(similarities: Array, clusters: int | None = None) -> Clustering:
    """Factor ``similarities`` [n, n] into ``clusters`` parts (at most n), or into as many of 2 to 20 as make error and
    penalty smallest; of equal ones the fewest."""
    count = len(similarities)
    tried = range(FEWEST, min(MOST, max(FEWEST, count - 1)) + 1) if clusters is None else [min(clusters, count)]
    values, vectors = _leading(similarities, max(tried))
    errors: dict[int, float] = {}
    best, lowest = None, math.inf
    for number in tried:
        penalty = number * math.log(count) / count
        if penalty >= lowest:
            break  # and so is that of all that follow
        found = factorise(similarities, *_start(values, vectors, number))
        errors[number] = found.error
        if found.error + penalty < lowest:
            best, lowest = found, found.error + penalty
    assert best is not None
    return Clustering(best, errors)


def factorise(similarities: Array, u: Array, v: Array, sweeps: int = SWEEPS) -> Factors:
    """Alternate least squares on ``similarities`` [n, n] from ``u`` [n, K], ``v`` [K, n], column by column."""
    u, v = u.copy(), v.copy()
    for _ in range(sweeps):
        _descend(u, similarities @ v.T, v @ v.T)
        _descend(v.T, similarities.T @ u, u.T @ u)
    whole = float((similarities**2).sum())
    # |S - UV|^2 by its parts: the difference itself would be as large as S
    error = whole - 2 * float(((similarities @ v.T) * u).sum()) + float(((u.T @ u) * (v @ v.T)).sum())
    return Factors(u, v, max(0.0, error) / max(whole, TINY))


def assign(similarities: Array, v: Array, sweeps: int = SWEEPS) -> Array:
    """The clusters int64 [m] of other points by their ``similarities`` [m, n] to those that ``v`` [K, n] was found on."""
    products, square = similarities @ v.T, v @ v.T
    u = np.maximum(products, 0.0)
    for _ in range(sweeps):
        _descend(u, products, square)
    return u.argmax(1)


def _descend(factor: Array, products: Array, square: Array) -> None:
    """One sweep over the columns of ``factor`` [n, K], each set to its best given the others, in place."""
    for k in range(factor.shape[1]):
        step = (products[:, k] - factor @ square[:, k]) / max(float(square[k, k]), TINY)
        factor[:, k] = np.maximum(factor[:, k] + step, TINY)


def _leading(matrix: Array, count: int) -> tuple[Array, Array]:
    """The ``count`` largest eigenpairs of a symmetric matrix, in falling order."""
    from scipy.sparse.linalg import eigsh

    if len(matrix) <= 3 * count:
        values, vectors = np.linalg.eigh(matrix)
    else:
        start = np.random.default_rng(0).standard_normal(len(matrix))
        values, vectors = eigsh(matrix, k=count, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")[:count]
    return values[order], vectors[:, order]


def _start(values: Array, vectors: Array, count: int) -> tuple[Array, Array]:
    """The larger of the positive and the negative part of each leading eigenvector: u [n, K] and its transpose."""
    columns = []
    for k in range(count):
        positive, negative = np.maximum(vectors[:, k], 0.0), np.maximum(-vectors[:, k], 0.0)
        part = positive if np.linalg.norm(positive) >= np.linalg.norm(negative) else negative
        columns.append(part * np.sqrt(max(float(values[k]), TINY)))
    u = np.stack(columns, 1)
    u = np.maximum(u, float(u.mean()) * 1e-2)  # a zero would stay one
    return u, u.T.copy()


def _unit(rows: Array) -> Array:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, TINY)
