"""What hardware formats cost in perplexity, by plain rounding and with GPTQ's error feedback; inputs rounded where they are.

    python benchmarks/low_bits.py --data DATA

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. GPTQ calibrates on 32 windows of
256 tokens. Every output folder is loaded by stock transformers, which rounds inputs as the format says, and scored on the
first --tokens tokens of each text in windows of 256. Figures are perplexity over the original's: 1 is no loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from _measure import note, run, save_json, table
from _ours import HERE, compress_command, fresh, work_folder
from _perplexity import DOMAINS, Texts, geometric_mean

ASKED: dict[str, list[str]] = {
    **{name: ["--scheme", name] for name in ("W8A8", "FP8", "FP8_BLOCK", "MXFP8")},
    "int4 g32": ["--bits", "4", "--group-size", "32"],
    **{name: ["--scheme", name] for name in ("MXFP4A16", "NVFP4A16")},
    **{f"{name}, scales searched": ["--scheme", name, "--clip", "on"] for name in ("MXFP4A16", "NVFP4A16")},
    **{name: ["--scheme", name] for name in ("MXFP4", "NVFP4")},
}


def cases(methods: list[str], schemes: list[str]) -> Iterator[tuple[str, str]]:
    """Everything to measure; what is to be compared comes one after the other."""
    for scheme in schemes:
        for method in methods:
            yield scheme, method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "tiny-llama")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of texts")
    parser.add_argument("--methods", nargs="+", choices=["rtn", "gptq"], default=["rtn", "gptq"])
    parser.add_argument("--schemes", nargs="+", choices=list(ASKED), default=list(ASKED))
    parser.add_argument("--tokens", type=int, default=20_000, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = Texts.read(parser, args.data, args.model, args.tokens)
    data = ["--dataset", args.data / "calibration.txt", "--num-samples", "32", "--seq-len", "256", "--seed", args.seed]
    rows, runs = [], []
    with work_folder(None) as work:
        for scheme, method in cases(args.methods, args.schemes):
            note(f"{scheme}, {method}")
            out = fresh(work / "out")
            command = [compress_command(), "quantize", args.model, "--method", method, *ASKED[scheme], *data]
            run([*map(str, command), "-o", str(out)])
            size = json.loads((out / "provenance.json").read_text())["size"]
            ratios = texts.of(out)
            bits, mean = size["bits_a_weight"], geometric_mean(ratios)
            rows.append([f"{scheme}, {method}", f"{bits:.2f}", *(f"{value:.4f}" for value in ratios), f"{mean:.4f}"])
            runs.append({"scheme": scheme, "method": method, "bits": bits, "ratios": ratios, "geometric_mean": mean})
    columns = [f"{value:.3f}" for value in (*texts.original, geometric_mean(texts.original))]
    first = ["the original's perplexity", "16", *columns]
    table(f"Perplexity over the original's, seed {args.seed}", ["", "bits", *DOMAINS, "geometric mean"], [first, *rows])
    save_json(args.json, {"model": str(args.model), "domains": DOMAINS, "original": texts.original, "runs": runs})


if __name__ == "__main__":
    main()
