"""Quantizers and the steps before and after them against plain GPTQ and plain rounding, at 2, 3 and 4 bits.

    python benchmarks/quantizers.py --data DATA

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Calibrates on windows of 256 tokens,
once for each seed; what has no seed runs once. Every output folder is loaded by stock transformers in float32 and scored on
the first tokens of each text in windows of 256. Figures are the geometric mean over the texts of perplexity over the
original's: 1 is no loss; means over seeds, and their range.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from _measure import note, save_json, table
from _ours import HERE, fresh, work_folder
from _perplexity import Texts, geometric_mean, spread
from compress import quantize, recover
from weightworks.store.adapters import Adapter

GRIDS = {2: 32, 3: 128, 4: 128}  # bits, group size
BOOKS = ("NF4", "FP4", "SHIFT4")  # of 4 bits, in groups of 64
HOWS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "gptaq": {"method": "gptq", "asymmetric_calibration": 1.0},
    "gptaq, a quarter": {"method": "gptq", "asymmetric_calibration": 0.25},
    "rtn, rotated": {"method": "rtn", "rotate": True},
    "gptq, rotated": {"method": "gptq", "rotate": True},
    "awq": {"method": "awq", "clip": "off"},
    "awq, clipped": {"method": "awq", "clip": "on"},
    "higgs": {"method": "higgs", "group_size": 128},
    **{f"{method}, {book}": {"method": method, "scheme": book} for book in BOOKS for method in ("rtn", "gptq")},
}
for first in ("rtn", "gptq"):
    HOWS |= {f"{first} and lqer": {"method": first, "format": "dense", "lqer": 32}}  # rank
SEEDLESS = ("rtn", "higgs", *(f"rtn, {book}" for book in BOOKS))


@dataclass(frozen=True)
class Case:
    """One output folder."""

    how: str
    bits: int
    seed: int


def cases(hows: list[str], bits: list[int], seeds: list[int]) -> Iterator[Case]:
    """Everything to measure; what is to be compared comes one after the other."""
    for width in bits:
        for seed in seeds:
            for how in hows:
                if "scheme" in HOWS[how] and width != 4:
                    continue
                if seed == seeds[0] or how not in SEEDLESS:
                    yield Case(how, width, seed)


def make(case: Case, args: argparse.Namespace, out: Path) -> float:
    """Make the folder of ``case``; returns its bits a weight."""
    asked = HOWS[case.how]
    grid = {} if "scheme" in asked else {"bits": case.bits, "group_size": GRIDS[case.bits]}
    options: dict[str, Any] = {**grid, **asked, "seed": case.seed}
    text = {"dataset": str(args.data / "calibration.txt"), "num_samples": args.num_samples, "seq_len": 256}
    rank = options.pop("lqer", None)
    if asked["method"] not in ("rtn", "higgs"):
        options |= text
    quantize(args.model, output_dir=fresh(out), device="cpu", **options)
    if rank is not None:
        return with_adapter(case, rank, text, args, out)
    size = json.loads((out / "provenance.json").read_text())["size"]["bits_a_weight"]
    if asked["method"] == "higgs":  # dense output: bits of codes and scales
        return float(options["bits"] + 16 / options["group_size"])
    return 4.25 if "scheme" in asked else float(size)


def with_adapter(case: Case, rank: int, text: dict[str, Any], args: argparse.Namespace, out: Path) -> float:
    """Add what lqer wins back to the dense weights in ``out``; returns the bits a weight of codes, scales and adapter."""
    folder = fresh(out.parent / "adapter")
    recover(out, method="lqer", teacher=args.model, rank=rank, output_dir=folder, device="cpu", seed=case.seed, **text)
    adapter, tensors = Adapter.open(folder), load_file(out / "model.safetensors")
    weights = extra = 0
    for module in adapter.pairs:
        a, b = adapter.factors(module)
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = weight.float() + b @ a  # no rounding: PEFT adds outputs, not weights
        weights, extra = weights + weight.numel(), extra + a.numel() + b.numel()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return case.bits + 16 / GRIDS[case.bits] + 16 * extra / weights  # of an adapter in 16 bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "tiny-llama")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of texts")
    parser.add_argument("--hows", nargs="+", choices=list(HOWS), default=list(HOWS))
    parser.add_argument("--bits", nargs="+", type=int, choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=5_000, help="of each text")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = Texts.read(parser, args.data, args.model, args.tokens)
    found: dict[tuple[str, int], list[float]] = {}
    sizes: dict[tuple[str, int], float] = {}
    with work_folder(None) as work:
        for case in cases(args.hows, args.bits, args.seeds):
            key = case.how, case.bits
            sizes[key] = make(case, args, work / "out")
            ratios = texts.of(work / "out")
            found.setdefault(key, []).append(geometric_mean(ratios))
            note(f"{case.how}, {case.bits} bits, seed {case.seed}: {found[key][-1]:.4f}")
    rows = []
    for how in args.hows:
        cells = []
        for width in args.bits:
            if (values := found.get((how, width))) is None:
                cells.append("")
                continue
            cells.append(f"{spread(values)} at {sizes[how, width]:.2f}")
        rows.append([how, *cells])
    widths = [f"{width} bits, groups of {GRIDS[width]}" for width in args.bits]
    table(f"Perplexity over the original's, and bits a weight; seeds {args.seeds}", ["", *widths], rows)
    figures = [{"how": how, "bits": bits, "ratios": ratios} for (how, bits), ratios in found.items()]
    save_json(args.json, {"model": str(args.model), "seeds": args.seeds, "figures": figures})


if __name__ == "__main__":
    main()
