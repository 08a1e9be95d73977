"""What training after pruning wins back, in perplexity: several ways, amounts and seeds on one model.

    python benchmarks/retraining.py --data DATA --model MODEL --ways imp [--json RESULTS.json]

DATA holds train.txt, calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Pruning calibrates on 64
windows of 256 tokens of calibration.txt; training reads --steps batches of 4 such windows of train.txt, in bfloat16 with
float32 values. Every output folder is loaded by stock transformers in float32 and scored on the first 10,000 tokens of
each test text in windows of 256. Figures are the geometric mean of the five perplexities: the mean over seeds, and the
range; below, what the training took. Results are kept in RESULTS.json as they come, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import MB, Usage, note, run, table
from _ours import compress_command, fresh, work_folder
from _perplexity import geometric_mean, perplexities, windows_of

DOMAINS = ("prose", "scripture", "drama", "math", "code")
WINDOWS, SEQ_LEN, TOKENS, BATCH = 64, 256, 10_000, 4
AMOUNT = "{amount}"  # stands where a command says how much is pruned
ROUNDS = 4


@dataclass(frozen=True)
class Way:
    """A chain of commands from model to result; the words of each, without its input, texts and output."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    rounds: int = 1

    @property
    def seeded(self) -> bool:
        return self.name != "magnitude"


def imp(name: str, *words: str, rounds: int = ROUNDS) -> Way:
    """IMP with all steps shared out over ``rounds``."""
    return Way(name, (("prune", "--method", "imp", AMOUNT, "--rounds", str(rounds), "--lr", "3e-4", *words),), rounds)


MAGNITUDE = ("prune", "--method", "magnitude", AMOUNT)
SETS: dict[str, list[Way]] = {
    "imp": [
        Way("magnitude", (MAGNITUDE,)),
        imp("once, then trained", rounds=1),
        imp("4 rounds (LRR)"),
        imp("4 rounds, cubic path", "--path", "cubic"),
        imp("4 rounds, one threshold", "--scope", "global"),
        imp("4 rounds, back to the start", "--rewind", "init"),
        imp("4 rounds, back to step 5", "--rewind", "step", "--rewind-step", "5"),
        imp("4 rounds, allr", "--schedule", "allr"),
    ],
}


@dataclass(frozen=True)
class Case:
    """One result."""

    model: Path
    way: Way
    amount: str
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return f"{self.model.name} | {self.way.name} | {self.amount} | {self.steps} | {self.seed}"


def make(case: Case, data: Path, work: Path) -> tuple[Path, Usage, dict[str, Any]]:
    """Run the chain; returns the last folder, what its command took, and its provenance."""
    amount = ["--pattern", case.amount] if ":" in case.amount else ["--sparsity", case.amount]
    source, usage = case.model, None
    for number, (kind, *rest) in enumerate(case.way.commands):
        words = [part for word in rest for part in (amount if word == AMOUNT else [word])]
        trains = kind == "recover" or "imp" in words
        text = ["--dataset", data / "train.txt", "--dtype", "bfloat16", "--batch-size", str(BATCH)]
        text += ["--steps", str(case.steps // case.way.rounds)]
        if not trains:
            text = ["--dataset", data / "calibration.txt", "--num-samples", str(WINDOWS), "--dtype", "float32"]
        out = fresh(work / f"out-{number}")
        settings = ["--seq-len", str(SEQ_LEN), "--seed", str(case.seed), "--overwrite", "--no-resume", "-q"]
        command = [compress_command(), kind, source, *words, *text, *settings, "-o", out]
        usage = run(command, env={"OMP_NUM_THREADS": "1"})
        source = out
    assert usage is not None
    return source, usage, json.loads((source / "provenance.json").read_text(encoding="utf-8"))


def measured(case: Case, args: argparse.Namespace, work: Path, windows: Sequence[Any]) -> dict[str, Any]:
    """All figures of a case."""
    folder, usage, facts = make(case, args.data, work)
    training = facts.get("training", {})
    return {
        "perplexity": geometric_mean(perplexities(folder, windows)),
        "cpu_seconds": usage.cpu_seconds,
        "peak_bytes": usage.peak_bytes,
        "share": training.get("trained_share"),
        "steps": training.get("steps", 0),
        "flips": [one["ended"].get("sign_flips") for one in training.get("rounds", [])],
    }


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything to measure, one seed of all before the next."""
    for number, seed in enumerate(args.seeds):
        for way in ways(args):
            for amount in args.amounts:
                if way.seeded or number == 0:
                    yield Case(args.model, way, amount, seed, args.steps)


def ways(args: argparse.Namespace) -> list[Way]:
    return [way for way in SETS[args.ways] if not args.only or any(part in way.name for part in args.only)]


def rows_of(args: argparse.Namespace, found: Mapping[str, Any]) -> Iterator[list[str]]:
    """One row a way: mean perplexity over seeds and range, amount by amount, and what the training took."""
    for way in ways(args):
        row, figures = [way.name], []
        for amount in args.amounts:
            keys = [Case(args.model, way, amount, seed, args.steps).key for seed in args.seeds]
            known = [found[key] for key in keys if key in found]
            values = [one["perplexity"] for one in known]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
            figures += known
        if not figures:
            continue
        shares = [one["share"] for one in figures if one["share"] is not None]
        row += [f"{statistics.mean(shares):.2%}" if shares else "", str(figures[0]["steps"] or "")]
        row.append(f"{statistics.mean(one['cpu_seconds'] for one in figures):.0f}")
        yield [*row, f"{max(one['peak_bytes'] for one in figures) / MB:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--ways", choices=list(SETS), required=True, help="which set of ways")
    parser.add_argument("--only", nargs="+", metavar="PART", help="those whose names have one of these in them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.6", "0.7"], help="shares of weights removed, or N:M")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps in all")
    parser.add_argument("--work", type=Path, help="keep the last output in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here, and do not measure again what is")
    args = parser.parse_args()
    texts = [args.data / f"{domain}.test.txt" for domain in DOMAINS]
    if missing := [str(path) for path in (args.data / "train.txt", *texts) if not path.is_file()]:
        parser.error(f"--data: not found: {', '.join(missing)}")
    windows = [windows_of(text, args.model, TOKENS) for text in texts]
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    if args.model.name not in found:
        found[args.model.name] = geometric_mean(perplexities(args.model, windows))
    with work_folder(args.work) as work:
        for case in cases(args):
            if case.key not in found:
                found[case.key] = measured(case, args, work, windows)
                note(f"{case.key}: {found[case.key]['perplexity']:.3f} ({found[case.key]['cpu_seconds']:.0f} CPU s)")
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1) + "\n")
    title = f"{args.model.name}, dense {found[args.model.name]:.2f}: perplexity, mean of seeds {' '.join(map(str, args.seeds))}"
    head = ["", *args.amounts, "trained", "steps", "CPU s", "MB"]
    table(title, head, list(rows_of(args, found)))


if __name__ == "__main__":
    main()
