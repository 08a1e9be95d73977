"""What training a whole model will take: memory, with blocks run again where it would be short, time, disk."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightworks.engine.estimate import (
    BYTES_A_SECOND,
    SLACK,
    Estimate,
    Sizes,
    reloadable,
    reloading,
    sizes_of,
    with_heap,
)
from weightworks.engine.job import Job
from weightworks.engine.machine import free_memory, resident, speeds
from weightworks.engine.teacher import Teacher
from weightworks.stream.lessons import Lessons
from weightworks.stream.linears import Linear

HELD = 16  # bytes a trained parameter: the value, its gradient, two moments
STEPPING = 12  # bytes a parameter of the largest while AdamW works on it
PRUNING = 24  # bytes a weight of the largest while it is pruned: scores, copies to sort, masks
LOGITS = 3  # tensors of the size of a part's logits, in float32, that a gradient takes
EFFECTIVE = 8  # bytes an adapted weight: what is multiplied with, and what the allocator leaves of making it
STATES = 4  # of the size of its hidden states that a block keeps, beside inputs and outputs of its linears
FORWARD, BACKWARD = 1, 2  # arithmetic of the passes, in forward passes


def estimate_training(job: Job, lessons: Lessons, *, probe: tuple[int, int], dtype: torch.dtype) -> Estimate:
    """The estimate for a method that trains on ``lessons``; ``probe`` is the number and length of the check windows."""
    regime = job.method.regime()
    limit = job.settings.memory_limit or free_memory() + resident()
    sizes = sizes_of(job, None, probe, dtype)
    if regime.window is not None:
        return _estimate_blocks(job, sizes, lessons, dtype, limit)
    recompute = bool(regime.recompute)
    phases = _phases(job, sizes, lessons, dtype, recompute=recompute)
    if regime.recompute is None and max(phases.values()) > limit:
        recompute, phases = True, _phases(job, sizes, lessons, dtype, recompute=True)
    lean = _phases(job, sizes, lessons, dtype, recompute=True)
    blocks = reloadable(job, sizes, max(lean.values()))
    phases["reloading the result"] = reloading(sizes, blocks)
    name = max(phases, key=lambda phase: phases[phase])
    trained, masked = _counts(job)
    taught = _taught(job, lessons, dtype)
    state = 12 * trained + (1 + regime.own) * masked  # values, moments; masks, and what the method keeps
    put_by = 4 * trained * ((regime.remember is not None) + (regime.patience is not None))
    return Estimate(
        output_bytes=job.weight_bytes,
        disk_bytes=job.weight_bytes + 2 * state + put_by + taught.disk,
        peak_bytes=phases[name],
        peak_phase=name,
        seconds=_seconds(job, lessons, dtype, recompute=recompute),
        limit_bytes=limit,
        on_disk=False,
        statistics_bytes=0,
        reload_blocks=blocks,
        recompute=recompute,
        teacher_bytes=taught.memory,
        taught_bytes=taught.disk,
    )


def _estimate_blocks(job: Job, s: Sizes, lessons: Lessons, dtype: torch.dtype, limit: int) -> Estimate:
    """The estimate where one block after the other is trained: twice in memory, with the activations of all windows."""
    skeleton, regime = job.skeleton, job.method.regime()
    config = skeleton.model.config.get_text_config()
    window = lessons.rows.longest * config.hidden_size * dtype.itemsize
    copies = 2 + (regime.window != "block") + (regime.inputs == "dense" or regime.targets == "trajectory")
    states = copies * (len(lessons.rows) + len(lessons.held_out)) * window
    trained = _counts(job)[0] // len(skeleton.blocks)
    kept = max(_kept(job, lessons, dtype))
    probe = 4 * len(lessons.held_out) * lessons.held_out.longest * config.hidden_size
    block = 2 * dtype.itemsize * s.block_count + HELD * trained + s.block_count  # a mask is bytes

    def phases(*, on_disk: bool) -> dict[str, int]:
        return with_heap(
            s.base + s.probe + (0 if on_disk else states),
            {
                "training a block": block + kept + STEPPING * s.weight_count,
                "loading what is outside the blocks": s.outside + s.outside_largest,
                "scoring": s.outside + probe + 3 * s.logits,
                "running a block": 4 * s.block_count + max(5 * s.weight_count, 16 * s.inner_count),
            },
        )

    on_disk = max(phases(on_disk=False).values()) > limit
    found, lean = phases(on_disk=on_disk), phases(on_disk=True)
    blocks = reloadable(job, s, max(lean.values()))
    found["reloading the result"] = reloading(s, blocks)
    name = max(found, key=lambda phase: found[phase])
    return Estimate(
        output_bytes=job.weight_bytes,
        disk_bytes=job.weight_bytes + 2 * states,
        peak_bytes=found[name],
        peak_phase=name,
        seconds=_block_seconds(job, lessons, dtype),
        limit_bytes=limit,
        on_disk=on_disk,
        statistics_bytes=0,
        reload_blocks=blocks,
    )


def _block_seconds(job: Job, lessons: Lessons, dtype: torch.dtype) -> float:
    """Arithmetic over measured speed: steps of every block, and passes over all windows."""
    regime, speed = job.method.regime(), speeds()
    weights = sum(math.prod(linear.shape) for linear in job.linears.values())
    parts = 2 if regime.window == "both" else 1
    trained = parts * lessons.passed(regime.steps, regime.batch) * (FORWARD + BACKWARD)
    passed = (2 + 2 * parts) * lessons.rows.tokens.numel()
    work = 2.0 * weights * (trained + passed) / speed[str(dtype).removeprefix("torch.")]
    return SLACK * work + (6 * job.checkpoint.nbytes + 3 * job.weight_bytes) / BYTES_A_SECOND + 3.0


def _kept(job: Job, lessons: Lessons, dtype: torch.dtype) -> list[int]:
    """Bytes that a backward pass needs of each block: activations of a part of a batch, and what adapters make of weights."""
    regime, config = job.method.regime(), job.skeleton.model.config.get_text_config()
    tokens = -(-regime.batch // regime.parts) * max(lessons.rows.longest, lessons.held_out.longest)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    found = []
    for block in job.blocks:
        adapted = sum(math.prod(linear.shape) for linear in block if linear.tensor in job.subset.adapters)
        own = tokens * (kept_elements(block, experts) + STATES * config.hidden_size)
        largest = max((math.prod(linear.shape) for linear in block), default=0) if adapted else 0
        found.append(dtype.itemsize * own + (EFFECTIVE + _cast(dtype)) * adapted + STEPPING * largest)
    return found


def _counts(job: Job) -> tuple[int, int]:
    """Parameters that are trained, and weights that have a mask."""
    trained = sum(job.skeleton.get(name).numel() for name in job.subset.names) + job.subset.added
    return trained, sum(math.prod(linear.shape) for linear in job.linears.values())


@dataclass(frozen=True)
class Taught:
    """Bytes that the teacher of a distillation takes while the model trains, in memory and on disk; ``passing`` more at its
    largest, in a pass; ``tokens`` that pass it."""

    memory: int = 0
    disk: int = 0
    passing: int = 0
    tokens: int = 0


def _taught(job: Job, lessons: Lessons, dtype: torch.dtype) -> Taught:
    regime = job.method.regime()
    wanted, teacher = regime.imitates, Teacher.of(job)
    if wanted is None or teacher is None:
        return Taught()
    skeleton = teacher.skeleton
    config = skeleton.model.config.get_text_config()
    tokens = -(-regime.batch // regime.parts) * lessons.rows.longest
    logits = 2 * 4 * tokens * config.vocab_size if wanted.logits else 0  # and their logarithms
    count = len(skeleton.blocks)
    kept = count if wanted.states else 1
    states = tokens * teacher.width * dtype.itemsize * kept
    outside = sum(skeleton.get(name).numel() for name in skeleton.names_of(None))
    if not wanted.streamed:
        total = sum(skeleton.get(name).numel() for name in skeleton.pieces)
        passed = lessons.passed(regime.rounds * regime.steps, regime.batch)
        return Taught(total * dtype.itemsize, 0, logits + states, passed)
    rows = len(lessons.rows) * lessons.rows.longest
    disk = rows * teacher.width * dtype.itemsize * (kept + 1)
    return Taught(4 * outside if wanted.logits else 0, disk, logits + states, rows)


def _phases(job: Job, s: Sizes, lessons: Lessons, dtype: torch.dtype, *, recompute: bool) -> dict[str, int]:
    """Peak bytes by phase."""
    skeleton, regime = job.skeleton, job.method.regime()
    trained, masked = _counts(job)
    total = sum(skeleton.get(name).numel() for name in skeleton.pieces)
    largest = max((skeleton.get(name).numel() for name in job.subset.names), default=0)
    cast = _cast(dtype) * trained
    weights = (total - trained + job.subset.added) * dtype.itemsize
    config = skeleton.model.config.get_text_config()
    tokens = -(-regime.batch // regime.parts) * max(lessons.rows.longest, lessons.held_out.longest)
    hidden = tokens * config.hidden_size * dtype.itemsize
    blocks = _kept(job, lessons, dtype)
    activations = len(blocks) * hidden + max(blocks) if recompute else sum(blocks)
    logits = LOGITS * 4 * tokens * config.vocab_size
    taught = _taught(job, lessons, dtype)
    held = s.base + weights + HELD * trained + (1 + regime.own) * masked + taught.memory  # a mask is bytes
    return with_heap(
        0,
        {
            "loading the model": held - 12 * trained + 4 * largest,
            "training, forward and backward": held + cast + activations + logits + taught.passing,
            "training, a step": held + STEPPING * largest,
            "pruning": held - 12 * trained + PRUNING * s.weight_count,
            "scoring": s.base + s.outside + 3 * s.logits,
        },
    )


def _cast(dtype: torch.dtype) -> int:
    """Bytes a parameter that autocast keeps of a pass."""
    return dtype.itemsize if dtype != torch.float32 else 0


def kept_elements(block: Sequence[Linear], experts: int) -> int:
    """Elements a token that a backward pass needs of the linears of a block: their outputs, and each input once.

    Of linears that are alike but for a number, experts, a token passes ``experts``.
    """
    alike: dict[str, list[Linear]] = {}
    for linear in block:
        expert = "" if linear.piece.expert is None else f".{linear.piece.part}"
        alike.setdefault(re.sub(r"\.\d+(?=\.)", ".*", linear.parameter) + expert, []).append(linear)
    outputs, inputs = 0, {}
    for name, group in alike.items():
        times = min(experts, len(group))
        outputs += times * group[0].shape[0]
        inputs[name.rpartition(".")[0].rpartition(".")[0], group[0].shape[1]] = times * group[0].shape[1]
    return outputs + sum(inputs.values())


def _seconds(job: Job, lessons: Lessons, dtype: torch.dtype, *, recompute: bool) -> float:
    """Arithmetic over measured speed, plus reading, writing and what is put by."""
    regime, speed = job.method.regime(), speeds()
    weights = sum(math.prod(linear.shape) for linear in job.linears.values())
    config = job.skeleton.model.config.get_text_config()
    passed = weights + config.hidden_size * config.vocab_size
    tokens = lessons.passed(regime.rounds * regime.steps, regime.batch)
    passes = FORWARD + BACKWARD + (FORWARD if recompute else 0)
    looks = 0 if regime.patience is None else regime.steps // regime.look + 1
    held_out = ((2 + looks) * regime.rounds + 1) * lessons.held_out.tokens.numel()
    held_out += _taught(job, lessons, dtype).tokens
    work = 2.0 * passed * (passes * tokens + held_out) / speed[str(dtype).removeprefix("torch.")]
    trained, _ = _counts(job)
    state = 12 * trained * regime.rounds
    return SLACK * work + (2 * job.checkpoint.nbytes + 3 * job.weight_bytes + state) / BYTES_A_SECOND + 3.0
