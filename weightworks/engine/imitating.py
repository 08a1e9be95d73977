"""The loss of a model that imitates its teacher: the teacher's distribution of the next token, and its hidden states.

Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2, and the hidden states of Kurtic et
al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models" (SquareHead, arXiv:2310.06927), section 2. Only
the positions count from which something is learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from weightworks.engine.blockwise import hidden_size
from weightworks.engine.job import Job
from weightworks.engine.teacher import Teacher
from weightworks.errors import MethodError
from weightworks.stage.training import Imitation
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.lessons import IGNORED, Batch, Lessons
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell
from weightworks.stream.replay import tail
from weightworks.stream.skeleton import Skeleton
from weightworks.stream.whole import Whole


def divergence(logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of distributions at a temperature T, nats, summed over tokens.

    ``logits`` and ``taught`` are [tokens, vocabulary]. T^2 keeps gradients of one size whatever the temperature.
    """
    own = nn.functional.log_softmax(logits / temperature, -1)
    theirs = nn.functional.log_softmax(taught / temperature, -1)
    return temperature**2 * nn.functional.kl_div(own, theirs, reduction="sum", log_target=True)


def distance(states: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """||h - t||^2 / ||t||^2 of hidden states [tokens, hidden], summed over tokens.

    It is relative token by token, so that parts of a batch add up and a first token of huge norm counts like any other.
    """
    scale = taught.square().sum(-1).clamp(min=1e-30)  # [tokens]
    return ((states - taught).square().sum(-1) / scale).sum()


def counterparts(count: int, taught: int) -> list[int]:
    """The teacher's block for each of ``count`` blocks: the same where it has as many, else at the same share of the way."""
    return [max(0, round((index + 1) * taught / count) - 1) for index in range(count)]


@dataclass(frozen=True)
class Taught:
    """What a teacher makes of a batch: ``logits`` [n, seq, vocabulary], ``states`` [n, seq, hidden] after blocks, by number."""

    logits: torch.Tensor | None
    states: Mapping[int, torch.Tensor]


class Teaching(Protocol):
    """A teacher at hand."""

    def of(self, batch: Batch) -> Taught:
        """What it makes of a batch."""

    def close(self) -> None:
        """Give its memory back."""


def check_imitable(job: Job) -> None:
    """Refuse an imitation without a teacher, or of hidden states that are not as wide as the model's own."""
    wanted: Imitation | None = job.method.regime().imitates
    if wanted is None:
        return
    teacher = Teacher.of(job)
    if teacher is None:
        raise MethodError(f"{job.label}: distillation imitates the original", hint="name it: --teacher ORIGINAL")
    own, theirs = hidden_size(job), teacher.width
    if wanted.states and own != theirs:
        raise MethodError(
            f"{job.label}: hidden states of {theirs} numbers cannot be imitated by those of {own}",
            hint="imitate the logits alone: --states-weight 0",
        )


class Imitating:
    """The loss of the job's model against its teacher's ``lessons``, as the method wants it."""

    def __init__(
        self, job: Job, writer: CheckpointWriter, teacher: Teacher, lessons: Lessons, dtype: torch.dtype
    ) -> None:
        self.job, self.dtype = job, dtype
        wanted: Imitation | None = job.method.regime().imitates
        assert wanted is not None
        self.wanted = wanted
        self.blocks = counterparts(len(job.skeleton.blocks), len(teacher.skeleton.blocks)) if wanted.states else []
        make = OnDisk if wanted.streamed else InMemory
        self.teaching: Teaching = make(job, writer, teacher, lessons, dtype, self.blocks)

    def close(self) -> None:
        self.teaching.close()

    def loss(self, model: Whole, batch: Batch) -> torch.Tensor:
        """The weighted sum of the losses of ``batch``, summed over its tokens."""
        wanted, taught = self.wanted, self.teaching.of(batch)
        batch = batch.to(self.job.device)
        aims = batch.labels[:, 1:]
        learned = aims != IGNORED  # [n, seq - 1]
        with watched(self.job.skeleton) as states, casting(self.job.device, self.dtype):
            made = model.model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
        logits = made[learned].float()  # [learned, vocabulary]
        total = torch.zeros((), device=self.job.device)
        if wanted.text:
            total = total + wanted.text * nn.functional.cross_entropy(logits, aims[learned], reduction="sum")
        if taught.logits is not None:
            total = total + wanted.logits * divergence(
                logits, taught.logits[:, :-1][learned].float(), wanted.temperature
            )
        for own, block in zip(states, self.blocks, strict=bool(self.blocks)):
            off = distance(own[:, :-1][learned].float(), taught.states[block][:, :-1][learned].float())
            total = total + wanted.states / len(self.blocks) * off
        return total


class InMemory:
    """A teacher whole in memory, which passes every batch."""

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        teacher: Teacher,
        lessons: Lessons,
        dtype: torch.dtype,
        blocks: Sequence[int],
    ) -> None:
        self.skeleton, self.dtype, self.device, self.blocks = teacher.skeleton, dtype, job.device, blocks
        self.wants_logits = bool(job.method.regime().imitates.logits)
        self.skeleton.load(teacher.view, list(self.skeleton.pieces), dtype, job.device)

    @torch.no_grad()
    def of(self, batch: Batch) -> Taught:
        with watched(self.skeleton) as states, casting(self.device, self.dtype):
            logits = self.skeleton.model(input_ids=batch.tokens.to(self.device), use_cache=False).logits
        return Taught(logits if self.wants_logits else None, {block: states[block] for block in self.blocks})

    def close(self) -> None:
        self.skeleton.unload(list(self.skeleton.pieces))


