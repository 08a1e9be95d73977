"""What norm tweaking wins back in perplexity after plain rounding and after GPTQ, at 2, 3 and 4 bits.

    python benchmarks/norm_tweaking.py --data DATA

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Calibrates on windows of 256 tokens,
once for each seed; rounding alone has no seed. Every output folder is loaded by stock transformers in float32 and scored on
the first tokens of each text in windows of 256. Figures are the geometric mean over the texts of perplexity over the
original's: 1 is no loss; means over seeds, and their range.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import note, save_json, table
from _ours import HERE, fresh, work_folder
from _perplexity import DOMAINS, Texts, geometric_mean, spread
from compress import quantize

GRIDS = {2: 32, 3: 128, 4: 128}  # bits, group size
HOWS = ("none", "adam", "closed")


@dataclass(frozen=True)
class Case:
    """One output folder."""

    method: str
    bits: int
    how: str
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method} w{self.bits}g{GRIDS[self.bits]}"


def cases(seeds: list[int], methods: list[str], hows: list[str]) -> Iterator[Case]:
    """Everything to measure, seed after seed."""
    for seed in seeds:
        for bits in GRIDS:
            for method in methods:
                for how in hows:
                    if method == "gptq" or how != "none" or seed == seeds[0]:
                        yield Case(method, bits, how, seed)


def make(case: Case, args: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Make the folder of ``case``; returns what became of the norms of each block."""
    options = {"method": case.method, "bits": case.bits, "group_size": GRIDS[case.bits], "norm_tweak": case.how}
    text = {"dataset": str(args.data / "calibration.txt"), "num_samples": args.num_samples, "seq_len": 256}
    outcome = quantize(args.model, **options, **text, seed=case.seed, output_dir=fresh(out))
    assert outcome.provenance is not None
    return list(outcome.provenance.get("norms", []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "tiny-llama")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of texts")
    parser.add_argument("--num-samples", type=int, default=128, help="windows to calibrate with")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of each text to score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=["rtn", "gptq"], default=["rtn", "gptq"])
    parser.add_argument("--hows", nargs="+", choices=HOWS, default=list(HOWS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = Texts.read(parser, args.data, args.model, args.tokens)
    runs: list[dict[str, Any]] = []
    with work_folder(None) as work:
        for case in cases(args.seeds, args.methods, args.hows):
            norms = make(case, args, work / "out")
            ratios = texts.of(work / "out")
            mean, kept = geometric_mean(ratios), sum(block["kept"] for block in norms)
            note(f"{case.label}, norms {case.how}, seed {case.seed}: {mean:.4f}, kept in {kept} of {len(norms)} blocks")
            runs.append({**vars(case), "label": case.label, "geometric_mean": mean, "ratios": ratios, "norms": norms})
    rows = []
    for label in dict.fromkeys(run["label"] for run in runs):
        of = [[r["geometric_mean"] for r in runs if (r["label"], r["how"]) == (label, how)] for how in args.hows]
        rows.append([label, *map(spread, of)])
    table(f"Perplexity over the original's, seeds {' '.join(map(str, args.seeds))}", ["", *args.hows], rows)
    save_json(args.json, {"model": str(args.model), "domains": DOMAINS, "original": texts.original, "runs": runs})


if __name__ == "__main__":
    main()
