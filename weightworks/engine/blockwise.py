"""The loop over decoder blocks: load one, watch its inputs, let the method solve its weights, send activations on.

Peak memory is one block, the activations of all windows (on disk past the limit) and the statistics of one stage.
After every block, results and activations are journalled, so a killed run continues there and ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from weightworks.engine.job import Job
from weightworks.engine.paired import Unrounded
from weightworks.engine.tweaking import Tuner
from weightworks.report.progress import Progress
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.layout import inputs_of
from weightworks.store.writer import CheckpointWriter, check_finite
from weightworks.stream.activations import Activations
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import Address, Group, Linear, Stage, find_stages, read_linear, watch, write_linear
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, perplexity, run_block, shell, token_losses
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import Skeleton

PROOF_TOKENS = 16  # a window long enough for masks and positions to matter


class Streamed(Protocol):
    """What passes over the blocks of an unchanged model take of a job."""

    checkpoint: Checkpoint
    view: DenseView
    skeleton: Skeleton
    blocks: list[list[Linear]]
    device: torch.device
    progress: Progress
    returns_tuple: int


class Blockwise:
    """A blockwise job on its way. ``reload_blocks`` is how many leading blocks the final reload check will load.

    It follows from memory, so a resumed run may have another than the run that was killed.
    """

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        calibration: Calibration,
        probe: torch.Tensor,
        dtype: torch.dtype,
        *,
        on_disk: bool,
        statistics_bytes: int,
        reload_blocks: int,
    ) -> None:
        self.job, self.writer, self.dtype = job, writer, dtype
        self.skeleton, self.method, self.device = job.skeleton, job.method, job.device
        self.windows, self.probe = Windows(calibration.tokens), Windows(probe)
        self.statistics_bytes, self.reload_blocks = statistics_bytes, reload_blocks
        hidden = hidden_size(job)
        scratch = writer.scratch
        self.states = Activations((*calibration.tokens.shape, hidden), dtype, scratch, "calibration", on_disk=on_disk)
        self.dense = Activations((*probe.shape, hidden), torch.float32, scratch, "dense")
        self.result = Activations((*probe.shape, hidden), torch.float32, scratch, "result")
        self.streams = [(self.windows, self.states)]  # what passes the rounded model in the dtype of the passes
        self.unrounded: Unrounded | None = None
        if job.paired:
            own = Activations((*calibration.tokens.shape, hidden), dtype, scratch, "unrounded", on_disk=on_disk)
            self.unrounded = Unrounded(self.skeleton, self.windows, own)
        self.tuner: Tuner | None = None
        if job.tweak is not None:
            assert calibration.held_out is not None
            held_out = Windows(calibration.held_out)
            held = Activations((*held_out.tokens.shape, hidden), dtype, scratch, "held-out", on_disk=on_disk)
            self.streams.append((held_out, held))
            self.tuner = Tuner(job, writer, self.windows, self.states, held_out, held)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Solve all blocks; returns ``rows`` and the probe's perplexities: dense, in memory, and after ``reload_blocks``
        (None if it was not taken on the way)."""
        count, job = len(self.skeleton.blocks), self.job
        done = next(index for index in range(count + 1) if f"block {index}" not in self.writer.steps)
        if done:
            job.progress.say(f"resuming after block {done} of {count}")
        self._embed(done)
        job.progress.begin("block", count, done)
        for index in range(done, count):
            self._block(index)
        job.progress.end()
        with shell(self.skeleton, job.view, self.device):
            dense, result = (self._perplexity(states) for states in (self.dense, self.result))
        steps = [self.writer.steps[f"block {index}"] for index in range(count)]
        job.tuned = {row["tensor"] for step in steps for row in step["rows"] if "relative_change" in row}
        return {
            **({} if self.tuner is None else {"norms": [step["norms"] for step in steps]}),
            "rows": [row for step in steps for row in step["rows"]],
            "dense": dense,
            "result": result,
            "partial": result if self.reload_blocks == count else steps[self.reload_blocks - 1].get("perplexity"),
        }

    def _embed(self, done: int) -> None:
        """Prove the replay, capture the blocks' arguments, and fill or restore the activations."""
        with shell(self.skeleton, self.job.view, self.device):
            self.job.returns_tuple = prove_once(self.job, self.writer, self.probe.tokens)
            for windows in (self.probe, *(windows for windows, _ in self.streams)):
                windows.capture(self.skeleton, returns_tuple=self.job.returns_tuple, device=self.device)
            if done:
                for states in self._kept(last=done == len(self.skeleton.blocks)):
                    states.restore(done)
                return
            own = [] if self.unrounded is None else [(self.windows, self.unrounded.states)]
            for windows, states in (*self.streams, *own):
                for start, hidden in windows.embedded(self.skeleton, self.device):
                    states.write(start, hidden.to(self.dtype))
            for start, hidden in self.probe.embedded(self.skeleton, self.device):
                self.dense.write(start, hidden)
                self.result.write(start, hidden)
            for states in self._kept(last=False):
                states.advance()

    def _kept(self, *, last: bool) -> list[Activations]:
        """The hidden states that go on to the next block, or, after the ``last`` one, to the head."""
        own = [] if self.unrounded is None else [self.unrounded.states]
        return [*([] if last else [*(states for _, states in self.streams), *own]), self.dense, self.result]

    def _block(self, index: int) -> None:
        job, skeleton, names = self.job, self.skeleton, self.skeleton.names_of(index)
        skeleton.load(job.view, names, torch.float32, self.device)
        run_block(skeleton, index, self.probe, self.dense, torch.float32, self.device)
        aims = None if self.tuner is None else self.tuner.aims(index)
        skeleton.cast(names, self.dtype)
        release()
        last = index == len(skeleton.blocks) - 1
        if self.unrounded is not None:
            self.unrounded.keep(index, job.blocks[index])
        rows = self._solve(index)
        if self.unrounded is not None and not last:
            self.unrounded.advance(self.dtype, self.device)
        facts: dict[str, Any] = {"rows": rows}
        norms = job.norms[index]
        skeleton.load(
            Written(job, self.writer), [name for name in names if name not in norms], torch.float32, self.device
        )
        if self.tuner is not None and aims is not None:
            skeleton.load(job.view, norms, torch.float32, self.device)
            tuned = self.tuner.tune(index, aims)
            facts = {"rows": rows + tuned["rows"], "norms": tuned["norms"]}
            release()
        run_block(skeleton, index, self.probe, self.result, torch.float32, self.device)
        if not last:
            skeleton.cast(names, self.dtype)
            for windows, states in self.streams:
                run_block(skeleton, index, windows, states, self.dtype, self.device)
        skeleton.unload(names)
        if index + 1 == self.reload_blocks and not last:
            with shell(skeleton, job.view, self.device):
                facts["perplexity"] = self._perplexity(self.result)
        kept = self._kept(last=last)
        for states in kept:
            states.checkpoint()
        self.writer.done(f"block {index}", facts)
        for states in kept:
            states.forget()
        job.progress.step(summary(rows) + (f"; {norms_told(facts['norms'])}" if "norms" in facts else ""))

    def _solve(self, index: int) -> list[dict[str, Any]]:
        """All linears of the loaded block: stage by stage, later ones seeing the new weights of earlier ones, or together;
        one by one where the method needs nothing but the weight."""
        if not hasattr(self.method, "solve"):
            return [row for linear in self.job.blocks[index] for row in self._group(index, [linear], None)]
        first = min(self.windows.batch, self.windows.tokens.shape[0])
        call = self.windows.call(first, self.dtype).blocks[index]
        hidden = self.states.read(0, first).to(self.device)
        stages, never = find_stages(self.skeleton, index, call, hidden, self.job.blocks[index])
        if self.job.together:
            stages = [Stage(tuple(group for stage in stages for group in stage.groups))]
        rows = []
        for groups in bounded(stages, self.statistics_bytes, self.job.held):
            statistics = {group.leader: self.method.watch(group.columns, self.device) for group in groups}
            self._watch(index, statistics)
            release()
            for group in groups:
                rows += self._group(index, group.linears, statistics.pop(group.leader))
        for linear in never:
            rows += self._group(index, [linear], self.method.watch(linear.shape[1], self.device))
        return rows

    def _watch(self, index: int, statistics: dict[Address, Any]) -> None:
        """Let ``statistics`` see the inputs of the products they are for, of all windows."""
        watchers = {leader: kept.add for leader, kept in statistics.items()}
        for start, stop in self.windows.slices():
            call = self.windows.call(stop - start, self.dtype).blocks[index]
            hidden = self.states.read(start, stop).to(self.device)
            if self.unrounded is None:
                watch(self.skeleton.blocks[index][1], call, hidden, watchers)
            else:
                self.unrounded.watch(call, hidden, start, stop, statistics)

    def _group(self, index: int, linears: Sequence[Linear], statistics: Any) -> list[dict[str, Any]]:
        targets = [self.job.target_of(linear) for linear in linears]
        weights = [read_linear(self.job.view, linear).to(self.device) for linear in linears]
        if hasattr(self.method, "solve"):
            solutions = self.method.solve(weights, statistics, targets)
        else:
            solutions = [self.method.apply(weight, target) for weight, target in zip(weights, targets, strict=True)]
        rows = []
        for linear, solution in zip(linears, solutions, strict=True):
            for name, tensor in self.job.stored(linear, solution).items():
                self.writer.put(name, tensor)
            if not self.job.together:  # the whole block is read back before it runs
                write_linear(self.skeleton, index, linear, solution.dense())
            rows.append(self.job.row(linear, solution))
        release()
        return rows

    def _perplexity(self, states: Activations) -> float:
        return perplexity(
            token_losses(self.skeleton, self.probe, states, returns_tuple=self.job.returns_tuple, device=self.device)
        )


