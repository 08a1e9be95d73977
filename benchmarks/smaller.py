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
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import note, run, table
from _ours import compress_command, fresh, work_folder
from _perplexity import geometric_mean, perplexities, windows_of

DOMAINS = ("prose", "scripture", "drama", "math", "code")
WINDOWS, SEQ_LEN, TOKENS = 64, 256, 10_000
REPAIR = ["--repair", "least-squares"]


def channels(share: float, *more: str) -> list[str]:
    return ["--method", "structured", "--sparsity", str(share), *more]


def heads(share: float, *more: str) -> list[str]:
    return ["--method", "structured", "--sparsity", "0", "--head-sparsity", str(share), *more]


METHODS = {
    "channels 25 %": channels(0.25),
    "channels 25 %, repaired": channels(0.25, *REPAIR),
    "channels 50 %": channels(0.5),
    "channels 50 %, repaired": channels(0.5, *REPAIR),
    "heads 25 %, groups": heads(0.25),
    "heads 25 %, groups, repaired": heads(0.25, *REPAIR),
    "heads 50 %, groups, repaired": heads(0.5, *REPAIR),
    "heads 50 %, queries, repaired": heads(0.5, *REPAIR, "--head-unit", "query"),
    "shortgpt, 1 block": ["--method", "shortgpt", "--layers", "1"],
    "shortgpt, 2 blocks": ["--method", "shortgpt", "--layers", "2"],
    "laco, 2 blocks a merge": ["--method", "laco", "--merge-layers", "2", "--threshold", "0.7"],
    "laco, 3 blocks a merge": ["--method", "laco", "--merge-layers", "3", "--threshold", "0.45"],
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
    text = ["--dataset", data / "calibration.txt", "--num-samples", str(WINDOWS), "--seq-len", str(SEQ_LEN)]
    settings = [*text, "--seed", str(case.seed), "--dtype", "float32", "--overwrite", "--no-resume", "-q", "-o", out]
    words = [compress_command(), "prune", case.model, *METHODS[case.method], *settings]
    done = run(words, env={"OMP_NUM_THREADS": "1"}, check=False)
    if not out.is_dir():
        note(f"{case.key}: {done.stderr.strip().splitlines()[0][:150]}")
        return None
    return out


def scored(folder: Path, windows: list[Any]) -> dict[str, float]:
    """Perplexity, and the CPU seconds of this process that it took, loading apart."""
    started = time.process_time()
    value = geometric_mean(perplexities(folder, windows))
    return {"perplexity": value, "seconds": time.process_time() - started}


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Whatever ``found`` lacks."""
    texts = [args.data / f"{domain}.test.txt" for domain in DOMAINS]
    with work_folder(args.work) as work:
        for model in args.models:
            windows = [windows_of(text, model, TOKENS) for text in texts]
            found.setdefault(model.name, scored(model, windows))
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
    os.environ["OMP_NUM_THREADS"] = "1"
    measure(args, found)
    for model in args.models:
        dense = found[model.name]["perplexity"]
        title = f"{model.name}, dense {dense:.2f}: mean of seeds {' '.join(map(str, args.seeds))}"
        table(title, ["", "parameters", "work a token", "CPU", "perplexity"], list(rows_of(args, model, found)))


if __name__ == "__main__":
    main()
