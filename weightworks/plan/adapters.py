"""Adapters made from request to published folder: several merged into one, or a fine-tune's difference extracted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from weightworks.engine.adapting import gather, reopened, run_units
from weightworks.engine.combining import CombineJob
from weightworks.engine.estimate import BYTES_A_SECOND, RUNTIME_BYTES, Estimate, refuse
from weightworks.engine.extracting import ROW_BYTES, ExtractJob
from weightworks.engine.finish import prove_written, publish, stream_perplexity
from weightworks.engine.machine import free_memory, pick_device, resident
from weightworks.errors import UsageError
from weightworks.plan.stage import Outcome, finished, keep_inputs, short_name
from weightworks.plan.texts import check_windows
from weightworks.plan.working import AGAIN, working
from weightworks.report.progress import Progress
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.store.adapted import AdaptedCheckpoint
from weightworks.store.adapters import Adapter
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.manifest import read_provenance
from weightworks.store.writer import CheckpointWriter, check_target
from weightworks.stream.skeleton import build

Job = CombineJob | ExtractJob
Source = TypeVar("Source", Adapter, Checkpoint)
EXTRACT = "extract"
CHECK_TOKENS = (2, 128)  # windows of the check text that the result is scored on: enough to see a broken adapter


def run_adapter(
    name: str,
    inputs: Sequence[str],
    options: dict[str, Any],
    settings: Settings,
    *,
    base: str | None = None,
    output_dir: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
    called: Mapping[str, str] | None = None,
) -> Outcome:
    """Make an adapter with the method ``adapter.name``: of the adapters ``inputs``, or (extract) of one fine-tune of ``base``.

    ``called`` is what provenance and card call inputs, by path.
    """
    started = time.monotonic()
    progress = progress or Progress(quiet=True)
    entry = catalog.find("adapter", name)
    module = entry.load()
    method = module.Method(module.Options.parse(options, where=entry.label))
    make = _extraction if name == EXTRACT else _combination
    job: Job = make(entry, method, inputs, settings, base, output_dir, progress, called or {})
    target = job.target
    if target.exists() and (not target.is_dir() or read_provenance(target) is None):
        check_target(target, overwrite=settings.overwrite)
    announce(resolved(job))
    if not dry_run or target.exists():
        identity = job.identity(**entry.version_facts())
        if (done := finished(target, identity)) is not None and not settings.overwrite:
            return Outcome(target, None, done, cached=True, seconds=time.monotonic() - started)
    if not dry_run:
        check_target(target, overwrite=settings.overwrite)
    costs = estimate(job)
    if dry_run:
        return Outcome(target, costs, None, seconds=time.monotonic() - started)
    refuse(costs, target)
    provenance = execute(job, identity)
    return Outcome(target, costs, provenance, seconds=time.monotonic() - started)


def _combination(
    entry: catalog.Entry,
    method: Any,
    names: Sequence[str],
    settings: Settings,
    base: str | None,
    output_dir: Path | None,
    progress: Progress,
    called: Mapping[str, str],
) -> CombineJob:
    """The merge of several adapters."""
    if not names:
        raise UsageError(f"{entry.label} needs at least one adapter")
    adapters = [_named(Adapter.open(one, allow_pickle=settings.allow_pickle), called) for one in names]
    checkpoint = None
    if base is not None:
        checkpoint = _named(Checkpoint.open(base, allow_pickle=settings.allow_pickle), called)
    target = (output_dir or Path("+".join(one.name.split("/")[-1] for one in adapters) + f"-{entry.name}")).absolute()
    keep_inputs(target, [*(one.store for one in adapters), *([checkpoint] if checkpoint else [])])
    inner, facts = _inner(method, len(adapters))
    return CombineJob(
        entry.label,
        entry.load().VERSION,
        method,
        settings,
        adapters,
        checkpoint,
        target,
        progress,
        pick_device("cpu"),
        inner,
        facts,
    )


def _inner(method: Any, count: int) -> tuple[Any, dict[str, Any]]:
    """The merge that a method leaves the arithmetic to, and what the identity must know of it."""
    if not hasattr(method, "project"):
        return None, {}
    entry = catalog.find("merge", method.options.using.replace("-", "_"))
    module = entry.load()
    values: dict[str, Any] = {}
    for word in method.options.using_options:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--using-options {word}: expected NAME=VALUE, such as density=0.2")
        values[name.replace("-", "_")] = _value(value)
    options = module.Options.parse(values, where=entry.label)
    inner = module.Method(options)
    if count < inner.LEAST or (inner.MOST is not None and count > inner.MOST):
        most = "any number" if inner.MOST is None else inner.MOST
        raise UsageError(f"{entry.label} takes {inner.LEAST} to {most} models, {count} adapters were given")
    return inner, {"inner": {"method": entry.label, "options": options.resolved(), **entry.version_facts()}}


def _value(text: str) -> Any:
    """An option as typed: JSON, numbers with commas between them, or a text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


def _extraction(
    entry: catalog.Entry,
    method: Any,
    names: Sequence[str],
    settings: Settings,
    base: str | None,
    output_dir: Path | None,
    progress: Progress,
    called: Mapping[str, str],
) -> ExtractJob:
    """The difference of one fine-tune from its base."""
    if base is None or len(names) != 1:
        raise UsageError(f"{entry.label} takes a base and one fine-tune of it", hint="merge extract-lora BASE TUNED")
    origin, tuned = (
        _named(Checkpoint.open(one, allow_pickle=settings.allow_pickle), called) for one in (base, names[0])
    )
    target = (output_dir or Path(f"{short_name(tuned)}-lora")).absolute()
    keep_inputs(target, [origin, tuned])
    return ExtractJob(
        entry.label, entry.load().VERSION, method, settings, origin, tuned, target, progress, pick_device("cpu")
    )


