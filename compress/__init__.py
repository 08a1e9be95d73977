"""Compression of checkpoints, from Python.

    from compress import evaluate, prune, quantize, recover, select

    outcome = quantize("examples/tiny-llama", bits=4, output_dir="tiny-llama-w4")
    sparse = prune("examples/tiny-llama", pattern="2:4", output_dir="tiny-llama-2of4")
    chosen = select("tiny-llama-2of4", teacher="examples/tiny-llama", dataset="rows.jsonl", output_dir="chosen")
    healed = recover("tiny-llama-2of4", dataset="train.txt", steps=100, output_dir="tiny-llama-healed")
    report = evaluate(["examples/tiny-llama", str(outcome.target)], ["held-out.txt"])

They do what the commands of the same names do. Nothing heavy is imported before the first call.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["evaluate", "prune", "quantize", "recover", "select"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from weightworks.plan.evaluate import evaluate

        return evaluate
    if name in ("prune", "quantize", "recover", "select"):
        return importlib.import_module(f"compress.{name}")
    raise AttributeError(f"module 'compress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
