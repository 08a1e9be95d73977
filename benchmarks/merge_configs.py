"""Runs the same mergekit configurations with `merge config` and with mergekit, and compares the tensors.

    python benchmarks/merge_configs.py --base BASE --models A B C --work DIR --peer-python PEER/bin/python

One configuration for each method that mergekit 0.1.5 registers, with weights and densities of their own for each model,
gradients and filters, and one that stacks layers. Both compute and write float32. `relative` is the norm of the difference
between the two results over that of what the merge changed (for merges without a base: of the result). Random
methods draw other numbers, so for them the ratio of the norms of what was changed is told instead. The peer's
environment is that of merge_vs_peer.py.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from _measure import note, run, save_json, table
from weightworks.store.checkpoint import Checkpoint

PER_MODEL = [
    {"weight": 0.5, "density": 0.6},
    {"weight": [0.2, 0.7], "density": [0.9, 0.4]},
    {"weight": [{"filter": "mlp", "value": 0.6}, {"value": 0.3}], "density": 0.5},
]
METHODS: dict[str, tuple[int, dict[str, Any]]] = {  # how many models beside the base, and parameters of the file
    "linear": (3, {}),
    "slerp": (1, {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}]}),
    "nuslerp": (2, {}),
    "multislerp": (3, {}),
    "karcher": (3, {}),
    "task_arithmetic": (3, {"lambda": 0.8}),
    "ties": (3, {"lambda": 1.1}),
    "dare_linear": (3, {}),
    "dare_ties": (3, {}),
    "breadcrumbs": (3, {"gamma": 0.02}),
    "breadcrumbs_ties": (3, {}),
    "della": (3, {"epsilon": 0.05}),
    "della_linear": (3, {"epsilon": 0.05}),
    "model_stock": (3, {}),
    "sce": (3, {"select_topk": 0.5}),
    "nearswap": (1, {"t": 0.0005}),
    "ram": (3, {"epsilon": 0.0002}),
    "ramplus_tl": (3, {"epsilon": 0.0002}),
    "arcee_fusion": (1, {}),
    "passthrough": (1, {}),
}
BASELESS = ("linear", "karcher", "passthrough")
WEIGHTED = ("linear", "nuslerp", "multislerp")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear", "arcee_fusion")


def configuration(method: str, base: Path, models: list[Path], layers: int) -> dict[str, Any]:
    """The configuration of one method; JSON is YAML."""
    count, parameters = METHODS[method]
    document: dict[str, Any] = {"merge_method": method, "dtype": "float32", "out_dtype": "float32"}
    if method == "passthrough":
        half = layers // 2
        document["slices"] = [
            {"sources": [{"model": str(models[0]), "layer_range": [0, layers - 1]}]},
            {
                "sources": [{"model": str(models[1]), "layer_range": [half, layers]}],
                "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]},
            },
        ]
        return document
    names = ("weight",) if method in WEIGHTED else ("weight", "density")
    given = [{name: one[name] for name in names} for one in PER_MODEL]
    document["models"] = [
        {"model": str(model), "parameters": own} for model, own in zip(models[:count], given, strict=False)
    ]
    if method not in BASELESS:
        document["base_model"] = str(base)
    return {**document, "parameters": parameters} if parameters else document


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name, torch.float64) for name in checkpoint.tensors}


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, float]:
    """The norm of the difference over that of the changes, that of our changes over theirs, the share of other elements."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    apart = mine = changed = others = total = 0.0
    for name, value in theirs.items():
        start = base[name] if base is not None else torch.zeros_like(value)
        apart += float((ours[name] - value).square().sum())
        mine += float((ours[name] - start).square().sum())
        changed += float((value - start).square().sum())
        others += int(((ours[name] - value).abs() > 1e-6 * value.abs().max()).sum())
        total += value.numel()
    return {"relative": math.sqrt(apart / changed), "norms": math.sqrt(mine / changed), "others": others / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs=3, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for configurations and outputs")
    parser.add_argument(
        "--peer-python", type=Path, required=True, metavar="PATH", help="the Python of mergekit's environment"
    )
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = tensors(args.base)
    layers = json.loads((args.base / "config.json").read_text())["num_hidden_layers"]
    rows, result = [], {}
    for method in args.only:
        note(method)
        file = args.work / f"{method}.yaml"
        file.write_text(
            json.dumps(configuration(method, args.base.resolve(), [one.resolve() for one in args.models], layers))
        )
        ours, theirs = args.work / f"{method}-ours", args.work / f"{method}-mergekit"
        for folder in (ours, theirs):
            shutil.rmtree(folder, ignore_errors=True)
        program = "from cli.program import merge; merge()"
        run([sys.executable, "-c", program, "config", file, "-o", ours, "-q", "--check", "files"])
        run([args.peer_python.parent / "mergekit-yaml", file, theirs, "--random-seed", "0"])
        result[method] = found = compared(tensors(ours), tensors(theirs), None if method in BASELESS else base)
        rows.append(
            [
                method,
                "random" if method in RANDOM else f"{found['relative']:.1e}",
                f"{found['norms']:.5f}",
                f"{found['others']:.2%}",
            ]
        )
    table(
        "`merge config` and mergekit on the same configurations",
        ["method", "relative", "norms", "other elements"],
        rows,
    )
    save_json(args.json, result)


if __name__ == "__main__":
    main()
