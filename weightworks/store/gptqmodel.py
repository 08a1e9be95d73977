"""The layouts of GPTQ, versions 1 and 2, as GPTQModel and its loaders read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.errors import CheckpointError, MethodError
from weightworks.store.layout import TensorReader, part, shape_of
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
from weightworks.store.tensorfile import TensorSpec


@dataclass(frozen=True)
class Gptq:
    """The GPTQ layout: everything transposed to [in, out]; version 1 stores ``zero - 1``, version 2 ``zero``."""

    name: str = "gptq"
    version: int = 1
    marker: str = "qweight"
    decodes_to: torch.dtype | None = None
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False) -> str | None:
        if not isinstance(scheme, IntScheme) or scheme.inputs is not None:
            return "the gptq layout holds integers alone; use --format compressed-tensors"
        if shape[0] % 32 or shape[1] % 32:
            return f"its shape {list(shape)} must be multiples of 32 for the gptq layout"
        return None

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def specs(self, base: str, shape: tuple[int, int], scheme: IntScheme, dtype: torch.dtype) -> list[TensorSpec]:
        (rows, columns), groups = shape, scheme.groups(shape[1])
        return [
            TensorSpec(f"{base}.qweight", (packed_width(columns, scheme.bits), rows), torch.int32),
            TensorSpec(f"{base}.qzeros", (groups, packed_width(rows, scheme.bits)), torch.int32),
            TensorSpec(f"{base}.scales", (groups, rows), torch.float16),
            TensorSpec(f"{base}.g_idx", (columns,), torch.int32),
        ]

    def tensors(self, base: str, weight: Quantized) -> dict[str, torch.Tensor]:
        bits, columns = weight.scheme.bits, weight.codes.shape[1]
        index = weight.group_index
        if index is None:
            index = torch.arange(columns, dtype=torch.int32) // (columns // weight.scale.shape[1])
        # Version 1 loaders add one to the whole word of zero points, so zero = 0 would carry into its neighbour.
        if self.version == 1 and not weight.zero.all():
            raise MethodError(f"{base}: zero point 0 cannot be stored in gptq version 1, lowest 1", hint="use gptq_v2")
        zero = weight.zero - 1 if self.version == 1 else weight.zero
        return {
            f"{base}.qweight": pack_columns(weight.codes.T, bits),
            f"{base}.qzeros": pack_rows(zero.T, bits),
            f"{base}.scales": weight.scale.T.to(torch.float16).contiguous(),
            f"{base}.g_idx": index.to(torch.int32),
        }

    def config(self, scheme: IntScheme, ignore: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        layout = "gptq" if self.version == 1 else "gptq_v2"
        return {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "desc_act": scheme.reordered,
            "sym": scheme.symmetric,
            "lm_head": False,
            "format": layout,
            "checkpoint_format": layout,
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": facts.get("damp_percent", 0.01),
            "static_groups": facts.get("static_groups", False),
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignore if name != "lm_head"} or None,
            "meta": {"quantizer": [facts["quantizer"]]},
        }

    def shape(self, reader: TensorReader, base: str, scheme: Any) -> tuple[int, int]:
        return shape_of(reader, f"{base}.qweight")[1], shape_of(reader, f"{base}.g_idx")[0]

    def load(self, reader: TensorReader, base: str, scheme: IntScheme) -> Quantized:
        bits = scheme.bits
        index = reader.read(f"{base}.g_idx")
        columns, rows = index.shape[0], shape_of(reader, f"{base}.qweight")[-1]
        groups = shape_of(reader, f"{base}.scales")[0]
        scale = part(reader, f"{base}.scales", (groups, rows), bits).T.contiguous()
        words = part(reader, f"{base}.qzeros", (groups, packed_width(rows, bits)), bits)
        zero = unpack_rows(words, bits, rows).T.contiguous()
        if self.version == 1:
            zero = (zero + 1) & ((1 << bits) - 1)
        packed = part(reader, f"{base}.qweight", (packed_width(columns, bits), rows), bits)
        codes = unpack_columns(packed, bits, columns).T.contiguous()
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise CheckpointError(f"tensor '{base}.g_idx' names groups {low} to {high}, there are {groups}")
        plain = torch.equal(index, torch.arange(columns).int() // (columns // groups))
        return Quantized(scheme, codes, scale, zero, None if plain else index)
