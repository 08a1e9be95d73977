"""Surveys: passes over the unchanged model, made before a method that shares something out over it changes any weight.

A survey that looks at inputs walks the blocks as the blockwise engine does and is journalled block by block; one that
needs only weights is a single pass over the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from weightworks.engine.job import Job
from weightworks.engine.walk import Walk
from weightworks.stage.protocols import Survey
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import Linear, read_linear


class Weights(Sequence[torch.Tensor]):
    """Weights float32 [out, in], each read when it is asked for."""

    def __init__(self, job: Job, linears: Sequence[Linear]) -> None:
        self.job, self.linears = job, linears

    def __len__(self) -> int:
        return len(self.linears)

    def __getitem__(self, place: Any) -> Any:
        return read_linear(self.job.view, self.linears[place]).to(self.job.device)


@torch.no_grad()
def run_surveys(
    job: Job,
    writer: CheckpointWriter,
    calibration: Calibration | None,
    probe: torch.Tensor,
    dtype: torch.dtype,
    *,
    on_disk: bool,
) -> None:
    """Make the surveys the job's method asks for, and give the job what they found."""
    surveys: Sequence[Survey] = job.method.surveys() if hasattr(job.method, "surveys") else ()
    found: Any = None
    for number, survey in enumerate(surveys):
        if f"survey {number}" not in writer.steps:
            if survey.watch is None:
                figures = list(_tensors(job, survey, found))
            else:
                assert calibration is not None
                walk = Walk(job, writer, f"survey {number}", calibration.tokens, probe, dtype, on_disk=on_disk)
                figures = walk.run(partial(_block, job, walk, survey, found))
            writer.done(f"survey {number}", {"found": survey.conclude(figures, found)})
        found = writer.steps[f"survey {number}"]["found"]
    job.found = found or {}


def _tensors(job: Job, survey: Survey, found: Any) -> Iterator[Any]:
    """The figures of every linear by itself, in the order of the model."""
    job.progress.begin("tensor looked at", len(job.linears), 0, every=5.0)
    for linear in job.linears.values():
        yield survey.look(Weights(job, [linear]), [None], [job.target_of(linear)], found)
        job.progress.step(linear.tensor)
    job.progress.end()


def _block(job: Job, walk: Walk, survey: Survey, found: Any, index: int) -> Any:
    """The figures of a loaded block."""
    assert survey.watch is not None
    linears = job.blocks[index]
    of = {name: statistics for part in walk.inputs(index, survey.watch) for name, statistics in part.items()}
    seen = [of[linear.tensor] for linear in linears]
    return survey.look(Weights(job, linears), seen, [job.target_of(linear) for linear in linears], found)
