"""The loop over tensors, for methods that need nothing but the weight itself. No model is ever built in memory."""

from __future__ import annotations

from typing import Any

import torch

from weightworks.engine.job import Job
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.linears import read_linear

JOURNAL_BYTES = 256 << 20  # input bytes between two journal entries: little is lost, the disk is not kept waiting


@torch.no_grad()
def run_tensorwise(job: Job, writer: CheckpointWriter) -> list[dict[str, Any]]:
    """Apply the method to every linear, in file order; returns the report's rows."""
    names = [name for name in job.checkpoint.tensors if name in job.linears]
    finished = {row["tensor"] for facts in writer.steps.values() for row in facts.get("rows", [])}
    if finished:
        job.progress.say(f"resuming after {len(finished)} of {len(names)} tensors")
    job.progress.begin("tensor", len(names), len(finished), every=5.0)
    rows: list[dict[str, Any]] = []
    held = 0
    for name in names:
        if name in finished:
            continue
        linear = job.linears[name]
        weight = read_linear(job.view, linear).to(job.device)
        solution = job.method.apply(weight, job.target_of(linear))
        for stored, tensor in job.stored(linear, solution).items():
            writer.put(stored, tensor)
        rows.append(job.row(linear, solution))
        held += job.checkpoint.tensors[name].nbytes
        if held > JOURNAL_BYTES:
            writer.done(f"tensors to {name}", {"rows": rows})
            rows, held = [], 0
        job.progress.step(name)
    if rows:
        writer.done("last tensors", {"rows": rows})
    job.progress.end()
    return [row for facts in writer.steps.values() for row in facts.get("rows", [])]
