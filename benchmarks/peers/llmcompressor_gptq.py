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
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def read_tokens(path: Path) -> Any:
    """The calibration windows, int64 [windows, length]."""
    if path.suffix == ".pt":
        import torch

        return torch.load(path, weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)["tokens"]


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


def quantize(args: argparse.Namespace) -> None:
    """Calibrate, quantize, save packed."""
    from llmcompressor import oneshot

    calibration: dict[str, Any] = {}
    if args.method == "gptq":
        from datasets import Dataset

        rows = read_tokens(args.tokens).tolist()
        dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        calibration = {
            "dataset": dataset,
            "num_calibration_samples": len(rows),
            "max_seq_length": len(rows[0]),
            "shuffle_calibration_samples": False,
        }
    oneshot(model=str(args.model), recipe=recipe(args), output_dir=str(args.out), save_compressed=True, **calibration)


def usage(wall: float, import_wall: float) -> dict[str, float]:
    """What this process and its children took: seconds, bytes."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall": round(wall, 3),
        "cpu": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 3),
        "peak_rss": max(own.ru_maxrss, children.ru_maxrss) * 1024,  # Linux counts in KiB
        "import_wall": round(import_wall, 3),
    }


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
    start = time.perf_counter()
    import llmcompressor  # noqa: F401

    import_wall = time.perf_counter() - start
    quantize(args)
    print(json.dumps(usage(time.perf_counter() - start, import_wall)), flush=True)


if __name__ == "__main__":
    main()
