"""PASER: rows for what pruning has damaged most: clusters of capabilities, a budget by degradation, cheap rows first.

He et al., "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery" (ICLR 2026,
arXiv:2502.12594). Prompts are embedded, mapped by diffusion and clustered by non-negative factors. A cluster's part of the
budget is in proportion to the mean Jensen-Shannon divergence of the model from the original. In a cluster rows are taken by
divergence over the logarithm of what they cost; a graph of concepts leaves out what contradicts rows taken before.

Where the paper is silent: K minimises error and penalty (compress/clusters.py); embeddings are standardised, so that no one
coordinate of a hidden state decides; what rounding down or a cluster without rows leaves over is shared out (compress/shares.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from compress.clusters import assign, cluster, similarity
from compress.concepts import ConceptGraph, concepts
from compress.diffusion import diffusion_map
from compress.selection import SelectionOptions
from compress.shares import quotas, share_out, top_up
from weightworks.errors import MethodError
from weightworks.stage.selecting import CHOSEN, NO_ROOM, Choice, Pool, Table

PAPER = "He et al. 2026, arXiv:2502.12594"
VERSION = 1
ROLES = {"model": "one checkpoint", "teacher": "one checkpoint"}
FEWEST_ROWS = 8  # of which clusters can be told at all
CHUNK = 4096  # rows that are put into a map of landmarks at once
NAMED = 6  # concepts that describe a cluster in the report

Array = Any  # numpy.ndarray; numpy loads late


class Options(SelectionOptions):
    """Options of PASER."""

    embedding: str = Field(
        "model",
        min_length=1,
        description="what prompts are embedded by: model (mean of the original's last hidden states), or the name of a model of "
        "sentence-transformers, such as all-MiniLM-L6-v2",
    )
    clusters: int | None = Field(
        None,
        ge=1,
        description="clusters of capabilities; default: as many of 2 to 20 as make error and penalty smallest",
    )
    dimensions: int = Field(16, ge=2, description="coordinates of the diffusion map")
    diffusion_steps: int = Field(1, ge=1, description="steps of the walk that the map is made of")
    landmarks: int = Field(
        2000,
        ge=FEWEST_ROWS,
        description="rows that are mapped and clustered exactly; of more, a seeded choice, others put among them",
    )
    concepts: int = Field(
        5,
        ge=0,
        description="key phrases a row that must not contradict rows taken before; 0: rows are not held against each other",
    )


class Method:
    """PASER as a selecting method."""

    measures = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def select(self, pool: Pool, count: int, say: Callable[[str], None]) -> Choice:
        assert pool.embeddings is not None
        assert pool.degradation is not None
        if len(pool) < FEWEST_ROWS:
            raise MethodError(
                f"select.paser: {len(pool)} rows can be trained on, at least {FEWEST_ROWS} are needed to find clusters",
                hint="give more rows, or --method random",
            )
        degradation = pool.degradation.double().numpy()
        say(f"mapping {len(pool)} prompts and clustering them")
        labels, coordinates, facts = self.clustered(pool.embeddings, pool.seed)
        efficiency = efficiencies(degradation, pool.tokens.numpy())
        members = [by_efficiency(np.flatnonzero(labels == k), efficiency) for k in range(labels.max() + 1)]
        suffered = [float(degradation[rows].mean()) for rows in members]
        wanted = quotas(count, suffered, [len(rows) for rows in members])
        say(f"choosing among {len(members)} clusters")
        found = [concepts(text, self.options.concepts) for text in pool.texts] if self.options.concepts else None
        order, outcomes = choose(count, members, suffered, found)
        places = np.empty(len(pool), dtype=np.int64)
        for rows in members:
            places[rows] = np.arange(len(rows))
        lengths = pool.tokens.sum(1).numpy()
        table = [
            {
                "cluster": k,
                "rows": len(rows),
                "degradation": suffered[k],
                "tokens_a_row": float(lengths[rows].mean()),
                "quota": wanted[k],
                "chosen": sum(outcomes[row] == CHOSEN for row in rows),
                "contradicted": sum(outcomes[row] not in (CHOSEN, NO_ROOM) for row in rows),
                **({"concepts": typical([found[row] for row in rows])} if found is not None else {}),
            }
            for k, rows in enumerate(members)
        ]
        shortfalls = []
        if len(order) < min(count, len(pool)):
            shortfalls.append(
                f"{len(order)} of {min(count, len(pool))} rows chosen: all others contradict the concepts of these; "
                "fewer --concepts, or 0, let more in"
            )
        if not degradation.any():
            shortfalls.append(
                "the model predicts what the original does: clusters have their share of rows, not of damage"
            )
        scores = {
            "cluster": labels.tolist(),
            "efficiency": efficiency.tolist(),
            "place_in_cluster": places.tolist(),
            "x": coordinates[:, 0].tolist(),
            "y": coordinates[:, 1].tolist(),
        }
        return Choice(order, outcomes, scores, {**facts, "clusters": table}, shortfalls)

    def clustered(self, embeddings: Table, seed: int) -> tuple[Array, Array, dict[str, Any]]:
        """The cluster int64 [n] and the diffusion coordinates [n, q] of all rows, and how they were found. Clusters without
        rows are left out; the others are numbered by size, the largest 0."""
        options, count = self.options, embeddings.shape[0]
        chosen = landmarks(count, options.landmarks, seed)
        points = np.concatenate([embeddings.read(row, row + 1).numpy() for row in chosen.tolist()])
        points = points.astype(np.float64)
        mean, spread = points.mean(0), points.std(0)
        spread[spread < 1e-6 * max(float(spread.max()), 1e-30)] = 1.0  # what is the same in all rows tells nothing
        try:
            mapped = diffusion_map((points - mean) / spread, options.dimensions, steps=options.diffusion_steps)
        except ValueError:
            raise MethodError(
                "select.paser: all prompts have the same embedding, so there is nothing to cluster",
                hint="give rows of several kinds, or --method random",
            ) from None
        result = cluster(similarity(mapped.coordinates), options.clusters)
        if len(chosen) == count:
            labels, coordinates = result.factors.labels, mapped.coordinates
        else:
            parts, own = [], mapped.coordinates
            labels = np.empty(count, dtype=np.int64)
            for start in range(0, count, CHUNK):
                stop = min(start + CHUNK, count)
                parts.append(mapped.place((embeddings.read(start, stop).numpy() - mean) / spread))
                labels[start:stop] = assign(similarity(parts[-1], own), result.factors.v)
            labels[chosen] = result.factors.labels
            coordinates = np.concatenate(parts)
        sizes = np.bincount(labels)
        numbers = np.empty(len(sizes), dtype=np.int64)
        numbers[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
        facts = {
            "landmarks": len(chosen),
            "kernel_width": mapped.sigma,
            "eigenvalues": mapped.values.tolist(),
            "factorisation_errors": {str(k): error for k, error in result.errors.items()},
        }
        return numbers[labels], coordinates, facts


def landmarks(count: int, most: int, seed: int) -> Array:
    """A seeded choice of ``most`` of ``count`` rows, in order; all of them where there are no more."""
    if count <= most:
        return np.arange(count)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]
    return chosen.sort().values.numpy()


def efficiencies(degradation: Array, tokens: Array) -> Array:
    """Degradation over the logarithm of what training on a row costs, the square of its tokens; ``tokens`` int64 [n, 2]."""
    return degradation / np.log(np.maximum(tokens.sum(1), 2).astype(np.float64) ** 2)


def by_efficiency(rows: Array, efficiency: Array) -> Array:
    """``rows`` by falling efficiency; of equal ones the first."""
    return rows[np.argsort(-efficiency[rows], kind="stable")]


def choose(
    count: int, members: Sequence[Array], weights: Sequence[float], found: Sequence[Sequence[str]] | None
) -> tuple[list[int], list[str]]:
    """At most ``count`` rows of clusters, and what became of every row.

    ``members`` are the rows of each cluster in the order in which they are wanted, ``weights`` its part of the budget,
    ``found`` the concepts of every row, None where they do not matter. The cluster of the largest weight goes first. One
    whose rows run out hands on what is left of its share.
    """
    sizes = [len(rows) for rows in members]
    wanted, shares = quotas(count, weights, sizes), share_out(count, weights, sizes)
    graph, order = ConceptGraph(), []
    outcomes = [NO_ROOM] * sum(sizes)
    looked, taken = [0] * len(members), [0] * len(members)
    while True:
        for k in sorted(range(len(members)), key=lambda k: -weights[k]):
            while taken[k] < shares[k] and looked[k] < sizes[k]:
                row = int(members[k][looked[k]])
                looked[k] += 1
                pair = graph.conflict(found[row]) if found is not None else None
                if pair is not None:
                    outcomes[row] = f"contradicts rows chosen before: '{pair[0]}' and '{pair[1]}' never stand together"
                    continue
                if found is not None:
                    graph.accept(found[row])
                outcomes[row] = CHOSEN
                order.append(row)
                taken[k] += 1
        left = min(count, sum(sizes)) - len(order)
        room = [taken[k] + sizes[k] - looked[k] for k in range(len(members))]
        if left <= 0 or room == taken:
            return order, outcomes
        shares = top_up(taken, wanted, room, left)


def typical(found: Sequence[Sequence[str]]) -> list[str]:
    """The concepts that most rows share."""
    counts = Counter(concept for one in found for concept in one)
    return [concept for concept, _ in counts.most_common(NAMED)]
