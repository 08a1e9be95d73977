"""The layouts of compressed-tensors, bit for bit those of release 0.20."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.store.layout import TensorReader, part
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

CT_VERSION = "0.20.0"


@dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors ``pack-quantized``: signed codes stored as ``code + 2**(bits-1)``, packed along the inputs."""

    name: str = "compressed-tensors"
    marker: str = "weight_packed"
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False) -> str | None:
        if transposed:
            return "its layer is a Conv1D, which compressed-tensors loaders do not replace; use --format gptq or dense"
        if scheme.reordered:
            return "compressed-tensors has no g_idx; use --act-order static, or --format gptq"
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
        channel = scheme.group_size == -1
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "version": CT_VERSION,
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(ignore),
            "config_groups": {"group_0": group},
        }

    def shape(self, reader: TensorReader, base: str) -> tuple[int, int]:
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
