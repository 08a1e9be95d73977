"""How much the model's loss minds errors in each of its layers, and the errors that each choice of a scheme would make there.

The linearity theorem of Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"
(arXiv:2411.17525): errors of layers add up, L(W + E) = L(W) + sum_u alpha_u e_u. The theorem measures e_u on the weights, which
is right for errors that lie anyhow. Those of GPTQ avoid the directions that inputs take, so here e_u is what errors do to the
layer's output, tr(E H E') / tr(W H W'), the same for noise and for rounding. alpha_u is fitted to the divergence
KL(model || model with Gaussian noise in u) at a few sizes of noise.

A *unit* is what gets one scheme: linears that read the same input (q, k, v; gate, up), which engines fuse, and all experts of a
block. All noisy models pass the blocks together as branches, so every weight is read once, block by block, journalled.

With ``neighbours``, Kim et al.'s inter-layer term (arXiv:2306.04879): E_ij = L(q_i, q_j) - L(q_i) - L(q_j) + L for units that
follow each other, q the coarsest rounding; for other choices in proportion to the root of the product of their errors.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from weightworks.engine.blockwise import bounded
from weightworks.engine.job import Job
from weightworks.engine.units import SHARES, Sum, Unit, coarsest, common, energy, noise_of, sensed, units_of
from weightworks.engine.walk import Walk
from weightworks.stage.budget import Budget
from weightworks.store.packing import Scheme
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.calibration import Calibration
from weightworks.stream.gram import Gram
from weightworks.stream.linears import Linear, Stage, read_linear, write_linear
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, shell
from weightworks.stream.replay import tail

LEAST, MOST = 1e-4, 0.1  # sizes beyond which noise drowns, or no layer is the same


class Sensitivity:
    """The pass over a job's model. ``choices`` are by tensor the numbers of the budget's choices that fit it."""

    def __init__(
        self,
        job: Job,
        writer: CheckpointWriter,
        calibration: Calibration,
        probe: torch.Tensor,
        dtype: torch.dtype,
        choices: Mapping[str, Sequence[int]],
        budget: Budget,
        *,
        on_disk: bool,
        statistics_bytes: int,
    ) -> None:
        self.job, self.budget, self.choices, self.dtype, self.on_disk = job, budget, choices, dtype, on_disk
        self.room = statistics_bytes
        self.walk = Walk(job, writer, "sensitivity", calibration.tokens, probe, dtype, on_disk=on_disk)
        count = sensed(*calibration.tokens.shape)
        self.windows = Windows(calibration.tokens[:count], self.walk.windows.calls)
        self.branches: list[Activations] = []  # a block's branches each, [branches x windows, seq, hidden]
        self.counts: list[int] = []

    @torch.no_grad()
    def run(self) -> list[Unit]:
        """The units of the model in the order of its passes."""
        figures = self.walk.run(self._block)
        return list(self._fitted(figures))

    def _block(self, index: int) -> dict[str, Any]:
        """Errors of every choice in the loaded block, and its noisy branches sent on; divergences, after the last one."""
        self._catch_up(index)
        sums = self._sums(index)
        plans = list(self._branches(index, sums))
        started = self._started(index, sums, plans)
        for states, count in zip(self.branches, self.counts, strict=True):
            self._pass(index, states, count)
        self.branches.append(started)
        self.counts.append(len(plans))
        for states in self.branches:
            states.checkpoint()
        units = [self._journalled(one) for one in sums]
        figures: dict[str, Any] = {"units": units, "branches": [plan.kind for plan in plans]}
        if index == len(self.job.skeleton.blocks) - 1:
            figures["divergences"] = self._divergences(index)
        return figures

    def _catch_up(self, index: int) -> None:
        """The branches of the blocks before, as the journal has them; the files before those are not needed any more."""
        steps = self.walk.writer.steps
        while len(self.branches) < index:
            count = len(steps[f"sensitivity, block {len(self.branches)}"]["figures"]["branches"])
            self.branches.append(self._states(len(self.branches), count))
            self.branches[-1].restore(index)
            self.counts.append(count)
        for states in self.branches:
            states.forget()

    def _states(self, block: int, count: int) -> Activations:
        windows, length = self.windows.tokens.shape
        shape = (count * windows, length, self.walk.states.shape[2])
        return Activations(shape, self.dtype, self.walk.writer.scratch, f"noisy{block}", on_disk=self.on_disk)

    def _sums(self, index: int) -> list[Sum]:
        """Errors and energies of the loaded block's units, gathered in rounds of statistics that fit."""
        stages, never = self.walk.stages(index, self.job.blocks[index])
        groups = tuple(group for stage in stages for group in stage.groups)
        sums = units_of(groups)
        for together in bounded([Stage(groups)], self.room, self._held):
            statistics = self.walk.watched(index, together, self._watch)
            for group in together:
                unit = next(one for one in sums if group.linears[0] in one.linears)
                self._measure(unit, group.linears, statistics.pop(group.leader))
                release()
        return sums + [Sum([linear]) for linear in never]

    def _held(self, columns: int) -> int:
        return 4 * columns**2 + self.job.held(columns)

    def _watch(self, columns: int, device: torch.device) -> Watched:
        own = self.job.method.watch(columns, device) if hasattr(self.job.method, "solve") else None
        return Watched(Gram(columns, device), own)

    def _measure(self, unit: Sum, linears: Sequence[Linear], held: Watched) -> None:
        """Add what noise and every choice do to the outputs of ``linears``, which read the same input."""
        second = held.gram.mean()
        weights = [read_linear(self.job.view, linear).to(self.job.device) for linear in linears]
        for linear, weight in zip(linears, weights, strict=True):
            unit.weight += energy(weight, second)
            unit.noise += energy(noise_of(linear, weight, self.job.settings.seed), second)
        fitting = common(self.choices, unit.linears)
        for number in fitting:
            solved = self._solved(linears, weights, held.own, self.budget.choices[number])
            error = sum(energy(one - weight, second) for one, weight in zip(solved, weights, strict=True))
            unit.errors[number] = unit.errors.get(number, 0.0) + error
            if self.budget.neighbours and number == coarsest(self.budget.choices, fitting, second.shape[0]):
                unit.coarse |= {linear.tensor: one for linear, one in zip(linears, solved, strict=True)}

    def _solved(
        self, linears: Sequence[Linear], weights: Sequence[torch.Tensor], own: Any, scheme: Scheme
    ) -> list[torch.Tensor]:
        """``weights`` rounded by the job's method; nothing is used up."""
        method = self.job.method
        targets = [replace(self.job.target_of(linear), scheme=scheme) for linear in linears]
        fresh = [weight.clone() for weight in weights]
        if own is None:
            return [method.apply(weight, target).dense() for weight, target in zip(fresh, targets, strict=True)]
        return [solution.dense() for solution in method.solve(fresh, copy.deepcopy(own), targets)]

    def _branches(self, index: int, sums: Sequence[Sum]) -> Iterator[Branch]:
        """What is sent on from the loaded block: noise of every size in every unit, and the coarsest roundings."""
        for number, unit in enumerate(sums):
            worst = max(unit.errors.values(), default=0.0) / unit.weight if unit.weight else 0.0
            if worst and unit.noise:
                for share in SHARES:
                    size = min(max(share * worst, LEAST), MOST)
                    yield Branch({"unit": number, "error": size}, number, size)
            if self.budget.neighbours and unit.coarse:
                yield Branch({"unit": number, "rounded": True}, number)
                if number and sums[number - 1].coarse:
                    yield Branch({"unit": number, "pair": True}, number, before=number - 1)
                elif not number and index and (row := self._rounded_before(index)) is not None:
                    yield Branch({"unit": number, "pair": True}, number, row=row)

    def _rounded_before(self, index: int) -> int | None:
        """The number of the branch of the block before in which its last unit alone is rounded."""
        figures = self.walk.writer.steps[f"sensitivity, block {index - 1}"]["figures"]
        last = {"unit": len(figures["units"]) - 1, "rounded": True}
        return figures["branches"].index(last) if last in figures["branches"] else None

    def _started(self, index: int, sums: Sequence[Sum], plans: Sequence[Branch]) -> Activations:
        """What the loaded block gives once for each of ``plans``, its weights changed for it and put back."""
        job, count, states = self.job, len(self.windows.tokens), self._states(index, len(plans))
        for _ in range(index + 1):  # blocks that the others have passed
            states.advance()
        for row, plan in enumerate(plans):
            touched = [sums[plan.unit], *([] if plan.before is None else [sums[plan.before]])]
            for unit in touched:
                self._change(index, unit, plan.size)
            source, place = (self.walk.states, 0) if plan.row is None else (self.branches[-1], plan.row * count)
            for start, stop in self.windows.slices():
                hidden = source.read(place + start, place + stop)
                states.write(row * count + start, self._through(index, hidden))
            for linear in (linear for unit in touched for linear in unit.linears):
                write_linear(job.skeleton, index, linear, read_linear(job.view, linear).to(job.device))
        states.advance()
        return states

    def _change(self, index: int, unit: Sum, size: float | None) -> None:
        """Put noise of relative error ``size`` into a unit of the loaded block, or else its coarsest rounding."""
        factor = 0.0 if size is None else math.sqrt(size * unit.weight / unit.noise)
        for linear in unit.linears:
            weight = read_linear(self.job.view, linear).to(self.job.device)
            if size is None:
                weight = unit.coarse[linear.tensor]
            else:
                weight = weight + factor * noise_of(linear, weight, self.job.settings.seed)
            write_linear(self.job.skeleton, index, linear, weight)

    def _pass(self, index: int, states: Activations, count: int) -> None:
        """Send ``count`` branches through the loaded block."""
        windows = len(self.windows.tokens)
        for row in range(count):
            for start, stop in self.windows.slices():
                place = row * windows
                states.write(place + start, self._through(index, states.read(place + start, place + stop)))
        states.advance()

    def _through(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        call = self.windows.call(len(hidden), self.dtype).blocks[index]
        return call.run(self.job.skeleton.blocks[index][1], hidden.to(self.job.device, self.dtype)).cpu()

    def _journalled(self, unit: Sum) -> dict[str, Any]:
        """What is kept of a unit."""
        errors = {str(number): error / unit.weight if unit.weight else 0.0 for number, error in unit.errors.items()}
        fitting = common(self.choices, unit.linears)
        coarse = coarsest(self.budget.choices, fitting, unit.linears[0].shape[1])
        errors = errors or dict.fromkeys(map(str, fitting), 0.0)  # no input ever came
        return {"tensors": [linear.tensor for linear in unit.linears], "errors": errors, "coarse": errors[str(coarse)]}

    def _divergences(self, index: int) -> list[list[float]]:
        """Nats a token by block and branch: KL(unchanged || branch), over all tokens but the last of each window."""
        job, windows, length = self.job, *self.windows.tokens.shape
        found = [[0.0] * count for count in self.counts]
        dense = torch.cat([self._through(index, self.walk.states.read(*one)) for one in self.windows.slices()])
        with shell(job.skeleton, job.view, job.device):
            for place in range(windows):
                tokens = self.windows.tokens[place : place + 1].to(job.device)

                def logs(hidden: torch.Tensor, tokens: torch.Tensor = tokens) -> torch.Tensor:
                    hidden = hidden.to(job.device, torch.float32)
                    logits = tail(job.skeleton, tokens, hidden, returns_tuple=job.returns_tuple)
                    return logits[0, :-1].float().log_softmax(-1)  # [seq - 1, vocabulary]

                own = logs(dense[place : place + 1])
                for block, states in enumerate(self.branches):
                    for row in range(self.counts[block]):
                        other = logs(states.read(row * windows + place, row * windows + place + 1))
                        found[block][row] += float((own.exp() * (own - other)).sum(dtype=torch.float64))
        tokens_seen = windows * (length - 1)
        return [[value / tokens_seen for value in row] for row in found]

    def _fitted(self, figures: Sequence[Mapping[str, Any]]) -> Iterator[Unit]:
        """Units out of what the journal has of all blocks."""
        flat = [
            (one, unit, dict(zip(map(_key, one["branches"]), values, strict=True)))
            for one, values in zip(figures, figures[-1]["divergences"], strict=True)
            for unit in range(len(one["units"]))
        ]
        for place, (block, number, seen) in enumerate(flat):
            facts = block["units"][number]
            errors = tuple(facts["errors"].get(str(one)) for one in range(len(self.budget.choices)))
            noise = [
                (plan["error"], max(seen[_key(plan)], 0.0))
                for plan in block["branches"]
                if plan["unit"] == number and "error" in plan
            ]
            square = sum(error**2 for error, _ in noise)
            alpha = sum(error * value for error, value in noise) / square if square else 0.0
            following = flat[place + 1] if place + 1 < len(flat) else None
            beyond = self._beyond(facts, number, seen, following) if following else 0.0
            yield Unit(tuple(facts["tensors"]), errors, alpha, tuple(noise), beyond)

    def _beyond(
        self,
        facts: Mapping[str, Any],
        number: int,
        seen: Mapping[str, float],
        following: tuple[Any, int, Mapping[str, float]],
    ) -> float:
        """The inter-layer term of a unit and the next, per root of the product of their coarsest errors."""
        block, after, theirs = following
        pair = theirs.get(_key({"unit": after, "pair": True}))
        if pair is None:
            return 0.0
        alone = seen[_key({"unit": number, "rounded": True})] + theirs[_key({"unit": after, "rounded": True})]
        product = facts["coarse"] * block["units"][after]["coarse"]
        return (pair - alone) / math.sqrt(product) if product > 0 else 0.0


@dataclass(frozen=True)
class Branch:
    """A model that differs from the unchanged one in ``unit`` of a block: by noise of an output error of ``size``, else by the
    coarsest rounding; in unit ``before`` too, or going on from branch ``row`` of the block before."""

    kind: Mapping[str, Any]
    unit: int
    size: float | None = None
    before: int | None = None
    row: int | None = None


@dataclass
class Watched:
    """Second moments of inputs, and what the method keeps of them."""

    gram: Gram
    own: Any

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs [tokens, in]."""
        self.gram.add(inputs)
        if self.own is not None:
            self.own.add(inputs)


def _key(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True)
