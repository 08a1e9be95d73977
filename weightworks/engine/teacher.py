"""The model that a training is measured by, or that it imitates: the one that was pruned, as it was before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from weightworks.engine.finish import PROOF_TOKENS
from weightworks.engine.job import Job
from weightworks.errors import MethodError
from weightworks.store.dense import DenseView
from weightworks.stream.activations import Activations
from weightworks.stream.lessons import IGNORED, Lessons
from weightworks.stream.passes import Windows, shell, stream_losses
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import Skeleton, build


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
        own, others = (int(one.model.config.get_text_config().vocab_size) for one in (job.skeleton, skeleton))
        if own != others:
            raise MethodError(
                f"{job.teacher.source}: is no teacher of {job.checkpoint.source}: it knows {others:,} tokens, not {own:,}",
                hint="give the model as it was before it was pruned",
            )
        return cls(view, skeleton, job.device, job.target)

    def loss(self, lessons: Lessons) -> float:
        """Its mean loss on the held-out rows, nats a token, in float32 and one block in memory at a time."""
        batch = lessons.held_out.batch(range(len(lessons.held_out)))
        with shell(self.skeleton, self.view, self.device):
            proof = batch.tokens[:2, :PROOF_TOKENS].to(self.device)
            self.returns_tuple = prove(self.skeleton, self.view, proof)
        hidden = int(self.skeleton.model.config.get_text_config().hidden_size)
        states = Activations((*batch.tokens.shape, hidden), torch.float32, self.target, "unused")
        windows = Windows(batch.tokens)
        losses = stream_losses(
            self.skeleton, self.view, windows, states, returns_tuple=self.returns_tuple, device=self.device
        )  # [n, seq - 1]
        learned = batch.labels[:, 1:] != IGNORED
        return float(losses[learned].double().mean())
