"""What a stage will take, before it runs: output bytes (exact), disk, peak memory, time; and the refusal if it cannot.

Memory is counted phase by phase as the blockwise engine lives it; time is arithmetic over the machine's measured speed.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.job import Job
from weightworks.engine.machine import free_memory, resident, speeds
from weightworks.errors import ResourceError
from weightworks.stream.passes import BATCH_TOKENS

RUNTIME_BYTES = 110 << 20  # grown by the libraries once work starts: thread pools, BLAS buffers, tokenizer
BYTES_A_SECOND = 500e6  # reading, writing and hashing a file, end to end
SLACK = 1.5  # work beside matrix products: attention, norms, casts, the sweep's small steps


@dataclass(frozen=True)
class Estimate:
    """Costs of a stage, and the choices that follow from the memory limit.

    Bytes: ``output_bytes`` of weight files, exact; ``disk_bytes`` staging included; ``peak_bytes`` of the process.
    ``on_disk`` says that activations go to disk; ``statistics_bytes`` is the room for one round of statistics;
    ``reload_blocks`` is how many leading blocks the reload check can hold.
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

    def facts(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the things that come and go."""

    base: int
    shell: int  # float32 weights outside the blocks
    block: int  # parameters of the largest block, count
    width: int  # widest input of a linear
    stack: int  # weights of the largest group, count
    dtype: int  # bytes of the compute dtype
    activations: int
    probe: int
    tokens: int  # a batch
    inner: int  # widest output of a linear, all that share an input together
    vocabulary: int
    loaded_dtype: int


def estimate(job: Job, *, tokens: tuple[int, int] | None, probe: tuple[int, int], dtype: torch.dtype) -> Estimate:
    """The estimate for ``tokens`` calibration windows of a length (None: data-free) and ``probe`` windows."""
    sizes = _sizes(job, tokens, probe, dtype)
    limit = job.settings.memory_limit or free_memory() + resident()
    statistics = 4 * sizes.width**2
    phases = _phases(sizes, statistics, on_disk=False) if tokens else _tensorwise_phases(sizes)
    on_disk = bool(tokens) and max(phases.values()) > limit
    if on_disk:
        phases = _phases(sizes, statistics, on_disk=True)
    name = max(phases, key=lambda phase: phases[phase])
    peak = phases[name]
    room = max(statistics, (max(peak, min(limit, 2 * peak)) - peak) // 2 + statistics)
    blocks = len(job.skeleton.blocks)
    reload_room = max(peak - sizes.base - sizes.shell - 8 * sizes.block, 0)
    reload_blocks = min(blocks, max(1, reload_room // max(4 * sizes.block, 1)))
    scratch = (2 * sizes.activations + 4 * sizes.probe) if tokens else 0
    return Estimate(
        output_bytes=job.weight_bytes,
        disk_bytes=job.weight_bytes + scratch,
        peak_bytes=int(peak),
        peak_phase=name,
        seconds=_seconds(job, tokens, probe, dtype),
        limit_bytes=limit,
        on_disk=on_disk,
        statistics_bytes=int(room),
        reload_blocks=int(reload_blocks),
    )


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


def _sizes(job: Job, tokens: tuple[int, int] | None, probe: tuple[int, int], dtype: torch.dtype) -> _Sizes:
    skeleton = job.skeleton
    config = skeleton.model.config.get_text_config()
    count = [sum(skeleton.get(name).numel() for name in skeleton.names_of(i)) for i in range(len(skeleton.blocks))]
    shell = sum(skeleton.get(name).numel() for name in skeleton.names_of(None))
    widths = [linear.shape[1] for linear in job.linears.values()]
    by_width: dict[int, int] = {}
    for linear in job.blocks[0]:
        if linear.piece.expert is None:
            by_width[linear.shape[1]] = by_width.get(linear.shape[1], 0) + linear.shape[0]
    outputs = [linear.shape[0] for linear in job.linears.values()]
    stack = max(linear.shape[0] * linear.shape[1] for linear in job.linears.values())
    batch = max(1, 1 << int(math.log2(max(1, BATCH_TOKENS // (tokens or probe)[1])))) * (tokens or probe)[1]
    return _Sizes(
        base=resident() + RUNTIME_BYTES,
        shell=4 * shell,
        block=max(count),
        width=max(widths),
        stack=2 * stack,
        dtype=dtype.itemsize,
        activations=(tokens[0] * tokens[1] * config.hidden_size * dtype.itemsize) if tokens else 0,
        probe=probe[0] * probe[1] * config.hidden_size * 4,
        tokens=min(batch, tokens[0] * tokens[1]) if tokens else probe[0] * probe[1],
        inner=max(outputs),
        vocabulary=config.vocab_size,
        loaded_dtype=2,
    )


def _phases(s: _Sizes, statistics: int, *, on_disk: bool) -> dict[str, int]:
    """Peak bytes by phase of the blockwise engine."""
    kept = s.base + (0 if on_disk else s.activations) + 2 * s.probe
    batch = s.tokens * (4 * s.inner * s.dtype)
    return {
        "embedding": kept + s.shell + s.tokens * s.width * 4,
        "watching a block": kept + s.block * s.dtype + statistics + batch + s.tokens * s.width * 4,
        "solving a block": kept + s.block * s.dtype + statistics + 18 * s.stack // 2,
        "loading a block": kept + s.block * (4 + s.dtype),
        "scoring": kept + s.shell + 3 * 256 * s.vocabulary * 4,
    }


def _tensorwise_phases(s: _Sizes) -> dict[str, int]:
    return {
        "rounding a tensor": s.base + 24 * s.stack // 2,
        "loading a block": s.base + 6 * s.block + s.probe * 4,
        "scoring": s.base + s.shell + 3 * 256 * s.vocabulary * 4,
    }


def _seconds(job: Job, tokens: tuple[int, int] | None, probe: tuple[int, int], dtype: torch.dtype) -> float:
    """Arithmetic over measured speed, plus reading and writing."""
    speed = speeds()
    weights = sum(linear.shape[0] * linear.shape[1] for linear in job.linears.values())
    skeleton = job.skeleton
    shell = sum(skeleton.get(name).numel() for name in skeleton.names_of(None))
    checked = probe[0] * probe[1]
    work = 2.0 * checked * (3 * weights + 3 * shell) / speed["float32"]
    if tokens:
        count = tokens[0] * tokens[1]
        work += 2.0 * 2 * count * weights / speed[str(dtype).removeprefix("torch.")]
        inputs = {(index, linear.shape[1]) for index, block in enumerate(job.blocks) for linear in block}
        work += sum(count * width**2 + 2 / 3 * 3 * width**3 for _, width in inputs) * 1.5 / speed["float32"]
        work += sum(2 * linear.shape[0] * linear.shape[1] ** 2 for linear in job.linears.values()) / speed["float32"]
    moved = (3 if tokens else 2) * job.checkpoint.nbytes + 3 * job.weight_bytes
    return SLACK * work + moved / BYTES_A_SECOND + 3.0
