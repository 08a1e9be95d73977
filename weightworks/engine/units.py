"""What gets one scheme when bits are chosen layer by layer, and errors of outputs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weightworks.store.packing import Scheme
from weightworks.stream.linears import Group, Linear
from weightworks.stream.passes import batch_windows

TOKENS = 4096  # that noisy models pass: differences of models are far steadier than losses
SHARES = (0.25, 1.0)  # sizes of noise, of the error of the coarsest choice: what is fitted is between them


@dataclass(frozen=True)
class Unit:
    """Linears of a block that get one scheme, and what is known of them.

    ``errors`` are the relative errors of outputs by choice, None where it does not fit; ``alpha`` is nats a token for each such
    error; ``noise`` has the pairs (error, divergence) that it was fitted to; ``beyond`` is the inter-layer term with the next
    unit, for each root of the product of their errors.
    """

    tensors: tuple[str, ...]
    errors: tuple[float | None, ...]
    alpha: float
    noise: tuple[tuple[float, float], ...]
    beyond: float = 0.0

    def cost(self, choice: int) -> float:
        """What a choice is expected to cost, nats a token."""
        return self.alpha * (self.errors[choice] or 0.0)


@dataclass
class Sum:
    """Squared outputs added up over the linears of a unit: of the weights, of the unscaled noise, of errors by choice."""

    linears: list[Linear] = field(default_factory=list)
    weight: float = 0.0
    noise: float = 0.0
    errors: dict[int, float] = field(default_factory=dict)
    coarse: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # the coarsest rounding, where neighbours are looked at


def sensed(windows: int, length: int) -> int:
    """How many of the calibration windows noisy models pass: whole batches, about ``TOKENS``."""
    batch = batch_windows(length)
    return min(windows, max(batch, TOKENS // length // batch * batch))


def units_of(groups: Sequence[Group]) -> list[Sum]:
    """Units of a block, in the order of its pass: what reads one input, all experts, and what is stored as one layer."""
    units: list[tuple[set[str], Sum]] = []
    for group in groups:
        kinds = {re.sub(r"\.\d+\.", ".*.", linear.parameter) for linear in group.linears}
        kinds |= {linear.module for linear in group.linears if linear.piece.expert is not None}
        met = [one for one in units if one[0] & kinds]
        found = (set().union(kinds, *(one[0] for one in met)), Sum([*(x for one in met for x in one[1].linears)]))
        found[1].linears.extend(group.linears)
        place = units.index(met[0]) if met else len(units)
        units = [one for one in units if one not in met]
        units.insert(place, found)
    return [one for _, one in units]


def common(choices: Mapping[str, Sequence[int]], linears: Sequence[Linear]) -> list[int]:
    """The numbers of the choices that fit all of ``linears``."""
    first, *others = (choices[linear.tensor] for linear in linears)
    return [number for number in first if all(number in one for one in others)]


def coarsest(choices: Sequence[Scheme], fitting: Sequence[int], columns: int) -> int:
    """The one of ``fitting`` that takes the fewest bits, scales of 16 bits included."""
    return min(fitting, key=lambda number: choices[number].bits + 16 * choices[number].groups(columns) / columns)


def energy(weight: torch.Tensor, second: torch.Tensor) -> float:
    """tr(W H W') of ``weight`` [out, in] and second moments ``second`` [in, in]: the mean square of the outputs, added up."""
    return float(((weight @ second) * weight).sum(dtype=torch.float64))


def noise_of(linear: Linear, weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian noise of the mean square of ``weight`` [out, in], the same whenever it is asked for."""
    digest = hashlib.sha256(f"{seed} {linear.tensor}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return noise * weight.square().mean().sqrt()
