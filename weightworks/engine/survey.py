"""Surveys: passes over the unchanged model, made before a method that shares something out over it changes any weight.

A survey that looks at inputs walks the blocks as the blockwise engine does and is journalled block by block; one that
needs only weights is a single pass over the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from weightworks.engine.blockwise import hidden_size, prove_once
from weightworks.engine.job import Job
from weightworks.stage.protocols import Survey
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import Linear, find_stages, read_linear, watch
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell


class Weights(Sequence[torch.Tensor]):
    """Weights float32 [out, in], each read when it is asked for."""

    def __init__(self, job: Job, linears: Sequence[Linear]) -> None:
        self.job, self.linears = job, linears

    def __len__(self) -> int:
        return len(self.linears)

    def __getitem__(self, place: Any) -> Any:
        return read_linear(self.job.view, self.linears[place]).to(self.job.device)


@torch.no_grad()
def run_surveys(
    job: Job,
    writer: CheckpointWriter,
    calibration: Calibration | None,
    probe: torch.Tensor,
    dtype: torch.dtype,
    *,
    on_disk: bool,
) -> None:
    """Make the surveys the job's method asks for, and give the job what they found."""
    surveys: Sequence[Survey] = job.method.surveys() if hasattr(job.method, "surveys") else ()
    found: Any = None
    for number, survey in enumerate(surveys):
        if f"survey {number}" not in writer.steps:
            if survey.watch is None:
                figures = list(_tensors(job, survey, found))
            else:
                assert calibration is not None
                figures = _Blocks(job, writer, survey, number, calibration, probe, dtype, on_disk=on_disk).run(found)
            writer.done(f"survey {number}", {"found": survey.conclude(figures, found)})
        found = writer.steps[f"survey {number}"]["found"]
    job.keeps = found or {}


def _tensors(job: Job, survey: Survey, found: Any) -> Iterator[Any]:
    """The figures of every linear by itself, in the order of the model."""
    job.progress.begin("tensor looked at", len(job.linears), 0, every=5.0)
    for linear in job.linears.values():
        yield survey.look(Weights(job, [linear]), [None], [job.target_of(linear)], found)
        job.progress.step(linear.tensor)
    job.progress.end()


class _Blocks:
    """One survey of inputs on its way over the blocks."""

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        survey: Survey,
        number: int,
        calibration: Calibration,
        probe: torch.Tensor,
        dtype: torch.dtype,
        *,
        on_disk: bool,
    ) -> None:
        self.job, self.writer, self.survey, self.name, self.dtype = job, writer, survey, f"survey {number}", dtype
        self.windows, self.probe = Windows(calibration.tokens), probe
        shape = (*calibration.tokens.shape, hidden_size(job))
        self.states = Activations(shape, dtype, writer.scratch, f"survey{number}", on_disk=on_disk)

    def run(self, found: Any) -> list[Any]:
        """The figures of every block."""
        job, skeleton = self.job, self.job.skeleton
        count = len(skeleton.blocks)
        done = next(index for index in range(count + 1) if self._step(index) not in self.writer.steps)
        if done < count:
            self._embed(done)
        job.progress.begin("block looked at", count, done)
        for index in range(done, count):
            names = skeleton.names_of(index)
            skeleton.load(job.view, names, self.dtype, job.device)
            figures = self._look(index, found)
            run_block(skeleton, index, self.windows, self.states, self.dtype, job.device)
            skeleton.unload(names)
            release()
            self.states.checkpoint()
            self.writer.done(self._step(index), {"figures": figures})
            self.states.forget()
            job.progress.step(self._step(index))
        job.progress.end()
        self.states.advance()
        self.states.forget()  # the last ones too
        return [self.writer.steps[self._step(index)]["figures"] for index in range(count)]

    def _step(self, index: int) -> str:
        return f"{self.name}, block {index}"

    def _embed(self, done: int) -> None:
        job = self.job
        with shell(job.skeleton, job.view, job.device):
            job.returns_tuple = prove_once(job, self.writer, self.probe)
            self.windows.capture(job.skeleton, returns_tuple=job.returns_tuple, device=job.device)
            if done:
                self.states.restore(done)
                return
            for start, hidden in self.windows.embedded(job.skeleton, job.device):
                self.states.write(start, hidden.to(self.dtype))
            self.states.advance()

    def _look(self, index: int, found: Any) -> Any:
        """The figures of the loaded block: all its inputs are watched in one pass, for nothing is changed."""
        job, make = self.job, self.survey.watch
        assert make is not None
        first = min(self.windows.batch, self.windows.tokens.shape[0])
        call = self.windows.call(first, self.dtype).blocks[index]
        hidden = self.states.read(0, first).to(job.device)
        stages, never = find_stages(job.skeleton, index, call, hidden, job.blocks[index])
        groups = [group for stage in stages for group in stage.groups]
        statistics = {group.leader: make(group.columns, job.device) for group in groups}
        watchers = {leader: kept.add for leader, kept in statistics.items()}
        for start, stop in self.windows.slices():
            call = self.windows.call(stop - start, self.dtype).blocks[index]
            watch(job.skeleton.blocks[index][1], call, self.states.read(start, stop).to(job.device), watchers)
        of = {linear.tensor: statistics[group.leader] for group in groups for linear in group.linears}
        of |= {linear.tensor: make(linear.shape[1], job.device) for linear in never}
        linears = job.blocks[index]
        seen = [of[linear.tensor] for linear in linears]
        return self.survey.look(Weights(job, linears), seen, [job.target_of(linear) for linear in linears], found)
