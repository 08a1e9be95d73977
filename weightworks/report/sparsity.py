"""What a pruned checkpoint is worth in bytes and time, in true words: for the terminal and for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sparsity(size: Mapping[str, Any]) -> str:
    """How much was pruned."""
    weights, kept = size["masked_weights"], size["kept_weights"]
    return f"{1 - kept / weights:.2%} of {weights:,} weights are zero, the masks take {size['masks_bytes']:,} bytes"


def weight_on_disk(size: Mapping[str, Any]) -> str:
    """What zeros save on disk."""
    before, after = size["bytes_in"], size["bytes_out"]
    if "bitmask_bytes" not in size:
        return f"{after / before:.2f}x, by quantization alone: a zero takes as many bits as any code"
    bits = size["bitmask_bytes"]
    return (
        f"{after / before:.2f}x, for zeros are stored like other numbers; with a bitmask {bits / before:.2f}x "
        f"({bits:,} bytes, by `compress export --sparse`)"
    )


def factors(size: Mapping[str, Any]) -> str:
    """What the factors beside a product take, and what a model made of them would."""
    before, bare = size["bytes_in"], size["factored_bytes"]
    return (
        f"{size['bytes_out'] / before:.2f}x as the dense product, which stock loaders read; with the factors in its place "
        f"{bare / before:.2f}x ({bare:,} bytes; factors.safetensors takes {size['factors_bytes']:,})"
    )


def factored_run_time() -> str:
    """What factors save in run time."""
    return (
        "none for the dense product; compress.factored.load_factored multiplies by the factors one after the other, which "
        "can be faster where a 2:4 kernel takes the core (not measured here)"
    )


def run_time(options: Mapping[str, Any]) -> str:
    """What zeros save in run time."""
    if options.get("pattern") == "2:4" and options.get("bits") is None:
        return (
            "none in stock transformers, which multiplies zeros like other numbers; GPUs with 2:4 tensor cores can run "
            "this pattern faster through kernels made for it (torch.sparse.to_sparse_semi_structured; not measured here)"
        )
    return "none: engines that load this folder multiply zeros like other numbers"
