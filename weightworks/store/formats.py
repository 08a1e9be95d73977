"""The containers of quantized weights: which tensors stand for a weight, and the configuration that says so.

A format turns a :class:`Quantized` weight into named tensors and back. ``base`` is the tensor's name without ``.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from weightworks.errors import CheckpointError, MethodError, UsageError, nearest
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.packing import (
    IntScheme,
    Quantized,
    pack_columns,
    pack_rows,
    packed_width,
    unpack_columns,
    unpack_rows,
)
from weightworks.store.tensorfile import TensorInfo, TensorSpec

CT_VERSION = "0.20.0"  # the layout below is bit for bit that of this release


class TensorReader(Protocol):
    """Anything that has named tensors: a checkpoint, or one being written."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...


class Format(Protocol):
    """A container of quantized weights."""

    @property
    def name(self) -> str: ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the tensors' names; the first is the codes'."""

    def refusal(
        self, scheme: IntScheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False
    ) -> str | None:
        """Why a weight [out, in] of this scheme cannot be stored, or None; ``expert``: models fuse it with others."""

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored in; codes must be computed against it."""

    def specs(self, base: str, shape: tuple[int, int], scheme: IntScheme, dtype: torch.dtype) -> list[TensorSpec]:
        """The tensors that will stand for the weight."""

    def tensors(self, base: str, weight: Quantized) -> dict[str, torch.Tensor]:
        """The tensors that stand for the weight, as :meth:`specs` announced them."""

    def config(self, scheme: IntScheme, ignore: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""

    def load(self, reader: TensorReader, base: str, scheme: IntScheme) -> Quantized:
        """Read the weight back."""


@dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors ``pack-quantized``: signed codes stored as ``code + 2**(bits-1)``, packed along the inputs."""

    name: str = "compressed-tensors"
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

    def refusal(
        self, scheme: IntScheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False
    ) -> str | None:
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

    def load(self, reader: TensorReader, base: str, scheme: IntScheme) -> Quantized:
        bits = scheme.bits
        rows, columns = (int(n) for n in _part(reader, f"{base}.weight_shape", (2,), bits))
        packed = _part(reader, f"{base}.weight_packed", (rows, packed_width(columns, bits)), bits)
        codes, groups = unpack_rows(packed, bits, columns), scheme.groups(columns)
        scale = _part(reader, f"{base}.weight_scale", (rows, groups), bits)
        if scheme.symmetric and f"{base}.weight_zero_point" not in reader.tensors:
            zero = torch.full(scale.shape, scheme.midpoint, dtype=torch.uint8)
        else:
            words = _part(reader, f"{base}.weight_zero_point", (packed_width(rows, bits), groups), bits)
            zero = unpack_columns(words, bits, rows)
        return Quantized(scheme, codes, scale, zero)


@dataclass(frozen=True)
class Gptq:
    """The GPTQ layout: everything transposed to [in, out]; version 1 stores ``zero - 1``, version 2 ``zero``."""

    name: str = "gptq"
    version: int = 1
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def refusal(
        self, scheme: IntScheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False
    ) -> str | None:
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

    def load(self, reader: TensorReader, base: str, scheme: IntScheme) -> Quantized:
        bits = scheme.bits
        index = reader.read(f"{base}.g_idx")
        columns, rows = index.shape[0], _shape(reader, f"{base}.qweight")[-1]
        groups = _shape(reader, f"{base}.scales")[0]
        scale = _part(reader, f"{base}.scales", (groups, rows), bits).T.contiguous()
        words = _part(reader, f"{base}.qzeros", (groups, packed_width(rows, bits)), bits)
        zero = unpack_rows(words, bits, rows).T.contiguous()
        if self.version == 1:
            zero = (zero + 1) & ((1 << bits) - 1)
        packed = _part(reader, f"{base}.qweight", (packed_width(columns, bits), rows), bits)
        codes = unpack_columns(packed, bits, columns).T.contiguous()
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise CheckpointError(f"tensor '{base}.g_idx' names groups {low} to {high}, there are {groups}")
        plain = torch.equal(index, torch.arange(columns).int() // (columns // groups))
        return Quantized(scheme, codes, scale, zero, None if plain else index)


FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "gptq_v2": Gptq(name="gptq_v2", version=2),
}


def find_format(name: str) -> Format:
    """The format called ``name``."""
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}' ({nearest(name, [*FORMATS, 'dense'])})")
    return FORMATS[name]


def packed_scheme(checkpoint: Checkpoint) -> tuple[Format, IntScheme] | None:
    """Format and scheme of a packed checkpoint, from its ``quantization_config``; None for a dense one.

    Raises :class:`CheckpointError` for a quantization we cannot decode, naming it.
    """
    config = checkpoint.config.get("quantization_config")
    if not config:
        return None
    try:
        known = _scheme(config)
        if known and not (known[1].bits in range(1, 9) and (known[1].group_size == -1 or known[1].group_size > 0)):
            known = None
    except (LookupError, TypeError, AttributeError):  # an entry is missing or of another kind
        known = None
    if known is None:
        kind = f"{config.get('quant_method')}/{config.get('format')}" if isinstance(config, dict) else str(config)
        raise CheckpointError(
            f"{checkpoint.root}: quantized as {kind}, which cannot be decoded",
            hint="known: compressed-tensors pack-quantized, one group; gptq; gptq_v2; start from the dense checkpoint",
        )
    return known


def _shape(reader: TensorReader, name: str) -> tuple[int, ...]:
    if name not in reader.tensors:
        raise CheckpointError(f"no tensor '{name}' ({nearest(name, reader.tensors)})", hint="the weight is incomplete")
    return reader.tensors[name].shape


def _part(reader: TensorReader, name: str, shape: tuple[int, ...], bits: int) -> torch.Tensor:
    """Tensor ``name``, whose shape must be the one that the others and the bit width ask for."""
    seen = _shape(reader, name)
    if seen != shape:
        raise CheckpointError(
            f"{reader.tensors[name].shard}: tensor '{name}' is {list(seen)}, {bits} bits need {list(shape)}",
            hint="quantization_config and tensors disagree, or the layout is older than compressed-tensors 0.18",
        )
    return reader.read(name)


def _scheme(config: Mapping[str, Any]) -> tuple[Format, IntScheme] | None:
    method = config.get("quant_method")
    if method == "gptq":
        version = 2 if config.get("checkpoint_format", config.get("format")) == "gptq_v2" else 1
        scheme = IntScheme(
            config["bits"], config["group_size"], bool(config.get("sym", True)), bool(config.get("desc_act"))
        )
        return FORMATS["gptq_v2" if version == 2 else "gptq"], scheme
    if method == "compressed-tensors" and config.get("format") == "pack-quantized":
        groups = list(config["config_groups"].values())
        weights = groups[0]["weights"]
        reordered = weights.get("actorder") in ("group", "dynamic")  # deprecated: columns go by weight_g_idx
        if len(groups) == 1 and weights["type"] == "int" and not reordered:
            return FORMATS["compressed-tensors"], IntScheme(
                weights["num_bits"], weights.get("group_size") or -1, weights["symmetric"]
            )
    return None
