"""Integer grids: scale and zero point of a group of weights, rounding, and the search for the best clipping range.

Codes are unsigned, ``0 .. 2**bits - 1``; a weight is ``scale * (code - zero)``. Scales are rounded to the dtype they
will be stored in before any code is computed, so codes are right for the scale as stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from weightworks.store.packing import Encoded, IntScheme, Quantized, Scheme

TINY = 1e-7  # stands in for the scale of an all-zero group; every code of it is the zero point
CLIP_STEPS = 100  # candidates are 1, 0.99, ... of the full range, down to CLIP_FLOOR (grid of the GPTQ repository)
CLIP_FLOOR = 0.2
FITTED = 1 << 22  # weights fitted at a time: what is computed on the way stays small


class AnyGrid(Protocol):
    """What weights are rounded to: codes on a scale, and perhaps a zero point, that a group of them shares."""

    @property
    def scheme(self) -> Scheme: ...

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (float32, same leading shape) of groups ``weight`` [..., group].

        ``importance`` (broadcastable to a row of ``weight``) weighs squared errors, such as diag(H).
        """

    def snap(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of ``weight``, and the weights they mean, a float32 tensor of its own."""

    def codes(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [out, in] of ``groups`` [out, groups, group], each rounded on its own."""

    def encoded(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_index: torch.Tensor | None = None
    ) -> Encoded:
        """The weight of ``codes`` uint8 [out, in] on fitted grids [out, groups]; ``group_index`` as in :class:`Quantized`."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How ranges become grids: the scheme, the dtype scales are stored in, the smallest zero point allowed.

    A symmetric grid has one level more below zero than above, and by convention the positive scale
    2 max|w| / (2^bits - 1), which clips an extreme weight by half a step. With ``signed`` each group takes the best of
    three scales: that one, its negative, and the one of either sign that lays the extreme weight exactly on the outermost
    level (as llama.cpp's Q4_0 does). ``clip`` adds ever narrower ranges. The best has the smallest sum of squared errors
    weighed by importance or, with ``exponent``, of plain errors to that power (2.4 in the GPTQ repository).
    """

    scheme: IntScheme
    scale_dtype: torch.dtype
    min_zero: int = 0
    signed: bool = False
    clip: bool = False
    exponent: float | None = None

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (float32, same leading shape) of groups ``weight`` [..., group].

        ``importance`` (broadcastable to a row of ``weight``) weighs squared errors, such as diag(H).
        """
        if weight.ndim == 1 or weight.numel() <= FITTED:
            return self._fit(weight, importance)
        parts = weight.split(max(1, FITTED // weight[0].numel()))
        scales, zeros = zip(*(self._fit(part, importance) for part in parts), strict=True)
        return torch.cat(scales), torch.cat(zeros)

    def _fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        low = weight.amin(-1).clamp(max=0)
        high = weight.amax(-1).clamp(min=0)
        candidates = self._candidates(low, high)
        scale, zero = next(candidates)
        if not self.clip and not (self.signed and self.scheme.symmetric):
            return scale, zero
        best = self._error(weight, scale, zero, importance)
        for scale_new, zero_new in candidates:
            error = self._error(weight, scale_new, zero_new, importance)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, scale_new, scale)
            zero = torch.where(better, zero_new, zero)
        return scale, zero

    def _candidates(self, low: torch.Tensor, high: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scales, as stored, and zero points worth trying for the range ``low`` <= 0 <= ``high``, and narrower ones."""
        steps = round((1 - CLIP_FLOOR) * CLIP_STEPS) if self.clip else 1
        for step in range(steps):
            yield from self.of_range(low * (1 - step / CLIP_STEPS), high * (1 - step / CLIP_STEPS))

    def of_range(self, low: torch.Tensor, high: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Those of one range."""
        scale, zero = self.from_range(low, high)
        if self.signed and self.scheme.symmetric:
            yield self.stored(torch.where(-low >= high, low, high) / -self.scheme.midpoint), zero
            yield -scale, zero
        yield scale, zero

    def from_range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The conventional scale, as stored, and zero point of the range ``low`` <= 0 <= ``high``."""
        top = (1 << self.scheme.bits) - 1
        if self.scheme.symmetric:
            scale = self.stored(2 * torch.maximum(-low, high) / top)
            return scale, torch.full_like(scale, self.scheme.midpoint)
        scale = self.stored((high - low) / top)
        return scale, torch.round(-low / scale).clamp(self.min_zero, top)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """``scale`` rounded to its storage dtype, in float32; its magnitude never zero, never subnormal there."""
        smallest = max(TINY, torch.finfo(self.scale_dtype).tiny)
        small = scale.abs() < smallest
        return torch.where(small, smallest, scale).to(self.scale_dtype).float()

    def snap(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of ``weight``, as float32 integers, and the weights they mean, a tensor of its own."""
        codes = self.round(weight, scale, zero)
        return codes, (codes - zero).mul_(scale)

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes of ``weight``, as float32 integers."""
        return torch.round(weight / scale).add_(zero).clamp_(0, (1 << self.scheme.bits) - 1)

    def _error(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, importance: torch.Tensor | None
    ) -> torch.Tensor:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = self.round(weight, scale, zero).sub_(zero).mul_(scale).sub_(weight)
        if self.exponent is not None:
            return error.abs_().pow_(self.exponent).sum(-1)
        return error.square_().sum(-1) if importance is None else error.square_().mul_(importance).sum(-1)

    def codes(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [out, in] of ``groups`` [out, groups, group], each rounded on its own."""
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
        size = max(1, FITTED // groups[0].numel())
        for part, w, s, z in zip(
            *(t.split(size) for t in (codes, groups, scale[..., None], zero[..., None])), strict=True
        ):
            part.copy_(self.round(w, s, z))
        return codes.flatten(1)

    def encoded(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_index: torch.Tensor | None = None
    ) -> Quantized:
        """The weight of ``codes`` uint8 [out, in] on fitted grids [out, groups]."""
        return Quantized(self.scheme, codes, scale.to(self.scale_dtype), zero.byte(), group_index)


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View [out, in] as [out, groups, group]."""
    return weight.view(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
