"""Statistics of a model on a text, from request to a published file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.blockwise import hidden_size
from weightworks.engine.estimate import BYTES_A_SECOND, RUNTIME_BYTES, Estimate, refuse
from weightworks.engine.identity import digest_of
from weightworks.engine.job import Job
from weightworks.engine.machine import compute_dtype, free_memory, pick_device, resident, speeds
from weightworks.engine.statistics import (
    fisher_bytes,
    fisher_specs,
    gather_fisher,
    gather_grams,
    gram_bytes,
    gram_specs,
)
from weightworks.engine.walk import Walk
from weightworks.errors import OutputError, ResourceError
from weightworks.plan.side import Looking, Written
from weightworks.plan.stage import keep_inputs, short_name
from weightworks.plan.texts import calibrate, check_windows, stored_dtype
from weightworks.plan.working import working
from weightworks.report.progress import Progress
from weightworks.stage.settings import Settings
from weightworks.stage.statistics import StatisticsOptions
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.shards import planned_bytes
from weightworks.store.statistics import ENTRY, read_facts
from weightworks.store.writer import CheckpointWriter, check_target
from weightworks.stream.calibration import Calibration

VERSION = 1  # of the figures: part of the identity
FILE = "statistics.safetensors"  # the file's name until it is published under its own
BACKWARD = 3  # times the arithmetic of a forward pass that a gradient takes
STATES_SHARE = 4  # hidden states may take this part of memory; beyond it they go to a file


def run_stats(
    model: str,
    options: StatisticsOptions,
    settings: Settings,
    *,
    output: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
) -> Written:
    """Gather statistics of ``model`` on the text of ``settings`` into one file. ``announce`` is given the configuration."""
    started, progress = time.monotonic(), progress or Progress(quiet=True)
    checkpoint = Checkpoint.open(model, allow_pickle=settings.allow_pickle)
    target = (output or Path(f"{short_name(checkpoint)}.{options.kind}.safetensors")).absolute()
    keep_inputs(target, [checkpoint])
    device, label = pick_device(settings.device), f"stats.{options.kind}"
    job = Job(label, VERSION, Looking(options), settings, checkpoint, target, progress, device)
    text = calibrate(job)
    dtype = torch.float32
    if options.kind == "gram":
        dtype = compute_dtype(settings.dtype, stored_dtype(checkpoint), device)
    announce(_resolved(job, text, dtype))
    identity = job.identity(calibration=text.digest, dtype=str(dtype))
    if target.is_file() and not settings.overwrite:
        facts = read_facts(target)
        if facts is not None and facts["identity"] == digest_of(identity):
            return Written(target, None, facts, cached=True, seconds=time.monotonic() - started)
    if not dry_run:
        check_target(target, overwrite=settings.overwrite)
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; statistics are one file", hint="give a file name with -o")
    costs = _estimate(job, text, dtype)
    if dry_run:
        return Written(target, costs, None, seconds=time.monotonic() - started)
    _refuse(job, costs)
    transposed = sorted(linear.tensor for linear in job.linears.values() if linear.transposed)
    facts = {
        "kind": options.kind,
        "model": checkpoint.digest,
        "source": checkpoint.name,
        "identity": digest_of(identity),
        "text": {"dataset": settings.dataset, **text.facts()},
        "dtype": str(dtype).removeprefix("torch."),
        **(
            {"labels": options.labels, "seed": settings.seed}
            if options.kind == "fisher"
            else {"transposed": transposed}
        ),
    }
    notes = _execute(job, identity, facts, text, dtype, costs)
    return Written(target, costs, facts, tuple(notes), seconds=time.monotonic() - started)


def _execute(
    job: Job, identity: dict[str, Any], facts: dict[str, Any], text: Calibration, dtype: torch.dtype, costs: Estimate
) -> list[str]:
    """Do the work, read it back and publish the file; a failure or interruption leaves what is finished for the next run."""
    settings, options = job.settings, job.options
    gram = options.kind == "gram"
    specs = gram_specs(job) if gram else fisher_specs(job)
    writer = CheckpointWriter(
        job.target,
        [],
        identity,
        overwrite=settings.overwrite,
        resume=settings.resume,
        side={FILE: specs},
        metadata={ENTRY: json.dumps(facts, sort_keys=True)},
    )
    with working(job, writer):
        if gram:
            probe = check_windows(job.checkpoint, job.skeleton, trust_remote_code=settings.trust_remote_code)
            walk = Walk(job, writer, "gram", text.tokens, probe, dtype, on_disk=costs.on_disk)
            notes = gather_grams(job, writer, walk, costs.statistics_bytes)
        else:
            notes = gather_fisher(job, writer, text.tokens, labels=options.labels)
        job.progress.say("verifying: reading everything back", detail=True)
        writer.read_back()
        writer.commit(only=FILE)
        return notes


def _estimate(job: Job, text: Calibration, dtype: torch.dtype) -> Estimate:
    """What it will take, from headers and structure."""
    windows, length = text.tokens.shape
    gram = job.options.kind == "gram"
    output = planned_bytes(gram_specs(job) if gram else fisher_specs(job), 1 << 62)
    limit = job.settings.memory_limit or free_memory() + resident()
    states = windows * length * hidden_size(job) * dtype.itemsize
    stored = sum(info.nbytes for info in job.checkpoint.tensors.values())
    parameters = sum(info.nbytes // info.dtype.itemsize for info in job.checkpoint.tensors.values())
    arithmetic = 2.0 * parameters * windows * length
    on_disk, matrices = False, 0
    held = fisher_bytes(job, length)
    if gram:
        on_disk = states > limit // STATES_SHARE
        widths = [linear.shape[1] for linear in job.linears.values()]
        fixed = resident() + RUNTIME_BYTES + gram_bytes(job) + (0 if on_disk else states)
        matrices = max(4 * max(widths) ** 2, (limit - fixed) // 2)
        whole = max(4 * sum({linear.shape[1] ** 2 for linear in block}) for block in job.blocks)
        held = gram_bytes(job) + (0 if on_disk else states) + min(matrices, whole)
        arithmetic *= 2 + max(widths) / max(min(widths), 1)  # the pass, the watching, the products
    else:
        arithmetic *= BACKWARD
    return Estimate(
        output_bytes=output,
        disk_bytes=output + (2 * states if gram else 0),
        peak_bytes=resident() + RUNTIME_BYTES + held,
        peak_phase="matrices of a block" if gram else "weights, gradients and sums of the whole model",
        seconds=arithmetic / speeds()["float32"] + (3 * stored + 2 * output) / BYTES_A_SECOND,
        limit_bytes=limit,
        on_disk=on_disk,
        statistics_bytes=matrices,
        reload_blocks=0,
    )


def _refuse(job: Job, costs: Estimate) -> None:
    """As every stage does; Fisher information has no way to take less than the whole model."""
    try:
        refuse(costs, job.target)
    except ResourceError as error:
        if job.options.kind == "fisher" and costs.peak_bytes > costs.limit_bytes:
            error.hint = (
                "gradients need the whole model in memory; shorter windows (--seq-len) help a little, gram streams"
            )
        raise


def _resolved(job: Job, text: Calibration, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration as it will run."""
    options, facts = job.options.resolved(), text.facts()
    if job.options.kind == "gram":
        del options["labels"]
    return {
        "model": job.checkpoint.name,
        **options,
        "output": str(job.target),
        "dataset": facts["source"],
        "windows": f"{facts['windows']} of {facts['seq_len']} tokens",
        "dtype": str(dtype).removeprefix("torch."),
        "seed": job.settings.seed,
        "device": str(job.device),
    }
