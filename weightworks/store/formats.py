"""The containers of quantized weights by name, and which of them a checkpoint is in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weightworks.errors import CheckpointError, UsageError, nearest
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.compressed import LAYOUTS, MIXED, layout_of
from weightworks.store.gptqmodel import Gptq
from weightworks.store.layout import Format
from weightworks.store.mixed import MixedScheme, all_of
from weightworks.store.packing import IntScheme, Scheme
from weightworks.store.quantargs import scheme_of

FORMATS: dict[str, Format] = {
    "compressed-tensors": LAYOUTS["pack-quantized"],
    "gptq": Gptq(),
    "gptq_v2": Gptq(name="gptq_v2", version=2),
}


def find_format(name: str, scheme: Scheme | None = None) -> Format:
    """The format called ``name``, in the layout that fits ``scheme``."""
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}' ({nearest(name, [*FORMATS, 'dense'])})")
    return layout_of(scheme) if name == "compressed-tensors" and scheme is not None else FORMATS[name]


def packed_scheme(checkpoint: Checkpoint) -> tuple[Format, Scheme | MixedScheme] | None:
    """Format and scheme of a packed checkpoint, from its ``quantization_config``; None for a dense one.

    Raises :class:`CheckpointError` for a quantization we cannot decode, naming it.
    """
    config = checkpoint.config.get("quantization_config")
    if not config:
        return None
    try:
        known = _scheme(config)
        if known and not all(
            one.bits in range(1, 9) and (one.group_size == -1 or one.group_size > 0) for one in all_of(known[1])
        ):
            known = None
    except (LookupError, TypeError, AttributeError, re.error):  # an entry is missing or of another kind
        known = None
    if known is None:
        kind = f"{config.get('quant_method')}/{config.get('format')}" if isinstance(config, dict) else str(config)
        raise CheckpointError(
            f"{checkpoint.root}: quantized as {kind}, which cannot be decoded",
            hint="known: compressed-tensors in its integer, FP8, FP4 and MX layouts; gptq; gptq_v2; "
            "start from the dense checkpoint",
        )
    return known


def _scheme(config: Mapping[str, Any]) -> tuple[Format, Scheme | MixedScheme] | None:
    method = config.get("quant_method")
    if method == "gptq":
        version = 2 if config.get("checkpoint_format", config.get("format")) == "gptq_v2" else 1
        scheme = IntScheme(
            config["bits"], config["group_size"], bool(config.get("sym", True)), bool(config.get("desc_act"))
        )
        return FORMATS["gptq_v2" if version == 2 else "gptq"], scheme
    if method == "compressed-tensors":
        return _compressed(config)
    return None


def _compressed(config: Mapping[str, Any]) -> tuple[Format, Scheme | MixedScheme] | None:
    """compressed-tensors: one group of layers, or several, each in the layout that it or else the whole names."""
    groups = list(config["config_groups"].values())
    schemes = []
    for group in groups:
        found = scheme_of(group)
        if found is None or layout_of(found).layout != (group.get("format") or config["format"]):
            return None
        schemes.append(found)
    if len(groups) == 1:
        return layout_of(schemes[0]), schemes[0]
    if not groups:
        return None
    targets = [tuple(group["targets"]) for group in groups]
    mixed = MixedScheme(tuple(zip(targets, schemes, strict=True)))
    mixed.of("")  # expressions that are none are found here
    return MIXED, mixed
