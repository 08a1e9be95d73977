"""A walk over the blocks of the unchanged model: windows pass them one by one, what is seen of each is journalled.

Peak memory is one block, the activations of all windows (on disk if told) and the statistics of one round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from weightworks.engine.blockwise import Streamed, bounded, hidden_size, prove_once
from weightworks.stage.reducing import Passing
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.linears import Address, Group, Linear, Stage, find_stages, watch
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell

Make = Callable[[int, torch.device], Any]  # fresh statistics of inputs, given their width


class Walk:
    """A walk under ``name`` in the ``writer``'s journal. ``tokens`` int64 [n, seq] are the windows, ``probe`` those on which
    the replay is proven."""

    def __init__(
        self,
        job: Streamed,
        writer: CheckpointWriter,
        name: str,
        tokens: torch.Tensor,
        probe: torch.Tensor,
        dtype: torch.dtype,
        *,
        on_disk: bool,
    ) -> None:
        self.job, self.writer, self.name, self.dtype, self.probe = job, writer, name, dtype, probe
        self.windows = Windows(tokens)
        shape = (*tokens.shape, hidden_size(job))
        self.states = Activations(shape, dtype, writer.scratch, name.replace(" ", ""), on_disk=on_disk)

    def run(self, look: Callable[[int], Any], passing: Callable[[int], Passing] | None = None) -> list[Any]:
        """What ``look(index)`` sees of every block while it is loaded and its inputs are there: JSON-compatible data.

        It may change the weights of the loaded block. With ``passing``, figures of what goes into each block and comes
        out stand in for what ``look`` gives.
        """
        job, skeleton = self.job, self.job.skeleton
        count = len(skeleton.blocks)
        done = next(index for index in range(count + 1) if self._step(index) not in self.writer.steps)
        if done < count:
            self._embed(done)
        job.progress.begin("block looked at", count, done)
        for index in range(done, count):
            names = skeleton.names_of(index)
            skeleton.load(job.view, names, self.dtype, job.device)
            figures = look(index)
            pairs = passing(index) if passing is not None else None
            seen = pairs.add if pairs is not None else None
            run_block(skeleton, index, self.windows, self.states, self.dtype, job.device, seen)
            figures = pairs.figure() if pairs is not None else figures
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

    def inputs(self, index: int, make: Make, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Statistics of the inputs of each linear of the loaded block, by tensor; those that read the same share them.

        Nothing is changed, so all are watched in one pass, or in rounds of at most ``limit`` bytes (4 in^2 an input).
        """
        stages, never = self.stages(index, self.job.blocks[index])
        together = Stage(tuple(group for stage in stages for group in stage.groups))
        rounds = bounded([together], limit, _matrix_bytes) if limit is not None else [list(together.groups)]
        for groups in rounds:
            statistics = self.watched(index, groups, make)
            yield {linear.tensor: statistics[group.leader] for group in groups for linear in group.linears}
        if never:
            yield {linear.tensor: make(linear.shape[1], self.job.device) for linear in never}

    def stages(self, index: int, linears: Sequence[Linear]) -> tuple[list[Stage], list[Linear]]:
        """The stages that ``linears`` of the loaded block form, and those of them it never multiplies with."""
        first = min(self.windows.batch, self.windows.tokens.shape[0])
        call = self.windows.call(first, self.dtype).blocks[index]
        hidden = self.states.read(0, first).to(self.job.device)
        return find_stages(self.job.skeleton, index, call, hidden, linears)

    def watched(self, index: int, groups: Sequence[Group], make: Make) -> dict[Address, Any]:
        """Statistics of the inputs of ``groups`` of the loaded block over all windows, by leader."""
        device = self.job.device
        statistics = {group.leader: make(group.columns, device) for group in groups}
        watchers = {leader: kept.add for leader, kept in statistics.items()}
        for start, stop in self.windows.slices():
            call = self.windows.call(stop - start, self.dtype).blocks[index]
            watch(self.job.skeleton.blocks[index][1], call, self.states.read(start, stop).to(device), watchers)
        return statistics


def _matrix_bytes(columns: int) -> int:
    return 4 * columns**2
