"""Weight matching: every model's units and heads put in the order in which its weights are closest to a reference's.

Ainsworth et al. 2022 (Git Re-Basin, arXiv:2209.04836, section 3.2), for the symmetries of :mod:`weightworks.stream.symmetry`.
The residual stream keeps its order, so that families do not depend on each other and each has its exact optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from weightworks.engine.mergejob import Input, MergeJob
from weightworks.store.dense import DenseView
from weightworks.store.permuted import PermutedView
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.symmetry import HEAD, Family, Segments, Shape, find_symmetry

LEAST_GAIN = 1e-3  # of the cosine of a family's weights; less is noise, and the order stays as it is
SHOWN = 5  # families named when some of a model's are moved


@dataclass(frozen=True)
class Similarity:
    """Inner products of all heads of a reference with all of a model: float64 [H, H] of what moves with heads, [K, K] of
    what moves with groups; ``reference`` and ``model`` are the squared norms of all of it."""

    heads: torch.Tensor
    groups: torch.Tensor
    reference: float
    model: float

    def cosine(self, order: torch.Tensor, shape: Shape) -> float:
        """Cosine of the reference's weights and the model's in ``order``, int64 [H]."""
        groups = order[:: shape.heads] // shape.heads
        value = self.heads[torch.arange(len(order)), order].sum() + self.groups[torch.arange(len(groups)), groups].sum()
        return float(value) / max(math.sqrt(self.reference * self.model), 1e-300)


def products(
    shape: Shape, segments: Segments, reference: torch.Tensor, model: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inner products of heads [H, H] and of groups [K, K], float64, of two tensors [rows, ...] whose rows hold ``segments``."""
    count = shape.groups * shape.heads
    heads = torch.zeros(count, count, dtype=torch.float64)
    groups = torch.zeros(shape.groups, shape.groups, dtype=torch.float64)
    start = 0
    for kind, size in segments:
        stop = start + shape.count(kind) * size
        a, b = (tensor[start:stop].reshape(shape.count(kind), -1) for tensor in (reference, model))
        (heads if kind == HEAD else groups).add_((a @ b.T).cpu())  # float32 products, added up in float64
        start = stop
    return heads, groups


