"""REPAIR for merges: rows of merged layers scaled so that their outputs vary as much as those of the models do.

Averaged weights may cancel, and what a layer puts out then varies less than in any of the models (Jordan et al. 2022,
REPAIR, arXiv:2211.08403, section 3). For unit i of a layer, with sigma its outputs' standard deviation and mu their mean on
some text, the target is sigma* = sum_k w_k sigma_k and mu* = sum_k w_k mu_k over the models k, and the merged weight's row is
multiplied by sigma* / sigma, layer after layer, each measured with those before it corrected. A bias becomes
mu* + sigma* / sigma (b - mu), so that means are met too; a layer without one is only scaled (RESCALE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.engine.mergejob import MergeJob
from weightworks.engine.merging import Correction, Merging
from weightworks.engine.mixture import MergedView
from weightworks.store.dense import DenseView
from weightworks.store.permuted import PermutedView
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.linears import Linear, Stage, block_linears, find_stages, watch, write_linear
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import DenseReader, build, place
from weightworks.stream.symmetry import Symmetry, find_symmetry

LEAST, MOST = 0.5, 2.0  # of a factor: beyond it the layer is broken otherwise
SILENT = 1e-6  # a standard deviation below which a unit says nothing, and is left alone
PROOF = 16  # tokens that the replay is proven on


@dataclass
class Moments:
    """Sums of a layer's outputs over tokens: float64 [out], and of their squares; ``count`` tokens."""

    total: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    @classmethod
    def none(cls, rows: int) -> Moments:
        return cls(torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64))

    def add(self, outputs: torch.Tensor) -> None:
        """Take in ``outputs`` [tokens, out]."""
        double = outputs.double()
        self.total += double.sum(0).cpu()
        self.squares += double.square().sum(0).cpu()
        self.count += outputs.shape[0]

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> torch.Tensor:
        return (self.squares / max(self.count, 1) - self.mean.square()).clamp(min=0)


@dataclass(frozen=True)
class Target:
    """What a layer's outputs should have: mean and standard deviation, float64 [out]."""

    mean: torch.Tensor
    deviation: torch.Tensor


def target_of(moments: Sequence[Moments], weights: Sequence[float], tie: int) -> Target:
    """The weighted mean of the models' means and standard deviations; units of ``tie`` rows have one deviation."""
    shares = [weight / sum(weights) for weight in weights]
    mean = sum(share * one.mean for share, one in zip(shares, moments, strict=True))
    deviation = sum(share * tied(one.variance, tie).sqrt() for share, one in zip(shares, moments, strict=True))
    return Target(torch.as_tensor(mean), torch.as_tensor(deviation))


def tied(variance: torch.Tensor, tie: int) -> torch.Tensor:
    """``variance`` [out], the mean of each unit of ``tie`` rows in all of its rows."""
    return variance if tie == 1 else variance.view(-1, tie).mean(1).repeat_interleave(tie)


def factor_of(target: Target, moments: Moments, tie: int) -> torch.Tensor:
    """sigma* / sigma, float64 [out]; 1 where a unit is silent, in the merge or in the models."""
    deviation = tied(moments.variance, tie).sqrt()
    speaks = (deviation > SILENT) & (target.deviation > SILENT)
    ratio = (target.deviation / deviation.clamp(min=SILENT)).clamp(LEAST, MOST)
    return torch.where(speaks, ratio, torch.ones_like(ratio))


def ties_of(symmetry: Symmetry) -> dict[str, int]:
    """Rows that must share a factor, by tensor: those of a head, whose coordinates rotary embeddings tie together."""
    found = {}
    for family in symmetry.families:
        for axis in family.axes:
            if axis.axis == 0:
                sizes = {size for _, size in axis.segments}
                found[axis.tensor] = min(sizes)  # segments of one tensor have heads of one size
    return found


