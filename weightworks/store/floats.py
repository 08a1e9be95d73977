"""Low-bit floating-point weights: elements, the scales they share, and how both are stored.

Elements are E2M1 and E4M3 of the Open Compute Project (Microscaling Formats 1.0; 8-bit Floating Point 1.0). Scales are
plain numbers, powers of two (MX), or E4M3 under one float32 scale a tensor (NVFP4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from weightworks.store.inputs import InputScheme
from weightworks.store.packing import DECODED

Element = Literal["E2M1", "E4M3"]
ScaleKind = Literal["plain", "E8M0", "E4M3"]
LARGEST: dict[str, float] = {"E2M1": 6.0, "E4M3": 448.0}
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1
BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between them; ties go to the even mantissa
BIAS = 127  # of E8M0
SMALLEST = 0.125  # what an all-zero group has for a scale under NVFP4, as compressed-tensors writes it


@dataclass(frozen=True, slots=True)
class FloatScheme:
    """How a weight is quantized: ``kind`` of its elements, ``group_size`` columns (-1: all) and ``rows`` rows that share a
    scale, how scales are stored, and how ``inputs`` are rounded where it is multiplied."""

    kind: Element
    group_size: int
    scales: ScaleKind = "plain"
    rows: int = 1
    inputs: InputScheme | None = None

    @property
    def bits(self) -> int:
        return 4 if self.kind == "E2M1" else 8

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def reordered(self) -> bool:
        return False

    @property
    def code(self) -> str:
        return self.kind

    @property
    def element(self) -> str:
        scales = "" if self.scales == "plain" else f" with {self.scales} scales"
        blocks = "" if self.rows == 1 else f" in blocks of {self.rows} rows"
        return f"{self.kind}{scales}{blocks}"

    def groups(self, columns: int) -> int:
        """Number of groups in a row of ``columns`` weights."""
        return 1 if self.group_size == -1 else columns // self.group_size

    def bands(self, rows: int) -> int:
        """Number of rows of scales."""
        return -(-rows // self.rows)


@dataclass(frozen=True)
class FloatQuantized:
    """A quantized weight: ``w[o, i] = scale[o // rows, g] * value(codes[o, i])``, ``g`` being the group of column i.

    codes: uint8 [out, in], the bits of the elements; scale: [bands, groups] as stored: float, uint8 E8M0 (2^(code - 127)) or
    float8_e4m3fn, which is divided by ``global_scale`` float32 [1]. ``input_scale`` float32 [1] is that of inputs which are
    rounded in the same way.
    """

    scheme: FloatScheme
    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    def split(self, heights: Sequence[int]) -> list[FloatQuantized]:
        """The weights of ``heights`` rows each that were stacked, each filled up with rows to whole bands."""
        bands = [self.scheme.bands(height) for height in heights]
        stacked = self.codes.split([count * self.scheme.rows for count in bands])
        parts = zip(heights, stacked, self.scale.split(bands), strict=True)
        return [
            FloatQuantized(self.scheme, codes[:height], scale, self.global_scale, self.input_scale)
            for height, codes, scale in parts
        ]

    def dequantize(self) -> torch.Tensor:
        """The weight these codes mean, float32 [out, in]."""
        scale = decoded_scale(self.scale, self.global_scale)
        scale = scale.repeat_interleave(self.scheme.rows, 0)[: len(self.codes)] if self.scheme.rows > 1 else scale
        weight = torch.empty(self.codes.shape, device=self.codes.device)
        rows = max(1, DECODED // weight.shape[1])
        for part, codes, factor in zip(*(t.split(rows) for t in (weight, self.codes, scale)), strict=True):
            groups = decode(codes, self.scheme.kind).view(len(codes), scale.shape[1], -1)  # [rows, groups, group]
            part.view_as(groups).copy_(groups * factor.unsqueeze(-1))
        return weight


def encode(x: torch.Tensor, kind: Element) -> torch.Tensor:
    """The bits uint8 of the nearest elements, ties to the even mantissa; what is too large becomes the largest.

    Zero has no sign.
    """
    if kind == "E4M3":
        codes = x.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn).view(torch.uint8)
        return codes.masked_fill_(codes == 0x80, 0)
    index = torch.bucketize(x.abs(), _bounds(x.device), out_int32=True).to(torch.uint8)  # [0, 8)
    return index.add_(((x < 0) & (index > 0)).to(torch.uint8), alpha=8)


def nearest(x: torch.Tensor, kind: Element) -> torch.Tensor:
    """What the nearest elements mean, float32: :func:`decode` of :func:`encode`, at a fraction of the time."""
    if kind == "E4M3":
        return x.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn).float()
    size = x.abs().clamp_(max=LARGEST[kind])
    step = (size >= 2).float().add_(1).add_(size >= 4, alpha=2).mul_(0.5)  # 0.5, 1 from 2 on, 2 from 4 on
    return size.div_(step).round_().mul_(step).copysign_(x).add_(0)


def decode(codes: torch.Tensor, kind: Element) -> torch.Tensor:
    """What the bits uint8 of elements mean, float32."""
    if kind == "E4M3":
        return codes.view(torch.float8_e4m3fn).float()
    return _values(codes.device)[codes.int()]


@cache
def _bounds(device: torch.device) -> torch.Tensor:
    """Upper bounds of E2M1's levels: a tie that goes up lies just above its bound."""
    exact = torch.tensor(BOUNDS)
    up = torch.arange(len(BOUNDS)) % 2 == 1
    return torch.where(up, torch.nextafter(exact, torch.zeros(())), exact).to(device)


@cache
def _values(device: torch.device) -> torch.Tensor:
    """E2M1's sixteen values by their bits."""
    levels = torch.tensor(LEVELS)
    return torch.cat([levels, -levels]).to(device)


# Scales, in float32 as they act and as they are stored.


def power_scale(top: torch.Tensor, kind: Element) -> torch.Tensor:
    """The power of two for groups whose largest magnitude is ``top``, as compressed-tensors takes it: the largest element's
    exponent meets that of ``top``, which counts as the next one from 1.75 on (the specification takes it from 2 on)."""
    mantissa, exponent = torch.frexp(top)  # top = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = exponent - 1 + (mantissa >= 0.875).int()
    offset = 2 if kind == "E2M1" else 8
    return _two_to((exponent - offset).clamp(-BIAS, BIAS))


def fp8_scale(scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """``scale`` as it acts once it is stored in E4M3 times ``global_scale``."""
    return stored_scale(scale, "E4M3", global_scale).float() / global_scale


def tensor_scale(top: torch.Tensor) -> torch.Tensor:
    """NVFP4's global scale float32 [1] of what has largest magnitude ``top``: the largest local scale becomes 448."""
    most = torch.finfo(torch.float32).max
    scale = (LARGEST["E4M3"] * LARGEST["E2M1"] / top.float()).clamp(max=most).reshape(1)
    return torch.where(top.reshape(1) > 0, scale, 1.0)


def stored_scale(scale: torch.Tensor, kind: ScaleKind, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Acting scales as they are stored: E8M0 as uint8, E4M3 as float8; plain ones stay."""
    if kind == "E8M0":
        return (torch.frexp(scale).exponent - 1 + BIAS).to(torch.uint8)
    if kind == "E4M3":
        assert global_scale is not None
        local = (scale * global_scale).clamp(max=LARGEST["E4M3"]).to(torch.float8_e4m3fn)
        return torch.where(local.float() == 0, torch.tensor(SMALLEST, dtype=local.dtype, device=local.device), local)
    return scale


def decoded_scale(stored: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Stored scales as they act, float32."""
    if stored.dtype == torch.uint8:
        return _two_to(stored.int() - BIAS)
    return stored.float() if global_scale is None else stored.float() / global_scale


def _two_to(exponent: torch.Tensor) -> torch.Tensor:
    """Powers of two, float32, subnormal ones too."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def rounding(inputs: InputScheme, global_scale: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """What engines of low-bit products do to inputs [..., in] before they multiply: a scale a token or group, from its
    largest magnitude, and the nearest element. As compressed-tensors computes it, in float32."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        groups = x.float().unflatten(-1, (-1, x.shape[-1] if inputs.group_size == -1 else inputs.group_size))
        top = groups.abs().amax(-1, keepdim=True)
        if inputs.kind == "INT8":
            scale = top / 127.5
            scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
            values = torch.round(groups / scale).clamp_(-128, 127)
        else:
            scale = group_scale(top, inputs.kind, inputs.scales, global_scale)
            values = nearest(groups / scale, inputs.kind)
        return values.mul_(scale).flatten(-2).to(x.dtype)

    return rounded


def group_scale(
    top: torch.Tensor, kind: Element, scales: ScaleKind, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The conventional scale, as it acts, of groups whose largest magnitude is ``top``: that lies on the largest element."""
    if scales == "E8M0":
        return power_scale(top, kind)
    scale = top / LARGEST[kind]
    if scales == "E4M3":
        assert global_scale is not None
        return fp8_scale(scale, global_scale)
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
