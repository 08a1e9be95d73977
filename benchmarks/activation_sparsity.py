"""What activations taken for zero cost in perplexity: TEAL with both ways to share zeros out, and CHESS.

    python benchmarks/activation_sparsity.py --data DATA

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Thresholds come from --num-samples
windows of 256 tokens; 32 windows of 256 tokens of each text are scored. Zeros are those of the inputs of linear layers, by
weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _measure import note, save_json, table
from _ours import HERE, fresh, work_folder
from _perplexity import geometric_mean
from weightworks.plan.thresholds import run_thresholds
from weightworks.stage.settings import Settings
from weightworks.stage.thresholds import ThresholdOptions

METHODS = {
    "teal": {"method": "teal"},
    "teal, uniform": {"method": "teal", "allocation": "uniform"},
    "chess": {"method": "chess"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "tiny-llama")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of texts")
    parser.add_argument("--domains", nargs="+", default=["prose", "scripture", "drama", "math", "code"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = tuple(str(args.data / f"{domain}.test.txt") for domain in args.domains)
    calibration = str(args.data / "calibration.txt")
    settings = Settings(dataset=calibration, num_samples=args.num_samples, seq_len=256, device="cpu")
    rows, runs = [], []
    with work_folder(None) as work:
        for share in args.sparsities:
            for name in args.methods:
                note(f"{name}, {share:.0%}")
                asked = ThresholdOptions(sparsity=share, **METHODS[name])
                found = run_thresholds(str(args.model), asked, settings, texts=texts, output_dir=fresh(work / "out"))
                measured = [found.report["measured"][text] for text in texts]
                ratios = [one["perplexity_sparse"] / one["perplexity"] for one in measured]
                zeros = sum(one["zeros_of_inputs"] for one in measured) / len(measured)
                gates = [one["zeros_of_gates"] for one in measured if "zeros_of_gates" in one]
                gate = f"{sum(gates) / len(gates):.1%}" if gates else ""
                mean = geometric_mean(ratios)
                rows.append([name, f"{share:.0%}", f"{zeros:.1%}", gate, f"{mean:.4f}", f"{found.seconds:.0f} s"])
                runs.append({"method": name, "sparsity": share, "zeros": zeros, "gates": gates, "ratios": ratios})
    head = ["", "asked", "zeros of inputs", "of gates", "perplexity", "time"]
    table("Perplexity over the original's, geometric mean", head, rows)
    save_json(args.json, {"model": str(args.model), "domains": args.domains, "runs": runs})


if __name__ == "__main__":
    main()
