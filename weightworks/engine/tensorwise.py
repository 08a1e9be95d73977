"""The loop over tensors, for methods that need nothing but the weight itself. No model is ever built in memory.

Where there are workers, the tensors are dealt to them; what they make comes back in file order and is stored here, so
that journal and bytes are those of one process, whoever worked and however often a worker was lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.executor import Executor, in_order
from weightworks.engine.job import Job
from weightworks.report.progress import Progress
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.linears import read_linear

JOURNAL_BYTES = 256 << 20  # input bytes between two journal entries: little is lost, the disk is not kept waiting
TASK_BYTES = 64 << 20  # input bytes of a task at most: what its tensors come to waits in memory to be stored
TASKS = 4  # for each worker: an even share of the work, whatever the sizes


@dataclass(frozen=True)
class LayerTask:
    """Some weights for a worker that has nothing but this: small, no tensors. ``job`` says in JSON what is done to them."""

    job: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Solved:
    """What became of a weight: the tensors that stand for it, and its row of the report."""

    name: str
    stored: Mapping[str, torch.Tensor]
    row: Mapping[str, Any]


@torch.no_grad()
def run_tensorwise(job: Job, writer: CheckpointWriter, executor: Executor | None = None) -> list[dict[str, Any]]:
    """Apply the method to every linear, in file order; returns the report's rows.

    Workers of an ``executor`` read the checkpoint under the path it has here, and compute on processors.
    """
    names = [name for name in job.checkpoint.tensors if name in job.linears]
    finished = {row["tensor"] for facts in writer.steps.values() for row in facts.get("rows", [])}
    if finished:
        job.progress.say(f"resuming after {len(finished)} of {len(names)} tensors")
    job.progress.begin("tensor", len(names), len(finished), every=5.0)
    rows: list[dict[str, Any]] = []
    held = 0
    for solved in _solutions(job, [name for name in names if name not in finished], executor):
        for stored, tensor in solved.stored.items():
            writer.put(stored, tensor)
        rows.append(dict(solved.row))
        held += job.checkpoint.tensors[solved.name].nbytes
        if held > JOURNAL_BYTES:
            writer.done(f"tensors to {solved.name}", {"rows": rows})
            rows, held = [], 0
        job.progress.step(solved.name)
    if rows:
        writer.done("last tensors", {"rows": rows})
    job.progress.end()
    return [row for facts in writer.steps.values() for row in facts.get("rows", [])]


def _solutions(job: Job, names: Sequence[str], executor: Executor | None) -> Iterator[Solved]:
    """What becomes of the weights ``names``, in their order."""
    if executor is None or job.device.type != "cpu":
        yield from (_solve(job, name) for name in names)
        return
    sizes = {name: job.checkpoint.tensors[name].nbytes for name in names}
    most = min(TASK_BYTES, sum(sizes.values()) // (TASKS * (executor.slots or 1)))
    described = _described(job)
    tasks = [LayerTask(described, batch) for batch in batches(sizes, most)]
    for solved in in_order(executor, solve_layers, tasks):
        yield from solved


def _solve(job: Job, name: str) -> Solved:
    linear = job.linears[name]
    weight = read_linear(job.view, linear).to(job.device)
    solution = job.method.apply(weight, job.target_of(linear))
    return Solved(name, job.stored(linear, solution), job.row(linear, solution))


@torch.no_grad()
def solve_layers(task: LayerTask) -> list[Solved]:
    """Do a task, in any process."""
    job = _job(task.job)
    return [_solve(job, name) for name in task.tensors]


def batches(sizes: Mapping[str, int], most: int) -> Iterator[tuple[str, ...]]:
    """Names in their order, as many together as have ``most`` bytes; a larger one alone."""
    batch: list[str] = []
    held = 0
    for name, size in sizes.items():
        if batch and held + size > most:
            yield tuple(batch)
            batch, held = [], 0
        batch.append(name)
        held += size
    if batch:
        yield tuple(batch)


def _described(job: Job) -> str:
    """All that another process needs to make the same job. The digest keeps apart what lay under one path in turn."""
    facts = {
        "label": job.label,
        "options": job.options.model_dump(mode="json"),
        "settings": job.settings.model_dump(mode="json"),
        "model": str(job.checkpoint.root),
        "digest": job.checkpoint.digest,
        "found": dict(job.found),
    }
    return json.dumps(facts)


@lru_cache(maxsize=1)
def _job(described: str) -> Job:
    facts = json.loads(described)
    module = catalog.find(*facts["label"].split(".", 1)).load()
    settings = Settings(**facts["settings"])
    checkpoint = Checkpoint.open(facts["model"], allow_pickle=settings.allow_pickle)
    method = module.Method(module.Options.model_validate_json(json.dumps(facts["options"])))
    cpu, nowhere = torch.device("cpu"), Path("unused")
    job = Job(facts["label"], module.VERSION, method, settings, checkpoint, nowhere, Progress(quiet=True), cpu)
    job.found = facts["found"]
    return job
