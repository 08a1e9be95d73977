"""Quantizes a checkpoint with llm-compressor and says what it cost. Runs inside the peer's own environment.

    python3.11 -m venv PEER && PEER/bin/pip install torch==2.13.0 && PEER/bin/pip install llmcompressor==0.14.0
    PEER/bin/python benchmarks/peers/llmcompressor_gptq.py MODEL OUT TOKENS.safetensors --bits 4 --group-size 128

TOKENS holds the calibration windows, int64 [windows, length], as ``.safetensors`` (key ``tokens``) or ``.pt``. Settings
are the peer's defaults (activation order ``static``, damping 0.01, batches of 1, sequential calibration) except that
samples are not shuffled and ``lm_head`` is left alone, as ours is. No network is used. The last line of stdout is JSON:
seconds, and bytes for the peak.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _oneshot import measured, oneshot


def recipe(args: argparse.Namespace) -> Any:
    """The peer's modifier for what was asked."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(
        num_bits=args.bits,
        type="int",
        symmetric=args.sym,
        strategy="group" if args.group_size > 0 else "channel",
        group_size=args.group_size if args.group_size > 0 else None,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if args.method == "rtn":
        return QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    order = {} if args.act_order == "static" else {"actorder": None if args.act_order == "none" else args.act_order}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"], **order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path, help="not read by --method rtn")
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group a row")
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--act-order", choices=["static", "none", "group", "weight"], default="static")
    args = parser.parse_args()
    tokens = args.tokens if args.method == "gptq" else None
    measured(lambda: oneshot(args.model, recipe(args), args.out, tokens, save_compressed=True))


if __name__ == "__main__":
    main()
