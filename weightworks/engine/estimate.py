"""What a stage will take, before it runs: output bytes (exact), disk, peak memory, time; and the refusal if it cannot.

Memory is counted phase by phase as the blockwise engine lives it; time is arithmetic over the machine's measured speed.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.job import Job, packed_bytes
from weightworks.engine.machine import free_memory, resident, speeds
from weightworks.engine.reducing import ReduceJob
from weightworks.engine.units import SHARES, sensed
from weightworks.errors import ResourceError
from weightworks.stage.protocols import by_gradients
from weightworks.store.mixed import all_of
from weightworks.stream.linears import Linear
from weightworks.stream.passes import batch_windows

RUNTIME_BYTES = 48 << 20  # grown by the libraries once work starts: thread pools, BLAS buffers, scipy, loaders
HEAP_BYTES = 64 << 20  # the most of freed temporaries that the allocator keeps until they are given back between steps
SOLVED = 10  # bytes a weight while it is solved: float32 and its stack, or the codes and what they mean
READ = 5  # bytes a weight while we decode it: the codes, and float32
DECODED = 13  # bytes a weight while compressed-tensors does: the codes, and three tensors of the expression
RELOADED = 256 << 20  # what the check of a small result may take beyond the run itself
BYTES_A_SECOND = 500e6  # reading, writing and hashing a file, end to end
HELD_OUT = 8  # at most one window in so many only judges
SLACK = 1.5  # work beside matrix products: attention, norms, casts, the sweep's small steps


@dataclass(frozen=True)
class Estimate:
    """Costs of a stage, and the choices that follow from the memory limit.

    Bytes: ``output_bytes`` of weight files, exact; ``disk_bytes`` staging included; ``peak_bytes`` of the process.
    ``on_disk`` says that activations go to disk; ``statistics_bytes`` is the room for one round of statistics;
    ``reload_blocks`` is how many leading blocks the reload check can hold; ``recompute`` says that a training runs blocks
    again in the backward pass; ``teacher_bytes`` are of what a training holds of its teacher in memory, ``taught_bytes`` of what
    that has left on disk.
    """

    output_bytes: int
    disk_bytes: int
    peak_bytes: int
    peak_phase: str
    seconds: float
    limit_bytes: int
    on_disk: bool
    statistics_bytes: int
    reload_blocks: int
    recompute: bool = False
    teacher_bytes: int = 0
    taught_bytes: int = 0

    def facts(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Sizes:
    """Bytes of the things that come and go; a trailing ``_count`` is of elements."""

    base: int  # the process as it is, and what the libraries will grow by
    outside: int  # float32 weights outside the blocks
    outside_stored: int  # the same as the checkpoint stores them
    outside_largest: int  # the largest of them, stored
    block_count: int  # parameters of the largest block
    block_stored: int  # that block in the output
    block_copy: int  # of its weights as they were, where inputs are watched in pairs; else 0
    weight_count: int  # the largest weight
    statistics: int  # of the widest input
    tuning: int  # of the graph of a batch through a block, and outputs of windows held out; 0 where no norms are tuned
    solving: int  # one input's statistics and the work on the weights that share it, whichever are largest together
    stage_statistics: int  # of all inputs that are watched in one pass (the experts of a mixture)
    activations: int  # of all calibration windows
    probe: int  # hidden states of the check text
    inner_count: int  # the widest output of a linear for a batch
    logits: int  # of a window of the check text
    width: int  # bytes of the compute dtype
    decodes_early: bool  # whether stock transformers decodes the result as it loads it


def estimate(
    job: Job | ReduceJob, *, tokens: tuple[int, int] | None, probe: tuple[int, int], dtype: torch.dtype
) -> Estimate:
    """The estimate for ``tokens`` calibration windows of a length, held-out ones among them (None: data-free), and ``probe``
    windows."""
    sizes = sizes_of(job, tokens, probe, dtype)
    branches = branches_of(job, tokens)
    if branches:
        sizes = replace(
            sizes, activations=sizes.activations + branches * sizes.activations // tokens[0] if tokens else 0
        )
    limit = job.settings.memory_limit or free_memory() + resident()
    on_disk, statistics = False, sizes.statistics
    scratch = (2 * sizes.activations + 4 * sizes.probe) if tokens else 0
    if tokens is None:
        phases = _tensorwise_phases(sizes)
    elif by_gradients(job.method):
        on_disk, statistics, phases = _gradient_phases(job, sizes, tokens, limit)
        if hasattr(job.method, "watch"):  # a pass over inputs follows
            phases |= _blockwise_phases(sizes, max(statistics, sizes.statistics), on_disk=on_disk)
        scratch += len(job.skeleton.blocks) * sizes.activations
    else:
        phases = _blockwise_phases(sizes, statistics, on_disk=False)
        if max(phases.values()) > limit:
            on_disk, phases = True, _blockwise_phases(sizes, statistics, on_disk=True)
        # More inputs watched in one pass save passes, and may take as much again as the run takes anyway.
        room = max(0, min(limit, 2 * max(phases.values())) - max(phases.values()))
        statistics = min(sizes.stage_statistics, statistics + room)
        phases = _blockwise_phases(sizes, statistics, on_disk=on_disk)
    if tokens is not None and not job.blockwise:  # the result is scored afterwards
        phases |= {name: max(held, phases.get(name, 0)) for name, held in _tensorwise_phases(sizes).items()}
    streams = tokens is not None and not by_gradients(job.method)
    lean = _blockwise_phases(sizes, sizes.statistics, on_disk=True) if streams else phases
    reload_blocks = reloadable(job, sizes, max(lean.values()))
    phases["reloading the result"] = reloading(sizes, reload_blocks)
    name = max(phases, key=lambda phase: phases[phase])
    written = job.weight_bytes if isinstance(job, ReduceJob) else bounded_bytes(job)
    return Estimate(
        output_bytes=written,
        disk_bytes=written + scratch,
        peak_bytes=phases[name],
        peak_phase=name,
        seconds=_seconds(job, tokens, probe, dtype),
        limit_bytes=limit,
        on_disk=on_disk,
        statistics_bytes=statistics,
        reload_blocks=reload_blocks,
    )


def bounded_bytes(job: Job) -> int:
    """Bytes of the weight files; under a budget the most that they can be."""
    if job.budget is None or job.budget.increase is not None:
        return job.weight_bytes
    if job.budget.nbytes is not None:
        return job.budget.nbytes
    assert job.budget.bits is not None
    largest = sum(
        packed_bytes(one, scheme) for one in job.linears.values() if (scheme := job.scheme_of(one)) is not None
    )
    weights = sum(math.prod(linear.shape) for linear in job.linears.values())
    return job.weight_bytes - (max(0, largest - int(job.budget.bits * weights / 8)) if job.format is not None else 0)


def branches_of(job: Job | ReduceJob, tokens: tuple[int, int] | None) -> int:
    """Windows of noisy models that pass the blocks beside the calibration windows, where bits are chosen layer by layer."""
    if tokens is None or isinstance(job, ReduceJob) or job.budget is None:
        return 0
    units = sum(len(_inputs(block)) for block in job.blocks)
    return units * (len(SHARES) + 2 * job.budget.neighbours) * sensed(*tokens)


def refuse(estimate: Estimate, target: Path) -> None:
    """Raise :class:`ResourceError` when the estimate does not fit this machine's memory or disk."""
    if estimate.peak_bytes > estimate.limit_bytes:
        raise ResourceError(
            f"too little memory: about {size(estimate.peak_bytes)} needed ({estimate.peak_phase}), "
            f"{size(estimate.limit_bytes)} allowed",
            hint="raise --max-memory, or use shorter windows (--seq-len); activations already go to disk",
        )
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if estimate.disk_bytes > free:
        raise ResourceError(
            f"too little disk at {folder}: {size(estimate.disk_bytes)} needed, {size(free)} free",
            hint="free some space, or choose another --output-dir",
        )


