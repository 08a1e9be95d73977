"""What chosen rows win back: PASER against chance and against all rows, at equal optimizer steps, by capability.

    python benchmarks/selection.py --model MODEL --data DATA [--json RESULTS.json]

DATA holds instructions.jsonl (fields capability, instruction, input, output), instructions.test.jsonl, and calibration.txt.
MODEL is pruned once (SparseGPT, --sparsity, 64 windows of 256 tokens of calibration.txt). The pool is the first --pool rows of
instructions.jsonl. The arms choose --budget of it, by PASER or by chance, or take all of it; each trains the pruned model with
PERP for --steps steps of 8 rows in bfloat16 with float32 values, once a seed. The seed is that of training, and of chance.
Results are loaded by stock transformers in float32; figures are the mean loss (nats a token of the answer) on the first --test
rows of each capability of instructions.test.jsonl, mean over seeds and range. They are kept in RESULTS.json as they come, and
what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _measure import Usage, note, run, table
from _ours import compress_command, fresh, work_folder
from weightworks.stream.examples import Maker
from weightworks.stream.lessons import IGNORED, Rows

ARMS = ("random", "paser", "all rows")
BATCH, SEQ_LEN, TESTED = 8, 256, 16  # rows a step, tokens a row, rows a forward pass of the test
Tests = Mapping[str, Rows]


def compress(*words: Any) -> Usage:
    """Run a command on one thread."""
    return run([compress_command(), *map(str, words), "--overwrite", "-q"], env={"OMP_NUM_THREADS": "1"})


def tests_of(path: Path, model: Path, each: int) -> dict[str, Rows]:
    """The first ``each`` rows of every capability that are short enough."""
    maker, found = Maker(model), dict[str, list[Any]]()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        made = maker.usable(row, SEQ_LEN)
        if not isinstance(made, str) and len(found.setdefault(row["capability"], [])) < each:
            found[row["capability"]].append(made)
    return {capability: Rows.of(rows) for capability, rows in sorted(found.items())}


@torch.no_grad()
def losses(folder: Path, tests: Tests) -> dict[str, float]:
    """The mean loss of a checkpoint on the answers of each capability, and the mean of these."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for capability, rows in tests.items():
        total, count = 0.0, 0
        for batch in rows.batches(TESTED):
            logits = model(input_ids=batch.tokens).logits[:, :-1].flatten(0, 1)
            labels = batch.labels[:, 1:].flatten()
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += batch.learned
        found[capability] = total / count
    return {**found, "mean": statistics.mean(found.values())}


def chosen(arm: str, seed: int, pruned: Path, pool: Path, args: argparse.Namespace, work: Path) -> tuple[Path, float]:
    """The rows that an arm trains on, and the CPU seconds that choosing took."""
    if arm == "all rows":
        return pool, 0.0
    out = work / (arm if arm == "paser" else f"{arm}-{seed}")
    words = ["select", pruned, "--method", arm, "--dataset", pool, "--budget", args.budget, "--seq-len", SEQ_LEN]
    words += ["--teacher", args.model, "--dtype", "float32"] if arm == "paser" else ["--seed", seed]
    usage = None if (out / "selected.jsonl").is_file() else compress(*words, "-o", out)
    return out / "selected.jsonl", usage.cpu_seconds if usage else 0.0


def trained(arm: str, seed: int, pruned: Path, pool: Path, tests: Tests, args: argparse.Namespace, work: Path) -> Any:
    """All figures of an arm and a seed."""
    rows, seconds = chosen(arm, seed, pruned, pool, args, work)
    out = fresh(work / "healed")
    words = ["recover", pruned, "--dataset", rows, "--steps", args.steps, "--batch-size", BATCH, "--seq-len", SEQ_LEN]
    usage = compress(*words, "--dtype", "bfloat16", "--seed", seed, "--no-resume", "-o", out)
    text = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["calibration"]
    shares = [json.loads(line).get("capability") for line in rows.read_text(encoding="utf-8").splitlines()]
    return {
        "losses": losses(out, tests),
        "rows": len(shares),
        "by_capability": {name: shares.count(name) for name in sorted(set(shares))},
        "learned_a_row": text["tokens_learned"] / text["windows"],
        "cpu_seconds": {"choosing": seconds, "training": usage.cpu_seconds},
    }


def told(values: Sequence[float]) -> str:
    """A mean, and the range behind it."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of instructions and calibration text")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--pool", type=int, default=2000, help="rows to choose from")
    parser.add_argument("--budget", type=float, default=0.2, help="rows to choose, or their share of the pool")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps")
    parser.add_argument("--test", type=int, default=60, help="rows of each capability to test on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="keep the choices and the last output in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here, and do not measure again what is")
    args = parser.parse_args()
    files = [args.data / name for name in ("instructions.jsonl", "instructions.test.jsonl", "calibration.txt")]
    if missing := [str(path) for path in files if not path.is_file()]:
        parser.error(f"--data: not found: {', '.join(missing)}")
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    tests = tests_of(files[1], args.model, args.test)
    with work_folder(args.work) as work:
        pool, pruned = work / "pool.jsonl", work / "pruned"
        lines = files[0].read_text(encoding="utf-8").splitlines(keepends=True)
        pool.write_text("".join(lines[: args.pool]), encoding="utf-8")
        words = ["prune", args.model, "--method", "sparsegpt", "--sparsity", args.sparsity, "--dataset", files[2]]
        compress(*words, "--num-samples", 64, "--seq-len", SEQ_LEN, "--dtype", "float32", "-o", pruned)
        for name, folder in (("dense", args.model), ("pruned", pruned)):
            if name not in found:
                found[name] = {"losses": losses(folder, tests)}
        for seed in args.seeds:
            for arm in ARMS:
                if f"{arm} {seed}" not in found:
                    made = found[f"{arm} {seed}"] = trained(arm, seed, pruned, pool, tests, args, work)
                    note(f"{arm}, seed {seed}: {made['losses']['mean']:.4f}, CPU seconds {made['cpu_seconds']}")
                    if args.json:
                        args.json.write_text(json.dumps(found, indent=1) + "\n")
    columns = [*tests, "mean"]
    rows = [
        [name, "", "", *(f"{found[name]['losses'][column]:.3f}" for column in columns)] for name in ("dense", "pruned")
    ]
    for arm in ARMS:
        made = [found[f"{arm} {seed}"] for seed in args.seeds]
        learned = statistics.mean(one["learned_a_row"] for one in made)
        rows.append([arm, str(made[0]["rows"]), f"{learned:.0f}"])
        rows[-1] += [told([one["losses"][column] for one in made]) for column in columns]
    title = f"{args.model.name}, SparseGPT {args.sparsity:.0%}, PERP {args.steps} steps: loss on held-out answers"
    table(title, ["", "rows", "learned a row", *columns], rows)
    shares = [
        [arm, *(str(found[f"{arm} {args.seeds[0]}"]["by_capability"].get(name, 0)) for name in tests)] for arm in ARMS
    ]
    table(f"rows by capability, seed {args.seeds[0]}", ["", *tests], shares)


if __name__ == "__main__":
    main()
