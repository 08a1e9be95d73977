"""Norms of a block tuned once its weights are rounded, and kept only where windows that were held out say so.

The aim is what the dense block puts out on the very inputs that the rounded one has: those the blocks before, rounded and
tuned, have made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightworks.engine.job import Job
from weightworks.stage.tweaking import Descent, Tweak
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.gram import Gram
from weightworks.stream.linears import Group, block_linears, find_stages, held_weight, read_linear, watch
from weightworks.stream.norms import form_of, makers, scaled
from weightworks.stream.passes import Windows
from weightworks.stream.replay import BlockCall

if TYPE_CHECKING:
    from weightworks.stage.tweaking import Solve


@dataclass(frozen=True)
class Aims:
    """Of the dense block by batch: what Adam is to follow on calibration windows, and the outputs of those held out; and for
    the closed form the linears that read a norm, by its name in the block."""

    seen: list[torch.Tensor]
    held_out: list[torch.Tensor]
    readers: Mapping[str, Group]


class Tuner:
    """Tunes the norms of the block that is loaded, in float32. ``states`` are the inputs of ``windows``, ``held`` of those
    that are held out."""

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        windows: Windows,
        states: Activations,
        held_out: Windows,
        held: Activations,
    ) -> None:
        assert job.tweak is not None
        self.job, self.writer, self.skeleton = job, writer, job.skeleton
        self.tweak: Tweak = job.tweak
        self.windows, self.states, self.held_out, self.held = windows, states, held_out, held

    @torch.no_grad()
    def aims(self, index: int) -> Aims:
        """What the block, loaded dense, puts out."""
        descent, seen = self.tweak.descent, []
        if descent is not None:
            seen = [descent.view(output) for output in self._outputs(index, self.windows, self.states)]
        readers = {} if self.tweak.solve is None else self._readers(index)
        return Aims(seen, list(self._outputs(index, self.held_out, self.held)), readers)

    def tune(self, index: int, aims: Aims) -> dict[str, Any]:
        """Tune, decide and write the norms of the rounded block; they are left in it as they are stored.

        Returns ``rows`` of those that changed, and of the block ``norms``: the measures on what is held out ``before`` and
        ``after``, and whether the tuned ones were ``kept``.
        """
        names = self.job.norms[index]
        before = {name: self.skeleton.get(name).clone() for name in names}
        old = self._measured(index, aims)
        if self.tweak.descent is not None:
            self._descend(index, aims, self.tweak.descent)
        if self.tweak.solve is not None:
            self._solve(index, aims, self.tweak.solve)
        tuned = {name: self._rounded(name) for name in names}
        self._put(tuned)
        new = self._measured(index, aims)
        kept = all(new[name] < old[name] for name in new)  # false for NaN too
        if not kept:
            self._put(before)
        rows = []
        for name in names:
            self.writer.put(self._tensor(name), self.skeleton.get(name).to(self._stored(name)))
            change = float((tuned[name] - before[name]).norm() / before[name].norm().clamp(min=1e-30))
            if kept and change:
                rows.append(self._row(name, change))
        largest = max((row["relative_change"] for row in rows), default=0.0)
        facts = {"block": index, "kept": kept, "before": old, "after": new, "largest_change": largest}
        return {"rows": rows, "norms": facts}

    # By the distribution of outputs.

    @torch.enable_grad()
    def _descend(self, index: int, aims: Aims, descent: Descent) -> None:
        """One pass of Adam over the calibration windows."""
        parameters = [self.skeleton.parameter(name).requires_grad_() for name in self.job.norms[index]]
        adam = torch.optim.Adam(parameters, lr=descent.rate(index, len(self.skeleton.blocks)), foreach=False)
        for output, aim in zip(self._outputs(index, self.windows, self.states), aims.seen, strict=True):
            adam.zero_grad()
            loss = descent.loss(descent.view(output), aim)
            if not torch.isfinite(loss):
                break  # what is there now is judged on the windows held out
            loss.backward()
            adam.step()
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)

    # By the outputs of the linears that read a norm.

    def _readers(self, index: int) -> dict[str, Group]:
        """The linears of the block, loaded dense, that read what a norm puts out, in the order of the forward pass."""
        dtypes = {name: info.dtype for name, info in self.job.checkpoint.tensors.items()}
        linears, _ = block_linears(self.skeleton, index, dtypes)  # those left as they are read it too
        call, x = next(self._batches(index, self.windows, self.states))
        stages, _ = find_stages(self.skeleton, index, call, x, linears)
        groups = {group.leader: group for stage in stages for group in stage.groups}
        made = makers(self._module(index), call, x, list(groups.values()))
        prefix = self.skeleton.blocks[index][0]
        tuned = {name.removeprefix(prefix + ".").rpartition(".")[0] for name in self.job.norms[index]}
        return {name: groups[leader] for leader, name in made.items() if name in tuned}

    @torch.no_grad()
    def _solve(self, index: int, aims: Aims, solve: Solve) -> None:
        """Factors of one norm after the other, each on the inputs that those before it make."""
        job, block = self.job, self._module(index)
        for name, group in aims.readers.items():
            gram = Gram(group.columns, job.device)
            for call, x in self._batches(index, self.windows, self.states):
                watch(block, call, x, {group.leader: gram.add})
            pairs = [
                (read_linear(job.view, linear).to(job.device), held_weight(self.skeleton, index, linear))
                for linear in group.linears
            ]
            scale(block.get_submodule(name), solve(gram.mean(), pairs))

    # What both need.

    @torch.no_grad()
    def _measured(self, index: int, aims: Aims) -> dict[str, float]:
        """The measures of the loaded block, their means over the batches held out."""
        sums = dict.fromkeys(self.tweak.measures, 0.0)
        for output, aim in zip(self._outputs(index, self.held_out, self.held), aims.held_out, strict=True):
            for name, measure in self.tweak.measures.items():
                sums[name] += float(measure(output, aim)) / len(aims.held_out)
        return sums

    def _outputs(self, index: int, windows: Windows, states: Activations) -> Iterator[torch.Tensor]:
        """What the loaded block puts out, by batch [n, seq, hidden]; with gradients where they are on."""
        for call, x in self._batches(index, windows, states):
            yield call.run(self._module(index), x)

    def _batches(self, index: int, windows: Windows, states: Activations) -> Iterator[tuple[BlockCall, torch.Tensor]]:
        """Inputs [n, seq, hidden] of the block in float32, and how it is called for them."""
        for start, stop in windows.slices():
            call = windows.call(stop - start, torch.float32).blocks[index]
            yield call, states.read(start, stop).to(self.job.device, torch.float32)

    def _module(self, index: int) -> nn.Module:
        return self.skeleton.blocks[index][1]

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.skeleton.assign(name, value)

    def _rounded(self, name: str) -> torch.Tensor:
        """A parameter in float32 with the values that it is stored with."""
        return self.skeleton.get(name).detach().to(self._stored(name)).float()

    def _tensor(self, name: str) -> str:
        return self.skeleton.pieces[name][0].tensor

    def _stored(self, name: str) -> torch.dtype:
        return self.job.checkpoint.info(self._tensor(name)).dtype

    def _row(self, name: str, change: float) -> dict[str, Any]:
        """The report's line on a norm that changed: by which share of its own norm."""
        info = self.job.checkpoint.info(self._tensor(name))
        row = {"tensor": self._tensor(name), "shape": list(info.shape), "method": "norm tweaking"}
        return {**row, "bytes_in": info.nbytes, "bytes_out": info.nbytes, "relative_change": change}


@torch.no_grad()
def scale(norm: nn.Module, factors: torch.Tensor) -> None:
    """Multiply what ``norm`` puts out by ``factors`` [hidden], through its gains and its bias."""
    values = dict(norm.named_parameters(recurse=False))
    values["weight"].data.copy_(scaled(values["weight"].data, 1 / factors, form_of(norm)))
    if "bias" in values:
        values["bias"].data.mul_(factors)