def size(count: float) -> str:
    """A byte count for people, in powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("bytes", "kB") else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def sizes_of(job: Job | ReduceJob, tokens: tuple[int, int] | None, probe: tuple[int, int], dtype: torch.dtype) -> Sizes:
    skeleton, tensors = job.skeleton, {spec.name: spec for spec in job.view.specs}
    config = skeleton.model.config.get_text_config()

    def stored(names: Sequence[str]) -> list[str]:
        return [piece.tensor for name in names for piece in skeleton.pieces[name]]

    def written(tensor: str) -> int:
        linear = job.linears.get(tensor)
        return tensors[tensor].nbytes if linear is None else sum(spec.nbytes for spec in job.specs_of(linear))

    outside = skeleton.names_of(None)
    blocks = [skeleton.names_of(index) for index in range(len(skeleton.blocks))]
    linears = list(job.linears.values())
    windows, length = tokens or probe
    batch = min(windows, batch_windows(length)) * length
    return Sizes(
        base=resident() + RUNTIME_BYTES,
        outside=4 * sum(skeleton.get(name).numel() for name in outside),
        outside_stored=sum(tensors[tensor].nbytes for tensor in stored(outside)),
        outside_largest=max((tensors[tensor].nbytes for tensor in stored(outside)), default=0),
        block_count=max(sum(skeleton.get(name).numel() for name in names) for names in blocks),
        block_stored=max(sum(written(tensor) for tensor in stored(names)) for names in blocks),
        block_copy=max(sum(math.prod(one.shape) for one in block) for block in job.blocks)
        * dtype.itemsize
        * job.paired,
        weight_count=max(math.prod(linear.shape) for linear in linears),
        statistics=max(job.held(linear.shape[1]) for linear in linears),
        tuning=_graph(job, tokens, batch) + 4 * config.hidden_size * windows * length // HELD_OUT
        if tokens and job.tweak is not None
        else 0,
        solving=max(
            job.held(width) + job.working(width) + SOLVED * sum(math.prod(linear.shape) for linear in group)
            for (_, width), group in _inputs(linears).items()
        ),
        stage_statistics=max(_stage_statistics(job, block) for block in job.blocks),
        activations=windows * length * config.hidden_size * dtype.itemsize * (1 + job.paired) if tokens else 0,
        probe=probe[0] * probe[1] * config.hidden_size * 4,
        inner_count=batch * max(linear.shape[0] for linear in linears),
        logits=4 * probe[1] * config.vocab_size,
        width=dtype.itemsize,
        decodes_early=job.format is None
        or (job.scheme is not None and not all(one.symmetric for one in all_of(job.scheme))),
    )


def _inputs(linears: Sequence[Linear]) -> dict[tuple[str, int], list[Linear]]:
    """Linears by the input they read, as far as structure tells: the part of the block they are in, and their width."""
    groups: dict[tuple[str, int], list[Linear]] = {}
    for linear in linears:
        part = f"{linear.module.rpartition('.')[0]} {linear.piece.expert}"
        groups.setdefault((part, linear.shape[1]), []).append(linear)
    return groups


def _stage_statistics(job: Job | ReduceJob, block: Sequence[Linear]) -> int:
    """Bytes of the statistics that one pass over a block can gather: of all inputs, of one, or of one an expert."""
    if job.together:
        return sum(job.held(width) for _, width in _inputs(block))
    sums: dict[tuple[str, int], int] = {}
    for part, width in _inputs(block):
        alike = re.sub(r"\d+", "*", part), width
        sums[alike] = sums.get(alike, 0) + job.held(width)
    return max(sums.values(), default=0)


def _blockwise_phases(s: Sizes, statistics: int, *, on_disk: bool) -> dict[str, int]:
    """Peak bytes by phase of the blockwise engine."""
    block = s.block_count * s.width + s.block_copy
    return with_heap(
        s.base + 2 * s.probe + (0 if on_disk else s.activations),
        {
            "loading what is outside the blocks": s.outside + s.outside_largest,
            "watching a block": block + statistics + max(4 * s.width, 4 + s.width) * s.inner_count,
            "solving a block": block + max(statistics, s.solving),
            "loading a block": 4 * s.block_count + READ * s.weight_count,
            **({"tuning norms": 4 * s.block_count + s.tuning} if s.tuning else {}),
            "scoring": s.outside + 3 * s.logits,
        },
    )


def _tensorwise_phases(s: Sizes) -> dict[str, int]:
    """Peak bytes by phase of the tensorwise engine and of the passes that score its result."""
    return with_heap(
        s.base + s.probe,
        {
            "loading what is outside the blocks": s.outside + s.outside_largest,
            "rounding a tensor": 18 * s.weight_count,
            "running a block": 4 * s.block_count + max(READ * s.weight_count, 16 * s.inner_count),
            "scoring": s.outside + 3 * s.logits,
        },
    )


def _gradient_phases(
    job: Job | ReduceJob, s: Sizes, tokens: tuple[int, int], limit: int
) -> tuple[bool, int, dict[str, int]]:
    """Whether gradients between blocks go to disk, the room for a round of traces, and peak bytes by phase."""
    graph = _graph(job, tokens, tokens[1])
    traces = [[job.method.traced(math.prod(one.shape), tokens[0]) for one in block] for block in job.blocks]
    least, most = max(map(max, filter(None, traces))), max(map(sum, traces))

    def phases(room: int, *, on_disk: bool) -> dict[str, int]:
        return with_heap(
            s.base + s.probe + (0 if on_disk else s.activations),
            {
                "loading what is outside the blocks": s.outside + s.outside_largest,
                "tracing a block": 8 * s.block_count + room + graph,
                "scoring": s.outside + 4 * s.logits,
            },
        )

    on_disk = max(phases(least, on_disk=False).values()) > limit
    spare = limit - max(phases(0, on_disk=on_disk).values())
    room = max(least, min(most, spare))
    return on_disk, room, phases(room, on_disk=on_disk)


def _graph(job: Job | ReduceJob, tokens: tuple[int, int], batch: int) -> int:
    """Bytes of the graph of ``batch`` tokens through a block, in windows of a length: about a dozen tensors as wide as the
    widest output, and the scores of all heads."""
    config = job.skeleton.model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 1))
    widest = max(linear.shape[0] for linear in job.linears.values())
    return 4 * batch * (12 * widest + 3 * heads * tokens[1])


def with_heap(kept: int, phases: dict[str, int]) -> dict[str, int]:
    """``kept`` and each phase's own bytes, with those that the allocator keeps of what other phases have freed."""
    heap = min(HEAP_BYTES, max(phases.values()))
    return {name: kept + heap + own for name, own in phases.items()}


