"""A merge from request to published folder."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightworks.engine.alignment import align, aligning_bytes
from weightworks.engine.diagnosis import Diagnosis, diagnose
from weightworks.engine.earlier import STATE_FILE
from weightworks.engine.estimate import BYTES_A_SECOND, RUNTIME_BYTES, Estimate, refuse
from weightworks.engine.finish import prove_written, publish, seal, stream_perplexity, verification, verify
from weightworks.engine.machine import free_memory, pick_device, resident
from weightworks.engine.mergejob import Input, MergeJob, open_inputs
from weightworks.engine.merging import LOOK, Merging, slab_rows, surveys_of
from weightworks.engine.side import matrix_bytes
from weightworks.plan.heldout import costs, digests, fit, held_out
from weightworks.plan.renormalising import Renormalising
from weightworks.plan.stage import Outcome, finished, keep_inputs, short_name
from weightworks.plan.texts import check_windows, stored_dtype
from weightworks.plan.tying import alike
from weightworks.plan.vocabularies import matched
from weightworks.plan.working import AGAIN, working
from weightworks.report.progress import Progress
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.manifest import read_provenance
from weightworks.store.tokenizerfile import FILE
from weightworks.store.writer import CheckpointWriter, check_target
from weightworks.stream.skeleton import build
from weightworks.stream.vocabulary import check_ids

CHECK_FLOPS = 2e11  # arithmetic that scoring the result may take: a second or two
LOADED = 1 << 28  # parameters up to which the check loads the whole result, beyond that its first block


def run_merge(
    name: str,
    models: Sequence[str],
    options: dict[str, Any],
    settings: Settings,
    *,
    base: str | None = None,
    earlier: str | None = None,
    output_dir: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
    called: Mapping[str, str] | None = None,
) -> Outcome:
    """Merge ``models`` with the method ``merge.name``. ``announce`` is given the configuration as it will run.

    ``earlier`` is a finished merge to be continued. ``called`` is what provenance and card call inputs, by path.
    """
    started = time.monotonic()
    progress = progress or Progress(quiet=True)
    entry = catalog.find("merge", name)
    module = entry.load()
    method = module.Method(module.Options.parse(options, where=entry.label))
    opened = open_inputs([*models, *([base] if base else [])], allow_pickle=settings.allow_pickle)
    opened = [_named(item, called) for item in opened]
    inputs, origin = (opened[:-1], opened[-1]) if base else (opened, None)
    before = None if earlier is None else Checkpoint.open(earlier, allow_pickle=settings.allow_pickle)
    target = (output_dir or default_target(inputs, origin, name)).absolute()
    check_place(target, opened, settings)
    device = pick_device(settings.device)
    inputs, origin, tying = alike(inputs, origin, settings)
    inputs, origin, vocabulary = matched(inputs, origin, method.options, settings)
    job = MergeJob(
        entry.label,
        module.VERSION,
        method,
        settings,
        inputs,
        origin,
        target,
        progress,
        device,
        earlier=before,
        vocabulary=vocabulary,
        tied=tying.tied,
        copies=tying.copies,
        remarks=tying.notes,
    )
    return carry_out(job, entry.version_facts(), started, dry_run=dry_run, announce=announce)


def check_place(target: Path, inputs: Sequence[Input], settings: Settings) -> None:
    """Refuse a target that is an input, or that holds what nobody here made."""
    keep_inputs(target, [item.checkpoint for item in inputs])
    if target.exists() and (not target.is_dir() or read_provenance(target) is None):
        check_target(target, overwrite=settings.overwrite)


def carry_out(
    job: MergeJob,
    versions: Mapping[str, Any],
    started: float,
    *,
    dry_run: bool = False,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
) -> Outcome:
    """Have what ``job`` makes: find it finished, say what it takes, or do it. ``versions`` go into its identity."""
    target, settings = job.target, job.settings
    job.texts()  # what tokenizer cannot be made is refused now
    wanted = held_out(job)
    renormalising = Renormalising(job)
    texts = digests(wanted) | renormalising.digests()
    diagnosis = None if wanted or (job.options.align and not dry_run) else diagnose(job)
    if diagnosis is not None or dry_run:
        announce(resolved(job, diagnosis or Diagnosis()))
    if not dry_run or target.exists():
        identity = job.identity(**texts, **versions)
        if (done := finished(target, identity)) is not None and not settings.overwrite:
            return Outcome(target, None, done, cached=True, seconds=time.monotonic() - started)
    if not dry_run:
        check_target(target, overwrite=settings.overwrite)
    estimated = estimate(job, renormalising)
    if dry_run:
        return Outcome(target, estimated, None, seconds=time.monotonic() - started)
    refuse(estimated, target)
    provenance = execute(job, identity, diagnosis, announce, renormalising)
    return Outcome(target, estimated, provenance, seconds=time.monotonic() - started)


def execute(
    job: MergeJob,
    identity: dict[str, Any],
    diagnosis: Diagnosis | None,
    announce: Callable[[dict[str, Any]], None],
    renormalising: Renormalising,
) -> dict[str, Any]:
    """Do the work, verify and publish; a failure or interruption leaves the staging folder for the next run.

    Without a ``diagnosis`` models are aligned or chosen first, and what is merged then is diagnosed and announced.
    """
    settings = job.settings
    writer = CheckpointWriter(
        job.target,
        job.specs,
        identity,
        max_shard_bytes=settings.shard_bytes,
        overwrite=settings.overwrite,
        resume=settings.resume,
        side=job.side,
    )
    with working(job, writer, out_of_memory=AGAIN):
        fitted: Any = None
        facts: dict[str, Any] = {}
        if job.options.align:
            facts["alignment"] = align(job, writer)
        if (wanted := held_out(job)) is not None:
            choice, facts["selection"] = fit(job, writer, wanted)
            fitted = choice.found
        if diagnosis is None:
            diagnosis = diagnose(job)
            announce(resolved(job, diagnosis))
        merging = Merging(job, writer, diagnosis, fitted)
        if renormalising:
            facts["renormalisation"] = renormalising.run(writer, merging)
        rows = merging.run()
        files = seal(job, writer, job.texts(), job.untrue)
        if job.vocabulary is not None:
            facts["vocabulary"] = job.vocabulary.facts
            if job.vocabulary.new:
                with verification(writer):
                    check_ids(writer.staging / FILE, {**job.vocabulary.members[0].vocabulary.ids, **job.vocabulary.new})
        with verification(writer):
            checks, quality = check(job, Checkpoint.open(writer.staging))
        facts |= {
            "size": sizes(job),
            "quality": quality,
            "diagnosis": diagnosis.facts(),
            "checks": checks,
            "merge": {"found": merging.found if STATE_FILE in job.side else None},
        }
        return publish(job, writer, identity, rows, facts, files)


def check(job: MergeJob, staged: Checkpoint) -> tuple[dict[str, Any], dict[str, float]]:
    """Load the result and score it; returns what was seen and the perplexities of reference and result."""
    if job.options.check == "files":
        return {
            "loader": "nothing loaded it (--check files): read back and accounted for only",
            "dequantize": False,
        }, {}
    view = DenseView(staged)
    job.skeleton = build(view, trust_remote_code=job.settings.trust_remote_code)
    probe = check_windows(staged, job.skeleton, trust_remote_code=job.settings.trust_remote_code)
    parameters = sum(spec.nbytes // spec.dtype.itemsize for spec in job.specs)
    tokens = int(CHECK_FLOPS / (2 * parameters))
    length = max(16, min(probe.shape[1], tokens // 2))
    count = max(2, min(probe.shape[0], tokens // length))
    probe = probe[:count, :length].contiguous()
    job.returns_tuple = prove_written(job, view, probe)
    result = stream_perplexity(job, view, probe)
    compared = job.compared.checkpoint
    if job.layout.config or job.tied is not None:  # it has other layers, or another head
        job.skeleton = build(DenseView(compared), trust_remote_code=job.settings.trust_remote_code)
        job.returns_tuple = prove_written(job, DenseView(compared), probe)
        dense = stream_perplexity(job, DenseView(compared), probe)
        job.skeleton = build(view, trust_remote_code=job.settings.trust_remote_code)
        job.returns_tuple = prove_written(job, view, probe)
    elif job.grown:  # it reads other tokens
        own = check_windows(compared, job.skeleton, trust_remote_code=job.settings.trust_remote_code)[:count, :length]
        dense = stream_perplexity(job, DenseView(compared), own.contiguous())
    else:
        dense = stream_perplexity(job, DenseView(compared), probe)
    quality = {"dense": dense, "result": result}
    blocks = len(job.skeleton.blocks) if whole_fits(job) else 1
    partial = result if blocks == len(job.skeleton.blocks) else None
    checks = verify(job, staged, probe, {"result": result, "partial": partial}, blocks)
    return {**checks, "check_text": list(probe.shape)}, quality


def estimate(job: MergeJob, renormalising: Renormalising) -> Estimate:
    """What the merge will take, from headers alone."""
    inputs, parts = len(job.models), job.merged
    asking = {
        id(one): [one, *surveys_of(one, "model"), *surveys_of(one, "tensor")] for one in (part.method for part in parts)
    }

    def held(part: Any) -> int:
        shape = part.spec.shape or (1,)
        whole = any(job.whole(one, part) for one in asking[id(part.method)])
        rows = shape[0] if whole else min(shape[0], slab_rows(shape, inputs, LOOK))
        return rows * (part.spec.nbytes // part.spec.dtype.itemsize // max(shape[0], 1))

    slab = 4 * max(map(held, parts), default=0) * (2 * inputs + 4)
    phases = {"merging": slab + matrix_bytes(job.statistics)}
    if job.options.check == "full":
        phases["checking the result"] = _loading(job)
    if job.options.align:
        phases["aligning"] = aligning_bytes(job) + _loading(job)
    if renormalising:
        phases["renormalising"] = _loading(job) + renormalising.states_bytes()
    choosing = 0.0
    if (wanted := held_out(job)) is not None:
        models_held, choosing = costs(job, wanted)
        phases["scoring candidates"] = _loading(job)
        phases["fitting weights with all models in memory"] = models_held
    phase = max(phases, key=lambda name: phases[name])
    read = sum(sum(spec.nbytes for spec in item.tensors.values()) for item in job.inputs)
    passes = max(map(len, asking.values()), default=1)
    return Estimate(
        output_bytes=job.output_bytes,
        disk_bytes=job.output_bytes,
        peak_bytes=resident() + RUNTIME_BYTES + phases[phase],
        peak_phase=phase,
        seconds=((passes + 1) * read + 4 * job.output_bytes) / BYTES_A_SECOND + 4.0 + choosing,
        limit_bytes=job.settings.memory_limit or free_memory() + resident(),
        on_disk=False,
        statistics_bytes=0,
        reload_blocks=0,
    )


def whole_fits(job: MergeJob) -> bool:
    """Whether the check loads the whole result: it is small, and there is the memory; else its first block."""
    outside, blocks, _ = _amounts(job)
    limit = job.settings.memory_limit or free_memory() + resident()
    return outside + sum(blocks) <= LOADED and resident() + RUNTIME_BYTES + _bytes(job, sum(blocks)) <= limit


def _loading(job: MergeJob) -> int:
    """Bytes that the check of the result takes."""
    _, blocks, _ = _amounts(job)
    return _bytes(job, sum(blocks) if whole_fits(job) else max(blocks, default=0))


def _bytes(job: MergeJob, held: int) -> int:
    """Bytes of ``held`` weights of blocks and of those outside, in float32 and as stored, and of a tensor on its way."""
    outside, _, largest = _amounts(job)
    return 6 * (outside + held) + 4 * largest


def _amounts(job: MergeJob) -> tuple[int, list[int], int]:
    """How many weights are outside the blocks, in each block, and in the largest tensor."""
    counts = {part.spec.name: part.spec.nbytes // part.spec.dtype.itemsize for part in job.parts}
    blocks: Counter[str] = Counter()
    for name, count in counts.items():
        found = re.match(r"(.*?\.\d+)\.", name)
        blocks[found.group(1) if found else ""] += count
    return blocks.pop("", 0), list(blocks.values()), max(counts.values(), default=0)


def sizes(job: MergeJob) -> dict[str, Any]:
    """Bytes of the weights before (of the reference) and after."""
    before, after = sum(spec.nbytes for spec in job.reference.tensors.values()), sum(spec.nbytes for spec in job.specs)
    return {"bytes_in": before, "bytes_out": after, "ratio": before / after}


def default_target(models: Sequence[Input], base: Input | None, name: str) -> Path:
    """The reference's name plus what was done, in the current folder: ``tiny-llama-merge-ties``."""
    known = short_name((base or models[0]).checkpoint)
    return Path(f"{known}-merge-{name.replace('_', '-')}")


def resolved(job: MergeJob, diagnosis: Diagnosis) -> dict[str, Any]:
    """The configuration as it will run, defaults included, and what the task vectors look like."""
    return {
        "method": job.label,
        "models": [item.name for item in job.models],
        "members": [job.models[number].name for number in job.members],
        "base": None if job.base is None else job.base.name,
        "output": str(job.target),
        **job.options.resolved(),
        "dtype": f"{str(stored_dtype(job.checkpoint)).removeprefix('torch.')}, computed in float32",
        "seed": job.settings.seed,
        "device": str(job.device),
        "tensors": "{transformed} merged, {copied} copied, {dropped} left out".format_map(job.account()),
        **({} if job.vocabulary is None else {"vocabularies": job.vocabulary.lines}),
        "notes": job.uncovered(),
        "diagnosis": diagnosis.facts(),
    }


def _named(item: Input, called: Mapping[str, str] | None) -> Input:
    """An input under the name that provenance and card shall have."""
    name = (called or {}).get(item.name)
    return item if name is None else replace(item, checkpoint=replace(item.checkpoint, source=name))
