"""The containers of quantized weights by name, and which of them a checkpoint is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightworks.errors import CheckpointError, UsageError, nearest
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.compressed import CompressedTensors
from weightworks.store.gptqmodel import Gptq
from weightworks.store.layout import Format
from weightworks.store.packing import IntScheme, Scheme

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


def packed_scheme(checkpoint: Checkpoint) -> tuple[Format, Scheme] | None:
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


def _scheme(config: Mapping[str, Any]) -> tuple[Format, Scheme] | None:
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
