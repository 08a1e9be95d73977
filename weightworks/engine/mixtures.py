"""Fewer experts in every mixture: some go, or several become one; the router keeps a row for each that stays.

A mixture is a module that holds the weights of all its experts in parameters [experts, ...] and is called with the tokens,
the experts each was given to, and with what weights: what transformers' mixtures look like, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightworks.engine.reducing import Layout, ReduceJob, Run, routed_to
from weightworks.engine.walk import Walk
from weightworks.errors import ArchitectureError, MethodError
from weightworks.stage.reducing import Experts, Mixture
from weightworks.store.reduced import Cut, ReducedView
from weightworks.stream.resizing import resized
from weightworks.stream.skeleton import Skeleton

GROUPED = ("n_group", "num_expert_group")  # what configurations call groups of experts that are routed to as wholes


@dataclass(frozen=True)
class Mixed:
    """A mixture of block ``block``: the module that holds the experts, and the router's parameters beside it."""

    block: int
    name: str
    module: nn.Module
    experts: tuple[str, ...]
    router: tuple[str, ...]


def mixtures_of(skeleton: Skeleton, index: int) -> Iterator[Mixed]:
    """The mixtures of a block, by the shapes of their parameters: [experts, rows, columns] in one module."""
    prefix, block = skeleton.blocks[index]
    for path, module in block.named_modules():
        held = dict(module.named_parameters(recurse=False))
        fused = [tensor for tensor in held.values() if tensor.ndim == 3]
        if not fused or len({len(tensor) for tensor in fused}) != 1:
            continue
        count, name = len(fused[0]), f"{prefix}.{path}"
        around = name.rpartition(".")[0] + "."
        experts = [f"{name}.{leaf}" for leaf, tensor in held.items() if len(tensor) == count]
        beside = [one for one in skeleton.names_of(index) if one.startswith(around) and not one.startswith(name + ".")]
        router = [one for one in beside if skeleton.get(one).ndim and len(skeleton.get(one)) == count]
        yield Mixed(index, name, module, tuple(experts), tuple(router))


class Thin:
    """The plan of a method that removes experts."""

    settled, masked = True, False

    def __init__(self, job: ReduceJob) -> None:
        self.job, skeleton = job, job.skeleton
        self.mixed = [one for index in range(len(skeleton.blocks)) for one in mixtures_of(skeleton, index)]
        counts = {len(skeleton.get(one.experts[0])) for one in self.mixed}
        if len(counts) != 1:
            seen = f"mixtures of {sorted(counts)} experts" if counts else "no mixture of experts in its blocks"
            raise ArchitectureError(f"{job.label}: {type(skeleton.model).__name__} has {seen}, one number is needed")
        (self.count,) = counts
        self.kept = job.method.leaves(self.count)
        self._refuse()
        first: list[Mixture] = [[(expert, 1.0)] for expert in range(self.kept)]
        self.first = {one.name: first for one in self.mixed}
        wanted = ReducedView(job.checkpoint, self.cuts(self.first))
        self.config = resized(job.config_before, self.count, self.kept, wanted)

    def _refuse(self) -> None:
        """Refuse mixtures that are routed to in groups, and fewer experts than a token is given to."""
        text = self.job.skeleton.model.config.get_text_config()
        for name in GROUPED:
            if (getattr(text, name, None) or 1) > 1:
                raise MethodError(
                    f"{self.job.label}: experts are routed to in groups ({name} is {getattr(text, name)}), which would "
                    "no longer be equal"
                )
        if self.kept < (needed := routed_to(text)):
            raise MethodError(
                f"{self.job.label}: {self.kept} of {self.count} experts would stay, and each token is given to {needed}",
                hint="keep more",
            )

    def cuts(self, chosen: Mapping[str, Sequence[Mixture]]) -> list[Cut]:
        """The tensors when the experts of each mixture are those ``chosen``, in file order."""
        cuts: dict[str, list[Cut]] = {name: [Cut.copy(name)] for name in self.job.checkpoint.tensors}
        skeleton = self.job.skeleton
        for one in self.mixed:
            mixtures = chosen[one.name]
            bases = torch.tensor([mixture[0][0] for mixture in mixtures])
            for name in one.router:
                for piece in skeleton.pieces[name]:
                    cuts[piece.tensor] = [Cut.copy(piece.tensor).narrowed(0, bases)]
            for name in one.experts:
                cuts |= self._experts(name, mixtures, bases)
        return [cut for made in cuts.values() for cut in made]

    def _experts(self, name: str, mixtures: Sequence[Mixture], bases: torch.Tensor) -> dict[str, list[Cut]]:
        """The tensors of one parameter [experts, ...], by the tensor of the source whose place they take."""
        pieces = self.job.skeleton.pieces[name]
        if pieces[0].expert is None:  # stored as one tensor
            whole = Cut.copy(pieces[0].tensor)
            if all(len(mixture) == 1 for mixture in mixtures):
                return {whole.name: [whole.narrowed(0, bases)]}
            mix = torch.zeros(len(mixtures), self.count)
            for place, mixture in enumerate(mixtures):
                for expert, weight in mixture:
                    mix[place, expert] = weight
            return {whole.name: [Cut(whole.name, whole.sources, mix=mix)]}
        tensors = {(piece.expert, piece.part): piece.tensor for piece in pieces}
        made: dict[str, list[Cut]] = {tensor: [] for tensor in tensors.values()}
        for place, mixture in enumerate(mixtures):
            for part in range(pieces[0].parts):
                sources = tuple((tensors[expert, part], weight) for expert, weight in mixture)
                made[sources[0][0]] = [Cut(tensors[place, part], sources)]
        return made

    def layout(self, found: Any) -> Layout:
        chosen = self.first if found is None else {one["part"]: one["mixtures"] for one in found}
        return Layout(self.cuts(chosen), self.config, range(len(self.job.blocks)))

    def find(self, run: Run) -> list[dict[str, Any]]:
        walk = Walk(self.job, run.writer, "experts", run.calibration.tokens, run.probe, run.dtype, on_disk=run.on_disk)
        figures = walk.run(lambda index: None, lambda index: _Watched(self, index))
        return [one for block in figures for one in block]

    def rows(self, found: Any) -> list[dict[str, Any]]:
        return [{"method": self.job.label, **{key: one[key] for key in one if key != "mixtures"}} for one in found]

    def uncovered(self) -> list[str]:
        return []

    def told(self, found: Any) -> list[str]:
        joined = sum(len(mixture) > 1 for one in found for mixture in one["mixtures"])
        lines = [f"{self.kept} of {self.count} experts left in each of {len(self.mixed)} mixtures"]
        return [*lines, f"{joined} of them made of several"] if joined else lines