def reloadable(job: Job | ReduceJob, sizes: Sizes, lean: int) -> int:
    """How many leading blocks of the result are loaded to check it: as many as take no more than the leanest run, ``lean``
    bytes; by sizes alone, so that every machine checks the same.
    """
    room = max(lean, sizes.base + RELOADED)
    fit = (room - reloading(sizes, 0)) // max(reloading(sizes, 1) - reloading(sizes, 0), 1)
    return max(1, min(len(job.skeleton.blocks), fit))


def reloading(s: Sizes, blocks: int) -> int:
    """Peak bytes of stock transformers with so many blocks: the mapped file while it loads, then decoding or logits."""
    file, packed, dense = (
        s.outside_stored + blocks * s.block_stored,
        blocks * s.block_stored,
        4 * blocks * s.block_count,
    )
    work = max(DECODED * s.weight_count, 3 * s.logits)
    loading = file + (dense + DECODED * s.weight_count if s.decodes_early else packed)
    return s.base + s.outside + max(loading, packed + dense + work)


def _seconds(job: Job | ReduceJob, tokens: tuple[int, int] | None, probe: tuple[int, int], dtype: torch.dtype) -> float:
    """Arithmetic over measured speed, plus reading and writing."""
    speed = speeds()
    weights = sum(linear.shape[0] * linear.shape[1] for linear in job.linears.values())
    skeleton = job.skeleton
    shell = sum(skeleton.get(name).numel() for name in skeleton.names_of(None))
    checked = probe[0] * probe[1]
    work = 2.0 * checked * (3 * weights + 3 * shell) / speed["float32"]
    if tokens:
        count = tokens[0] * tokens[1]
        surveys = job.method.surveys() if hasattr(job.method, "surveys") else ()
        passes = (
            (job.blockwise or hasattr(job.method, "reduces"))
            + job.paired
            + 4 * hasattr(job.method, "smoother")
            + 2 * by_gradients(job.method)
            + 2 * hasattr(job.method, "renormalises")
            + sum(survey.watch is not None for survey in surveys)
        )
        work += 2.0 * 2 * passes * count * weights / speed[str(dtype).removeprefix("torch.")]
    if tokens and job.tweak is not None:  # the dense block, a pass and its way back, what is held out before and after
        work += 2.0 * (1 + 3 + 0.25) * tokens[0] * tokens[1] * weights / speed["float32"]
    if tokens and job.second_moments:
        inputs = {(index, linear.shape[1]) for index, block in enumerate(job.blocks) for linear in block}
        moments = sum(count * width**2 + 2 / 3 * 3 * width**3 for _, width in inputs) * 1.5 / speed["float32"]
        work += moments * (1 + 2 * job.paired)  # what pairs add is not symmetric
        work += sum(2 * linear.shape[0] * linear.shape[1] ** 2 for linear in job.linears.values()) / speed["float32"]
    if tokens and (branches := branches_of(job, tokens)) and not isinstance(job, ReduceJob):
        assert job.budget is not None
        vocabulary = (
            skeleton.model.config.get_text_config().vocab_size * skeleton.model.config.get_text_config().hidden_size
        )
        work += 2.0 * branches * tokens[1] * (weights / 2 + vocabulary) / speed["float32"]
        work *= 1 + (job.budget.increase is not None)  # a trial at least
        work += (
            len(job.budget.choices)
            * sum(2 * linear.shape[0] * linear.shape[1] ** 2 for linear in job.linears.values())
            / speed["float32"]
        )
    moved = (3 if tokens else 2) * job.checkpoint.nbytes + 3 * job.weight_bytes
    return SLACK * work + moved / BYTES_A_SECOND + 3.0
