"""The model that a training is measured by, or that it imitates: the one that was pruned, as it was before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from weightworks.engine.finish import PROOF_TOKENS, Runnable
from weightworks.engine.job import Job
from weightworks.errors import MethodError
from weightworks.store.dense import DenseView
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.lessons import IGNORED, Lessons
from weightworks.stream.passes import Windows, shell, stream_losses
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import DenseReader, Skeleton, build


@dataclass
class Teacher:
    """A checkpoint opened for that. ``returns_tuple`` is known once the replay is proven."""

    view: DenseView
    skeleton: Skeleton
    device: torch.device
    target: Path
    returns_tuple: int = field(init=False, default=0)

    @classmethod
    def of(cls, job: Job) -> Teacher | None:
        """The job's teacher; refused if it does not read the same tokens."""
        if job.teacher is None:
            return None
        view = DenseView(job.teacher)
        skeleton = build(view, trust_remote_code=job.settings.trust_remote_code)
        regime = job.method.regime() if hasattr(job.method, "regime") else None
        if regime is None or regime.window is not None:  # blocks are laid side by side
            same = set(skeleton.pieces) == set(job.skeleton.pieces)
            if not same or skeleton.mismatches(DenseView(job.checkpoint)):
                raise MethodError(
                    f"{job.teacher.source}: cannot be imitated block by block: it is of another shape than "
                    f"{job.checkpoint.source}",
                    hint="give the model as it was before it was pruned, or take --method distill",
                )
        own, others = (int(one.model.config.get_text_config().vocab_size) for one in (job.skeleton, skeleton))
        if own != others:
            raise MethodError(
                f"{job.teacher.source}: is no teacher of {job.checkpoint.source}: it knows {others:,} tokens, not {own:,}",
                hint="give the model as it was before it was pruned",
            )
        return cls(view, skeleton, job.device, job.target)

    @property
    def width(self) -> int:
        """Of its hidden states."""
        return int(self.skeleton.model.config.get_text_config().hidden_size)

    def measured(self, writer: CheckpointWriter, lessons: Lessons) -> float:
        """:meth:`loss`, a step of the journal; from then on it can be streamed."""
        if "teacher" not in writer.steps:
            writer.done("teacher", {"held_out": self.loss(lessons), "returns_tuple": self.returns_tuple})
        self.returns_tuple = writer.steps["teacher"]["returns_tuple"]
        return float(writer.steps["teacher"]["held_out"])

    def loss(self, lessons: Lessons) -> float:
        """Its mean loss on the held-out rows, nats a token."""
        with shell(self.skeleton, self.view, self.device):
            rows = [one.batch([0]).tokens for one in (lessons.held_out, lessons.rows)]  # there is one of each at least
            length = min(PROOF_TOKENS, *(row.shape[1] for row in rows))
            proof = torch.cat([row[:, :length] for row in rows]).to(self.device)
            self.returns_tuple = prove(self.skeleton, self.view, proof)
        return held_out_loss(self, self.view, lessons)


def held_out_loss(model: Runnable, reader: DenseReader, lessons: Lessons) -> float:
    """The mean loss of a model on the held-out rows, nats a token, in float32 and one block in memory at a time."""
    batch = lessons.held_out.batch(range(len(lessons.held_out)))
    hidden = int(model.skeleton.model.config.get_text_config().hidden_size)
    states = Activations((*batch.tokens.shape, hidden), torch.float32, model.target, "unused")
    windows, returns_tuple = Windows(batch.tokens), model.returns_tuple
    losses = stream_losses(model.skeleton, reader, windows, states, returns_tuple=returns_tuple, device=model.device)
    learned = batch.labels[:, 1:] != IGNORED  # [n, seq - 1]
    return float(losses[learned].double().mean())
