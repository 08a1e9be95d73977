"""The loop backward over decoder blocks, for methods that look at the gradients of the loss.

The model's inputs of every block go to disk in one forward pass. Then, from the last block to the first, each is loaded,
run again window by window with gradients on, and given the gradient of the loss by its output; out come those by its
weights, for the method, and by its input, for the block before. Nothing a block's answer depends on is changed by
another's, so the gradients are those of the unchanged model. Peak memory is one block with what the method traces of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from weightworks.engine.blockwise import Streamed, hidden_size, prove_once
from weightworks.engine.job import Job
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import Linear, read_linear
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell, window_losses
from weightworks.stream.replay import capture, head
from weightworks.stream.skeleton import place

FORWARD = "inputs of all blocks"
Answer = Callable[[Linear, torch.Tensor, Any], dict[str, Any]]  # of a weight float32 [out, in] and what was traced


class Traced(Streamed, Protocol):
    """A job whose method has ``trace``."""

    method: Any


class Backward:
    """A job of gradients on its way; everything in float32."""

    def __init__(
        self,
        job: Traced,
        writer: CheckpointWriter,
        calibration: Calibration,
        probe: torch.Tensor,
        *,
        on_disk: bool,
        traced_bytes: int,
    ) -> None:
        self.job, self.writer, self.probe, self.traced_bytes = job, writer, probe, traced_bytes
        self.windows = Windows(calibration.tokens)
        shape = (*calibration.tokens.shape, hidden_size(job))
        self.inputs = Activations(shape, torch.float32, writer.scratch, "inputs", on_disk=True)
        self.gradients = Activations(shape, torch.float32, writer.scratch, "gradients", on_disk=on_disk)

    def run(self, answer: Answer) -> list[dict[str, Any]]:
        """What ``answer`` makes of every linear and what was traced of it, in the order of the model: JSON-compatible."""
        job, count = self.job, len(self.job.skeleton.blocks)
        done = next(number for number in range(count + 1) if self._step(count - 1 - number) not in self.writer.steps)
        if done:
            job.progress.say(f"resuming after block {done} of {count}, from the last")
        if done < count:
            self._prepare(done)
        job.progress.begin("block from the last", count, done)
        for index in reversed(range(count - done)):
            self._block(index, answer)
        job.progress.end()
        return [row for index in range(count) for row in self.writer.steps[self._step(index)]["rows"]]

    def _step(self, index: int) -> str:
        return f"block {index}"

    def _prepare(self, done: int) -> None:
        """The inputs of all blocks, and the gradient by the last one's output; restored if the journal has them."""
        job, skeleton = self.job, self.job.skeleton
        with torch.no_grad(), shell(skeleton, job.view, job.device):
            job.returns_tuple = prove_once(job, self.writer, self.probe)
            self.windows.capture(skeleton, returns_tuple=job.returns_tuple, device=job.device)
            one = self.windows.tokens[:1].to(job.device)
            self.windows.calls[1] = capture(skeleton, one, returns_tuple=job.returns_tuple)
            if FORWARD not in self.writer.steps:
                for start, hidden in self.windows.embedded(skeleton, job.device):
                    self.inputs.write(start, hidden)
                self.inputs.advance()
                self.inputs.checkpoint()
        if FORWARD in self.writer.steps:
            self.gradients.restore(done)
            return
        for index in range(len(skeleton.blocks)):
            names = skeleton.names_of(index)
            skeleton.load(job.view, names, torch.float32, job.device)
            run_block(skeleton, index, self.windows, self.inputs, torch.float32, job.device)
            skeleton.unload(names)
            self.inputs.checkpoint()
        self._loss()
        self.writer.done(FORWARD)

    def _loss(self) -> None:
        """The gradient of each window's mean loss by the last block's output."""
        job = self.job
        with shell(job.skeleton, job.view, job.device):
            for number in range(self.windows.tokens.shape[0]):
                tokens = self.windows.tokens[number : number + 1].to(job.device)
                hidden = self.inputs.read(number, number + 1).to(job.device).requires_grad_()
                with torch.enable_grad():
                    logits = head(job.skeleton, tokens, hidden, returns_tuple=job.returns_tuple)
                    (gradient,) = torch.autograd.grad(window_losses(logits, tokens).mean(), [hidden])
                self.gradients.write(number, gradient.cpu())
        self.gradients.advance()
        self.gradients.checkpoint()

    def _block(self, index: int, answer: Answer) -> None:
        job, skeleton, names = self.job, self.job.skeleton, self.job.skeleton.names_of(index)
        skeleton.load(job.view, names, torch.float32, job.device)
        self.inputs.restore(index)
        rows = []
        rounds = list(bounded(job, self.windows.tokens.shape[0], job.blocks[index], self.traced_bytes)) or [[]]
        for number, linears in enumerate(rounds):
            traced = self._trace(index, linears, last=number == len(rounds) - 1)
            for linear in linears:
                weight = read_linear(job.view, linear).to(job.device)
                rows.append(answer(linear, weight, traced.pop(linear.tensor)))
            release()
        skeleton.unload(names)
        self.gradients.checkpoint()
        self.writer.done(self._step(index), {"rows": rows})
        self.gradients.forget()
        job.progress.step(f"{len(rows)} weights")

    def _trace(self, index: int, linears: Sequence[Linear], *, last: bool) -> dict[str, Any]:
        """The gradients of ``linears`` over all windows; in the ``last`` round also those by the block's input."""
        job, (prefix, block) = self.job, self.job.skeleton.blocks[index]
        count, call = self.windows.tokens.shape[0], self.windows.call(1, torch.float32).blocks[index]
        traced = {
            linear.tensor: job.method.trace(linear.shape[0] * linear.shape[1], count, job.device) for linear in linears
        }
        names = list(dict.fromkeys(linear.parameter for linear in linears))
        parameters = [job.skeleton.get(f"{prefix}.{name}").requires_grad_() for name in names]
        for number in range(count):
            hidden = self.inputs.read(number, number + 1).to(job.device).requires_grad_()
            outer = self.gradients.read(number, number + 1).to(job.device)
            with torch.enable_grad():
                output = call.run(block, hidden)
                found = torch.autograd.grad(output, [hidden, *parameters], outer, allow_unused=True)
            of = dict(zip(names, found[1:], strict=True))
            for linear in linears:
                whole = of[linear.parameter]
                if whole is not None:  # an expert that the window did not reach
                    part = place(whole, linear.piece)
                    traced[linear.tensor].add(part.T if linear.transposed else part)
            if last:
                self.gradients.write(number, found[0].cpu())
        for parameter in parameters:
            parameter.requires_grad = False
        if last:
            self.gradients.advance()
        return traced


def solved(job: Job, writer: CheckpointWriter) -> Answer:
    """The answer that is a new weight, stored: how a method of gradients prunes."""

    def answer(linear: Linear, weight: torch.Tensor, traced: Any) -> dict[str, Any]:
        solution = job.method.answer(weight, traced, job.target_of(linear))
        for name, tensor in job.stored(linear, solution).items():
            writer.put(name, tensor)
        return job.row(linear, solution)

    return answer


def bounded(job: Traced, count: int, linears: Sequence[Linear], limit: int) -> Iterator[list[Linear]]:
    """``linears`` in rounds whose traces stay within ``limit`` bytes, or of one."""
    round_: list[Linear] = []
    held = 0
    for linear in linears:
        size = job.method.traced(linear.shape[0] * linear.shape[1], count)
        if round_ and held + size > limit:
            yield round_
            round_, held = [], 0
        round_.append(linear)
        held += size
    if round_:
        yield round_
