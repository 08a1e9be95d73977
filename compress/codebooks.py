"""Grids of any levels: NF4, FP4 and powers of two, under one scale a group. No container holds them; they become dense weights.

NF4 is that of Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314): the levels between which a
normal number is equally likely to lie, zero among them. FP4 is E2M1. SHIFT4 has powers of two and zero under scales that are
powers of two, so that products are shifts (after Li et al., "DenseShift", arXiv:2208.09708, which trains and leaves zero out).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from compress.grids import CLIP_FLOOR, CLIP_STEPS, FITTED, TINY
from weightworks.store.inputs import InputScheme

Book = Literal["NF4", "FP4", "SHIFT4"]
LEVELS: dict[str, tuple[float, ...]] = {  # those of the largest magnitude are 1
    "NF4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "FP4": tuple(sign * level / 6 for sign in (-1, 1) for level in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    "SHIFT4": (0.0, *(sign * 2.0**-power for sign in (-1, 1) for power in range(7))),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BookScheme:
    """How a weight is quantized: the ``book`` of levels, ``group_size`` columns (-1: all) that share a scale."""

    book: str
    group_size: int
    bits: int = 4
    inputs: InputScheme | None = None
    symmetric: bool = True
    reordered: bool = False

    @property
    def element(self) -> str:
        return self.book

    @property
    def code(self) -> str:
        return self.book

    def groups(self, columns: int) -> int:
        """Number of groups in a row of ``columns`` weights."""
        return 1 if self.group_size == -1 else columns // self.group_size


@dataclass(frozen=True)
class BookQuantized:
    """A weight: ``w[o, i] = scale[o, g] * levels[codes[o, i]]``; codes uint8 [out, in], scale float32 [out, groups]."""

    scheme: BookScheme
    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The weight these codes mean, float32 [out, in]."""
        values = levels(self.scheme.book).to(self.codes.device)[self.codes.int()]
        return (values.view(len(values), self.scale.shape[1], -1) * self.scale[..., None]).flatten(1)

    def split(self, heights: Sequence[int]) -> list[BookQuantized]:
        """The weights of ``heights`` rows each that were stacked."""
        parts = zip(self.codes.split(list(heights)), self.scale.split(list(heights)), strict=True)
        return [BookQuantized(self.scheme, codes, scale) for codes, scale in parts]


@dataclass(frozen=True, slots=True)
class BookGrid:
    """How groups of weights get scales: the largest magnitude is the largest level, or, with ``clip``, the best of ever
    narrower ranges by the sum of squared errors weighed by importance. ``shifts`` says that scales are powers of two, of
    which the next smaller is tried too."""

    scheme: BookScheme
    scale_dtype: torch.dtype
    clip: bool = False

    @property
    def shifts(self) -> bool:
        return self.scheme.book == "SHIFT4"

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero points, all 0 (float32, same leading shape), of groups ``weight`` [..., group]."""
        if weight.ndim == 1:
            scale = self._fit(weight, importance)
        else:
            step = max(1, FITTED // max(1, weight[0].numel()))
            scale = torch.cat([self._fit(part, importance) for part in weight.split(step)])
        return scale, torch.zeros_like(scale)

    def _fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        candidates = self._candidates(weight.abs().amax(-1))
        scale = next(candidates)
        if not self.clip and not self.shifts:
            return scale
        best = self._error(weight, scale, importance)
        for candidate in candidates:
            error = self._error(weight, candidate, importance)
            scale = torch.where(error < best, candidate, scale)
            best = torch.minimum(error, best)
        return scale

    def _candidates(self, top: torch.Tensor) -> Iterator[torch.Tensor]:
        """Scales, as stored, for the largest magnitudes ``top``."""
        if self.shifts:
            whole = torch.exp2(torch.ceil(torch.log2(top.clamp(min=TINY))))
            yield from (whole * 0.5**step for step in range(3 if self.clip else 2))
            return
        smallest = max(TINY, torch.finfo(self.scale_dtype).tiny)
        for step in range(round((1 - CLIP_FLOOR) * CLIP_STEPS) if self.clip else 1):
            yield (top * (1 - step / CLIP_STEPS)).clamp(min=smallest).to(self.scale_dtype).float()

    def _error(self, weight: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        error = self.snap(weight, scale[..., None], scale)[1].sub_(weight).square_()
        return error.sum(-1) if importance is None else error.mul_(importance).sum(-1)

    def snap(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of ``weight``, and the weights they mean, a float32 tensor of its own."""
        codes = nearest(weight / scale, self.scheme.book)
        return codes, levels(self.scheme.book).to(weight.device)[codes.int()] * scale

    def codes(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [out, in] of ``groups`` [out, groups, group], each rounded on its own."""
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
        size = max(1, FITTED // groups[0].numel())
        for part, w, s in zip(*(t.split(size) for t in (codes, groups, scale[..., None])), strict=True):
            part.copy_(nearest(w / s, self.scheme.book))
        return codes.flatten(1)

    def encoded(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_index: torch.Tensor | None = None
    ) -> BookQuantized:
        """The weight of ``codes`` uint8 [out, in] on fitted grids [out, groups]."""
        assert group_index is None
        return BookQuantized(self.scheme, codes, scale)


@lru_cache(maxsize=8)
def levels(book: str) -> torch.Tensor:
    """The levels of a book, float32, in the order of their codes: rising."""
    return torch.tensor(sorted(LEVELS[book]), dtype=torch.float32)


@lru_cache(maxsize=8)
def _middles(book: str) -> torch.Tensor:
    return (levels(book)[1:] + levels(book)[:-1]) / 2


def nearest(x: torch.Tensor, book: str) -> torch.Tensor:
    """The codes uint8 of the nearest levels."""
    return torch.bucketize(x.contiguous(), _middles(book).to(x.device), out_int32=True).to(torch.uint8)
