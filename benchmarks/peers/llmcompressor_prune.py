"""Prunes a checkpoint with llm-compressor and says what it cost. Runs inside the peer's own environment.

    python3.11 -m venv PEER && PEER/bin/pip install torch==2.13.0 && PEER/bin/pip install llmcompressor==0.14.0
    PEER/bin/python benchmarks/peers/llmcompressor_prune.py MODEL OUT TOKENS.safetensors --method wanda --sparsity 0.5

Settings are the peer's defaults (damping 0.01, blocks of 128 columns, batches of 1, sequential calibration) except that
samples are not shuffled. The peer prunes the linear layers inside its ``targets``: these must be the decoder layers, found
here as the class of what the model's longest list of modules holds. With ``targets="Linear"``, its default, nothing is
inside them and nothing is pruned, and success is reported. No network is used. The last line of stdout is JSON: seconds, and
bytes for the peak.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _oneshot import measured, oneshot


def decoder_layer(model: Path) -> str:
    """The class of the model's decoder layers, by its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    lists = [module for module in whole.modules() if isinstance(module, torch.nn.ModuleList)]
    return type(max(lists, key=len)[0]).__name__


def recipe(args: argparse.Namespace) -> Any:
    """The peer's modifier for what was asked; of its N:M the first number is what is removed, which for 2:4 is the same."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[args.method]
    structure = args.pattern if ":" in args.pattern else "0:0"
    layers = [decoder_layer(args.model)]
    return modifier(sparsity=args.sparsity, mask_structure=structure, targets=layers, ignore=["re:.*lm_head"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--method", choices=["sparsegpt", "wanda"], default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", choices=["unstructured", "2:4"], default="unstructured")
    args = parser.parse_args()
    dense = {"pipeline": "sequential", "save_compressed": False}
    measured(lambda: oneshot(args.model, recipe(args), args.out, args.tokens, **dense))


if __name__ == "__main__":
    main()
