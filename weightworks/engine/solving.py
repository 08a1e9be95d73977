"""An adapter beside the model that is solved layer by layer, from what the layer's weight lost and from the inputs it sees."""

from __future__ import annotations

from typing import Any

import torch

from weightworks.engine.beside import Summed
from weightworks.engine.finish import stream_perplexity
from weightworks.engine.job import Job
from weightworks.engine.teacher import Teacher
from weightworks.engine.walk import Walk
from weightworks.errors import MethodError
from weightworks.store.adapters import PREFIX
from weightworks.store.dense import DenseView
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import Linear


def check_solvable(job: Job) -> None:
    """Refuse it without the original, or with one that has other weights."""
    teacher = Teacher.of(job)
    if teacher is None:
        raise MethodError(
            f"{job.label}: what rounding lost is known from the original alone", hint="name it: --teacher ORIGINAL"
        )
    wrong = [
        name for name in job.subset.adapters
        if name not in teacher.view.names or weight_shape(teacher.view, job.linears[name]) != job.linears[name].shape
    ]  # fmt: skip
    if wrong:
        raise MethodError(
            f"{job.label}: {len(wrong)} weights have no counterpart in {teacher.view.checkpoint.source}: {', '.join(wrong[:3])}",
            hint="name the checkpoint that was quantized: --teacher ORIGINAL",
        )


@torch.no_grad()
def solve(
    job: Job,
    writer: CheckpointWriter,
    calibration: Calibration,
    probe: torch.Tensor,
    dtype: torch.dtype,
    *,
    on_disk: bool,
    limit: int,
) -> dict[str, Any]:
    """Write the factors of every layer; returns ``rows`` and the probe's perplexities without and with the adapter.

    A walk over the model as it is, journalled block by block; statistics take ``limit`` bytes at a time.
    """
    teacher = Teacher.of(job)
    assert teacher is not None  # refused before
    walk = Walk(job, writer, "solving", calibration.tokens, probe, dtype, on_disk=on_disk)

    def look(index: int) -> list[dict[str, Any]]:
        rows = []
        for found in walk.inputs(index, job.method.watch, limit):
            for name, statistics in found.items():
                if name in job.subset.adapters:
                    rows.append(_solved(job, writer, teacher.view, job.linears[name], statistics))
        return rows

    rows = [row for block in walk.run(look) for row in block]

    def factors(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        b, a = (writer.read(f"{PREFIX}{module}.lora_{end}.weight") for end in "BA")
        return b, a

    dense = stream_perplexity(job, job.view, probe)
    return {"rows": rows, "dense": dense, "result": stream_perplexity(job, Summed(job, factors), probe)}


def _solved(job: Job, writer: CheckpointWriter, original: DenseView, linear: Linear, statistics: Any) -> dict[str, Any]:
    """Write the factors of one layer; returns its row of the report."""
    error = as_linear(original, linear) - as_linear(job.view, linear)
    b, a, left = job.method.factors(error, statistics)
    for end, factor in (("A", a), ("B", b)):
        writer.put(f"{PREFIX}{linear.module}.lora_{end}.weight", factor.contiguous())
    row: dict[str, Any] = {"tensor": linear.tensor, "shape": list(linear.shape), "method": job.label, "rank": len(a)}
    row["bytes_in"] = linear.shape[0] * linear.shape[1] * linear.dtype.itemsize
    row["bytes_out"] = a.nbytes + b.nbytes
    row |= {"tokens": statistics.tokens, "relative_error": left}
    if not statistics.tokens:
        row["fallbacks"] = ["saw no inputs, all count alike"]
    return row


def weight_shape(view: DenseView, linear: Linear) -> tuple[int, ...]:
    """The shape [out, in] of a weight."""
    shape = view.shape(linear.tensor)
    return shape[::-1] if linear.transposed and not view.is_packed(linear.tensor) else shape


def as_linear(view: DenseView, linear: Linear) -> torch.Tensor:
    """A weight float32 [out, in], whatever way it is stored."""
    weight = view.read(linear.tensor, torch.float32)
    return weight.T if linear.transposed and not view.is_packed(linear.tensor) else weight
