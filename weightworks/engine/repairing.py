"""The loop of renormalisation: a pruned model's layers put out what the original's do, channel by channel.

Factors and shifts go into weights, biases and gains; a factor leaves every zero of its row a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weightworks.engine.blockwise import Written, prove_first
from weightworks.engine.finish import stream_perplexity
from weightworks.engine.job import Job
from weightworks.engine.merging import Correction
from weightworks.engine.renormalising import Renormalised, Renormaliser
from weightworks.engine.teacher import Teacher
from weightworks.engine.trained import carry_masks, distance, masked_tensors
from weightworks.errors import MethodError
from weightworks.stage.protocols import Solution
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import turned
from weightworks.stream.symmetry import search


def check_repairable(job: Job) -> None:
    """Refuse a renormalisation without the original."""
    if Teacher.of(job) is None:
        raise MethodError(
            f"{job.label}: layers are to put out what the original's do", hint="name it: --teacher ORIGINAL"
        )


def repair(
    job: Job, writer: CheckpointWriter, text: Calibration, probe: torch.Tensor, *, on_disk: bool
) -> dict[str, Any]:
    """Find the corrections on ``text``, and write what they change; returns ``rows``, what is to be told of the
    ``renormalisation``, and the probe's perplexities."""
    job.returns_tuple = prove_first(job, writer, probe)
    dense = stream_perplexity(job, job.view, probe)
    teacher = Teacher.of(job)
    assert teacher is not None  # refused before
    corrections: dict[str, Correction] = {}
    what = Renormalised(
        job.skeleton,
        search(job.skeleton, teacher.view, hint="its layers cannot be renormalised: take --method perp"),
        {spec.name: spec.dtype for spec in job.specs},
        job.view,
        [teacher.view],
        [1.0],
        job.device,
        only=job.linears,
        norms=bool(job.options.norms),
    )
    facts = Renormaliser(what, writer, job.progress, text.tokens, corrections, on_disk=on_disk).run()
    if "renormalised" not in writer.steps:
        rows = _write(job, writer, corrections, facts["left"])
        carry_masks(job, writer)
        writer.done("renormalised", {"rows": rows})
    result = stream_perplexity(job, Written(job, writer), probe)
    left = {name: one.left for name, one in corrections.items() if one.left}
    told = {**facts, "text": text.facts(), "means_left": left}
    return {"rows": writer.steps["renormalised"]["rows"], "renormalisation": told, "dense": dense, "result": result}


def _write(
    job: Job, writer: CheckpointWriter, corrections: Mapping[str, Correction], left: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Write every tensor that may be changed, corrected where it is; returns the report's rows, in file order.

    ``left`` are modules that could not be corrected, and why.
    """
    masked, rows = masked_tensors(job), []
    for name in (name for name in job.checkpoint.tensors if name in job.changed):
        info, before = job.checkpoint.info(name), job.view.read(name, torch.float32)
        after = corrections[name].made(before) if name in corrections else before
        facts: dict[str, Any] = {"relative_change": distance(after, before)}
        if name in corrections:
            scale = corrections[name].scale
            facts |= {"least_factor": float(scale.min()), "greatest_factor": float(scale.max())}
            facts |= {"mean_left": corrections[name].left} if corrections[name].left else {}
        elif name in job.linears or any(name.startswith(module) for module in left):
            reasons = [reason for module, reason in left.items() if name.startswith(module + ".")]
            facts["fallbacks"] = [f"left as it is: {(*reasons, 'the text does not reach it')[0]}"]
        if name in job.linears:
            linear, mask = job.linears[name], None
            if name in masked:
                assert job.masks is not None
                mask = turned(job.masks.read(name, info.shape), linear)
            solution = Solution(turned(after, linear), facts, mask=mask)
            for stored, tensor in job.stored(linear, solution).items():
                writer.put(stored, tensor.cpu())
            rows.append(job.row(linear, solution))
            continue
        writer.put(name, after.to(info.dtype).contiguous())
        row = {"tensor": name, "shape": list(info.shape), "method": job.label}
        rows.append({**row, "bytes_in": info.nbytes, "bytes_out": info.nbytes, **facts})
    return rows
