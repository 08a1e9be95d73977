"""REPAIR for merges: rows of merged layers scaled so that their outputs vary as much as those of the models do.

Averaged weights may cancel, and what a layer puts out then varies less than in any of the models (Jordan et al. 2022,
REPAIR, arXiv:2211.08403, section 3). For unit i of a layer, with sigma its outputs' standard deviation and mu their mean on
some text, the target is sigma* = sum_k w_k sigma_k and mu* = sum_k w_k mu_k over the models k, and the merged weight's row is
multiplied by sigma* / sigma, layer after layer, each measured with those before it corrected. A bias becomes
mu* + sigma* / sigma (b - mu), so that means are met too; a layer without one is only scaled (RESCALE).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightworks.engine.mergejob import MergeJob
from weightworks.engine.merging import Correction, Merging
from weightworks.engine.mixture import MergedView
from weightworks.engine.moments import Moments, Target, factor_of, off, target_of
from weightworks.report.progress import Progress
from weightworks.store.dense import DenseView
from weightworks.store.permuted import PermutedView
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.linears import Linear, Stage, block_linears, find_stages, watch, write_linear
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell
from weightworks.stream.replay import passing, prove
from weightworks.stream.skeleton import DenseReader, Skeleton, build, place
from weightworks.stream.symmetry import Symmetry, find_symmetry

PROOF = 16  # tokens that the replay is proven on


def ties_of(symmetry: Symmetry) -> dict[str, int]:
    """Rows that must share a factor, by tensor: those of a head, whose coordinates rotary embeddings tie together."""
    found = {}
    for family in symmetry.families:
        for axis in family.axes:
            if axis.axis == 0:
                sizes = {size for _, size in axis.segments}
                found[axis.tensor] = min(sizes)  # segments of one tensor have heads of one size
    return found


@dataclass(frozen=True)
class Renormalised:
    """What is renormalised: the model ``made``, read through its structure, and the ``models`` whose outputs are the target,
    by their ``weights``. ``dtypes`` are those of its stored tensors, ``symmetry`` tells which rows share a factor. Of its layers
    ``only`` those are corrected, None for all; with ``norms`` the gains of normalisation too, channel by channel."""

    skeleton: Skeleton
    symmetry: Symmetry
    dtypes: Mapping[str, torch.dtype]
    made: DenseView
    models: Sequence[DenseReader]
    weights: Sequence[float]
    device: torch.device
    only: Collection[str] | None = None
    norms: bool = False

    @classmethod
    def of_merge(cls, job: MergeJob, merging: Merging) -> Renormalised:
        """The merge that ``merging`` makes, and its models."""
        trust = job.settings.trust_remote_code
        view, models = DenseView(job.checkpoint), [PermutedView(job.models[k].reader, {}) for k in job.members]
        weights = list(getattr(job.options, "weights", []))
        return cls(
            build(view, trust_remote_code=trust),
            find_symmetry(view, job.reference.reader, trust_remote_code=trust),
            {spec.name: spec.dtype for spec in job.specs},
            MergedView(job, make=merging.made),
            models,
            weights if len(weights) == len(models) else [1.0] * len(models),
            job.device,
        )


class Renormaliser:
    """Finds ``corrections``, by tensor, on ``tokens`` int64 [n, seq]. The models and what is made of them pass their blocks side
    by side: in memory are one block and everybody's hidden states, or these are ``on_disk``."""

    def __init__(
        self,
        what: Renormalised,
        writer: CheckpointWriter,
        progress: Progress,
        tokens: torch.Tensor,
        corrections: dict[str, Correction],
        *,
        on_disk: bool = False,
    ) -> None:
        self.what, self.writer, self.progress, self.corrections = what, writer, progress, corrections
        self.skeleton, self.device = what.skeleton, what.device
        self.ties = ties_of(what.symmetry)
        self.windows = Windows(tokens)
        self.left: dict[str, str] = {}  # norms that cannot be corrected, and why
        hidden = int(self.skeleton.model.config.get_text_config().hidden_size)
        self.states = [
            Activations((*tokens.shape, hidden), torch.float32, writer.scratch, f"renormalise{number}", on_disk=on_disk)
            for number in range(len(what.models) + 1)
        ]

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Find the corrections, block by block, each a step of the journal. Returns what provenance says."""
        skeleton, models = self.skeleton, self.what.models
        self.progress.begin("block renormalised", len(skeleton.blocks), 0)
        self._embed()
        for index in range(len(skeleton.blocks)):
            step = f"renormalised block {index}"
            if step in self.writer.steps:  # states are not kept: they are made again, what they showed is known
                for reader, states in zip(models, self.states[1:], strict=True):
                    self._pass(index, reader, states)
            else:
                found = self._correct(index, self._targets(index))
                told = {name: correction.facts() for name, correction in found.items()}
                self.writer.done(step, {"corrections": told, "left": self.left})
            known = self.writer.steps[step]
            self.left = dict(known["left"])
            self.corrections.update((name, Correction.of(facts)) for name, facts in known["corrections"].items())
            self._pass(index, Corrected(self.what.made, self.corrections), self.states[0])
            self.progress.step(step)
        self.progress.end()
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """The least, the mean and the greatest factor of every tensor, and what was left as it is."""
        rows = {}
        for name, correction in self.corrections.items():
            scale = correction.scale
            rows[name] = {"least": float(scale.min()), "mean": float(scale.mean()), "greatest": float(scale.max())}
        return {
            "windows": list(self.windows.tokens.shape),
            "factors": rows,
            "left": {**self.what.symmetry.unknown, **self.left},
        }

    def _embed(self) -> None:
        """Everybody's hidden states before the first block; the replay proven on the first model."""
        device, skeleton = self.device, self.skeleton
        for number, (reader, states) in enumerate(zip([self.what.made, *self.what.models], self.states, strict=True)):
            with shell(skeleton, reader, device):
                if number == 0:
                    probe = self.windows.tokens[:2, :PROOF].to(device)
                    self.returns_tuple = prove(skeleton, reader, probe)
                    self.windows.capture(skeleton, returns_tuple=self.returns_tuple, device=device)
                for start, hidden in self.windows.embedded(skeleton, device):
                    states.write(start, hidden)
                states.advance()

    def _pass(self, index: int, reader: DenseReader, states: Activations) -> None:
        names = self.skeleton.names_of(index)
        self.skeleton.load(reader, names, torch.float32, self.device)
        run_block(self.skeleton, index, self.windows, states, torch.float32, self.device)
        states.forget()
        self.skeleton.unload(names)
        release()

    def _linears(self, index: int) -> list[Linear]:
        """The linears of a block that are scaled: not those of parts that could not be understood."""
        unknown = tuple(f"{name}." for name in self.what.symmetry.unknown)
        linears = block_linears(self.skeleton, index, self.what.dtypes)[0]
        only = self.what.only
        linears = [linear for linear in linears if only is None or linear.tensor in only]
        return [linear for linear in linears if not f"{linear.module}.".startswith(unknown)] if unknown else linears

    def _stages(self, index: int, states: Activations) -> list[Stage]:
        """The linears of the loaded block in the order of the forward pass."""
        first = min(self.windows.batch, self.windows.tokens.shape[0])
        call = self.windows.call(first, torch.float32).blocks[index]
        hidden = states.read(0, first).to(self.device)
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
            watch(self.skeleton.blocks[index][1], call, states.read(start, stop).to(self.device), watchers)
        return found

    def _targets(self, index: int) -> dict[str, Target]:
        """What the outputs of a block's layers should be like; the models' states pass the block."""
        names, seen = self.skeleton.names_of(index), []
        for reader, states in zip(self.what.models, self.states[1:], strict=True):
            self.skeleton.load(reader, names, torch.float32, self.device)
            found = self._measure(index, self._stages(index, states), states)
            for norm in self._norms(index):
                found[norm] = self._measure_norm(index, norm, states)
            seen.append(found)
            run_block(self.skeleton, index, self.windows, states, torch.float32, self.device)
            states.forget()
            self.skeleton.unload(names)
            release()
        shared = [tensor for tensor in seen[0] if all(tensor in one for one in seen)]
        return {
            tensor: target_of([one[tensor] for one in seen], self.what.weights, self.ties.get(tensor, 1))
            for tensor in shared
        }

    def _correct(self, index: int, targets: Mapping[str, Target]) -> dict[str, Correction]:
        """The corrections of a block, by tensor: layer after layer, each measured with those before it made."""
        names, states = self.skeleton.names_of(index), self.states[0]
        self.skeleton.load(self.what.made, names, torch.float32, self.device)
        found: dict[str, Correction] = {}
        for step in self._turns(index, states):
            if isinstance(step, str):
                found |= self._correct_norm(index, step, targets[step])
                continue
            measured = self._measure(index, [step], states)
            for linear in (linear for group in step.groups for linear in group.linears if linear.tensor in targets):
                found |= self._correct_linear(index, linear, targets[linear.tensor], measured[linear.tensor])
        self.skeleton.unload(names)
        return found

    def _correct_linear(self, index: int, linear: Linear, target: Target, moments: Moments) -> dict[str, Correction]:
        tie, bias = self.ties.get(linear.tensor, 1), self._bias(linear)
        factor = factor_of(target, moments, tie)
        meets = bias is not None and tie == 1
        scale, left = factor.float(), 0.0 if meets else off(target, factor * moments.mean)
        found = {linear.tensor: Correction(scale, None, linear.transposed, left)}
        write_linear(self.skeleton, index, linear, self._weight(index, linear) * scale.to(self.device)[:, None])
        if bias is not None:
            shift = target.mean - factor * moments.mean if meets else torch.zeros_like(factor)
            name = self.skeleton.pieces[f"{linear.module}.bias"][0].tensor
            found[name] = Correction(scale, shift.float())
            bias.copy_(found[name].made(bias))
        return found

    # Norms.

    def _norms(self, index: int) -> list[str]:
        """The gains of a block that are corrected, by tensor: as long as the stream is wide, and of one piece."""
        if not self.what.norms:
            return []
        width = int(self.skeleton.model.config.get_text_config().hidden_size)
        gains = [name for name in self.skeleton.names_of(index) if self.skeleton.get(name).shape == (width,)]
        return [self.skeleton.pieces[name][0].tensor for name in gains if name.endswith(".weight")]

    def _norm(self, tensor: str) -> tuple[nn.Module, str]:
        """The module of a gain, and its name."""
        name = next(name for name, pieces in self.skeleton.pieces.items() if pieces[0].tensor == tensor)
        return self.skeleton.holder(name), name.rpartition(".")[0]

    def _outputs(self, index: int, module: nn.Module, states: Activations) -> Iterator[torch.Tensor]:
        """What a module of the loaded block puts out [tokens, hidden], batch by batch."""
        for start, stop in self.windows.slices():
            call = self.windows.call(stop - start, torch.float32).blocks[index]
            x = states.read(start, stop).to(self.device)
            yield passing(self.skeleton.blocks[index][1], module, call, x).made.flatten(0, -2)

    def _measure_norm(self, index: int, tensor: str, states: Activations) -> Moments:
        moments = Moments.none(self.skeleton.get(f"{self._norm(tensor)[1]}.weight").numel())
        for outputs in self._outputs(index, self._norm(tensor)[0], states):
            moments.add(outputs)
        return moments

    def _correct_norm(self, index: int, tensor: str, target: Target) -> dict[str, Correction]:
        """The correction of a gain, and of the bias beside it. None where scaling the gain does not scale the outputs (of
        norms that multiply by 1 + gain)."""
        (module, name), states = self._norm(tensor), self.states[0]
        moments = self._measure_norm(index, tensor, states)
        factor = factor_of(target, moments, 1)
        gain, bias = self.skeleton.get(f"{name}.weight").data, getattr(module, "bias", None)
        before = next(self._outputs(index, module, states)).clone()
        corrections = {
            tensor: Correction(factor.float(), left=0.0 if bias is not None else off(target, factor * moments.mean))
        }
        kept = {gain: gain.clone()}
        gain.copy_(corrections[tensor].made(gain))
        shift = torch.zeros_like(factor)
        if bias is not None:
            shift = target.mean - factor * moments.mean
            kept[bias.data] = bias.data.clone()
            stored = self.skeleton.pieces[f"{name}.bias"][0].tensor
            corrections[stored] = Correction(factor.float(), shift.float())
            bias.data.copy_(corrections[stored].made(bias.data))
        wanted = before * factor.float().to(self.device) + shift.float().to(self.device)
        if not torch.allclose(next(self._outputs(index, module, states)), wanted, rtol=1e-3, atol=1e-4):
            for value, old in kept.items():
                value.copy_(old)
            self.left[name] = "its outputs do not scale with its gain"
            return {}
        return corrections

    def _turns(self, index: int, states: Activations) -> list[Stage | str]:
        """Stages of linears and gains of norms (by tensor) of the loaded block, in the order of the forward pass."""
        stages, norms = self._stages(index, states), self._norms(index)
        if not norms:
            return [*stages]
        called: list[str] = []
        block = self.skeleton.blocks[index][1]
        prefix = self.skeleton.blocks[index][0]
        names = {module: f"{prefix}.{name}" for name, module in block.named_modules()}
        handles = [module.register_forward_pre_hook(lambda module, _: called.append(names[module])) for module in names]
        first = min(self.windows.batch, self.windows.tokens.shape[0])
        try:
            self.windows.call(first, torch.float32).blocks[index].run(block, states.read(0, first).to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        turns: list[tuple[int, Stage | str]] = [
            (min(called.index(one.module) for group in stage.groups for one in group.linears), stage)
            for stage in stages
        ]
        turns += [(called.index(self._norm(norm)[1]), norm) for norm in norms if self._norm(norm)[1] in called]
        return [step for _, step in sorted(turns, key=lambda turn: turn[0])]

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
            moments.add(nn.functional.linear(inputs, weight, bias))

    return add


class Corrected(DenseView):
    """``view`` with ``corrections`` made."""

    def __init__(self, view: DenseView, corrections: Mapping[str, Correction]) -> None:
        super().__init__(view.checkpoint)
        self.view, self.corrections = view, corrections

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        made = self.view.read(name, dtype)
        return self.corrections[name].made(made) if name in self.corrections else made
