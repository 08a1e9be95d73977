"""The loop of methods that train: a whole model in memory, round after round of optimizer steps, masks held at each.

A run is put by from time to time and at the end of every round: values, masks, moments, and where it was. A killed run goes
on from there, and since windows, rates and arithmetic follow from the position alone, it ends in the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weightworks.engine.blockwise import Written, prove_first
from weightworks.engine.finish import stream_perplexity
from weightworks.engine.imitating import Imitating, casting
from weightworks.engine.job import Job
from weightworks.engine.optimizer import Optimizer
from weightworks.engine.teacher import Teacher
from weightworks.engine.trained import (
    carry_masks,
    curve,
    given_masks,
    refuse_divergence,
    trained_share,
    whole,
    write_changed,
)
from weightworks.stage.training import Modelwise
from weightworks.store.snapshot import Snapshot, write_snapshot
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.lessons import Batch, Lessons
from weightworks.stream.memory import release
from weightworks.stream.skeleton import DenseReader, Skeleton
from weightworks.stream.whole import Whole

SAVE_SECONDS = 60.0  # a run is put by no more often than this while it trains,
SAVE_SHARE = 20  # nor does putting it by take more than one part in so many of its time
EARLIER = "earlier.safetensors"  # values to go back to
BEST = "best.safetensors"  # those of the best look at the held-out loss


class Training:
    """A modelwise job on its way."""

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        lessons: Lessons,
        probe: torch.Tensor,
        dtype: torch.dtype,
        *,
        recompute: bool,
    ) -> None:
        self.job, self.writer, self.lessons, self.probe, self.dtype = job, writer, lessons, probe, dtype
        self.method: Modelwise = job.method
        self.regime = self.method.regime()
        self.recompute, self.teacher = recompute, Teacher.of(job)
        self.imitating: Imitating | None = None
        self.rounds: list[dict[str, Any]] = []  # facts of rounds begun
        self.losses: list[float] = []  # of steps since the last journal entry
        self.saves = 0
        self.saved = self.cost = 0.0  # when the run was last put by, and the seconds that took

    def run(self) -> dict[str, Any]:
        """Train and write; returns ``rows``, what is to be told of the ``training``, and the probe's perplexities."""
        job, writer = self.job, self.writer
        job.returns_tuple = prove_first(job, writer, self.probe)
        dense = stream_perplexity(job, job.view, self.probe)
        if self.teacher is not None:
            self.teacher.measured(writer, self.lessons)
        if "trained" not in writer.steps:
            model = whole(job, self.dtype)
            try:
                if self.teacher is not None and self.regime.imitates is not None:
                    self.imitating = Imitating(job, writer, self.teacher, self.lessons, self.dtype)
                model.load(masks=given_masks(job))
                self._train(model)
                rows = self._write(model)
                writer.done("trained", {"rows": rows, "training": self._told(model)})
            finally:
                model.unload()
                if self.imitating is not None:
                    self.imitating.close()
                release()
        result = stream_perplexity(job, self._written(), self.probe)
        return {**writer.steps["trained"], "dense": dense, "result": result}

    def _write(self, model: Whole) -> list[dict[str, Any]]:
        """Write what was trained; returns the report's rows."""
        rows = write_changed(self.job, self.writer, model)
        carry_masks(self.job, self.writer)
        return rows

    def _written(self) -> DenseReader:
        """The model as it is written."""
        return Written(self.job, self.writer)

    # Rounds and steps.

    def _train(self, model: Whole) -> None:
        optimizer = Optimizer(model.values, model.masks, decay=self.regime.decay, clip=self.regime.clip)
        number, step = self._restore(model, optimizer)
        rounds, steps = self.regime.rounds, self.regime.steps
        self.job.progress.begin("step", rounds * steps, number * steps + step, every=5.0)
        with recomputing(self.job.skeleton) if self.recompute else _as_it_is():
            while number < rounds:
                if step == 0:
                    self._begin(number, model)
                    optimizer.restart()
                rates = self.method.rates(number, self.rounds[number]["begun"])
                while step < steps and not self._waited(number):
                    self._put_by(model, number, step)
                    self._approach(model, number, step)
                    self._step(model, optimizer, number, step, rates[step])
                    step += 1
                    self._look(model, number, step)
                    if step < steps and time.monotonic() - self.saved > max(SAVE_SECONDS, SAVE_SHARE * self.cost):
                        self._save(model, optimizer, number, step)
                self._put_by(model, number, step)
                self._approach(model, number, step)
                self.rounds[number]["steps"] = step
                self._end(number, model)
                number, step = number + 1, 0
                optimizer.restart()
                self._save(model, optimizer, number, step)
        self._approach(model, rounds, 0)
        self.job.progress.end()

    def _approach(self, model: Whole, number: int, step: int) -> None:
        """Let a method that changes what the model multiplies with as it trains do so."""
        if hasattr(self.method, "approach"):
            regime = self.regime
            self.method.approach((number * regime.steps + step) / (regime.rounds * regime.steps), model)

    def _begin(self, number: int, model: Whole) -> None:
        before = self.rounds[-1]["held_out_after"] if self.rounds else self._held_out(model)
        begun = self.method.begin(number, model)
        model.hold()
        facts = {"begun": begun, "held_out_before": before, "held_out_begun": self._held_out(model)}
        self.rounds.append(facts)
        if self.regime.patience is not None:
            facts["looks"] = [[0, facts["held_out_begun"]]]
            write_snapshot(self.writer.scratch / BEST, model.values)
        self.job.progress.say(
            f"round {number + 1} of {self.regime.rounds}: held-out loss {told(facts, 'before', 'begun')}"
        )

    def _end(self, number: int, model: Whole) -> None:
        facts = self.rounds[number]
        if "looks" in facts:
            best = Snapshot(self.writer.scratch / BEST)
            for name, value in model.values.items():
                value.data.copy_(best.read(name))
        facts["held_out_after"] = self._held_out(model)
        facts["ended"] = self.method.end(number, model)
        self.job.progress.say(
            f"round {number + 1} of {self.regime.rounds}: held-out loss {told(facts, 'begun', 'after')}"
        )

    def _step(self, model: Whole, optimizer: Optimizer, number: int, step: int, rate: float) -> None:
        """One optimizer step; the loss is the mean over all tokens predicted in it."""
        regime = self.regime
        batch, loss = self.lessons.batch(number * regime.steps + step, regime.batch), 0.0
        for part in batch.parts(regime.parts):
            share = self._aim(model, part) / batch.learned
            share.backward()
            loss += float(share.detach())
        norm = optimizer.step(rate)
        refuse_divergence(self.job, self.writer, loss, norm, f"step {step + 1} of round {number + 1}, rate {rate:.3g}")
        self.losses.append(loss)
        self.job.progress.step(f"round {number + 1}, loss {loss:.4f}, rate {rate:.2e}")

    def _aim(self, model: Whole, batch: Batch) -> torch.Tensor:
        """What a step makes smaller, summed over what is learned of ``batch``."""
        return self._loss(model, batch) if self.imitating is None else self.imitating.loss(model, batch)

    def _loss(self, model: Whole, batch: Batch) -> torch.Tensor:
        """The sum of the negative log-likelihoods (nats) of what is learned of ``batch``."""
        batch = batch.to(self.job.device)
        with casting(self.job.device, self.dtype):
            logits = model.model(input_ids=batch.tokens, use_cache=False).logits  # [n, seq, vocabulary]
        return nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
        )

    @torch.no_grad()
    def _held_out(self, model: Whole) -> float:
        """The mean loss on the held-out windows, nats a token."""
        total, learned = 0.0, 0
        for batch in self.lessons.held_out.batches(max(1, self.regime.batch // self.regime.parts)):
            total, learned = total + float(self._loss(model, batch)), learned + batch.learned
        return total / learned

    # Stopping early.

    def _look(self, model: Whole, number: int, step: int) -> None:
        """After every so many steps, and the last: the held-out loss, and the values put by if it was never lower.

        A run that is continued from before a look takes it again, and comes to the same file.
        """
        regime = self.regime
        if regime.patience is None or (step % regime.look and step < regime.steps):
            return
        looks, loss = self.rounds[number]["looks"], self._held_out(model)
        if loss < min(seen for _, seen in looks):
            write_snapshot(self.writer.scratch / BEST, model.values)
        looks.append([step, loss])
        self.job.progress.say(f"held-out loss {loss:.4f} after step {step}, {best_look(looks)[1]:.4f} the best")

    def _waited(self, number: int) -> bool:
        """Whether the last looks, as many as patience is, were no better than the best before them."""
        looks = self.rounds[number].get("looks")
        if looks is None or self.regime.patience is None:
            return False
        return len(looks) - 1 - looks.index(best_look(looks)) >= self.regime.patience

    # Putting by, and going on.

    def _put_by(self, model: Whole, number: int, step: int) -> None:
        """Keep the values a method will go back to."""
        if number == 0 and step == self.regime.remember:
            write_snapshot(self.writer.scratch / EARLIER, model.values)
        model.earlier = self._earlier

    def _earlier(self, name: str) -> torch.Tensor:
        return Snapshot(self.writer.scratch / EARLIER).read(name)

    def _save(self, model: Whole, optimizer: Optimizer, number: int, step: int) -> None:
        """Put the run by: its tensors in a file, the rest in the journal, which names the file."""
        started = time.monotonic()
        self.saves += 1
        path = self._state(self.saves)
        masks = {name: mask for name, mask in model.masks.items() if name in model.values}  # others are the folder's
        kept: dict[str, Mapping[str, torch.Tensor]] = {"value": model.values, "mask": masks, "extra": model.extra}
        named = {f"{kind} {name}": tensor for kind, tensors in kept.items() for name, tensor in tensors.items()}
        write_snapshot(path, {**named, **dict(optimizer.state())})
        facts = {"position": [number, step], "rounds": self.rounds, "losses": self.losses}
        self.writer.done(f"training {self.saves}", facts)
        self.losses = []
        self._state(self.saves - 1).unlink(missing_ok=True)
        self.saved, self.cost = time.monotonic(), time.monotonic() - started

    def _restore(self, model: Whole, optimizer: Optimizer) -> tuple[int, int]:
        """Where the run is: at its start, or where it was put by last, with all that it had then."""
        self.saves = sum(name.startswith("training ") for name in self.writer.steps)
        self.saved = time.monotonic()
        if self.saves == 0:
            return 0, 0
        facts = self.writer.steps[f"training {self.saves}"]
        self.rounds = list(facts["rounds"])
        number, step = facts["position"]
        snapshot = Snapshot(self._state(self.saves))
        for named in snapshot.infos:
            kind, _, name = named.partition(" ")
            if kind == "value":
                model.values[name].data.copy_(snapshot.read(named))
            elif kind in ("mask", "extra"):
                {"mask": model.masks, "extra": model.extra}[kind][name] = snapshot.read(named).to(self.job.device)
        optimizer.restore(snapshot.infos, snapshot.read)
        model.earlier = self._earlier
        self.job.progress.say(f"resuming after step {step} of round {number + 1}")
        return number, step

    def _state(self, number: int) -> Any:
        return self.writer.scratch / f"training-{number:04d}.safetensors"

    # The end.

    def _told(self, model: Whole) -> dict[str, Any]:
        """What the report says of the training."""
        trained = sum(value.numel() for value in model.values.values())
        losses = [loss for facts in self.writer.steps.values() for loss in facts.get("losses", ())]
        regime, rounds, done, tokens = self.regime, [], 0, 0
        for number, facts in enumerate(self.rounds):
            taken, first = facts["steps"], number * regime.steps
            rounds.append({**facts, "losses": curve(losses[done : done + taken])})
            tokens += self.lessons.passed(first + taken, regime.batch) - self.lessons.passed(first, regime.batch)
            done += taken
        return {
            "trained_parameters": trained,
            "trained_share": trained_share(self.job, trained),
            "steps": done,
            **({"steps_allowed": regime.rounds * regime.steps} if regime.patience is not None else {}),
            "tokens": tokens,
            "held_out": {
                "before": self.rounds[0]["held_out_before"],
                "after": self.rounds[-1]["held_out_after"],
                **({"teacher": self.writer.steps["teacher"]["held_out"]} if self.teacher else {}),
            },
            "rounds": rounds,
        }


def best_look(looks: list[list[float]]) -> list[float]:
    """The first of the lowest losses, with its step."""
    return min(looks, key=lambda look: look[1])


def told(facts: dict[str, Any], *when: str) -> str:
    return " -> ".join(f"{facts[f'held_out_{one}']:.4f}" for one in when)


@contextmanager
def recomputing(skeleton: Skeleton) -> Iterator[None]:
    """Blocks keep their input alone, and run again in the backward pass for what it needs."""

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    try:
        for _, block in skeleton.blocks:
            block.forward = make(block.forward)
        yield
    finally:
        for _, block in skeleton.blocks:
            block.__dict__.pop("forward", None)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