class _Watched:
    """The mixtures of a loaded block while tokens pass it: what each expert is given, and what it gives."""

    def __init__(self, plan: Thin, index: int) -> None:
        self.plan, self.job = plan, plan.job
        self.mixed = [one for one in plan.mixed if one.block == index]
        self.statistics = [self.job.method.watch(plan.count, self.job.device) for _ in self.mixed]
        self.handles = [
            one.module.register_forward_pre_hook(self._hook(one, seen), with_kwargs=True)
            for one, seen in zip(self.mixed, self.statistics, strict=True)
        ]

    def _hook(self, one: Mixed, statistics: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = _routed(one, (*args, *kwargs.values()))
            if weights.shape != index.shape:  # of every expert, those of the others being zero
                weights = weights.gather(-1, index)
            norms = torch.zeros_like(weights, dtype=torch.float32)
            for expert in index.unique().tolist():
                rows, slots = (index == expert).nonzero(as_tuple=True)
                given = index[rows, slots][:, None], torch.ones_like(weights[rows, slots])[:, None]
                output = type(module).forward(module, hidden[rows], *given)  # the hook is not called again
                norms[rows, slots] = output.float().norm(dim=-1)
            router = next(self.job.skeleton.get(name) for name in one.router if self.job.skeleton.get(name).ndim == 2)
            statistics.add((hidden @ router.T).float(), index, weights.float(), norms)

        return hook

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        pass

    def figure(self) -> list[dict[str, Any]]:
        for handle in self.handles:
            handle.remove()
        found = []
        for one, statistics in zip(self.mixed, self.statistics, strict=True):
            chosen: Experts = self.job.method.choose(statistics, self.plan.count)
            told = {"fallbacks": chosen.fallbacks} if chosen.fallbacks else {}
            row = {"part": one.name, "kept": len(chosen.mixtures), "of": self.plan.count, **chosen.facts, **told}
            found.append({**row, "mixtures": [list(map(list, mixture)) for mixture in chosen.mixtures]})
        return found


def _routed(one: Mixed, given: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [tokens, hidden], experts int64 [tokens, k] and weights, of what a mixture is called with."""
    tensors = [value for value in given if isinstance(value, torch.Tensor) and value.ndim == 2]
    whole = [tensor for tensor in tensors if not tensor.is_floating_point()]
    real = [tensor for tensor in tensors if tensor.is_floating_point()]
    if len(whole) != 1 or len(real) != 2 or len({len(tensor) for tensor in tensors}) != 1:
        raise ArchitectureError(
            f"{one.name}: is not called with tokens, their experts and the weights of these, so what experts do is not seen"
        )
    return real[0], whole[0], real[1]
