"""The loop of reconstruction: block by block, what is trained comes to give what the original's block gives.

The inputs of a block are those that the pruned model makes, its earlier blocks reconstructed, or the original's; the aim is
the output of the original's block, on the same inputs or on its own. Peak memory is one block twice, its training, and the
activations of all windows, on disk past the limit. After each block the run is journalled, and a killed one goes on there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from weightworks.engine.blockwise import Written, hidden_size, prove_first
from weightworks.engine.finish import stream_perplexity
from weightworks.engine.job import Job
from weightworks.engine.optimizer import Optimizer
from weightworks.engine.teacher import Teacher, held_out_loss
from weightworks.engine.trained import (
    carry_masks,
    curve,
    given_masks,
    refuse_divergence,
    trained_share,
    whole,
    write_changed,
)
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.lessons import Lessons
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell
from weightworks.stream.replay import BlockCall, Passed, capture, passing
from weightworks.stream.whole import Whole

POINTS = 10  # of the loss curve that the report has of a window


class Reconstruction:
    """A reconstruction on its way."""

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        lessons: Lessons,
        probe: torch.Tensor,
        dtype: torch.dtype,
        *,
        on_disk: bool,
    ) -> None:
        self.job, self.writer, self.lessons, self.probe, self.dtype = job, writer, lessons, probe, dtype
        self.skeleton, self.device, self.method = job.skeleton, job.device, job.method
        self.regime = job.method.regime()
        teacher = Teacher.of(job)
        assert teacher is not None  # refused before
        self.teacher = teacher
        every = [
            lessons.rows.batch(range(len(lessons.rows))).tokens,
            lessons.held_out.batch(range(len(lessons.held_out))).tokens,
        ]
        self.windows, self.count = Windows(torch.cat(every)), len(lessons.rows)  # those held out come last
        self.size = self.regime.batch // self.regime.parts

        def activations(name: str) -> Activations:
            shape = (*self.windows.tokens.shape, hidden_size(job))
            return Activations(shape, dtype, writer.scratch, name, on_disk=on_disk)

        self.states, self.targets = activations("student"), activations("target")
        self.inputs = activations("input") if self.regime.window != "block" else None
        follows = self.regime.inputs == "dense" or self.regime.targets == "trajectory"
        self.dense = activations("teacher") if follows else None

    def run(self) -> dict[str, Any]:
        """Reconstruct and write; returns ``rows``, what is to be told of the ``training``, and the probe's perplexities."""
        job, writer, count = self.job, self.writer, len(self.skeleton.blocks)
        job.returns_tuple = prove_first(job, writer, self.probe)
        dense = stream_perplexity(job, job.view, self.probe)
        if "teacher" not in writer.steps:
            losses = {"teacher": self.teacher.loss(self.lessons), "before": held_out_loss(job, job.view, self.lessons)}
            writer.done("teacher", losses)
        done = next(index for index in range(count + 1) if f"block {index}" not in writer.steps)
        if done < count:
            self._embed(done)
        job.progress.begin("block", count, done)
        for index in range(done, count):
            self._block(index)
        job.progress.end()
        if "trained" not in writer.steps:
            carry_masks(job, writer)
            writer.done("trained", {"after": held_out_loss(job, Written(job, writer), self.lessons)})
        result = stream_perplexity(job, Written(job, writer), self.probe)
        steps = [writer.steps[f"block {index}"] for index in range(count)]
        rows = [row for step in steps for row in step["rows"]]
        return {"rows": rows, "training": self._told(steps), "dense": dense, "result": result}

    def _told(self, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the report says of the training."""
        measured, regime = self.writer.steps["teacher"], self.regime
        count = sum(len(step["windows"]) for step in steps) * regime.steps
        trained = sum(step["trained"] for step in steps)
        return {
            "trained_parameters": trained,
            "trained_share": trained_share(self.job, trained),
            "steps": count,
            "tokens": self.lessons.passed(regime.steps, regime.batch) * count // regime.steps,
            "held_out": {
                "before": measured["before"],
                "after": self.writer.steps["trained"]["after"],
                "teacher": measured["teacher"],
            },
            "blocks": [step["windows"] for step in steps],
        }

    def _embed(self, done: int) -> None:
        """How blocks are called, and what the first is handed, or what the next one is."""
        job, followed = self.job, [one for one in (self.states, self.dense) if one is not None]
        with shell(self.skeleton, job.view, self.device):
            self.windows.capture(self.skeleton, returns_tuple=job.returns_tuple, device=self.device)
            tokens = self.windows.tokens[[place % len(self.windows.tokens) for place in range(self.size)]]
            call = capture(self.skeleton, tokens.to(self.device), returns_tuple=job.returns_tuple)
            self.windows.calls[self.size] = call
        if done:
            for states in followed:
                states.restore(done)
            return
        for states, reader in zip(followed, (job.view, self.teacher.view), strict=False):
            with shell(self.skeleton, reader, self.device):
                for start, hidden in self.windows.embedded(self.skeleton, self.device):
                    states.write(start, hidden.to(self.dtype))
            states.advance()

    # One block.

    def _block(self, index: int) -> None:
        job, skeleton, names = self.job, self.skeleton, self.skeleton.names_of(index)
        original = self._original(index, names)
        model = whole(job, self.dtype)
        model.load(names, given_masks(job))
        try:
            self.method.begin(index, model)
            parts = self._parts(index)
            windows = [self._window(index, part, model, original) for part in parts]
            rows = write_changed(job, self.writer, model)
            trained = sum(value.numel() for value in model.values.values())
        finally:
            model.unload()
        skeleton.load(Written(job, self.writer), names, self.dtype, self.device)
        run_block(skeleton, index, self.windows, self.states, self.dtype, self.device)
        skeleton.unload(names)
        if self.dense is not None:
            self._fill(
                self.dense, ((start, call.run(original, x)) for start, call, x in self._passes(index, self.dense))
            )
        del original
        release()
        followed = [one for one in (self.states, self.dense) if one is not None]
        for states in followed:
            states.checkpoint()
        self.writer.done(f"block {index}", {"rows": rows, "windows": windows, "trained": trained})
        for states in followed:
            states.forget()
        told = ", ".join(f"{one['part']} {one['before']:.3%} -> {one['after']:.3%}" for one in windows)
        job.progress.step(f"error against the original, held out: {told}")

    def _original(self, index: int, names: Sequence[str]) -> nn.Module:
        """The original's block, beside that of the skeleton."""
        prefix, block = self.skeleton.blocks[index]
        original = copy.deepcopy(block)
        for name in names:
            module, _, leaf = name.removeprefix(prefix + ".").rpartition(".")
            value = self.skeleton.assemble(self.teacher.view, name, self.dtype).to(self.device)
            holder = original.get_submodule(module)
            if leaf in holder._parameters:
                holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                holder._buffers[leaf] = value
        return original

    def _parts(self, index: int) -> list[str]:
        """The modules of a block that are reconstructed, in turn, by their names in it; the block itself is the empty name."""
        if self.regime.window == "block":
            return [""]
        attention, mlp = self.job.outline.halves(index)
        return {"attn": [attention], "mlp": [mlp], "both": [attention, mlp]}[str(self.regime.window)]

    def _window(self, index: int, part: str, model: Whole, original: nn.Module) -> dict[str, Any]:
        """Train what there is in ``part`` of the block; returns the report's figures."""
        inputs, calls = self._aim(index, part, original)
        module, regime, losses = self.skeleton.blocks[index][1].get_submodule(part), self.regime, []
        optimizer = Optimizer(model.values, model.masks, decay=regime.decay, clip=regime.clip)
        before = self._error(module, inputs, calls)
        for step, rate in enumerate(self.method.rates(0, {})):
            loss = 0.0
            for places in _split(self.lessons.places(step, regime.batch), self.size):
                x, y = self._rows(inputs, places), self._rows(self.targets, places)
                share = (self._run(module, calls[self.size], x) - y.float()).square().mean() / regime.parts
                share.backward()
                loss += float(share.detach())
            norm = optimizer.step(rate)
            refuse_divergence(self.job, self.writer, loss, norm, f"step {step + 1} of block {index}")
            losses.append(loss)
        after = self._error(module, inputs, calls)
        return {"part": part or "block", "before": before, "after": after, "losses": curve(losses, POINTS)}

    def _aim(self, index: int, part: str, original: nn.Module) -> tuple[Activations, dict[int, BlockCall]]:
        """Write what the module ``part`` shall give, and perhaps what it is given; returns the latter, and how it is called."""
        block, regime = self.skeleton.blocks[index][1], self.regime
        source = self.dense if regime.inputs == "dense" else self.states
        assert source is not None
        giving = original if regime.inputs == "dense" else block
        sizes = {self.size, *(stop - start for start, stop in self.windows.slices())}
        calls = {size: self.windows.call(size, self.dtype).blocks[index] for size in sizes}
        inputs = source
        if part:
            assert self.inputs is not None
            inner = {
                size: self._through(giving, part, call, self._some(source, size)).call for size, call in calls.items()
            }
            passes = self._passes(index, source)
            self._fill(self.inputs, ((start, self._through(giving, part, call, x).given) for start, call, x in passes))
            inputs, calls = self.inputs, inner
        if regime.targets == "trajectory":
            assert self.dense is not None
            passes = self._passes(index, self.dense)
            made = ((start, self._through(original, part, call, x).made) for start, call, x in passes)
        else:
            module = original.get_submodule(part)
            made = ((start, self._run(module, calls[len(x)], x)) for start, _, x in self._passes(index, inputs))
        self._fill(self.targets, made)
        return inputs, calls

    # Passes.

    def _run(self, module: nn.Module, call: BlockCall, x: torch.Tensor) -> torch.Tensor:
        """The module's output [n, seq, hidden] in float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return call.run(module, x).float()

    def _through(self, block: nn.Module, part: str, call: BlockCall, x: torch.Tensor) -> Passed:
        """What happens at ``part`` of a block as ``x`` passes; the block itself is a part too."""
        if not part:
            return Passed(call, x, self._run(block, call, x))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return passing(block, block.get_submodule(part), call, x)

    def _rows(self, states: Activations, places: Sequence[int]) -> torch.Tensor:
        """Windows of ``states``, [n, seq, hidden]."""
        return torch.cat([states.read(place, place + 1) for place in places]).to(self.device)

    def _some(self, states: Activations, count: int) -> torch.Tensor:
        """So many windows, whichever: for what depends on their number alone."""
        return self._rows(states, [place % len(self.windows.tokens) for place in range(count)])

    def _passes(self, index: int, states: Activations) -> Iterator[tuple[int, BlockCall, torch.Tensor]]:
        """Batches of ``states`` with the number of their first window, and how the block is called for them."""
        for start, stop in self.windows.slices():
            call = self.windows.call(stop - start, self.dtype).blocks[index]
            yield start, call, states.read(start, stop).to(self.device)

    @torch.no_grad()
    def _fill(self, states: Activations, batches: Iterator[tuple[int, torch.Tensor]]) -> None:
        for start, x in batches:
            states.write(start, x.to(self.dtype).cpu())
        states.advance()
        if states is not self.dense:  # which is dropped only once the next is journalled
            states.forget()

    @torch.no_grad()
    def _error(self, module: nn.Module, inputs: Activations, calls: dict[int, BlockCall]) -> float:
        """||y - t||^2 / ||t||^2 of the module's outputs on the held-out windows."""
        off = whole_ = 0.0
        places = range(self.count, len(self.windows.tokens))
        for rows in _split([*places], self.size):
            given = [*rows, *rows[:1] * (self.size - len(rows))]
            x, y = self._rows(inputs, given), self._rows(self.targets, given)
            made, aim = self._run(module, calls[self.size], x)[: len(rows)], y[: len(rows)].float()
            off += float((made - aim).square().sum())
            whole_ += float(aim.square().sum())
        return off / max(whole_, 1e-30)


def _split(places: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(places), size):
        yield list(places[start : start + size])