class Renormaliser:
    """Finds the corrections of a merge on ``tokens`` int64 [n, seq]. The models and the merge pass their blocks side by side:
    in memory are one block and everybody's hidden states."""

    def __init__(self, job: MergeJob, writer: CheckpointWriter, merging: Merging, tokens: torch.Tensor) -> None:
        self.job, self.writer, self.corrections = job, writer, merging.corrections
        trust = job.settings.trust_remote_code
        self.skeleton = build(DenseView(job.checkpoint), trust_remote_code=trust)
        self.symmetry = find_symmetry(DenseView(job.checkpoint), job.reference.reader, trust_remote_code=trust)
        self.ties = ties_of(self.symmetry)
        self.merged = MergedView(job, make=merging.made)
        self.models: list[DenseReader] = [PermutedView(job.models[number].reader, {}) for number in job.members]
        weights = list(getattr(job.options, "weights", []))
        self.weights = weights if len(weights) == len(self.models) else [1.0] * len(self.models)
        self.windows = Windows(tokens)
        hidden = int(self.skeleton.model.config.get_text_config().hidden_size)
        self.states = [
            Activations((*tokens.shape, hidden), torch.float32, writer.scratch, f"renormalise{number}")
            for number in range(len(self.models) + 1)
        ]

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Find the corrections, block by block, each a step of the journal; they are the merge's then. Returns what
        provenance says."""
        job, skeleton = self.job, self.skeleton
        job.progress.begin("block renormalised", len(skeleton.blocks), 0)
        self._embed()
        for index in range(len(skeleton.blocks)):
            step = f"renormalised block {index}"
            if step in self.writer.steps:  # states are not kept: they are made again, what they showed is known
                for reader, states in zip(self.models, self.states[1:], strict=True):
                    self._pass(index, reader, states)
            else:
                found = self._correct(index, self._targets(index))
                self.writer.done(step, {name: correction.facts() for name, correction in found.items()})
            known = self.writer.steps[step]
            self.corrections.update((name, Correction.of(facts)) for name, facts in known.items())
            self._pass(index, Corrected(self.merged, self.corrections), self.states[0])
            job.progress.step(step)
        job.progress.end()
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """The least, the mean and the greatest factor of every tensor, and what was left as it is."""
        rows = {}
        for name, correction in self.corrections.items():
            scale = correction.scale
            rows[name] = {"least": float(scale.min()), "mean": float(scale.mean()), "greatest": float(scale.max())}
        return {"windows": list(self.windows.tokens.shape), "factors": rows, "left": dict(self.symmetry.unknown)}

    def _embed(self) -> None:
        """Everybody's hidden states before the first block; the replay proven on the first model."""
        device, skeleton = self.job.device, self.skeleton
        for number, (reader, states) in enumerate(zip([self.models[0], *self.models], self.states, strict=True)):
            source = self.merged if number == 0 else reader
            with shell(skeleton, source, device):
                if number == 0:
                    probe = self.windows.tokens[:2, :PROOF].to(device)
                    self.returns_tuple = prove(skeleton, source, probe)
                    self.windows.capture(skeleton, returns_tuple=self.returns_tuple, device=device)
                for start, hidden in self.windows.embedded(skeleton, device):
                    states.write(start, hidden)
                states.advance()

    def _pass(self, index: int, reader: DenseReader, states: Activations) -> None:
        names = self.skeleton.names_of(index)
        self.skeleton.load(reader, names, torch.float32, self.job.device)
        run_block(self.skeleton, index, self.windows, states, torch.float32, self.job.device)
        self.skeleton.unload(names)
        release()

    def _linears(self, index: int) -> list[Linear]:
        """The linears of a block that are scaled: not those of parts that could not be understood."""
        dtypes = {spec.name: spec.dtype for spec in self.job.specs}
        unknown = tuple(f"{name}." for name in self.symmetry.unknown)
        linears = block_linears(self.skeleton, index, dtypes)[0]
        return [linear for linear in linears if not f"{linear.module}.".startswith(unknown)] if unknown else linears

    def _stages(self, index: int, states: Activations) -> list[Stage]:
        """The linears of the loaded block in the order of the forward pass."""
        first = min(self.windows.batch, self.windows.tokens.shape[0])
        call = self.windows.call(first, torch.float32).blocks[index]
        hidden = states.read(0, first).to(self.job.device)
        return find_stages(self.skeleton, index, call, hidden, self._linears(index))[0]

    def _measure(self, index: int, stages: Sequence[Stage], states: Activations) -> dict[str, Moments]:
        """Moments of the outputs of all linears of ``stages`` of the loaded block, by tensor."""
        found: dict[str, Moments] = {}
        watchers = {}
        for group in (group for stage in stages for group in stage.groups):
            layers = []
            for linear in group.linears:
                found[linear.tensor] = Moments.none(linear.shape[0])
                layers.append((found[linear.tensor], self._weight(index, linear), self._bias(linear)))
            watchers[group.leader] = _adder(layers)
        for start, stop in self.windows.slices():
            call = self.windows.call(stop - start, torch.float32).blocks[index]
            watch(self.skeleton.blocks[index][1], call, states.read(start, stop).to(self.job.device), watchers)
        return found

    def _targets(self, index: int) -> dict[str, Target]:
        """What the outputs of a block's linears should be like; the models' states pass the block."""
        names, seen = self.skeleton.names_of(index), []
        for reader, states in zip(self.models, self.states[1:], strict=True):
            self.skeleton.load(reader, names, torch.float32, self.job.device)
            seen.append(self._measure(index, self._stages(index, states), states))
            run_block(self.skeleton, index, self.windows, states, torch.float32, self.job.device)
            self.skeleton.unload(names)
            release()
        shared = [tensor for tensor in seen[0] if all(tensor in one for one in seen)]
        return {
            tensor: target_of([one[tensor] for one in seen], self.weights, self.ties.get(tensor, 1))
            for tensor in shared
        }

    def _correct(self, index: int, targets: Mapping[str, Target]) -> dict[str, Correction]:
        """The corrections of a block, by tensor: stage by stage, each measured with those before it made."""
        names, states, device = self.skeleton.names_of(index), self.states[0], self.job.device
        self.skeleton.load(self.merged, names, torch.float32, device)
        found: dict[str, Correction] = {}
        for stage in self._stages(index, states):
            measured = self._measure(index, [stage], states)
            for linear in (linear for group in stage.groups for linear in group.linears if linear.tensor in targets):
                tie, target, moments = self.ties.get(linear.tensor, 1), targets[linear.tensor], measured[linear.tensor]
                factor = factor_of(target, moments, tie)
                scale = factor.float()
                found[linear.tensor] = Correction(scale, None, linear.transposed)
                write_linear(self.skeleton, index, linear, self._weight(index, linear) * scale.to(device)[:, None])
                if (bias := self._bias(linear)) is not None:
                    shift = target.mean - factor * moments.mean if tie == 1 else torch.zeros_like(factor)
                    name = self.skeleton.pieces[f"{linear.module}.bias"][0].tensor
                    found[name] = Correction(scale, shift.float())
                    bias.copy_(found[name].made(bias))
        self.skeleton.unload(names)
        return found

    def _weight(self, index: int, linear: Linear) -> torch.Tensor:
        """The weight [out, in] in the loaded block."""
        parameter = self.skeleton.get(f"{self.skeleton.blocks[index][0]}.{linear.parameter}")
        weight = place(parameter.data, linear.piece)
        return weight.T if linear.transposed else weight

    def _bias(self, linear: Linear) -> torch.Tensor | None:
        """The bias [out] in the loaded block, if the layer has one of its own."""
        pieces = self.skeleton.pieces.get(f"{linear.module}.bias", [])
        if len(pieces) != 1 or linear.piece.expert is not None or linear.piece.parts > 1:
            return None
        return self.skeleton.get(f"{linear.module}.bias").data


def _adder(layers: Sequence[tuple[Moments, torch.Tensor, torch.Tensor | None]]) -> Any:
    def add(inputs: torch.Tensor) -> None:
        for moments, weight, bias in layers:
            moments.add(torch.nn.functional.linear(inputs, weight, bias))

    return add


class Corrected(DenseView):
    """``view`` with ``corrections`` made."""

    def __init__(self, view: MergedView, corrections: Mapping[str, Correction]) -> None:
        super().__init__(view.checkpoint)
        self.view, self.corrections = view, corrections

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        made = self.view.read(name, dtype)
        return self.corrections[name].made(made) if name in self.corrections else made
