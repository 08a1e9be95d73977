"""Floating-point grids: the scale of a group of weights, rounding to elements, and the search for a better scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compress.grids import FITTED
from weightworks.store.floats import (
    FloatQuantized,
    FloatScheme,
    decoded_scale,
    encode,
    group_scale,
    nearest,
    stored_scale,
)

NEIGHBOURS = range(-8, 6)  # steps of an E4M3 scale that are tried: from half of the usual one to one and a half of it


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """How groups of weights get scales: the scheme, the dtype plain scales are stored in, and the scales of the tensor.

    The conventional scale lays the largest magnitude on the largest element. With ``clip`` the best of those next to it is
    taken, by the sum of squared errors weighed by importance (FP-Quant, arXiv:2509.23202, searches so too).
    """

    scheme: FloatScheme
    scale_dtype: torch.dtype
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    clip: bool = False

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale as it acts and zero points, all 0 (float32, same leading shape), of groups ``weight`` [..., group]."""
        rows = self.scheme.rows
        step = max(1, FITTED // max(1, weight[0].numel()) // rows) * rows
        scale = torch.cat([self._fit(part, importance) for part in weight.split(step)])
        return scale, torch.zeros_like(scale)

    def _fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        top = weight.abs().amax(-1)
        if self.scheme.rows > 1:
            for band in top.split(self.scheme.rows):
                band.copy_(band.amax(0))
        scale = self._stored(group_scale(top, self.scheme.kind, self.scheme.scales, self.global_scale))
        if not self.clip:
            return scale
        best = self._error(weight, scale, importance)
        for candidate in self._candidates(scale):
            error = self._error(weight, candidate, importance)
            scale = torch.where(error < best, candidate, scale)
            best = torch.minimum(error, best)
        return scale

    def _candidates(self, scale: torch.Tensor) -> Iterator[torch.Tensor]:
        """The scales around the conventional one."""
        if self.scheme.scales == "E8M0":
            yield from (scale / 2, scale * 2)
        elif self.scheme.scales == "E4M3":
            codes = stored_scale(scale, "E4M3", self.global_scale).view(torch.uint8).int()
            for step in NEIGHBOURS:
                code = (codes + step).clamp_(1, 0x7E).byte()  # 0 is no scale, 0x7F no number
                yield decoded_scale(code.view(torch.float8_e4m3fn), self.global_scale)

    def _error(self, weight: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        error = self.nearest(weight, scale.unsqueeze(-1)).sub_(weight).square_()
        return error.sum(-1) if importance is None else error.mul_(importance).sum(-1)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Acting scales as they are once stored."""
        return scale if self.scheme.scales != "plain" else _rounded(scale, self.scale_dtype)

    def snap(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of ``weight``, and the weights they mean, a float32 tensor of its own."""
        scaled = weight / scale
        return encode(scaled, self.scheme.kind), nearest(scaled, self.scheme.kind).mul_(scale)

    def nearest(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weights that the codes of ``weight`` mean."""
        return nearest(weight / scale, self.scheme.kind).mul_(scale)

    def codes(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [out, in] of ``groups`` [out, groups, group], each rounded on its own."""
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
        size = max(1, FITTED // groups[0].numel())
        for part, w, s in zip(*(t.split(size) for t in (codes, groups, scale[..., None])), strict=True):
            part.copy_(encode(w / s, self.scheme.kind))
        return codes.flatten(1)

    def encoded(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_index: torch.Tensor | None = None
    ) -> FloatQuantized:
        """The weight of ``codes`` uint8 [out, in] on fitted grids [out, groups]."""
        assert group_index is None
        stored = stored_scale(scale[:: self.scheme.rows], self.scheme.scales, self.global_scale)
        if self.scheme.scales == "plain":
            stored = stored.to(self.scale_dtype)
        return FloatQuantized(self.scheme, codes, stored, self.global_scale, self.input_scale)


def _rounded(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scale`` rounded to ``dtype``, in float32, never zero there."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal number
    return scale.clamp(min=least).to(dtype).float()
