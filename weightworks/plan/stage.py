"""One stage from request to published folder: a graph of a single node."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.beside import AdapterJob, Beside, finish_adapter
from weightworks.engine.blockwise import Blockwise, Written, prove_first
from weightworks.engine.budgeting import allot, allowed, check_budget
from weightworks.engine.estimate import Estimate, estimate, refuse
from weightworks.engine.executor import Executor
from weightworks.engine.finish import copy_rest, finish, stream_perplexity
from weightworks.engine.gradients import Backward, solved
from weightworks.engine.identity import digest_of
from weightworks.engine.job import Job, refuse_filled
from weightworks.engine.machine import pick_device
from weightworks.engine.modelwise import Training
from weightworks.engine.reconstruct import Reconstruction
from weightworks.engine.reducing import ReduceJob, Run, reduce
from weightworks.engine.repairing import check_repairable, repair
from weightworks.engine.rotating import facts as rotation_facts
from weightworks.engine.rotating import rotated
from weightworks.engine.smoothing import smooth
from weightworks.engine.solving import check_solvable, solve
from weightworks.engine.survey import run_surveys
from weightworks.engine.tensorwise import run_tensorwise
from weightworks.engine.trained import check_trainable
from weightworks.engine.training_costs import estimate_training
from weightworks.errors import DegradedError, OutputError
from weightworks.plan.chosen import chosen_by
from weightworks.plan.keys import reads_text, trains
from weightworks.plan.reduce import plan_reduction
from weightworks.plan.texts import Text, calibrate, check_windows, dtype_of_passes, lessons
from weightworks.plan.working import working
from weightworks.report.card import hardware
from weightworks.report.progress import Progress
from weightworks.stage import catalog
from weightworks.stage.protocols import by_gradients
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import FACTORS, Checkpoint
from weightworks.store.manifest import changed_files, read_provenance
from weightworks.store.mixed import in_words
from weightworks.store.rotated import RotatedCheckpoint
from weightworks.store.sources import file_digest
from weightworks.store.writer import CheckpointWriter, check_target
from weightworks.stream.lessons import Lessons

SPILL = "run it again with a smaller --max-memory, so that activations go to disk, or close other programs"


@dataclass
class Outcome:
    """What a stage did. ``cached`` says that an identical, intact output was already there; ``provenance`` is None after
    a dry run; ``seconds`` and ``peak_bytes`` are this run's own."""

    target: Path
    estimate: Estimate | None
    provenance: dict[str, Any] | None
    cached: bool = False
    seconds: float = 0.0

    @property
    def fallbacks(self) -> list[str]:
        return [] if self.provenance is None else list(self.provenance["fallbacks"])

    def degraded(self) -> DegradedError | None:
        """What ``--strict`` makes of a result that needed fallbacks."""
        if not self.fallbacks:
            return None
        return DegradedError(
            f"{self.target}: done, but the method could not be applied as asked in {len(self.fallbacks)} cases",
            hint="they are listed in provenance.json and in the model card",
        )


