"""Calibration windows on their way through the unchanged model, beside the same windows in the rounded one.

For methods whose statistics are of pairs: the input that a linear gets, and the one it would get had nothing been rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from weightworks.stream.activations import Activations
from weightworks.stream.linears import Address, Linear, watch
from weightworks.stream.passes import Windows, run_block
from weightworks.stream.replay import BlockCall
from weightworks.stream.skeleton import Skeleton


class Unrounded:
    """The unchanged model's side of it: hidden states ``states`` of ``windows``, and the weights of the running block."""

    def __init__(self, skeleton: Skeleton, windows: Windows, states: Activations) -> None:
        self.skeleton, self.windows, self.states = skeleton, windows, states
        self.index, self.weights = -1, dict[str, torch.Tensor]()

    def keep(self, index: int, linears: Sequence[Linear]) -> None:
        """Keep the weights of ``linears`` of the loaded block ``index`` as they are now."""
        prefix = self.skeleton.blocks[index][0]
        names = dict.fromkeys(f"{prefix}.{linear.parameter}" for linear in linears)
        self.index, self.weights = index, {name: self.skeleton.get(name).data.clone() for name in names}

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The block has its unchanged weights for the time of the context."""
        rounded = {name: self.skeleton.get(name).data for name in self.weights}
        try:
            for name, weight in self.weights.items():
                self.skeleton.get(name).data = weight
            yield
        finally:
            for name, weight in rounded.items():
                self.skeleton.get(name).data = weight

    @torch.no_grad()
    def watch(
        self, call: BlockCall, hidden: torch.Tensor, start: int, stop: int, statistics: Mapping[Address, Any]
    ) -> None:
        """Hand the inputs of watched products to ``statistics``, in pairs: of ``hidden``, the rounded model's, and its own.

        Which tokens reach an expert may differ between the two; what not every token reaches is handed over without its pair.
        """
        block, tokens = self.skeleton.blocks[self.index][1], hidden.shape[0] * hidden.shape[1]
        own: dict[Address, list[torch.Tensor]] = {leader: [] for leader in statistics}
        with self.loaded():
            states = self.states.read(start, stop).to(hidden.device)
            watch(block, call, states, {leader: found.append for leader, found in own.items()})

        def pair(leader: Address, inputs: torch.Tensor) -> None:
            mate = own[leader].pop(0) if own[leader] else None
            whole = mate is not None and len(mate) == len(inputs) == tokens
            statistics[leader].add(inputs, mate if whole else None)

        watch(block, call, hidden, {leader: partial(pair, leader) for leader in statistics})

    def advance(self, dtype: torch.dtype, device: torch.device) -> None:
        """Send its hidden states on to the next block."""
        with self.loaded():
            run_block(self.skeleton, self.index, self.windows, self.states, dtype, device)
        self.weights = {}