def prove_once(job: Streamed, writer: CheckpointWriter, probe: torch.Tensor) -> int:
    """Prove the replay on the first windows of ``probe`` unless the journal says it was; returns ``returns_tuple``.

    The parts outside the blocks must be loaded. NaN is found here, wherever it is.
    """
    if "proof" not in writer.steps:
        check_outside(job)
        returns_tuple = prove(job.skeleton, job.view, probe[:2, :PROOF_TOKENS].to(job.device))
        writer.done("proof", {"returns_tuple": returns_tuple})
    return int(writer.steps["proof"]["returns_tuple"])


def check_outside(job: Streamed) -> None:
    """Refuse NaN in tensors outside the blocks and in those the model has no place for; the proof reads the others."""
    blocks = (name for index in range(len(job.skeleton.blocks)) for name in job.skeleton.names_of(index))
    inside = {piece.tensor for name in blocks for piece in job.skeleton.pieces[name]}
    for name in job.view.names:
        if name not in inside:
            check_finite(name, job.view.read(name))


def prove_first(job: Job, writer: CheckpointWriter, probe: torch.Tensor) -> int:
    """:func:`prove_once` for an engine that does not need the parts outside the blocks itself."""
    with shell(job.skeleton, job.view, job.device):
        return prove_once(job, writer, probe)


