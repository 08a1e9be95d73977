"""What recovery wins back of what pruning cost, in perplexity: pruners, amounts, ways to recover and seeds on one model.

    python benchmarks/recovering.py --data DATA --model MODEL [--pruners wanda] [--ways perp distill] [--json RESULTS.json]

DATA holds train.txt, calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Pruning calibrates on 64
windows of 256 tokens of calibration.txt (seed 0); recovery reads --steps batches of 4 such windows of train.txt, in bfloat16
with float32 values: the same text for every way that trains the whole model, while ebft takes --steps / 4 of 16 windows in
each block, and renormalise reads the calibration windows. Every output folder is loaded by stock transformers in float32
and scored on the first 10,000 tokens of each test text in windows of 256. Figures are the geometric mean of the five
perplexities; "won back" is of the logarithm of what pruning added. Results are kept in RESULTS.json as they come, and what is
there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import MB, Usage, note, run, table
from _ours import compress_command, fresh, work_folder
from _perplexity import geometric_mean, perplexities, windows_of

DOMAINS = ("prose", "scripture", "drama", "math", "code")
WINDOWS, SEQ_LEN, TOKENS, BATCH = 64, 256, 10_000, 4
PRUNERS = ("magnitude", "wanda", "sparsegpt")
AMOUNTS = ("0.5", "0.6", "0.7", "2:4")
WAYS: Mapping[str, tuple[str, ...]] = {  # words of compress recover
    "perp": ("--method", "perp"),
    "perp-norm": ("--method", "perp", "--train", "norm"),
    "distill": ("--method", "distill"),
    "ebft": ("--method", "ebft"),
    "renormalise": ("--method", "renormalise"),
    "full": ("--method", "perp", "--train", "full", "--lr", "1e-4"),
    "full-distill": ("--method", "distill", "--train", "full", "--lr", "1e-4"),
}


def pruned(args: argparse.Namespace, pruner: str, amount: str, out: Path) -> Path:
    """The pruned model, made once for all ways."""
    if not (out / "provenance.json").is_file():
        words = ["--pattern", amount] if ":" in amount else ["--sparsity", amount]
        if pruner != "magnitude":
            words += [
                "--dataset",
                args.data / "calibration.txt",
                "--num-samples",
                str(WINDOWS),
                "--seq-len",
                str(SEQ_LEN),
            ]
        run([compress_command(), "prune", args.model, "--method", pruner, *words, "-q", "-o", fresh(out)])
    return out


def recovered(args: argparse.Namespace, source: Path, way: str, seed: int, out: Path) -> tuple[Usage, dict[str, Any]]:
    """Run one recovery; returns what it took, and its provenance."""
    words = [*WAYS[way], "--teacher", args.model, "--seq-len", str(SEQ_LEN), "--seed", str(seed)]
    if way == "renormalise":
        words += ["--dataset", args.data / "calibration.txt", "--num-samples", str(WINDOWS)]
    else:
        steps, batch = (args.steps // 4, 4 * BATCH) if way == "ebft" else (args.steps, BATCH)
        words += ["--dataset", args.data / "train.txt", "--steps", str(steps), "--batch-size", str(batch)]
        words += ["--dtype", "bfloat16"]
    usage = run([compress_command(), "recover", source, *words, "-q", "-o", fresh(out)], env={"OMP_NUM_THREADS": "1"})
    return usage, json.loads((out / "provenance.json").read_text(encoding="utf-8"))


def measured(args: argparse.Namespace, found: dict[str, Any], windows: Sequence[Any], work: Path) -> Iterator[str]:
    """Fill ``found`` with what is not there yet; yields the key of each new figure."""
    for amount in args.amounts:
        for pruner in args.pruners:
            before = f"{pruner} | {amount}"
            for way in args.ways:
                for seed in args.seeds if way != "renormalise" else args.seeds[:1]:
                    key = f"{before} | {way} | {args.steps} | {seed}"
                    if key in found:
                        continue
                    source = pruned(args, pruner, amount, work / f"{pruner}-{amount.replace(':', 'of')}")
                    if before not in found:
                        found[before] = geometric_mean(perplexities(source, windows))
                        yield before
                    usage, facts = recovered(args, source, way, seed, work / "out")
                    training = facts.get("training", {})
                    found[key] = {
                        "perplexity": geometric_mean(perplexities(work / "out", windows)),
                        "share": training.get("trained_share", 0.0),
                        "steps": training.get("steps", 0),
                        "cpu_seconds": usage.cpu_seconds,
                        "peak_bytes": usage.peak_bytes,
                    }
                    yield key


def rows_of(args: argparse.Namespace, found: Mapping[str, Any], dense: float) -> Iterator[list[str]]:
    """A row for every pruner, amount and way that was measured: before, after, what is won back, what it took."""
    for amount in args.amounts:
        for pruner in args.pruners:
            for way in args.ways:
                keys = (f"{pruner} | {amount} | {way} | {args.steps} | {seed}" for seed in args.seeds)
                known = [found[key] for key in keys if key in found]
                if not known:
                    continue
                before, values = found[f"{pruner} | {amount}"], [one["perplexity"] for one in known]
                mean = statistics.mean(values)
                spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
                share = math.log(before / mean) / math.log(before / dense)
                yield [
                    f"{pruner} {amount}", way, f"{before:.2f}", f"{mean:.2f}{spread}", f"{share:.0%}",
                    f"{known[0]['share']:.2%}", str(known[0]["steps"]),
                    f"{statistics.mean(one['cpu_seconds'] for one in known):.0f}",
                    f"{max(one['peak_bytes'] for one in known) / MB:.0f}",
                ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--pruners", nargs="+", choices=PRUNERS, default=list(PRUNERS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS), help="shares of weights removed, or N:M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--work", type=Path, help="keep the pruned models in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here, and do not measure again what is")
    args = parser.parse_args()
    texts = [args.data / f"{domain}.test.txt" for domain in DOMAINS]
    needed = (args.data / "train.txt", args.data / "calibration.txt", *texts)
    if missing := [str(path) for path in needed if not path.is_file()]:
        parser.error(f"--data: not found: {', '.join(missing)}")
    windows = [windows_of(text, args.model, TOKENS) for text in texts]
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    if args.model.name not in found:
        found[args.model.name] = geometric_mean(perplexities(args.model, windows))
    with work_folder(args.work) as work:
        for key in measured(args, found, windows, work):
            figure = found[key]
            note(f"{key}: {figure if isinstance(figure, float) else figure['perplexity']:.3f}")
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    dense = found[args.model.name]
    title = f"{args.model.name}, dense {dense:.2f}: perplexity, mean of seeds {' '.join(map(str, args.seeds))}"
    head = ["pruned", "recovered by", "before", "after", "won back", "trained", "steps", "CPU s", "MB"]
    table(title, head, list(rows_of(args, found, dense)))


if __name__ == "__main__":
    main()
