"""Thresholds of activations, found block by block on a text: TEAL and CHESS.

TEAL (Liu et al. 2024): an input of a linear layer counts as zero where its magnitude is at most the quantile of magnitudes at
the layer's share of zeros. A block's shares are found greedily: zeros are added, a little at a time, where they change its output
least. CHESS (He et al. 2024): channel j of a gate counts as zero where |gate_j| E|up_j| is at most the quantile of that over all
channels, so its threshold is that quantile over E|up_j|; the inputs of the queries and of the attention's output have quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weightworks.engine.walk import Walk
from weightworks.errors import ArchitectureError
from weightworks.stage.thresholds import ThresholdOptions
from weightworks.stream.linears import Group
from weightworks.stream.sparsified import INPUTS, OUTPUTS, sparsified

SHIFT = 14  # of the bits of a float32: 512 bins from each power of two to the next
BINS = 1 << (31 - SHIFT)
STEP = 0.1  # zeros added to a layer of mean size in a step of the greedy search; half of it takes twice as long
MOST = 0.99  # zeros no layer goes beyond
TAIL = 0.25  # part of each window, the last, on which a block's output is compared

Thresholds = dict[str, Any]  # by name, a number or a list of them, as the journal keeps it


class Histogram:
    """Magnitudes in bins of equal relative width, so that no range need be known before. The bins are those of a float32's
    leading bits: a quantile is exact to 0.2 %."""

    def __init__(self, columns: int = 0, device: torch.device | None = None) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, x: torch.Tensor) -> None:
        bins = x.detach().float().abs().contiguous().view(torch.int32).flatten() >> SHIFT
        self.counts += torch.bincount(bins.cpu(), minlength=BINS)

    def quantile(self, share: float) -> float:
        """The least magnitude, to a bin, which ``share`` of all do not exceed; 0 for none."""
        total = int(self.counts.sum())
        if share <= 0 or total == 0:
            return 0.0
        place = int(torch.searchsorted(self.counts.cumsum(0), torch.tensor(share * total).ceil().long()))
        return float(torch.tensor((min(place, BINS - 1) + 1 << SHIFT) - 1, dtype=torch.int32).view(torch.float32))


def find_thresholds(walk: Walk, options: ThresholdOptions) -> list[Thresholds]:
    """The thresholds of every block by name, with ``shares``: the zeros that each is meant to make."""
    find = _teal if options.method == "teal" else _chess
    found: list[Thresholds] = walk.run(lambda index: find(walk, index, options))
    return found


def _groups(walk: Walk, index: int) -> list[Group]:
    """Layers of the block that read the same input, in the order in which they run; experts fused into one tensor are not
    among them."""
    stages, _ = walk.stages(index, [linear for linear in walk.job.blocks[index] if linear.piece.expert is None])
    return [group for stage in stages for group in stage.groups]


def _named(group: Group) -> list[str]:
    return [INPUTS + linear.module for linear in group.linears]


def _sizes(groups: Sequence[Group]) -> list[float]:
    """The share of the weights of ``groups`` that each has."""
    counts = [sum(linear.shape[0] * linear.shape[1] for linear in group.linears) for group in groups]
    return [count / sum(counts) for count in counts]


def _teal(walk: Walk, index: int, options: ThresholdOptions) -> Thresholds:
    groups = _groups(walk, index)
    seen = walk.watched(index, groups, Histogram)
    histograms = [seen[group.leader] for group in groups]
    shares = [options.sparsity] * len(groups)
    if options.allocation == "greedy" and options.sparsity > 0:
        shares = _allocate(_sizes(groups), options.sparsity, _distance(walk, index, groups, histograms))
    found: Thresholds = {}
    for group, histogram, share in zip(groups, histograms, shares, strict=True):
        found.update(dict.fromkeys(_named(group), histogram.quantile(share)))
    return {"thresholds": found, "shares": {name: s for g, s in zip(groups, shares, strict=True) for name in _named(g)}}


def _allocate(sizes: Sequence[float], target: float, distance: Callable[[Sequence[float]], float]) -> list[float]:
    """Shares of zeros whose mean by ``sizes`` is ``target``. Each step adds as many zeros in all, to the layer where ``distance``
    of the shares is then least."""
    shares, left = [0.0] * len(sizes), target
    while left > 1e-9:
        tried = []
        for place, size in enumerate(sizes):
            more = min(STEP / len(sizes), left, (MOST - shares[place]) * size)
            if more > 1e-9:
                new = [*shares[:place], shares[place] + more / size, *shares[place + 1 :]]
                tried.append((distance(new) / more, place, more, new))
        if not tried:
            break
        _, _, more, shares = min(tried, key=lambda one: one[:2])
        left -= more
    return shares


def _distance(
    walk: Walk, index: int, groups: Sequence[Group], histograms: Sequence[Histogram]
) -> Callable[[Sequence[float]], float]:
    """How far the block's output on the first windows is from that without zeros, given shares of zeros: the squares summed over
    the last part of each window."""
    first = min(walk.windows.batch, walk.windows.tokens.shape[0])
    call = walk.windows.call(first, walk.dtype).blocks[index]
    block, model = walk.job.skeleton.blocks[index][1], walk.job.skeleton.model
    begin = int(walk.windows.tokens.shape[1] * (1 - TAIL))

    def output() -> torch.Tensor:
        return call.run(block, walk.states.read(0, first).to(walk.job.device))[:, begin:].float()

    with torch.no_grad():
        usual = output()

    @torch.no_grad()
    def distance(shares: Sequence[float]) -> float:
        limits = {
            name: torch.tensor(histogram.quantile(share))
            for group, histogram, share in zip(groups, histograms, shares, strict=True)
            for name in _named(group)
        }
        with sparsified(model, limits, count=False):
            return float((output() - usual).square().double().sum())

    return distance


def _chess(walk: Walk, index: int, options: ThresholdOptions) -> Thresholds:
    groups = _groups(walk, index)
    gate = _Gate.find(walk, index, groups)
    rest = [group for group in groups if not {linear.module for linear in group.linears} & gate.layers]
    seen = walk.watched(index, rest, Histogram)
    found: Thresholds = {_named(group)[0]: seen[group.leader].quantile(options.sparsity) for group in rest}
    mean = gate.mean_up()
    histogram = Histogram()
    gate.passes(lambda acted, up: histogram.add(acted.float().abs() * mean))
    limit = histogram.quantile(options.sparsity)
    found[OUTPUTS + gate.name] = torch.where(mean > 0, limit / mean.clamp(min=1e-30), 0.0).clamp(max=3e38).tolist()
    return {"thresholds": found, "shares": dict.fromkeys(found, options.sparsity)}


class _Gate:
    """The gated feed-forward part of a loaded block: the module ``name`` that acts on the gate, the others by role."""

    def __init__(self, walk: Walk, index: int, name: str, up: str, layers: set[str]) -> None:
        self.walk, self.index, self.name, self.up, self.layers = walk, index, name, up, layers

    @classmethod
    def find(cls, walk: Walk, index: int, groups: Sequence[Group]) -> _Gate:
        """By watching the block: what acts on the output of one of two layers that read the same input and is multiplied by the
        other's is a gate if the product is what the next layer reads."""
        model, (prefix, block) = walk.job.skeleton.model, walk.job.skeleton.blocks[index]
        linears = {linear.module for group in groups for linear in group.linears}
        inner = {f"{prefix}.{name}": module for name, module in block.named_modules() if not list(module.children())}
        ins: dict[str, torch.Tensor] = {}
        outs: dict[str, torch.Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
                if given and isinstance(given[0], torch.Tensor) and isinstance(output, torch.Tensor):
                    ins[name], outs[name] = given[0], output

            return keep

        handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in inner]
        try:
            _run_first(walk, index)
        finally:
            for handle in handles:
                handle.remove()
        for pair in (group.linears for group in groups if len(group.linears) == 2):
            for gate, up in (pair, pair[::-1]):
                for name in set(outs) - linears:
                    if gate.module not in outs or ins[name].data_ptr() != outs[gate.module].data_ptr():
                        continue
                    product = outs[name] * outs[up.module]
                    for down in linears & set(ins):
                        if ins[down].shape == product.shape and torch.equal(ins[down], product):
                            return cls(walk, index, name, up.module, {gate.module, up.module, down})
        raise ArchitectureError(
            f"{prefix}: no gated feed-forward part was seen, which chess needs", hint="use --method teal"
        )

    def passes(self, seen: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """Run all windows; ``seen`` gets the gate after its activation and the up projection, [n, seq, channels] each."""
        model = self.walk.job.skeleton.model
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, given, output: kept.update({name: output})

        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in (self.name, self.up)]
        try:
            for start, stop in self.walk.windows.slices():
                _run(self.walk, self.index, start, stop)
                seen(kept[self.name], kept[self.up])
        finally:
            for handle in handles:
                handle.remove()

    def mean_up(self) -> torch.Tensor:
        """E|up| of every channel, float32."""
        sums: list[torch.Tensor] = []
        self.passes(
            lambda acted, up: sums.append(up.float().abs().flatten(0, -2).double().mean(0) * up[..., 0].numel())
        )
        tokens = self.walk.windows.tokens.numel()
        return (torch.stack(sums).sum(0) / tokens).float()


def _run_first(walk: Walk, index: int) -> None:
    _run(walk, index, 0, min(walk.windows.batch, walk.windows.tokens.shape[0]))


@torch.no_grad()
def _run(walk: Walk, index: int, start: int, stop: int) -> torch.Tensor:
    call = walk.windows.call(stop - start, walk.dtype).blocks[index]
    output: torch.Tensor = call.run(
        walk.job.skeleton.blocks[index][1], walk.states.read(start, stop).to(walk.job.device)
    )
    return output


def joined(found: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Thresholds float32 and shares of zeros of all blocks by name."""
    thresholds = {name: torch.tensor(value) for block in found for name, value in block["thresholds"].items()}
    return thresholds, {name: share for block in found for name, share in block["shares"].items()}
