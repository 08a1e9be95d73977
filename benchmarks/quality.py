"""What quantizing costs in perplexity: this project and, with --peer-python, llm-compressor, on the same tokens.

    python benchmarks/quality.py --data DATA [--peer-python PEER/bin/python]

DATA holds calibration.txt and the test texts {prose,scripture,drama,math,code}.test.txt. GPTQ at 4 and 3 bits in groups
of 128 and at 2 bits in groups of 32 calibrates on 128 windows of 256 tokens, once for each seed; rounding (rtn) has no
seed. Every output folder is loaded by stock transformers in float32 and scored on the first 20,000 tokens of each text
in windows of 256. Figures are perplexity over the original's: 1 is no loss; means over seeds, and the range of the
geometric mean. To make the peer's environment:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install llmcompressor==0.14.0
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _measure import note, run, save_json, table
from _ours import HERE, PEER_HELP, Settings, Windows, fresh, peer_command, quantize_command, work_folder, write_tokens
from _perplexity import geometric_mean, perplexities, windows_of

DOMAINS = ("prose", "scripture", "drama", "math", "code")
GRIDS = ((4, 128), (3, 128), (2, 32))
WINDOWS, SEQ_LEN = 128, 256


@dataclass(frozen=True)
class Case:
    """One output folder."""

    side: str
    method: str
    bits: int
    group_size: int
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method} w{self.bits}g{self.group_size}, {self.side}"


def cases(seeds: list[int], sides: list[str], methods: list[str]) -> Iterator[Case]:
    """Everything to measure; what is to be compared comes one after the other."""
    for method in methods:
        for bits, group_size in GRIDS:
            for seed in seeds if method == "gptq" else seeds[:1]:
                for side in sides:
                    yield Case(side, method, bits, group_size, seed)


def quantize(case: Case, args: argparse.Namespace, work: Path) -> Path:
    """Make the folder of ``case``."""
    out = fresh(work / "out")
    settings = Settings(case.method, case.bits, case.group_size)
    windows = Windows(str(args.data / "calibration.txt"), WINDOWS, SEQ_LEN, case.seed)
    if case.side == "ours":
        run(quantize_command(args.model, out, settings, windows))
    else:
        tokens = work / f"tokens-{case.seed}.safetensors"
        if not tokens.exists():
            write_tokens(args.model, tokens, windows)
        run(peer_command(args.peer_python, args.model, out, tokens, settings))
    return out


def rows_of(ratios: dict[Case, list[float]]) -> list[list[str]]:
    """One row for each label: every domain, their geometric mean, its range over seeds."""
    groups: dict[str, list[list[float]]] = {}
    for case, found in ratios.items():
        groups.setdefault(case.label, []).append(found)
    rows = []
    for label, runs in groups.items():
        means = [geometric_mean(found) for found in runs]
        by_domain = [statistics.mean(found[at] for found in runs) for at in range(len(DOMAINS))]
        spread = f"{min(means):.4f} to {max(means):.4f}" if len(means) > 1 else ""
        rows.append([label, *(f"{value:.4f}" for value in by_domain), f"{statistics.mean(means):.4f}", spread])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "tiny-llama")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of texts")
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help=PEER_HELP)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=["gptq", "rtn"], default=["gptq", "rtn"])
    parser.add_argument("--sides", nargs="+", choices=["ours", "llm-compressor"], help="default: all there are")
    parser.add_argument("--work", type=Path, help="keep tokens and the last output in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = [args.data / f"{domain}.test.txt" for domain in DOMAINS]
    missing = [str(path) for path in (args.data / "calibration.txt", *texts) if not path.is_file()]
    if missing:
        parser.error(f"--data: not found: {', '.join(missing)}")
    sides = args.sides or (["ours", "llm-compressor"] if args.peer_python else ["ours"])
    if "llm-compressor" in sides and not args.peer_python:
        parser.error("the peer needs --peer-python")
    windows = [windows_of(text, args.model) for text in texts]
    original = perplexities(args.model, windows)
    ratios: dict[Case, list[float]] = {}
    with work_folder(args.work) as work:
        for case in cases(args.seeds, sides, args.methods):
            note(f"{case.label}, seed {case.seed}")
            found = perplexities(quantize(case, args, work), windows)
            ratios[case] = [value / base for value, base in zip(found, original, strict=True)]
    columns = [*original, geometric_mean(original)]
    first = ["the original's perplexity", *(f"{value:.3f}" for value in columns), ""]
    title = f"Perplexity over the original's, mean of seeds {' '.join(map(str, args.seeds))}"
    table(title, ["", *DOMAINS, "geometric mean", "range"], [first, *rows_of(ratios)])
    runs = [{**vars(case), "ratios": found, "geometric_mean": geometric_mean(found)} for case, found in ratios.items()]
    save_json(args.json, {"model": str(args.model), "domains": DOMAINS, "original": original, "runs": runs})


if __name__ == "__main__":
    main()
