"""What the types of GGUF files cost in perplexity, from the dense model and from one that GPTQ rounded to fitting groups.

    python benchmarks/gguf_types.py --data DATA

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. Every file is loaded by stock
transformers and scored on the first --tokens tokens of each text in windows of 256. GPTQ calibrates on 32 windows of 256
tokens; its groups of 32 go into Q4_0 as they are. Figures are perplexity over the original's: 1 is no loss.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from _measure import note, run, save_json, table
from _ours import HERE, compress_command, fresh, work_folder
from _perplexity import DOMAINS, Texts, geometric_mean, perplexity

TYPES = ("F16", "BF16", "Q8_0", "Q4_K", "Q4_0", "MXFP4")


def exported(model: Path, kind: str, out: Path, windows: list[torch.Tensor]) -> tuple[dict[str, float], list[float]]:
    """What the export says, and the perplexity of the file on each text's windows."""
    told = run([compress_command(), "export", str(model), "--gguf", kind, "-o", str(fresh(out)), "--json", "-q"])
    facts = json.loads(told.stdout)
    loaded = AutoModelForCausalLM.from_pretrained(out, gguf_file=Path(facts["file"]).name, dtype=torch.float32)
    return facts, [perplexity(loaded, one) for one in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "tiny-llama")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of texts")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each text")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = Texts.read(parser, args.data, args.model, args.tokens)
    rows, runs = [], []
    with work_folder(None) as work:
        note("GPTQ, 4 bits in groups of 32")
        data = ["--dataset", args.data / "calibration.txt", "--num-samples", "32", "--seq-len", "256"]
        command = [compress_command(), "quantize", args.model, "--bits", "4", "--group-size", "32", *data]
        run([*map(str, command), "-o", str(work / "gptq")])
        cases = [(args.model, kind, kind) for kind in TYPES] + [(work / "gptq", "Q4_0", "Q4_0, codes of gptq")]
        for model, kind, name in cases:
            note(name)
            facts, found = exported(model, kind, work / "out", texts.windows)
            ratios = texts.ratios(found)
            bits, error, mean = facts["bits_a_weight"], facts["relative_error"], geometric_mean(ratios)
            rows.append([name, f"{bits:.3f}", f"{error:.4f}", *(f"{value:.4f}" for value in ratios), f"{mean:.4f}"])
            runs.append({"name": name, "bits": bits, "error": error, "ratios": ratios, "geometric_mean": mean})
    columns = [f"{value:.3f}" for value in (*texts.original, geometric_mean(texts.original))]
    first = ["the original's perplexity", "16", "", *columns]
    table("Perplexity over the original's", ["", "bits", "error", *DOMAINS, "geometric mean"], [first, *rows])
    save_json(args.json, {"model": str(args.model), "domains": DOMAINS, "original": texts.original, "runs": runs})


if __name__ == "__main__":
    main()
