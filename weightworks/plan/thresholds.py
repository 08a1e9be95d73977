"""Thresholds of activations for a model, from request to a published folder with a measured report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.blockwise import hidden_size
from weightworks.engine.estimate import BYTES_A_SECOND, RUNTIME_BYTES, Estimate, refuse
from weightworks.engine.identity import digest_of
from weightworks.engine.job import Job
from weightworks.engine.machine import compute_dtype, free_memory, pick_device, resident, speeds
from weightworks.engine.thresholds import BINS, STEP, find_thresholds, joined
from weightworks.engine.walk import Walk
from weightworks.plan.side import Looking, Written
from weightworks.plan.stage import keep_inputs, short_name
from weightworks.plan.texts import calibrate, check_windows, stored_dtype
from weightworks.plan.working import working
from weightworks.report.progress import Progress
from weightworks.stage.settings import Settings
from weightworks.stage.thresholds import ThresholdOptions
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.documents import read_json
from weightworks.store.sources import file_digest
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.writer import CheckpointWriter, check_target
from weightworks.stream.activations import Activations
from weightworks.stream.calibration import Calibration, load_windows
from weightworks.stream.passes import Windows, perplexity, stream_losses
from weightworks.stream.sparsified import sparsified

VERSION = 1  # of the figures: part of the identity
FILE, REPORT = "activation_thresholds.safetensors", "activation_thresholds.json"
SCORED, LENGTH = 32, 256  # windows of each text that is scored, and their tokens
STATES_SHARE = 4  # hidden states may take this part of memory; beyond it they go to a file


def run_thresholds(
    model: str,
    options: ThresholdOptions,
    settings: Settings,
    *,
    texts: tuple[str, ...] = (),
    output_dir: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
) -> Written:
    """Find thresholds of ``model`` on the text of ``settings`` and measure them on the check text and on ``texts``.

    ``announce`` is given the configuration as it will run.
    """
    started, progress = time.monotonic(), progress or Progress(quiet=True)
    checkpoint = Checkpoint.open(model, allow_pickle=settings.allow_pickle)
    name = f"{short_name(checkpoint)}-{options.method}-s{100 * options.sparsity:g}"
    target = (output_dir or Path(name)).absolute()
    keep_inputs(target, [checkpoint])
    device = pick_device(settings.device)
    job = Job(f"sparsify.{options.method}", VERSION, Looking(options), settings, checkpoint, target, progress, device)
    text = calibrate(job)
    scored = {"check text": check_windows(checkpoint, job.skeleton, trust_remote_code=settings.trust_remote_code)}
    scored |= {path: _scored(job, path).tokens for path in texts}
    plain = settings.dtype == "auto" and device.type == "cpu"  # few processors multiply quickly in 16 bits
    dtype = torch.float32 if plain else compute_dtype(settings.dtype, stored_dtype(checkpoint), device)
    announce(
        {
            "model": checkpoint.name,
            **options.resolved(),
            "output": str(target),
            "dataset": text.facts()["source"],
            "windows": f"{text.tokens.shape[0]} of {text.tokens.shape[1]} tokens",
            "dtype": str(dtype).removeprefix("torch."),
        }
    )
    identity = job.identity(calibration=text.digest, dtype=str(dtype))
    identity["scored"] = {path: digest_of({"tokens": tokens.tolist()}) for path, tokens in scored.items()}
    if (report := _finished(target, identity)) is not None and not settings.overwrite:
        return Written(target, None, report, cached=True, seconds=time.monotonic() - started)
    costs = _estimate(job, text, dtype)
    if dry_run:
        return Written(target, costs, None, seconds=time.monotonic() - started)
    check_target(target, overwrite=settings.overwrite)
    refuse(costs, target)
    report = _execute(job, identity, text, scored, dtype, on_disk=costs.on_disk)
    return Written(target, costs, report, tuple(report["left"]), seconds=time.monotonic() - started)


def left_out(job: Job) -> list[str]:
    """One line on what has no thresholds though it multiplies: layers whose inputs cannot be told apart, or are not known."""
    fused = [linear.tensor for linear in job.linears.values() if linear.piece.expert is not None]
    told = f"{len(fused)} weights of experts that are fused have no thresholds: {', '.join(fused[:3])}"
    return [*([told] if fused else []), *job.uncovered()]


def _scored(job: Job, path: str) -> Calibration:
    return load_windows(
        path,
        job.checkpoint.root,
        num_samples=SCORED,
        seq_len=min(LENGTH, job.skeleton.context_length),
        seed=0,
        trust_remote_code=job.settings.trust_remote_code,
    )


def _finished(target: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report at ``target`` if it bears this identity and the thresholds are as it says."""
    if not (target / REPORT).is_file() or not (target / FILE).is_file():
        return None
    report = read_json(target / REPORT)
    sound = report.get("identity") == digest_of(dict(identity)) and report.get("sha256") == file_digest(target / FILE)
    return report if sound else None


