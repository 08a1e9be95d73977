"""The texts that a run reads, as its settings ask for them, and the dtype in which they pass the model."""

from __future__ import annotations

import torch

from weightworks.engine.job import Job
from weightworks.engine.machine import compute_dtype, free_memory
from weightworks.engine.reducing import ReduceJob
from weightworks.errors import CalibrationError, MethodError
from weightworks.plan.keys import trains
from weightworks.store.checkpoint import Checkpoint
from weightworks.stream.builtin import verification_text
from weightworks.stream.calibration import Calibration, describe, encode_all, load_tokenizer, load_windows
from weightworks.stream.examples import are_examples, load_examples, read_rows
from weightworks.stream.lessons import Lessons
from weightworks.stream.skeleton import Skeleton

Text = Calibration | Lessons  # what a run reads
CALIBRATION_WINDOWS = 128
HELD_OUT = 8  # beside so many windows another is held out, where a step is kept only if it helps
PROBE_WINDOWS, PROBE_LENGTH = 4, 256  # the check text: enough to tell a broken folder from a sound one


def calibrate(job: Job | ReduceJob) -> Calibration:
    """The job's calibration windows, as its settings ask for them."""
    count = job.settings.num_samples or CALIBRATION_WINDOWS
    judged = isinstance(job, Job) and (
        job.tweak is not None or (job.budget is not None and job.budget.increase is not None)
    )
    return read_windows(job, count, max(1, count // HELD_OUT) if judged else 0)


def lessons(job: Job) -> Lessons:
    """What the job's method is trained on: windows of a text, or examples where the data set is made of them."""
    settings, regime = job.settings, job.method.regime()
    count = settings.num_samples or regime.windows
    rows = read_rows(settings.dataset) if regime.window is None else []
    if not are_examples(rows):
        return Lessons.of(read_windows(job, count), regime.held_out, settings.seed)
    return load_examples(
        rows,
        describe(settings.dataset),
        job.checkpoint.root,
        count=count,
        held_out=regime.held_out,
        seq_len=min(settings.seq_len, job.skeleton.context_length),
        seed=settings.seed,
        trust_remote_code=settings.trust_remote_code,
    )


def read_windows(job: Job | ReduceJob, count: int, held_out: int = 0) -> Calibration:
    """``count`` windows of the data set in the job's settings, and others held out."""
    settings, length = job.settings, min(job.settings.seq_len, job.skeleton.context_length)
    if settings.dataset == "self":
        from weightworks.stream.selfwritten import write_windows

        return write_windows(
            job.checkpoint,
            count,
            length,
            settings.seed,
            held_out=held_out,
            free_bytes=settings.memory_limit or free_memory(),
            trust_remote_code=settings.trust_remote_code,
        )
    return load_windows(
        settings.dataset,
        job.checkpoint.root,
        num_samples=count,
        seq_len=length,
        seed=settings.seed,
        held_out=held_out,
        trust_remote_code=settings.trust_remote_code,
    )


def check_windows(checkpoint: Checkpoint, skeleton: Skeleton, *, trust_remote_code: bool) -> torch.Tensor:
    """Windows int64 [n, seq] of the built-in check text; seeded random tokens where there is no tokenizer.

    Raises :class:`CalibrationError` for a damaged ``tokenizer.json``, and for one that is not the model's.
    """
    length = min(PROBE_LENGTH, skeleton.context_length)
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    try:
        tokenizer = load_tokenizer(checkpoint.root, trust_remote_code=trust_remote_code)
    except CalibrationError:
        if (checkpoint.root / "tokenizer.json").is_file():
            raise
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (PROBE_WINDOWS, length), generator=generator)
    tokens = encode_all(tokenizer, [verification_text()])
    if tokens.numel() < 2 or int(tokens.max()) >= vocabulary:
        seen = f"token {int(tokens.max())}" if tokens.numel() else "no token"
        raise CalibrationError(
            f"{checkpoint.root}: its tokenizer gives {seen} for the check text, the model knows {vocabulary} tokens",
            hint="the tokenizer belongs to another model; put the right one there, or none",
        )
    length = min(length, tokens.numel() // 2)
    return tokens[: tokens.numel() // length * length].view(-1, length)[:PROBE_WINDOWS]


def dtype_of_passes(job: Job | ReduceJob) -> torch.dtype:
    """The dtype in which the text passes the model. Training takes no float16: gradients leave its range."""
    wanted, stored = job.settings.dtype, stored_dtype(job.checkpoint)
    if not trains(job.method):
        return compute_dtype(wanted, stored, job.device)
    if wanted == "float16":
        raise MethodError(
            f"{job.label}: --dtype float16 cannot train: gradients leave its range", hint="--dtype bfloat16"
        )
    return compute_dtype(wanted, torch.bfloat16 if stored == torch.float16 else stored, job.device)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype most of the checkpoint's bytes have."""
    amounts: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        amounts[info.dtype] = amounts.get(info.dtype, 0) + info.nbytes
    return max(amounts, key=lambda dtype: amounts[dtype])
