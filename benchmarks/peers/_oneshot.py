"""What all runs of llm-compressor share: tokens in, one call, what it cost. Imported in the peer's own environment."""

from __future__ import annotations

import importlib
import json
import os
import resource
import time
from collections.abc import Callable
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


def oneshot(model: Path, recipe: Any, out: Path, tokens: Path | None, **keywords: Any) -> Any:
    """Apply ``recipe`` on the windows of ``tokens``, in their order, and save; returns the model."""
    import llmcompressor

    calibration: dict[str, Any] = {}
    if tokens is not None:
        from datasets import Dataset

        rows = read_tokens(tokens).tolist()
        dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        calibration = {
            "dataset": dataset,
            "num_calibration_samples": len(rows),
            "max_seq_length": len(rows[0]),
            "shuffle_calibration_samples": False,
        }
    return llmcompressor.oneshot(model=str(model), recipe=recipe, output_dir=str(out), **calibration, **keywords)


def usage(wall: float, import_wall: float) -> dict[str, float]:
    """What this process and its children took: seconds, bytes."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall": round(wall, 3),
        "cpu": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 3),
        "peak_rss": max(own.ru_maxrss, children.ru_maxrss) * 1024,  # Linux counts in KiB
        "import_wall": round(import_wall, 3),
    }


def measured(work: Callable[[], None]) -> None:
    """Do ``work`` and print what it and the import took, as JSON on the last line."""
    start = time.perf_counter()
    importlib.import_module("llmcompressor")  # what it takes to start is told apart

    import_wall = time.perf_counter() - start
    work()
    print(json.dumps(usage(time.perf_counter() - start, import_wall)), flush=True)