def run_stage(
    kind: str,
    name: str,
    model: str,
    options: dict[str, Any],
    settings: Settings,
    *,
    teacher: str | None = None,
    output_dir: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
    called: Mapping[str, str] | None = None,
    executor: Executor | None = None,
) -> Outcome:
    """Run method ``kind.name`` on ``model``. ``announce`` is given the resolved configuration before work starts.

    ``teacher`` is the model that a recovery is measured by. ``called`` is what provenance and card call the inputs, in place of
    their paths: where they lie in a workspace is no part of what they are. ``executor`` takes tensors that can be worked on
    apart from the others.
    """
    started = time.monotonic()
    progress = progress or Progress(quiet=True)
    entry = catalog.find(kind, name)
    module = entry.load()
    method = module.Method(module.Options.parse(options, where=entry.label))
    checkpoint = opened(model, settings, called)
    if kind != "prune":
        refuse_filled(checkpoint)
    if getattr(method.options, "rotate", False):
        checkpoint = rotated(checkpoint, seed=settings.seed, trust_remote_code=settings.trust_remote_code)
    original = None if teacher is None else opened(teacher, settings, called)
    target = (output_dir or default_target(checkpoint, name, method.options)).absolute()
    keep_inputs(target, [checkpoint, *([original] if original else [])])
    if target.exists() and (not target.is_dir() or read_provenance(target) is None):
        check_target(target, overwrite=settings.overwrite)
    device = pick_device(settings.device)
    parts = entry.label, module.VERSION, method, settings, checkpoint, target, progress, device
    make = AdapterJob if getattr(method, "keeps_adapter", False) else Job
    job = (
        plan_reduction(*parts)
        if hasattr(method, "reduces")
        else make(*parts, original, chosen_by(settings.dataset, called))
    )
    if isinstance(job, Job):
        check_budget(job)
    text: Text | None = None
    if isinstance(job, Job) and trains(method):
        check_trainable(job)
        text = lessons(job)
    elif reads_text(method):
        if isinstance(job, Job) and hasattr(method, "renormalises"):
            check_repairable(job)
        if isinstance(job, AdapterJob):
            check_solvable(job)
        text = calibrate(job)
    probe = check_windows(checkpoint, job.skeleton, trust_remote_code=settings.trust_remote_code)
    dtype = torch.float32  # what gradients and moments of outputs are computed in
    if text is not None and not by_gradients(method) and not hasattr(method, "renormalises"):
        dtype = dtype_of_passes(job)
    data: dict[str, Any] = {} if text is None else {"calibration": text.digest, "dtype": str(dtype)}
    announce(resolved(job, text, dtype))
    if not dry_run or target.exists():  # the identity takes reading every byte of the input, once
        if hasattr(method, "files"):
            data["files"] = {str(path): file_digest(path) for path in method.files()}
        identity = job.identity(**data, **entry.version_facts())
        if (done := finished(target, identity)) is not None and not settings.overwrite:
            return Outcome(target, None, done, cached=True, seconds=time.monotonic() - started)
    if not dry_run:
        check_target(target, overwrite=settings.overwrite)
    costs = estimated(job, text, (probe.shape[0], probe.shape[1]), dtype)
    if dry_run:
        return Outcome(target, costs, None, seconds=time.monotonic() - started)
    refuse(costs, target)
    provenance = execute(job, identity, text, probe, dtype, costs, executor)
    return Outcome(target, costs, provenance, seconds=time.monotonic() - started)


def opened(model: str, settings: Settings, called: Mapping[str, str] | None) -> Checkpoint:
    """An input, under the name that it is called by."""
    checkpoint = Checkpoint.open(model, allow_pickle=settings.allow_pickle)
    return replace(checkpoint, source=called[model]) if called and model in called else checkpoint


def estimated(job: Job | ReduceJob, text: Text | None, probe: tuple[int, int], dtype: torch.dtype) -> Estimate:
    """What the job will take."""
    if isinstance(text, Lessons):
        assert isinstance(job, Job)
        return estimate_training(job, text, probe=probe, dtype=dtype)
    held_out = 0 if text is None or text.held_out is None else len(text.held_out)
    tokens = None if text is None else (text.tokens.shape[0] + held_out, text.tokens.shape[1])
    if tokens is not None and hasattr(job.method, "renormalises"):
        tokens = 2 * tokens[0], tokens[1]  # of the original too
    return estimate(job, tokens=tokens, probe=probe, dtype=dtype)


