"""Integer codes to packed 32-bit words and back: one dense little-endian bit stream a row.

Element ``i`` of a row starts at bit ``i * bits`` of the row's stream, least significant bit first, and may cross a word
boundary (3, 5, 6 and 7 bits). This is the layout of compressed-tensors since 0.18 along rows and of GPTQ along columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from weightworks.store.inputs import InputScheme

DECODED = 1 << 22  # weights decoded at a time: what is computed on the way stays small


class Scheme(Protocol):
    """How a weight is quantized: on which grid, and which weights share a scale."""

    @property
    def bits(self) -> int:
        """Bits a code."""

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; -1: the whole row."""

    @property
    def symmetric(self) -> bool:
        """Whether the grid is symmetric about zero, so that no zero point is stored."""

    @property
    def reordered(self) -> bool:
        """Whether groups follow an order of the columns that the file must store (``g_idx``)."""

    @property
    def element(self) -> str:
        """What a code is and how its scale is stored, for people."""

    @property
    def code(self) -> str:
        """The kind of code in a word."""

    @property
    def inputs(self) -> InputScheme | None:
        """How inputs are rounded where the weight is multiplied; None if they are not."""

    def groups(self, columns: int) -> int:
        """Number of groups in a row of ``columns`` weights."""


class Encoded(Protocol):
    """A weight as codes and scales."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def codes(self) -> torch.Tensor:
        """uint8 [out, in], one a weight."""

    def dequantize(self) -> torch.Tensor:
        """The weight these codes mean, float32 [out, in]."""

    def split(self, heights: Sequence[int]) -> Sequence[Encoded]:
        """The weights of ``heights`` rows each that were stacked."""


def told(scheme: Scheme) -> str:
    """A scheme in words."""
    groups = "one scale a row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    inputs = "" if scheme.inputs is None else f"; inputs {scheme.inputs}"
    return f"{scheme.element}, {groups}, {'symmetric' if scheme.symmetric else 'asymmetric'}{inputs}"


@dataclass(frozen=True, slots=True)
class IntScheme:
    """How a weight is quantized: bits a code, input columns a group (-1: the whole row), symmetric about zero or not.

    ``reordered`` says that groups follow an order of the columns that the file must store (``g_idx``).
    """

    bits: int
    group_size: int
    symmetric: bool
    reordered: bool = False
    inputs: InputScheme | None = None

    @property
    def element(self) -> str:
        return f"{self.bits} bits"

    @property
    def code(self) -> str:
        return f"{self.bits}-bit"

    def groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else columns // self.group_size

    @property
    def midpoint(self) -> int:
        """The zero point of the symmetric grid on unsigned codes, ``2**(bits-1)``."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: ``w[o, i] = scale[o, g] * (codes[o, i] - zero[o, g])`` with ``g = group_index[i]``.

    codes: uint8 [out, in] in ``0 .. 2**bits - 1``; scale: [out, groups] in the dtype it is stored in;
    zero: uint8 [out, groups]; group_index: int32 [in], or None when groups are consecutive columns.
    """

    scheme: IntScheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_index: torch.Tensor | None = None

    def split(self, heights: Sequence[int]) -> list[Quantized]:
        """The weights of ``heights`` rows each that were stacked."""
        parts = zip(*(t.split(list(heights)) for t in (self.codes, self.scale, self.zero)), strict=True)
        return [Quantized(self.scheme, codes, scale, zero, self.group_index) for codes, scale, zero in parts]

    def dequantize(self) -> torch.Tensor:
        """The weight these codes mean, float32 [out, in]."""
        index = None if self.group_index is None else self.group_index.long()
        weight = torch.empty(self.codes.shape, device=self.codes.device)
        rows = max(1, DECODED // weight.shape[1])
        for part, *stored in zip(*(t.split(rows) for t in (weight, self.codes, self.scale, self.zero)), strict=True):
            codes, scale, zero = (t.float() for t in stored)
            if index is not None:
                part.copy_((codes - zero[:, index]) * scale[:, index])
            else:
                groups = codes.view(len(codes), scale.shape[1], -1)  # [rows, groups, group]
                part.view_as(groups).copy_((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1))
        return weight


def packed_width(columns: int, bits: int) -> int:
    """Words a row of ``columns`` codes takes."""
    return math.ceil(columns * bits / 32)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``codes`` [rows, columns] into int32 words [rows, ceil(columns * bits / 32)]; the last word is zero-padded."""
    rows, columns = codes.shape
    period, span = _period(bits)
    words = torch.zeros(rows, math.ceil(columns / period) * span, dtype=torch.int64)
    for place in range(min(period, columns)):
        column = codes[:, place::period].long()  # [rows, repeats]
        word, shift = divmod(place * bits, 32)
        words[:, word::span][:, : column.shape[1]] |= (column << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1 :: span][:, : column.shape[1]] |= column >> (32 - shift)
    words = words[:, : packed_width(columns, bits)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()


def unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_rows`: uint8 [rows, columns]."""
    period, span = _period(bits)
    rows = words.shape[0]
    padded = torch.zeros(rows, math.ceil(columns / period) * span, dtype=torch.int64)
    padded[:, : words.shape[1]] = words.long() & 0xFFFFFFFF
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for place in range(min(period, columns)):
        target = codes[:, place::period]
        word, shift = divmod(place * bits, 32)
        value = padded[:, word::span] >> shift
        if shift + bits > 32:
            value = value | (padded[:, word + 1 :: span] << (32 - shift))
        target.copy_((value & ((1 << bits) - 1))[:, : target.shape[1]])
    return codes


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first axis: [rows, columns] to [ceil(rows * bits / 32), columns]."""
    return pack_rows(codes.T, bits).T.contiguous()


def unpack_columns(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """The inverse of :func:`pack_columns`."""
    return unpack_rows(words.T, bits, rows).T.contiguous()


def _period(bits: int) -> tuple[int, int]:
    """After how many codes, and how many words, the bit stream is word-aligned again."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common