class OnDisk:
    """A teacher that has passed all rows before, block by block: its hidden states are on disk, its head in memory.

    Each block is a step of the journal; the states that are wanted stay, those between are dropped.
    """

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        teacher: Teacher,
        lessons: Lessons,
        dtype: torch.dtype,
        blocks: Sequence[int],
    ) -> None:
        self.teacher, self.dtype, self.device = teacher, dtype, job.device
        self.last = len(teacher.skeleton.blocks) - 1
        self.wants_logits = bool(job.method.regime().imitates.logits)
        self.blocks = sorted({*blocks, *([self.last] if self.wants_logits else [])})
        shape = (len(lessons.rows), lessons.rows.longest, teacher.width)
        self.states = {
            block: Activations(shape, dtype, writer.scratch, "taught", on_disk=True) for block in [-1, *self.blocks]
        }
        self._stream(job, writer, Windows(lessons.rows.batch(range(len(lessons.rows))).tokens))
        for block in self.blocks:
            self.states[block].restore(block + 1)
        self.shell = teacher.skeleton.names_of(None) if self.wants_logits else []
        teacher.skeleton.load(teacher.view, self.shell, torch.float32, self.device)

    def _stream(self, job: Job, writer: CheckpointWriter, windows: Windows) -> None:
        """Send all rows through the teacher."""
        skeleton, states, device = self.teacher.skeleton, self.states[-1], self.device
        blocks = range(max(self.blocks) + 1)
        done = next(index for index in range(len(blocks) + 1) if f"taught {index}" not in writer.steps)
        if done == len(blocks):
            return
        with shell(skeleton, self.teacher.view, device):
            windows.capture(skeleton, returns_tuple=self.teacher.returns_tuple, device=device)
            if done:
                states.restore(done)
            else:
                for start, hidden in windows.embedded(skeleton, device):
                    states.write(start, hidden.to(self.dtype))
                states.advance()
        job.progress.begin("block of the teacher", len(blocks), done)
        for index in range(done, len(blocks)):
            names = skeleton.names_of(index)
            skeleton.load(self.teacher.view, names, self.dtype, device)
            run_block(skeleton, index, windows, states, self.dtype, device)
            skeleton.unload(names)
            states.checkpoint()
            writer.done(f"taught {index}", {})
            if index - 1 not in self.blocks:
                states.forget()
            job.progress.step(f"taught {index}")
        job.progress.end()

    @torch.no_grad()
    def of(self, batch: Batch) -> Taught:
        length = batch.tokens.shape[1]

        def rows(block: int) -> torch.Tensor:
            found = [self.states[block].read(place, place + 1)[:, :length] for place in batch.places]
            return torch.cat(found).to(self.device)

        states = {block: rows(block) for block in self.blocks}
        if not self.wants_logits:
            return Taught(None, states)
        last, tuple_ = states[self.last].float(), self.teacher.returns_tuple
        logits = tail(self.teacher.skeleton, batch.tokens.to(self.device), last, returns_tuple=tuple_)
        return Taught(logits, states)

    def close(self) -> None:
        self.teacher.skeleton.unload(self.shell)
        release()


@contextmanager
def watched(skeleton: Skeleton) -> Iterator[list[torch.Tensor]]:
    """What the blocks of a model give in a pass [n, seq, hidden], in their order."""
    seen: list[torch.Tensor] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [block.register_forward_hook(look) for _, block in skeleton.blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def casting(device: torch.device, dtype: torch.dtype) -> Any:
    """Products in ``dtype``, whatever the values are held in."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