def execute(
    job: Job | ReduceJob,
    identity: dict[str, Any],
    text: Text | None,
    probe: torch.Tensor,
    dtype: torch.dtype,
    costs: Estimate,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Do the work, verify and publish; a failure or interruption leaves the staging folder for the next run."""
    settings = job.settings
    settled = job.plan.settled if isinstance(job, ReduceJob) else job.budget is None
    writer = CheckpointWriter(
        job.target,
        job.specs if settled else (),
        identity,
        max_shard_bytes=settings.shard_bytes,
        overwrite=settings.overwrite,
        resume=settings.resume,
        side=None if isinstance(job, ReduceJob) else job.side,
    )
    with working(job, writer, out_of_memory=SPILL):
        calibration = None if isinstance(text, Lessons) else text
        if isinstance(job, ReduceJob):
            assert calibration is not None
            run = Run(writer, calibration, probe, dtype, costs.on_disk, costs.statistics_bytes)
            return reduce(job, run, identity, calibrated(job, calibration, dtype), costs.reload_blocks)
        allotted = {}
        if job.budget is not None:
            assert calibration is not None
            allotted = allot(job, writer, identity, calibration, probe, dtype, costs)
        results = worked(job, writer, text, probe, dtype, costs, executor)
        facts: dict[str, Any] = {
            **({} if isinstance(job, AdapterJob) else {"size": sizes(job, results["rows"])}),
            **({"format": f"{job.format.name}: {in_words(job.scheme)}"} if job.format and job.scheme else {}),
            **allotted,
            "quality": {key: results[key] for key in ("dense", "result")},
            **({"rotation": rotation_facts(job.checkpoint)} if isinstance(job.checkpoint, RotatedCheckpoint) else {}),
            **{key: results[key] for key in ("smoothing", "training", "renormalisation", "norms") if key in results},
        }
        if text is not None:
            facts |= calibrated(job, text, dtype)
        if isinstance(job, AdapterJob):
            return finish_adapter(job, writer, identity, results, facts, probe=probe)
        return finish(
            job,
            writer,
            identity,
            results["rows"],
            facts,
            probe=probe,
            in_memory=results,
            reload_blocks=costs.reload_blocks,
        )


def worked(
    job: Job,
    writer: CheckpointWriter,
    text: Text | None,
    probe: torch.Tensor,
    dtype: torch.dtype,
    costs: Estimate,
    executor: Executor | None,
) -> dict[str, Any]:
    """Make and write every tensor by the loop of the method's shape; returns the report's ``rows``, perplexities on the
    probe, and what else is to be told."""
    calibration = None if isinstance(text, Lessons) else text
    smoothing = smooth(job, writer, calibration, probe, dtype, on_disk=costs.on_disk)
    run_surveys(job, writer, calibration, probe, dtype, on_disk=costs.on_disk)
    if isinstance(text, Lessons) and isinstance(job, AdapterJob):
        results = Beside(job, writer, text, probe, dtype, recompute=costs.recompute).run()
    elif isinstance(job, AdapterJob):
        assert calibration is not None
        room = costs.statistics_bytes
        results = solve(job, writer, calibration, probe, dtype, on_disk=costs.on_disk, limit=room)
    elif isinstance(text, Lessons) or hasattr(job.method, "renormalises"):
        results = recovered(job, writer, text, probe, dtype, costs)
        copy_rest(job, writer)
        results["partial"] = results["result"] if costs.reload_blocks == len(job.skeleton.blocks) else None
    elif calibration is not None and job.blockwise:
        results = Blockwise(
            job,
            writer,
            calibration,
            probe,
            dtype,
            on_disk=costs.on_disk,
            statistics_bytes=costs.statistics_bytes,
            reload_blocks=costs.reload_blocks,
        ).run()
        copy_rest(job, writer)
    else:
        job.returns_tuple = prove_first(job, writer, probe)
        if calibration is not None and by_gradients(job.method):
            rows = Backward(
                job, writer, calibration, probe, on_disk=costs.on_disk, traced_bytes=costs.statistics_bytes
            ).run(solved(job, writer))
        else:
            # Other processes open the checkpoint themselves, and would not see it changed.
            alone = smoothing or isinstance(job.checkpoint, RotatedCheckpoint)
            rows = run_tensorwise(job, writer, None if alone else executor)
        results = {"rows": rows, "dense": stream_perplexity(job, job.view, probe)}
        copy_rest(job, writer)
        written = Written(job, writer)
        results["result"] = stream_perplexity(job, written, probe)
        results["partial"] = stream_perplexity(job, written, probe, costs.reload_blocks)
    return results | smoothing


def recovered(
    job: Job, writer: CheckpointWriter, text: Text | None, probe: torch.Tensor, dtype: torch.dtype, costs: Estimate
) -> dict[str, Any]:
    """A model changed as a whole, by training or by what its layers put out."""
    if not isinstance(text, Lessons):
        assert text is not None
        return repair(job, writer, text, probe, on_disk=costs.on_disk)
    if job.method.regime().window is None:
        return Training(job, writer, text, probe, dtype, recompute=costs.recompute).run()
    return Reconstruction(job, writer, text, probe, dtype, on_disk=costs.on_disk).run()


def calibrated(job: Job | ReduceJob, text: Text, dtype: torch.dtype) -> dict[str, Any]:
    """What the provenance says of the text."""
    name = str(dtype).removeprefix("torch.")
    chosen = job.chosen if isinstance(job, Job) else None
    dataset = job.settings.dataset if chosen is None else chosen["name"]
    return {"calibration": {"dataset": dataset, "dtype": name, **text.facts()}}


def keep_inputs(target: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Refuse a target that is a folder of an input, or holds one; from now on a change of an input is noticed."""
    for checkpoint in checkpoints:
        checkpoint.watch()
        for root in (root.resolve() for root in checkpoint.roots):
            if target.resolve() in (root, *root.parents):
                raise OutputError(
                    f"{target}: is an input, or holds one; it would be replaced", hint="choose another --output-dir"
                )


def where(checkpoint: Checkpoint) -> str:
    """The folders a checkpoint is read from, adapters after a ``+``."""
    return "+".join(map(str, checkpoint.roots))


def short_name(checkpoint: Checkpoint) -> str:
    """The checkpoint's name without owner and revision; adapters after a ``+``."""
    return "+".join(part.split("@")[0].split("/")[-1] for part in checkpoint.name.split("+"))


def default_target(checkpoint: Checkpoint, method: str, options: Any) -> Path:
    """The model's name plus what was done, in the current folder: ``tiny-llama-gptq-w4g128``, ``tiny-llama-wanda-2of4``,
    ``tiny-llama-gptq-w8a8-smooth`` where channels were made alike first, ``-rotated`` where they were rotated, ``-norms-closed``
    where norms were tuned after."""
    parts = [short_name(checkpoint), _done(method, options)]
    if getattr(options, "rotate", False):
        parts.append("rotated")
    if getattr(options, "smooth", None) is not None:
        parts.append("smooth")
    if (tweak := getattr(options, "norm_tweak", "none")) != "none":
        parts.append(f"norms-{tweak}")
    return Path("-".join(parts))


def _done(method: str, options: Any) -> str:
    """The method with what its outputs differ in most."""
    if (amount := getattr(options, "amount", None)) is not None:
        return f"{method}-{amount}"
    if (share := getattr(options, "sparsity", None)) is not None:
        pattern = getattr(options, "pattern", "unstructured")
        method += f"-s{100 * share:g}" if pattern == "unstructured" else f"-{pattern.replace(':', 'of')}"
    if getattr(options, "budgeted", False) and options.budget is not None:
        return f"{method}-{options.budget.replace(' ', '').lower()}"
    if (share := getattr(options, "max_perplexity_increase", None)) is not None:
        return f"{method}-within-{share.replace(' ', '').replace('%', '')}-percent"
    if (named := hardware({"scheme": getattr(options, "scheme", None)})) is not None:
        return f"{method}-{named.lower().replace('_', '-')}"
    if (bits := getattr(options, "bits", None)) is None:
        return method
    size = getattr(options, "group_size", -1)
    group = "" if size == -1 else f"g{size}"
    return f"{method}-w{bits}{group}{'' if getattr(options, 'sym', True) else '-asym'}"


def finished(target: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The provenance at ``target`` if it bears this identity and every file is intact."""
    provenance = read_provenance(target) if target.is_dir() else None
    if provenance is None or provenance.get("stage") != digest_of(identity):
        return None
    if problems := changed_files(target, provenance):
        raise OutputError(
            f"{target}: was made by this very command but has changed since: {'; '.join(problems)}",
            hint="pass --overwrite to make it again",
        )
    return provenance


def resolved(job: Job | ReduceJob, text: Text | None, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration as it will run, defaults included."""
    facts: dict[str, Any] = {"method": job.label, "model": where(job.checkpoint), "output": str(job.target)}
    if job.teacher is not None:
        facts["teacher"] = where(job.teacher)
    facts.update(job.options.resolved())
    if isinstance(job, Job):
        facts.update(allowed(job))
    if text is not None:
        facts["training_text" if isinstance(text, Lessons) else "calibration"] = text.told(job.settings.seq_len)
        facts["dtype"] = str(dtype).removeprefix("torch.")
    facts.update(seed=job.settings.seed, device=str(job.device))
    return facts | ({"note": remarks} if (remarks := job.checkpoint.remarks) else {})


def sizes(job: Job, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bytes before and after, and true bits a weight of the changed layers (packed codes, scales, zero points).

    Of what was pruned also how many weights stay, what the masks take, and what the folder would as bits and values; of
    what is a product, what its factors take, and what the model would with them in place of it.
    """
    weights = sum(linear.shape[0] * linear.shape[1] for linear in job.linears.values())
    changed = sum(spec.nbytes for linear in job.linears.values() for spec in job.specs_of(linear))
    bytes_out = sum(spec.nbytes for spec in job.specs)
    facts = {
        "bytes_in": job.checkpoint.nbytes,
        "bytes_out": bytes_out,
        **({"quantized_weights": weights} if job.scheme is not None else {}),
        "bits_a_weight": 8 * changed / weights,
        "ratio": job.checkpoint.nbytes / bytes_out,
    }
    if FACTORS in job.side:
        factors = sum(spec.nbytes for spec in job.side[FACTORS])
        facts |= {
            "factored_weights": weights,
            "factors_bytes": factors,
            "factored_bytes": bytes_out - changed + factors,
        }
    elif job.side:
        kept = {row["tensor"]: row["kept"] for row in rows if "kept" in row}
        if job.masks is not None and not job.method.masks:
            kept = {name: job.masks.kept(name) for name in job.masks.infos} | kept  # those that were not worked on too
        masks = sum(spec.nbytes for members in job.side.values() for spec in members)
        pruned = sum(math.prod(job.view.shape(name)) for name in kept)
        values = sum(count * job.checkpoint.info(name).dtype.itemsize for name, count in kept.items())
        facts |= {"masked_weights": pruned, "kept_weights": sum(kept.values()), "masks_bytes": masks}
        if job.format is None:
            dense = sum(job.checkpoint.info(name).nbytes for name in kept)
            facts["bitmask_bytes"] = bytes_out - dense + masks + values
    return facts
