"""What a training has made, put where it belongs: changed tensors and the masks that were held, a row of the report each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from weightworks.engine.imitating import check_imitable
from weightworks.engine.job import Job
from weightworks.engine.teacher import Teacher
from weightworks.errors import MethodError
from weightworks.stage.protocols import Solution
from weightworks.store.checkpoint import MASKS
from weightworks.store.masks import SUFFIX
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.linears import turned
from weightworks.stream.whole import Whole

CURVE = 50  # points of the loss curve that the report has of a round


def check_trainable(job: Job) -> None:
    """Refuse a training of nothing, one without the mask it needs, and an imitation of what cannot be imitated."""
    check_imitable(job)
    window = job.method.regime().window
    if Teacher.of(job) is None and window is not None:
        raise MethodError(f"{job.label}: reconstruction imitates the original", hint="name it: --teacher ORIGINAL")
    if window not in (None, "block"):
        job.outline.halves(0)
    if not job.changed:
        raise MethodError(f"{job.label}: nothing to train: the model has none of what was asked for")
    masked = job.masks.infos if job.masks is not None else ()
    if lost := [name for name in masked if name in job.changed and name not in job.linears]:
        raise MethodError(
            f"{job.label}: {len(lost)} weights that the model's masks say are pruned are left out by --ignore, and would "
            f"be trained without: {', '.join(lost[:5])}",
            hint="ignore others",
        )


def given_masks(job: Job) -> Iterator[tuple[str, torch.Tensor]]:
    """The masks [out, in] that the model's folder has, of weights the job works on: what was pruned before stays so."""
    for name in job.masks.infos if job.masks is not None else ():
        if name in job.linears:
            assert job.masks is not None
            yield name, turned(job.masks.read(name, job.view.shape(name)), job.linears[name])


def masked_tensors(job: Job) -> set[str]:
    """The weights that have a mask in the output."""
    return {spec.name.removesuffix(SUFFIX) for spec in job.side.get(MASKS, ())}


def whole(job: Job, dtype: torch.dtype) -> Whole:
    """The job's model, to be loaded."""
    linears = {name: one for name, one in job.adaptable.items() if name in job.linears or name in job.subset.adapters}
    return Whole(job.skeleton, job.view, linears, job.subset, dtype, job.device, seed=job.settings.seed)


def write_changed(job: Job, writer: CheckpointWriter, model: Whole) -> list[dict[str, Any]]:
    """Write every tensor of ``model`` that was trained, and its mask; returns the report's rows, in file order."""
    masked, changed, rows = masked_tensors(job), dict(model.stored()), []
    figure = "relative_weight_error" if job.method.masks else "relative_change"
    for name in (name for name in job.checkpoint.tensors if name in changed):
        info = job.checkpoint.info(name)
        if name in masked:
            linear, original, weight, mask = (
                job.linears[name],
                model.original(name),
                model.merged(name),
                model.mask(name),
            )
            facts = {figure: distance(weight, original), **job.method.told(weight, original, mask)}
            solution = Solution(weight, facts, mask=mask)
            for stored, tensor in job.stored(linear, solution).items():
                writer.put(stored, tensor.cpu())
            rows.append(job.row(linear, solution))
            continue
        value = changed[name]()
        moved = distance(value.cpu(), job.view.read(name, torch.float32))
        writer.put(name, value.to(info.dtype).cpu().contiguous())
        row = {"tensor": name, "shape": list(info.shape), "method": job.label}
        rows.append({**row, "bytes_in": info.nbytes, "bytes_out": info.nbytes, "relative_change": moved})
    return rows


def carry_masks(job: Job, writer: CheckpointWriter) -> None:
    """Copy the masks of weights that were not trained."""
    for name in sorted(masked_tensors(job) - job.changed):
        assert job.masks is not None
        writer.put(name + SUFFIX, job.masks.packed(name))


def distance(weight: torch.Tensor, original: torch.Tensor) -> float:
    """|| W' - W ||^2 / || W ||^2."""
    return float((weight - original).square().sum() / original.square().sum().clamp(min=1e-30))


def trained_share(job: Job, trained: int) -> float:
    """``trained`` parameters as a share of the model's."""
    return trained / sum(math.prod(spec.shape) for spec in job.view.specs)


def refuse_divergence(job: Job, writer: CheckpointWriter, loss: float, norm: float, where: str) -> None:
    """Raise :class:`MethodError` for a loss or gradient that is no number; nothing is left, it would come to this again."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        writer.discard()
        raise MethodError(
            f"{job.label}: the training diverged: loss {loss}, gradient norm {norm} at {where}",
            hint="take a smaller --lr; nothing was written",
        )


def curve(losses: Sequence[float], points: int = CURVE) -> list[float]:
    """At most so many means of equal stretches of ``losses``."""
    ends = [len(losses) * number // points for number in range(points + 1)]
    return [round(sum(losses[a:b]) / (b - a), 5) for a, b in itertools.pairwise(ends) if b > a]
