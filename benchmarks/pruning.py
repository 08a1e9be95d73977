"""What pruning costs in perplexity: every method of the shelf, two models, several patterns and calibration seeds.

    python benchmarks/pruning.py --data DATA --models MODEL [MODEL ...] [--json RESULTS.json]

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Methods calibrate on 64 windows
of 256 tokens, in float32; every output folder is loaded by stock transformers in float32 and scored on the first 10,000
tokens of each text in windows of 256. Figures are the geometric mean of the five perplexities; means over seeds, and the
range. Magnitude has no seed. Results are kept in RESULTS.json as they come, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from _measure import note, table
from _ours import fresh, work_folder
from _perplexity import geometric_mean, perplexities, windows_of
from compress import prune

DOMAINS = ("prose", "scripture", "drama", "math", "code")
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
WINDOWS, SEQ_LEN, TOKENS = 64, 256, 10_000
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude, global": {"method": "magnitude", "scope": "global"},
    "wanda": {"method": "wanda"},
    "wanda + owl": {"method": "wanda", "budget": "owl"},
    "wanda + dsnot": {"method": "wanda", "repair": "dsnot"},
    "ria": {"method": "ria"},
    "obert": {"method": "obert"},
    "obert, matrix-free": {"method": "obert", "fisher": "matrix-free"},
    "sparsegpt, as published": {"method": "sparsegpt", "act_order": "none", "refine": 0},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt + owl": {"method": "sparsegpt", "budget": "owl"},
    "sparsegpt + dsnot": {"method": "sparsegpt", "repair": "dsnot"},
}


@dataclass(frozen=True)
class Case:
    """One output folder."""

    model: Path
    method: str
    pattern: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.model.name} | {self.method} | {self.pattern} | {self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        amount = {"pattern": self.pattern} if ":" in self.pattern else {"sparsity": float(self.pattern)}
        return {**METHODS[self.method], **amount}


def possible(method: str, pattern: str) -> bool:
    """N:M takes the same share everywhere, so nothing can be shared out."""
    return ":" not in pattern or not ("global" in method or "owl" in method)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything to measure, one seed of all before the next."""
    for number, seed in enumerate(args.seeds):
        for model in args.models:
            for method in args.methods:
                for pattern in args.patterns:
                    if possible(method, pattern) and (number == 0 or not method.startswith("magnitude")):
                        yield Case(model, method, pattern, seed)


def pruned(case: Case, data: Path, work: Path) -> Path:
    """Make the folder of ``case``."""
    out = fresh(work / "out")
    text = {"dataset": str(data / "calibration.txt"), "num_samples": WINDOWS, "seq_len": SEQ_LEN}
    prune(case.model, **case.options, **text, seed=case.seed, dtype="float32", resume=False, output_dir=out)
    return out


def rows_of(args: argparse.Namespace, model: Path, found: Mapping[str, float]) -> Iterator[list[str]]:
    """One row a method: mean over seeds and range, pattern by pattern."""
    for method in args.methods:
        row = [method]
        for pattern in args.patterns:
            keys = [Case(model, method, pattern, seed).key for seed in args.seeds]
            values = [found[key] for key in keys if key in found]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), help="shares of weights removed, or N:M")
    parser.add_argument("--work", type=Path, help="keep the last output in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here, and do not measure again what is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = [args.data / f"{domain}.test.txt" for domain in DOMAINS]
    if missing := [str(path) for path in (args.data / "calibration.txt", *texts) if not path.is_file()]:
        parser.error(f"--data: not found: {', '.join(missing)}")
    windows = {model: [windows_of(text, model, TOKENS) for text in texts] for model in args.models}
    found: dict[str, float] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    for model in args.models:
        if model.name not in found:
            found[model.name] = geometric_mean(perplexities(model, windows[model]))
    with work_folder(args.work) as work:
        for case in cases(args):
            if case.key not in found:
                found[case.key] = geometric_mean(perplexities(pruned(case, args.data, work), windows[case.model]))
                note(f"{case.key}: {found[case.key]:.3f}")
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1) + "\n")
    for model in args.models:
        title = (
            f"{model.name}, dense {found[model.name]:.2f}: perplexity, mean of seeds {' '.join(map(str, args.seeds))}"
        )
        table(title, ["", *args.patterns], list(rows_of(args, model, found)))


if __name__ == "__main__":
    main()
