"""What making a model smaller costs in perplexity and saves in work: units, blocks, and how what goes is chosen.

    python benchmarks/smaller.py --data DATA --models MODEL [MODEL ...] [--json RESULTS.json]

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Methods calibrate on 64 windows
of 256 tokens, in float32; every output folder is loaded by stock transformers in float32 and scored on the first 10,000
tokens of each text in windows of 256. ``perplexity`` is the geometric mean of the five, a mean over seeds with its range;
``CPU`` the seconds of one thread that scoring all of them takes, the least of the seeds, relative to the dense model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from _measure import note, table
from _ours import fresh, work_folder
from _perplexity import geometric_mean, perplexities, windows_of
from compress import prune
from weightworks.errors import WeightworksError

DOMAINS = ("prose", "scripture", "drama", "math", "code")
WINDOWS, SEQ_LEN, TOKENS = 64, 256, 10_000
CHANNELS: dict[str, Any] = {"method": "structured"}
HEADS: dict[str, Any] = {"method": "structured", "sparsity": 0.0}
REPAIR = {"repair": "least-squares"}
TAYLOR = {"importance": "taylor"}
METHODS: dict[str, dict[str, Any]] = {
    **{
        f"{share:.0%} of channels{name}": {**CHANNELS, "sparsity": share, **more}
        for share in (0.25, 0.5)
        for name, more in {
            "": {},
            ", taylor": TAYLOR,
            ", repaired": REPAIR,
            ", taylor, repaired": {**TAYLOR, **REPAIR},
        }.items()
    },
    **{
        f"{share:.0%} of heads{name}": {**HEADS, "head_sparsity": share, **more}
        for share, name, more in (
            (0.5, ", groups", {}),
            (0.5, ", groups, repaired", REPAIR),
            (0.5, ", groups, taylor, repaired", {**TAYLOR, **REPAIR}),
            (0.5, ", queries, repaired", {**REPAIR, "head_unit": "query"}),
        )
    },
    "shortgpt, 1 block": {"method": "shortgpt", "layers": 1},
    "shortgpt, 2 blocks": {"method": "shortgpt", "layers": 2},
    "laco, 2 blocks a merge, alike by 0.9": {"method": "laco", "merge_layers": 2, "threshold": 0.9},
    "laco, 3 blocks a merge, alike by 0.45": {"method": "laco", "merge_layers": 3},
}


@dataclass(frozen=True)
class Case:
    """One output folder."""

    model: Path
    method: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.model.name} | {self.method} | {self.seed}"


def make(case: Case, data: Path, work: Path) -> Path | None:
    """Make the folder of ``case``; None if the model cannot be made smaller so (heads of OPT have no configuration)."""
    out = fresh(work / "out")
    text = {"dataset": str(data / "calibration.txt"), "num_samples": WINDOWS, "seq_len": SEQ_LEN}
    settings = {**text, "seed": case.seed, "dtype": "float32", "resume": False}
    try:
        prune(case.model, **METHODS[case.method], **settings, output_dir=out)
    except WeightworksError as error:
        note(f"{case.key}: {str(error)[:150]}")
        return None
    return out


def scored(folder: Path, windows: list[Any]) -> dict[str, float]:
    """Perplexity, and the CPU seconds of this process that it took, loading included."""
    started = time.process_time()
    value = geometric_mean(perplexities(folder, windows))
    return {"perplexity": value, "seconds": time.process_time() - started}


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Whatever ``found`` lacks."""
    texts = [args.data / f"{domain}.test.txt" for domain in DOMAINS]
    with work_folder(args.work) as work:
        for model in args.models:
            windows = [windows_of(text, model, TOKENS) for text in texts]
            if model.name not in found:
                scored(model, windows)  # the first is slower
                found[model.name] = scored(model, windows)
            for case in (Case(model, method, seed) for seed in args.seeds for method in args.methods):
                if case.key in found:
                    continue
                folder = make(case, args.data, work)
                found[case.key] = None
                if folder is not None:
                    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["reduction"]
                    found[case.key] = {**scored(folder, windows), **facts}
                    note(f"{case.key}: {found[case.key]['perplexity']:.3f}")
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1) + "\n")


def rows_of(args: argparse.Namespace, model: Path, found: Mapping[str, Any]) -> Iterator[list[str]]:
    """One row a method."""
    dense = found[model.name]
    for method in args.methods:
        results = [one for seed in args.seeds if (one := found.get(Case(model, method, seed).key)) is not None]
        if not results:
            continue
        values = [one["perplexity"] for one in results]
        first = results[0]
        yield [
            method,
            f"{first['parameters_out'] / first['parameters_in']:.1%}",
            f"{first['multiply_adds_out'] / first['multiply_adds_in']:.1%}",
            f"{min(one['seconds'] for one in results) / dense['seconds']:.2f}",
            f"{statistics.mean(values):.2f}"
            + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--work", type=Path, help="keep the last output in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here, and do not measure again what is")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    torch.set_num_threads(1)
    measure(args, found)
    for model in args.models:
        dense = found[model.name]["perplexity"]
        title = f"{model.name}, dense {dense:.2f}: mean of seeds {' '.join(map(str, args.seeds))}"
        table(title, ["", "parameters", "work a token", "CPU", "perplexity"], list(rows_of(args, model, found)))


if __name__ == "__main__":
    main()