def _execute(
    job: Job,
    identity: dict[str, Any],
    text: Calibration,
    scored: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    on_disk: bool,
) -> dict[str, Any]:
    """Do the work, measure it and publish the folder; a failure or interruption leaves what is finished for the next run."""
    settings = job.settings
    writer = CheckpointWriter(job.target, [], identity, overwrite=settings.overwrite, resume=settings.resume)
    with working(job, writer):
        walk = Walk(job, writer, "thresholds", text.tokens, scored["check text"], dtype, on_disk=on_disk)
        thresholds, shares = joined(find_thresholds(walk, job.options))
        writer.add(FILE, [TensorSpec(name, tuple(value.shape), torch.float32) for name, value in thresholds.items()])
        for name, value in thresholds.items():
            writer.put(name, value)
        writer.done("written")
        job.progress.say("measuring", detail=True)
        measured = {path: _measure(job, tokens, thresholds) for path, tokens in scored.items()}
        report = {
            "method": job.options.method,
            "sparsity": job.options.sparsity,
            "allocation": job.options.allocation if job.options.method == "teal" else None,
            "identity": digest_of(identity),
            "sha256": writer.read_back()[FILE],
            "model": {"name": job.checkpoint.name, "digest": job.checkpoint.digest},
            "calibration": text.facts(),
            "shares": shares,
            "left": left_out(job),
            "measured": measured,
        }
        writer.write_text(REPORT, json.dumps(report, indent=1) + "\n")
        writer.commit()
        return report


def _measure(job: Job, tokens: torch.Tensor, thresholds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Perplexity of the model and of that with ``thresholds``, in float32, and the zeros that they made: by name, and the mean
    over weights of the zeros among what they multiply."""

    def score() -> float:
        shape = (*tokens.shape, hidden_size(job))
        states = Activations(shape, torch.float32, job.checkpoint.root, "unused")
        return perplexity(
            stream_losses(
                job.skeleton,
                job.view,
                Windows(tokens),
                states,
                returns_tuple=job.returns_tuple,
                device=job.device,
            )
        )

    usual = score()
    with sparsified(job.skeleton.model, thresholds) as counted:
        sparse = score()
    shares = counted.shares()
    sizes = {f"inputs.{linear.module}": linear.shape[0] * linear.shape[1] for linear in job.linears.values()}
    known = [name for name in shares if name in sizes]
    mean = sum(sizes[name] * shares[name] for name in known) / max(sum(sizes[name] for name in known), 1)
    gates = [share for name, share in shares.items() if name not in sizes]
    return {
        "tokens": tokens.numel(),
        "perplexity": usual,
        "perplexity_sparse": sparse,
        "zeros_of_inputs": mean,
        **({"zeros_of_gates": sum(gates) / len(gates)} if gates else {}),
        "zeros": shares,
    }


def _estimate(job: Job, text: Calibration, dtype: torch.dtype) -> Estimate:
    """What it will take, from headers and structure."""
    windows, length = text.tokens.shape
    skeleton = job.skeleton
    limit = job.settings.memory_limit or free_memory() + resident()
    states = windows * length * hidden_size(job) * dtype.itemsize
    on_disk = states > limit // STATES_SHARE
    blocks = [sum(skeleton.get(n).numel() for n in skeleton.names_of(i)) for i in range(len(skeleton.blocks))]
    outside = sum(skeleton.get(name).numel() for name in skeleton.names_of(None))
    stored = sum(info.nbytes for info in job.checkpoint.tensors.values())
    tried = (
        job.options.sparsity / STEP * 16 if job.options.method == "teal" and job.options.allocation == "greedy" else 0
    )
    passes = 3 * windows * length + tried * 1024  # tokens through a block
    held = 4 * max(*blocks, outside) + (0 if on_disk else states) + 16 * BINS * 8
    output = sum(4 * linear.shape[0] for linear in job.linears.values())
    return Estimate(
        output_bytes=output,
        disk_bytes=output + 2 * states,
        peak_bytes=resident() + RUNTIME_BYTES + held,
        peak_phase="a block and the hidden states",
        seconds=2.0 * sum(blocks) * passes / speeds()["float32"] + 4 * stored / BYTES_A_SECOND,
        limit_bytes=limit,
        on_disk=on_disk,
        statistics_bytes=0,
        reload_blocks=0,
    )
