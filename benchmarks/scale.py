"""What models too large for this machine would cost, by the estimator, and how far it is off on small ones.

    python benchmarks/scale.py

For each size: a checkpoint of headers alone (its files have holes for weights), and what `compress quantize --dry-run`
says of it with the default calibration, 128 windows of 2,048 tokens. Traffic is what is read and written: the input
twice (the proof, the blocks), the output three times (written, read back, loaded). Then the check: small checkpoints of
the same proportions are quantized for real, and what was said is put beside what was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _measure import folder_bytes, note, run, save_json, table
from _ours import HERE, compress_command, fresh, work_folder

LAYERS = {"llama-3.1-8b": 32, "llama-3.1-70b": 80, "llama-3.1-405b": 126}
SMALL = (
    (2, 512, 32, 512),
    (2, 1024, 32, 512),
    (4, 1024, 16, 512),
    (2, 2048, 16, 512),
)  # layers, hidden, windows, tokens


def make(out: Path, *words: str) -> Path:
    """A checkpoint folder by make_checkpoint.py, made at first use."""
    if not out.exists():
        note(f"making {out.name}")
        run([sys.executable, HERE / "make_checkpoint.py", out, *words])
    return out


def estimate(model: Path, out: Path, *words: str) -> dict[str, Any]:
    """What a dry run says, and the seconds it took to say it."""
    usage = run([compress_command(), "quantize", model, "-o", out, *words, "--dry-run", "--json", "-q"])
    found: dict[str, Any] = _json(usage.stdout)["estimate"]
    return {**found, "said_in": usage.wall_seconds}


def _json(text: str) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(text[text.index("{") :])
    return found


def large(work: Path) -> list[dict[str, Any]]:
    """Estimates of the models of LAYERS."""
    found = []
    for preset, layers in LAYERS.items():
        model = make(work / preset, "--preset", preset, "--layers", str(layers), "--headers-only")
        for words in ((), ("--max-memory", "16GB"), ("--method", "rtn")):
            try:
                facts = estimate(model, work / "out", *words)
            except SystemExit as refusal:
                note(str(refusal))
                continue
            found.append({"model": preset, "input_bytes": folder_bytes(model), "words": " ".join(words), **facts})
    return found


def small(work: Path) -> list[dict[str, Any]]:
    """Estimate and measurement of small models."""
    found = []
    for layers, hidden, windows, tokens in SMALL:
        model = make(work / f"small-{layers}x{hidden}", "--layers", str(layers), "--hidden", str(hidden))
        words = ("--num-samples", str(windows), "--seq-len", str(tokens))
        facts = estimate(model, work / "out", *words)
        note(f"quantizing {model.name}")
        usage = run([compress_command(), "quantize", model, "-o", fresh(work / "out"), *words, "-q"])
        weights = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
        measured = {"seconds": usage.wall_seconds, "peak_bytes": usage.peak_bytes, "output_bytes": weights}
        found.append({"model": model.name, "windows": windows, "said": facts, "measured": measured})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep checkpoints in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with work_folder(args.work) as work:
        big, little = large(work), small(work)
    rows = [
        [
            f"{row['model']} {row['words']}".strip(),
            f"{row['input_bytes'] / 1e9:.0f}",
            f"{row['output_bytes'] / 1e9:.1f}",
            f"{row['disk_bytes'] / 1e9:.0f}",
            f"{(2 * row['input_bytes'] + 3 * row['output_bytes']) / 1e9:.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{row['seconds'] / 3600:.1f}",
            f"{row['said_in']:.1f}",
        ]
        for row in big
    ]
    table(
        "Estimates",
        ["model", "input GB", "output GB", "disk GB", "traffic GB", "peak GB", "hours here", "said in s"],
        rows,
    )
    rows = [
        [
            f"{row['model']}, {row['windows']} windows",
            *(
                f"{row[side][key] / unit:.{places}f}"
                for key, unit, places in (("seconds", 1, 0), ("peak_bytes", 1e9, 2))
                for side in ("said", "measured")
            ),
            "yes" if row["said"]["output_bytes"] == row["measured"]["output_bytes"] else "NO",
        ]
        for row in little
    ]
    table("Said and measured", ["model", "said s", "took s", "said GB", "peak GB", "output bytes exact"], rows)
    save_json(args.json, {"large": big, "small": little})


if __name__ == "__main__":
    main()
