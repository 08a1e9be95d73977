"""Bits chosen layer by layer against one width for all, both by GPTQ, at equal bytes.

    python benchmarks/mixed_precision.py --data DATA

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. For every uniform grid a run with the
same bytes as its budget (the size of the uniform weight files), once for each seed, which chooses calibration windows of 256
tokens and the noise that sensitivities are measured with. Every folder is loaded by stock transformers in float32 and scored on
the first tokens of each text in windows of 256. Figures are the geometric mean over the texts of perplexity over the
original's: 1 is no loss; means over seeds, and their range.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from _measure import note, save_json, table
from _ours import HERE, fresh, work_folder
from _perplexity import DOMAINS, Texts, geometric_mean, spread
from compress import quantize

UNIFORM = {"2g32": (2, 32), "2g16": (2, 16), "3g-1": (3, -1), "3g32": (3, 32), "4g128": (4, 128)}


def made(options: dict[str, Any], args: argparse.Namespace, seed: int, out: Path) -> dict[str, Any]:
    """Quantize the model as ``options`` say; returns sizes and, of a budget, what was expected."""
    text = {"dataset": str(args.data / "calibration.txt"), "num_samples": args.num_samples, "seq_len": 256}
    outcome = quantize(args.model, method="gptq", **options, **text, seed=seed, output_dir=fresh(out))
    assert outcome.provenance is not None
    size, files = outcome.provenance["size"], sum(path.stat().st_size for path in out.glob("*.safetensors"))
    allocation = outcome.provenance.get("allocation", {})
    return {
        "bytes": files,
        "bits": size["bits_a_weight"],
        "expected": allocation.get("expected_increase"),
        "units": allocation.get("units"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "tiny-llama")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of texts")
    parser.add_argument("--num-samples", type=int, default=32, help="windows to calibrate with")
    parser.add_argument("--tokens", type=int, default=5_000, help="tokens of each text to score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--uniform", nargs="+", choices=list(UNIFORM), default=["2g32", "3g-1", "3g32"])
    parser.add_argument("--bit-choices", default="2,3g-1,3,3g64,4,8")
    parser.add_argument("--inter-layer", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = Texts.read(parser, args.data, args.model, args.tokens)
    runs: list[dict[str, Any]] = []
    with work_folder(None) as work:
        for seed in args.seeds:
            for name in args.uniform:
                bits, group = UNIFORM[name]
                facts = made({"bits": bits, "group_size": group}, args, seed, work / "uniform")
                budget = {"budget": f"{facts['bytes']}B", "bit_choices": args.bit_choices}
                ours = made({**budget, "inter_layer": args.inter_layer}, args, seed, work / "mixed")
                assert ours["bytes"] <= facts["bytes"]
                for how, one in (("uniform", facts), ("mixed", ours)):
                    ratios = texts.of(work / how)
                    mean = geometric_mean(ratios)
                    note(f"{name}, {how}, seed {seed}: {one['bits']:.3f} bits, {mean:.4f}")
                    runs.append(
                        {"grid": name, "how": how, "seed": seed, **one, "ratios": ratios, "geometric_mean": mean}
                    )
    rows = []
    for name in args.uniform:
        of = {how: [run for run in runs if (run["grid"], run["how"]) == (name, how)] for how in ("uniform", "mixed")}
        bits = [f"{statistics.mean(run['bits'] for run in of[how]):.3f}" for how in of]
        means = [[run["geometric_mean"] for run in of[how]] for how in of]
        won = sum(ours < theirs for theirs, ours in zip(*means, strict=True))
        rows.append([name, *bits, *map(spread, means), f"{won} of {len(args.seeds)}"])
    head = ["bytes of", "bits, uniform", "bits, mixed", "uniform", "mixed", "mixed better"]
    table(f"Perplexity over the original's, seeds {' '.join(map(str, args.seeds))}", head, rows)
    save_json(args.json, {"model": str(args.model), "domains": DOMAINS, "original": texts.original, "runs": runs})


if __name__ == "__main__":
    main()
