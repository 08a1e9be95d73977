"""The layouts of compressed-tensors, bit for bit those of release 0.20: one class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.errors import CheckpointError
from weightworks.store.floats import FloatQuantized, FloatScheme
from weightworks.store.layout import TensorReader, part, shape_of
from weightworks.store.mixed import MixedScheme
from weightworks.store.packing import (
    IntScheme,
    Quantized,
    Scheme,
    pack_columns,
    pack_rows,
    packed_width,
    unpack_columns,
    unpack_rows,
)
from weightworks.store.quantargs import configuration, mixed_configuration
from weightworks.store.tensorfile import TensorSpec

FLOAT_EXPERTS = (
    "transformers loads experts of 8-bit floats with one scale a row only; use --scheme FP8, or --ignore them"
)


@dataclass(frozen=True)
class PackQuantized:
    """``pack-quantized``: signed codes stored as ``code + 2**(bits-1)``, packed along the inputs."""

    name: str = "compressed-tensors"
    layout: str = "pack-quantized"
    marker: str = "weight_packed"
    decodes_to: torch.dtype | None = None
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False) -> str | None:
        if reason := _refusal(scheme, transposed=transposed):
            return reason
        if expert and not scheme.symmetric:  # transformers 5.23 drops the zero points of experts
            return "transformers cannot load asymmetric experts from compressed-tensors; use --sym, or --format gptq_v2"
        return None

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return weight_dtype

    def specs(self, base: str, shape: tuple[int, int], scheme: IntScheme, dtype: torch.dtype) -> list[TensorSpec]:
        (rows, columns), groups = shape, scheme.groups(shape[1])
        specs = [
            TensorSpec(f"{base}.weight_packed", (rows, packed_width(columns, scheme.bits)), torch.int32),
            TensorSpec(f"{base}.weight_scale", (rows, groups), self.scale_dtype(dtype)),
            TensorSpec(f"{base}.weight_shape", (2,), torch.int64),
        ]
        if not scheme.symmetric:
            words = packed_width(rows, scheme.bits)
            specs.append(TensorSpec(f"{base}.weight_zero_point", (words, groups), torch.int32))
        return specs

    def tensors(self, base: str, weight: Quantized) -> dict[str, torch.Tensor]:
        bits = weight.scheme.bits
        tensors = {
            f"{base}.weight_packed": pack_rows(weight.codes, bits),
            f"{base}.weight_scale": weight.scale.contiguous(),
            f"{base}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not weight.scheme.symmetric:
            tensors[f"{base}.weight_zero_point"] = pack_columns(weight.zero, bits)
        return tensors

    def config(self, scheme: IntScheme, ignore: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        return configuration(self.layout, scheme, ignore)

    def shape(self, reader: TensorReader, base: str, scheme: Any) -> tuple[int, int]:
        rows, columns = reader.read(f"{base}.weight_shape").tolist()
        return rows, columns

    def load(self, reader: TensorReader, base: str, scheme: IntScheme) -> Quantized:
        bits = scheme.bits
        rows, columns = (int(n) for n in part(reader, f"{base}.weight_shape", (2,), bits))
        packed = part(reader, f"{base}.weight_packed", (rows, packed_width(columns, bits)), bits)
        codes, groups = unpack_rows(packed, bits, columns), scheme.groups(columns)
        scale = part(reader, f"{base}.weight_scale", (rows, groups), bits)
        if scheme.symmetric and f"{base}.weight_zero_point" not in reader.tensors:
            zero = torch.full(scale.shape, scheme.midpoint, dtype=torch.uint8)
        else:
            words = part(reader, f"{base}.weight_zero_point", (packed_width(rows, bits), groups), bits)
            zero = unpack_columns(words, bits, rows)
        return Quantized(scheme, codes, scale, zero)


@dataclass(frozen=True)
class EightBit:
    """``int-quantized``, ``float-quantized`` and ``mxfp8-quantized``: ``weight`` holds the codes, one byte each.

    Integers are signed, the code less 128; floats are E4M3.
    """

    layout: str
    name: str = "compressed-tensors"
    marker: str = "weight_scale"
    suffixes: tuple[str, ...] = ("weight", "weight_scale")

    @property
    def decodes_to(self) -> torch.dtype | None:
        """The dtype that loaders decode weights to in any case."""
        return torch.bfloat16 if self.layout == "mxfp8-quantized" else None

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False) -> str | None:
        if reason := _refusal(scheme, transposed=transposed):
            return reason
        whole = isinstance(scheme, FloatScheme) and scheme.group_size == -1
        return FLOAT_EXPERTS if expert and not whole else None

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return weight_dtype

    def specs(
        self, base: str, shape: tuple[int, int], scheme: IntScheme | FloatScheme, dtype: torch.dtype
    ) -> list[TensorSpec]:
        rows = shape[0] if isinstance(scheme, IntScheme) else scheme.bands(shape[0])
        scales = torch.uint8 if self.layout == "mxfp8-quantized" else self.scale_dtype(dtype)
        return [
            TensorSpec(f"{base}.weight", shape, _byte(scheme)),
            TensorSpec(f"{base}.weight_scale", (rows, scheme.groups(shape[1])), scales),
        ]

    def tensors(self, base: str, weight: Quantized | FloatQuantized) -> dict[str, torch.Tensor]:
        integers = isinstance(weight, Quantized)
        codes = weight.codes ^ 0x80 if integers else weight.codes  # less 128, in two's complement
        return {
            f"{base}.weight": codes.contiguous().view(_byte(weight.scheme)),
            f"{base}.weight_scale": weight.scale.contiguous(),
        }

    def config(self, scheme: Scheme, ignore: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        return configuration(self.layout, scheme, ignore)

    def shape(self, reader: TensorReader, base: str, scheme: Any) -> tuple[int, int]:
        rows, columns = shape_of(reader, f"{base}.weight")
        return rows, columns

    def load(self, reader: TensorReader, base: str, scheme: IntScheme | FloatScheme) -> Quantized | FloatQuantized:
        rows, columns = self.shape(reader, base, scheme)
        codes, groups = reader.read(f"{base}.weight"), scheme.groups(columns)
        if codes.dtype != _byte(scheme):
            raise CheckpointError(f"tensor '{base}.weight' is {codes.dtype}, {self.layout} means {_byte(scheme)}")
        codes = codes.view(torch.uint8)
        if isinstance(scheme, IntScheme):
            scale = part(reader, f"{base}.weight_scale", (rows, groups), 8)
            zero = torch.full(scale.shape, scheme.midpoint, dtype=torch.uint8)
            return Quantized(scheme, codes ^ 0x80, scale, zero)
        return FloatQuantized(scheme, codes, part(reader, f"{base}.weight_scale", (scheme.bands(rows), groups), 8))


@dataclass(frozen=True)
class FourBit:
    """``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``: two E2M1 elements a byte, the one of the even column in the low
    half."""

    layout: str
    name: str = "compressed-tensors"
    marker: str = "weight_packed"
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")

    @property
    def decodes_to(self) -> torch.dtype | None:
        """The dtype that loaders decode weights to in any case."""
        return torch.bfloat16

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False) -> str | None:
        return _refusal(scheme, transposed=transposed) or (FLOAT_EXPERTS if expert else None)

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn if self.layout.startswith("nv") else torch.uint8

    def specs(self, base: str, shape: tuple[int, int], scheme: FloatScheme, dtype: torch.dtype) -> list[TensorSpec]:
        (rows, columns), scales = shape, self.scale_dtype(dtype)
        specs = [
            TensorSpec(f"{base}.weight_packed", (rows, columns // 2), torch.uint8),
            TensorSpec(f"{base}.weight_scale", (rows, scheme.groups(columns)), scales),
        ]
        if scheme.scales == "E4M3":
            specs.append(TensorSpec(f"{base}.weight_global_scale", (1,), torch.float32))
            if scheme.inputs is not None:
                specs.append(TensorSpec(f"{base}.input_global_scale", (1,), torch.float32))
        return specs

    def tensors(self, base: str, weight: FloatQuantized) -> dict[str, torch.Tensor]:
        low, high = weight.codes[:, ::2], weight.codes[:, 1::2]
        tensors = {
            f"{base}.weight_packed": (low | high << 4).contiguous(),
            f"{base}.weight_scale": weight.scale.contiguous(),
        }
        if weight.global_scale is not None:
            tensors[f"{base}.weight_global_scale"] = weight.global_scale
        if weight.input_scale is not None:
            tensors[f"{base}.input_global_scale"] = weight.input_scale
        return tensors

    def config(self, scheme: FloatScheme, ignore: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        return configuration(self.layout, scheme, ignore)

    def shape(self, reader: TensorReader, base: str, scheme: Any) -> tuple[int, int]:
        rows, width = shape_of(reader, f"{base}.weight_packed")
        return rows, 2 * width

    def load(self, reader: TensorReader, base: str, scheme: FloatScheme) -> FloatQuantized:
        rows, columns = self.shape(reader, base, scheme)
        packed = part(reader, f"{base}.weight_packed", (rows, columns // 2), 4)
        codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(1)
        scale = part(reader, f"{base}.weight_scale", (rows, scheme.groups(columns)), 4)
        if scheme.scales != "E4M3":
            return FloatQuantized(scheme, codes, scale)
        whole = part(reader, f"{base}.weight_global_scale", (1,), 4)
        inputs = None if scheme.inputs is None else part(reader, f"{base}.input_global_scale", (1,), 4)
        return FloatQuantized(scheme, codes, scale, whole, inputs)


@dataclass(frozen=True)
class MixedPrecision:
    """``mixed-precision``: every weight in the layout of its own scheme."""

    name: str = "compressed-tensors"
    layout: str = "mixed-precision"
    marker: str = "weight_scale"  # every layout has one
    decodes_to: torch.dtype | None = None
    suffixes: tuple[str, ...] = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
                                 "weight_global_scale", "input_global_scale")  # fmt: skip

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False) -> str | None:
        return layout_of(scheme).refusal(scheme, shape, transposed=transposed, expert=expert)

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return weight_dtype

    def specs(self, base: str, shape: tuple[int, int], scheme: Any, dtype: torch.dtype) -> list[TensorSpec]:
        return layout_of(scheme).specs(base, shape, scheme, dtype)

    def tensors(self, base: str, weight: Any) -> dict[str, torch.Tensor]:
        return layout_of(weight.scheme).tensors(base, weight)

    def config(self, scheme: MixedScheme, ignore: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        return mixed_configuration({one: layout_of(one).layout for _, one in scheme.groups}, scheme, ignore)

    def shape(self, reader: TensorReader, base: str, scheme: Any) -> tuple[int, int]:
        return layout_of(scheme).shape(reader, base, scheme)

    def load(self, reader: TensorReader, base: str, scheme: Any) -> Quantized | FloatQuantized:
        return layout_of(scheme).load(reader, base, scheme)


Layout = PackQuantized | EightBit | FourBit
EIGHT = ("int-quantized", "float-quantized", "mxfp8-quantized")
FOUR = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
LAYOUTS: dict[str, Layout] = {
    "pack-quantized": PackQuantized(),
    **{name: EightBit(name) for name in EIGHT},
    **{name: FourBit(name) for name in FOUR},
}
MIXED = MixedPrecision()


def layout_of(scheme: Scheme) -> Layout:
    """The layout that weights of ``scheme`` are stored in."""
    if isinstance(scheme, FloatScheme):
        if scheme.kind == "E2M1":
            return LAYOUTS["nvfp4-pack-quantized" if scheme.scales == "E4M3" else "mxfp4-pack-quantized"]
        return LAYOUTS["mxfp8-quantized" if scheme.scales == "E8M0" else "float-quantized"]
    return LAYOUTS["pack-quantized" if scheme.inputs is None else "int-quantized"]


def _byte(scheme: Scheme) -> torch.dtype:
    """The dtype of codes that take a byte each."""
    return torch.float8_e4m3fn if isinstance(scheme, FloatScheme) else torch.int8


def _refusal(scheme: Scheme, *, transposed: bool) -> str | None:
    """What no layout can hold."""
    if transposed:
        return "its layer is a Conv1D, which compressed-tensors loaders do not replace; use --format gptq or dense"
    if scheme.reordered:
        return "compressed-tensors has no g_idx; use --act-order static, or --format gptq"
    return None