class Written:
    """Dense weights as the staging folder has them so far, the input's elsewhere."""

    def __init__(self, job: Job, writer: CheckpointWriter) -> None:
        self.job, self.writer = job, writer

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self.job.changed:
            stored = self.job.view.read(name)  # as it is copied: a sum with an adapter is rounded first
            return stored if dtype is None else stored.to(dtype)
        if name not in self.job.linears or self.job.format is None:
            return self.writer.read(name, dtype)
        linear = self.job.linears[name]
        weight = self.job.format.load(self.writer, linear.base, self.job.scheme_of(linear)).dequantize()
        return weight if dtype is None else weight.to(dtype)

    def inputs(self, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What is done to inputs [..., in] before weight ``name`` multiplies them; None if nothing."""
        if not self.is_packed(name):
            return None
        linear = self.job.linears[name]
        return inputs_of(self.writer, linear.base, self.job.scheme_of(linear))

    def is_packed(self, name: str) -> bool:
        """Whether ``read`` decodes the tensor."""
        return name in self.job.linears and self.job.format is not None


def bounded(stages: Sequence[Stage], limit: int, size_of: Callable[[int], int]) -> Iterator[list[Group]]:
    """The groups of each stage, in several rounds where their statistics, ``size_of`` bytes each, would exceed ``limit``."""
    for stage in stages:
        round_: list[Group] = []
        held = 0
        for group in stage.groups:
            size = size_of(group.columns)
            if round_ and held + size > limit:
                yield round_
                round_, held = [], 0
            round_.append(group)
            held += size
        yield round_


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A block in a few words: worst relative error, and fallbacks if any."""
    if not rows:
        return "nothing to do"
    what, key = ("output", "relative_error") if "relative_error" in rows[0] else ("weight", "relative_weight_error")
    worst = max(rows, key=lambda row: row.get(key, 0.0))
    text = f"worst {what} error {worst.get(key, 0.0):.2%} ({worst['tensor'].removesuffix('.weight').split('.')[-1]})"
    count = sum(1 for row in rows if row.get("fallbacks"))
    return text + (f", {count} with fallbacks" if count else "")


def norms_told(facts: dict[str, Any]) -> str:
    """What became of a block's norms in a few words."""
    figures = (f"{name} {facts['before'][name]:.4g} -> {facts['after'][name]:.4g}" for name in facts["before"])
    return f"norms {'tuned' if facts['kept'] else 'left'}, held-out {', '.join(figures)}"


def hidden_size(job: Streamed) -> int:
    """Width of the residual stream."""
    config = job.skeleton.model.config.get_text_config()
    return int(config.hidden_size)