def _named(source: Source, called: Mapping[str, str]) -> Source:
    """An input under the name that provenance and card shall have."""
    return replace(source, source=called.get(source.source, source.source))


def execute(job: Job, identity: dict[str, Any]) -> dict[str, Any]:
    """Do the work, verify and publish; a failure or interruption leaves the staging folder for the next run."""
    settings = job.settings
    writer = CheckpointWriter(job.target, [], identity, overwrite=settings.overwrite, resume=settings.resume)
    with working(job, writer, out_of_memory=AGAIN):
        rows = run_units(job, writer)
        job.progress.say("verifying: reading everything back", detail=True)
        files = gather(job, writer)
        sum_ = reopened(job, writer)
        quality, checks = score(job, sum_)
        config = json.loads((writer.staging / "adapter_config.json").read_text(encoding="utf-8"))
        facts = {
            "size": {"bytes_out": sum(info.nbytes for info in writer.tensors.values())},
            "config": {key: config[key] for key in ("base_model_name_or_path", "r", "rank_pattern")},
            "quality": quality,
            "residual": residuals(rows),
            "checks": checks,
        }
        return publish(job, writer, identity, rows, facts, files)


def residuals(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The norm of all that the adapter lacks, as a share of all it stands for: in full precision, and as stored."""
    known = [row for row in rows if "residual" in row]
    of = "norm_of_sum" if any("norm_of_sum" in row for row in known) else "norm"
    norms = [row.get(of, 0.0) for row in known]
    whole = math.hypot(*norms)
    if not whole:
        return None
    kinds = {"total": "residual", "stored": "residual_stored"}
    return {
        key: math.hypot(*(row[name] * norm for row, norm in zip(known, norms, strict=True))) / whole
        for key, name in kinds.items()
    }


def score(job: Job, total: AdaptedCheckpoint | None) -> tuple[dict[str, float], dict[str, Any]]:
    """Perplexities on the built-in check text of the base, of the fine-tune if there is one, and of base and adapter."""
    if total is None or job.options.check == "files":
        reason = "no base given" if total is None else "--check files"
        return {}, {"loader": f"weightworks' own reader, not run ({reason})"}
    assert job.base is not None
    job.skeleton = build(DenseView(job.base), trust_remote_code=job.settings.trust_remote_code)
    probe = check_windows(job.base, job.skeleton, trust_remote_code=job.settings.trust_remote_code)
    probe = probe[: CHECK_TOKENS[0], : CHECK_TOKENS[1]].contiguous()
    job.returns_tuple = prove_written(job, DenseView(total), probe)
    models = {
        "base": job.base,
        **({"fine-tune": job.tuned} if isinstance(job, ExtractJob) else {}),
        "with the adapter": total,
    }
    quality = {name: stream_perplexity(job, DenseView(model), probe) for name, model in models.items()}
    return quality, {"loader": "weightworks' own reader, added to the base and run", "check_text": list(probe.shape)}


def estimate(job: Job) -> Estimate:
    """What it will take; the size of the result is the most it can be."""
    if isinstance(job, CombineJob):
        tensors = [info for adapter in job.adapters for info in adapter.store.tensors.values()]
        largest = max((info.nbytes for info in tensors), default=0) * 8 * len(job.adapters)
        output = read = sum(info.nbytes for info in tensors)
        seconds = 20 * read / BYTES_A_SECOND
    else:
        widest = max((math.prod(info.shape) for info in job.base.tensors.values()), default=0)
        rank = job.options.rank or 256
        shapes = [job.base.tensors[name].shape for name in job.linears.values()]
        output = sum(4 * min(rank, *shape) * sum(shape) for shape in shapes)
        largest = 4 * widest * (2 if job.transposed else 1) + 3 * ROW_BYTES
        read = job.base.nbytes + job.tuned.nbytes
        seconds = read / BYTES_A_SECOND + sum(30 * math.prod(shape) * min(rank, *shape) for shape in shapes) / 2e10
    return Estimate(
        output_bytes=output,
        disk_bytes=2 * output,
        peak_bytes=resident() + RUNTIME_BYTES + largest,
        peak_phase="one module",
        seconds=seconds + 4.0,
        limit_bytes=job.settings.memory_limit or free_memory() + resident(),
        on_disk=False,
        statistics_bytes=0,
        reload_blocks=0,
    )


def resolved(job: Job) -> dict[str, Any]:
    """The configuration as it will run, defaults included."""
    facts: dict[str, Any] = {"method": job.label}
    if isinstance(job, CombineJob):
        facts["adapters"] = [adapter.source for adapter in job.adapters]
        facts["modules"] = f"{len(job.modules)}, and {len(job.whole)} tensors held whole"
    else:
        facts["fine-tune"] = job.tuned.source
        facts["modules"] = f"{len(job.linears)} can have an update, {len(job.units) - len(job.linears)} other tensors"
    facts["base"] = None if job.base is None else job.base.source
    facts |= {"output": str(job.target), **job.options.resolved(), "seed": job.settings.seed}
    return {**facts, "notes": job.uncovered()}
