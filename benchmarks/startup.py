"""How long ``compress --help`` takes, beside a bare ``import typer``.

    python benchmarks/startup.py

The median of 5 runs each, in turn, after one run that fills the file cache. Help must never import torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from _measure import MB, Usage, run, save_json, table
from _ours import compress_command

REFERENCE = "python -c 'import typer'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    compress = compress_command()
    commands: dict[str, list[str | Path]] = {
        REFERENCE: [sys.executable, "-c", "import typer"],
        "compress --help": [compress, "--help"],
        "compress quantize --help": [compress, "quantize", "--help"],
    }
    runs: dict[str, list[Usage]] = {label: [] for label in commands}
    for turn in range(args.runs + 1):
        for label, command in commands.items():
            usage = run(command)
            if turn:
                runs[label].append(usage)
    middle = {
        label: {
            "wall_seconds": statistics.median(usage.wall_seconds for usage in usages),
            "cpu_seconds": statistics.median(usage.cpu_seconds for usage in usages),
            "peak_bytes": statistics.median(usage.peak_bytes for usage in usages),
        }
        for label, usages in runs.items()
    }
    rows = [
        [
            label,
            f"{found['wall_seconds']:.3f}",
            f"{found['cpu_seconds']:.3f}",
            f"{found['peak_bytes'] / MB:.0f}",
            f"{found['cpu_seconds'] / middle[REFERENCE]['cpu_seconds']:.2f}",
        ]
        for label, found in middle.items()
    ]
    table(f"Start-up, median of {args.runs}", ["", "wall s", "CPU s", "peak MB", "CPU x"], rows)
    save_json(args.json, {"runs": args.runs, "median": middle})


if __name__ == "__main__":
    main()