def best_order(heads: torch.Tensor, groups: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The order of a model's heads, int64 [H], that makes the sum of ``heads`` [H, H] and ``groups`` [K, K] greatest.

    Groups stay together: for every pair of groups the best order of heads inside, then the best pairs.
    """
    size, count = shape.heads, shape.groups
    if size == 1:
        return assign(heads + groups)
    blocks = heads.view(count, size, count, size).transpose(1, 2)  # [K, K, g, g]
    inner = torch.stack([torch.stack([assign(block) for block in row]) for row in blocks])  # [K, K, g]
    value = groups + blocks.gather(-1, inner[..., None]).sum((-1, -2))  # [K, K]
    outer = assign(value)
    return torch.cat([outer[k] * size + inner[k, outer[k]] for k in range(count)])


def assign(value: torch.Tensor) -> torch.Tensor:
    """For each row of ``value`` [n, n] the column of the assignment of greatest sum, int64 [n]."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(value.numpy(), maximize=True)
    return torch.from_numpy(columns).long()


@torch.no_grad()
def align(job: MergeJob, writer: CheckpointWriter) -> dict[str, Any]:
    """Let every model of ``job`` but the reference be read in its best order; returns what the report says of it.

    Each model's orders are a step of the journal. Raises :class:`ArchitectureError` where no symmetry is known.
    """
    reference = job.reference
    job.progress.say(f"aligning to {reference.name}")
    symmetry = find_symmetry(
        DenseView(reference.checkpoint), reference.reader, trust_remote_code=job.settings.trust_remote_code
    )
    facts: dict[str, Any] = {
        "reference": reference.name,
        "least_gain": LEAST_GAIN,
        "not_aligned": dict(symmetry.unknown),
        "models": {},
    }
    models = list(job.models)
    for number, item in enumerate(models):
        if item is reference:
            continue
        rows = []
        orders: dict[str, tuple[int, torch.Tensor]] = {}
        for block in dict.fromkeys(family.block for family in symmetry.families):
            families = [family for family in symmetry.families if family.block == block]
            step = f"aligned {number} {block}"
            if step not in writer.steps:
                writer.done(step, {"families": [_aligned(job, item, family) for family in families]})
            for family, row in zip(families, writer.steps[step]["families"], strict=True):
                rows.append({key: value for key, value in row.items() if key != "order"})
                if row["order"] is not None:
                    orders |= family.orders(torch.tensor(row["order"]), item.reader)
        facts["models"][item.name] = rows
        if orders:
            models[number] = replace(item, reader=PermutedView(item.reader, orders))
        job.progress.say(told(item.name, rows))
    job.models = models
    job.alignment = facts
    return facts


def _aligned(job: MergeJob, item: Input, family: Family) -> dict[str, Any]:
    """The best order of one family of a model, None if it stays; its gain, and the cosines before and after."""
    row: dict[str, Any] = {"family": family.name, "heads": family.shape.groups * family.shape.heads, "order": None}
    lacking = [axis.tensor for axis in family.axes if axis.tensor not in item.tensors]
    if lacking:
        return {**row, "gain": 0.0, "moved": 0, "lacking": lacking}
    found = similarity(job, item, family)
    order = best_order(found.heads, found.groups, family.shape)
    same = torch.arange(len(order))
    before, after = (found.cosine(one, family.shape) for one in (same, order))
    row |= {"cosine": before, "gain": after - before, "moved": int((order != same).sum())}
    if after - before < LEAST_GAIN:
        return row
    return {**row, "order": order.tolist()}


def similarity(job: MergeJob, item: Input, family: Family) -> Similarity:
    """Read a family's tensors of the reference and of a model, two at a time."""
    shape = family.shape
    count = shape.groups * shape.heads
    heads = torch.zeros(count, count, dtype=torch.float64)
    groups = torch.zeros(shape.groups, shape.groups, dtype=torch.float64)
    norms = [0.0, 0.0]
    for axis in family.axes:
        sides = []
        for place, one in enumerate((job.reference, item)):
            rows = one.tensors[axis.tensor].shape[0]
            tensor = job.read(one, axis.tensor, 0, rows).movedim(axis.stored(one.reader), 0)
            norms[place] += float(tensor.double().square().sum())
            sides.append(tensor)
        of_heads, of_groups = products(shape, axis.segments, *sides)
        heads += of_heads
        groups += of_groups
    return Similarity(heads, groups, *norms)


def told(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What a person is told of a model."""
    moved = [row for row in rows if row["gain"] >= LEAST_GAIN]
    if not moved:
        most = max((row["gain"] for row in rows), default=0.0)
        gain = f"the best would raise the cosine by {most:.1e} only" if most > 0 else "no other is nearer"
        return f"{name}: its units keep their order, {gain}"
    shown = ", ".join(f"{row['family']} {row['moved']} of {row['heads']} (+{row['gain']:.3f})" for row in moved[:SHOWN])
    more = f" and {len(moved) - SHOWN} more" if len(moved) > SHOWN else ""
    return f"{name}: moved in {len(moved)} of {len(rows)} parts: {shown}{more}"


def aligning_bytes(job: MergeJob) -> int:
    """Bytes that the matching takes: two tensors and their copies, and the inner products of the widest family."""
    shapes = [part.spec.shape for part in job.merged if len(part.spec.shape) == 2]
    largest = max((math.prod(shape) for shape in shapes), default=0)
    inner = [max(shape) for shape in shapes if _narrow(shape, shapes)]
    return 4 * 4 * largest + 24 * max(inner, default=0) ** 2


def _narrow(shape: Sequence[int], shapes: Sequence[Sequence[int]]) -> bool:
    """Whether a matrix is of a kind that blocks repeat; embeddings have a length of their own."""
    return sum(max(other) == max(shape) for other in shapes) > 2
