"""Schemes as the configuration of compressed-tensors says them, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightworks.store.floats import FloatScheme
from weightworks.store.inputs import InputScheme
from weightworks.store.mixed import MixedScheme
from weightworks.store.packing import IntScheme, Scheme

CT_VERSION = "0.20.0"
FLOATS = (
    FloatScheme("E4M3", -1),
    FloatScheme("E4M3", 128, rows=128),
    FloatScheme("E4M3", 32, "E8M0"),
    FloatScheme("E2M1", 32, "E8M0"),
    FloatScheme("E2M1", 16, "E4M3"),
)
INPUTS = (
    InputScheme("INT8"),
    InputScheme("E4M3"),
    InputScheme("E4M3", 128),
    InputScheme("E4M3", 32, "E8M0"),
    InputScheme("E2M1", 32, "E8M0"),
    InputScheme("E2M1", 16, "E4M3"),
)
SCALES = {"E8M0": "torch.uint8", "E4M3": "torch.float8_e4m3fn"}  # plain ones are in no dtype of their own


def configuration(layout: str, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model all of whose linear layers but ``ignore`` are of one scheme."""
    return _whole(layout, {"group_0": _group(["Linear"], scheme)}, ignore)


def mixed_configuration(layouts: Mapping[Scheme, str], mixed: MixedScheme, ignore: Sequence[str]) -> dict[str, Any]:
    """That of a model whose layers are of several schemes, each in the layout that ``layouts`` names."""
    groups = {
        f"group_{number}": {**_group(targets, scheme), "format": layouts[scheme]}
        for number, (targets, scheme) in enumerate(mixed.groups)
    }
    return _whole("mixed-precision", groups, ignore)


def _whole(layout: str, groups: Mapping[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    """A ``quantization_config`` around its groups."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "version": CT_VERSION,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": dict(groups),
    }


def _group(targets: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    """An entry of ``config_groups``."""
    inputs = None if scheme.inputs is None else _input_arguments(scheme.inputs)
    return {
        "targets": list(targets),
        "weights": _arguments(scheme),
        "input_activations": inputs,
        "output_activations": None,
    }


def scheme_of(group: Mapping[str, Any]) -> IntScheme | FloatScheme | None:
    """The scheme that an entry of ``config_groups`` means; None for one that is not known."""
    weights, inputs = group["weights"], group.get("input_activations")
    if weights.get("actorder") in ("group", "dynamic"):  # deprecated: columns go by weight_g_idx
        return None
    asked = None if inputs is None else next((one for one in INPUTS if _agree(inputs, _input_arguments(one))), None)
    if (asked is None) != (inputs is None):
        return None
    if weights["type"] == "int":
        return IntScheme(weights["num_bits"], weights.get("group_size") or -1, weights["symmetric"], inputs=asked)
    known = (replace(one, inputs=asked) for one in FLOATS)
    return next((one for one in known if _agree(weights, _arguments(one))), None)


def _arguments(scheme: Scheme) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of weights."""
    size = None if scheme.group_size == -1 else scheme.group_size
    facts: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    if not isinstance(scheme, FloatScheme):
        return facts
    if scheme.rows > 1:
        blocks = {"strategy": "block", "group_size": None, "block_structure": [scheme.rows, scheme.group_size]}
        return facts | {"type": "float"} | blocks
    local = {"strategy": "tensor_group"} if scheme.scales == "E4M3" else {}
    return facts | {"type": "float"} | _scale_arguments(scheme.scales) | local


def _input_arguments(inputs: InputScheme) -> dict[str, Any]:
    """The same of inputs."""
    local, size = inputs.scales == "E4M3", None if inputs.group_size == -1 else inputs.group_size
    return {
        "num_bits": 4 if inputs.kind == "E2M1" else 8,
        "type": "int" if inputs.kind == "INT8" else "float",
        "symmetric": True,
        "strategy": "tensor_group" if local else "token" if size is None else "group",
        "group_size": size,
        "dynamic": "local" if local else True,
        "observer": "static_minmax" if local else None,
        **_scale_arguments(inputs.scales),
    }


def _scale_arguments(scales: str) -> dict[str, Any]:
    """The part of them that says how scales are stored."""
    return {} if scales == "plain" else dict.fromkeys(("scale_dtype", "zp_dtype"), SCALES[scales])


def _agree(these: Mapping[str, Any], those: Mapping[str, Any]) -> bool:
    """Whether two sets of arguments mean the same numbers."""
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure", "scale_dtype")
    return all(these.get(key) == those.get(key) for key in keys)
