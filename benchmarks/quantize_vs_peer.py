"""Quantizes one checkpoint with this project and with llm-compressor, in turn, and compares what it cost.

    python benchmarks/make_checkpoint.py CKPT --layers 2
    python benchmarks/quantize_vs_peer.py CKPT --peer-python PEER/bin/python

Both get the same model, the same calibration tokens and the same bits, group size and symmetry, in one run. Each is a
process of its own, measured from start to end: imports, calibration, saving, and our verification too. CPU seconds are
user plus system of the whole process tree, the peak is its largest resident size. The arithmetic floor comes from the
model's shape (see _floor.py) and this machine's speed, measured at the start. Without --peer-python only ours runs. To
make the peer's environment:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install llmcompressor==0.14.0

On a busy machine read CPU seconds, not wall time. With --repeat N each side's run of median CPU seconds counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _floor import Floor, gptq_floor, machine_rates
from _measure import Usage, folder_bytes, last_json, note, run, save_json, table
from _ours import (
    PEER_HELP,
    Settings,
    Windows,
    cost_cells,
    fresh,
    peer_command,
    quantize_command,
    work_folder,
    write_tokens,
)

OURS, PEER = "ours", "llm-compressor"
DTYPES = ("float32", "bfloat16")


def median_run(runs: Sequence[Usage]) -> Usage:
    """The run with the (lower) median of CPU seconds: one real run, not a mixture."""
    return sorted(runs, key=lambda usage: usage.cpu_seconds)[(len(runs) - 1) // 2]


def run_in_turn(args: argparse.Namespace, work: Path) -> dict[str, list[Usage]]:
    """Ours, the peer, ours, the peer, ...; the usage of every run by side."""
    settings = Settings(args.method, args.bits, args.group_size)
    windows = Windows(args.text, args.num_samples, args.seq_len, args.seed)
    commands = {OURS: quantize_command(args.model, work / OURS, settings, windows)}
    if args.peer_python:
        tokens = work / "tokens.safetensors"
        write_tokens(args.model, tokens, windows)
        commands[PEER] = peer_command(args.peer_python, args.model, work / PEER, tokens, settings)
    runs: dict[str, list[Usage]] = {side: [] for side in commands}
    for turn in range(args.repeat):
        for side, command in commands.items():
            note(f"run {turn + 1} of {args.repeat}: {side}")
            fresh(work / side)
            runs[side].append(run(command))
    return runs


def print_costs(title: str, runs: dict[str, list[Usage]], sizes: dict[str, int]) -> None:
    """One row a side and one with the ratios."""
    middle = {side: median_run(usages) for side, usages in runs.items()}
    rows = [[side, *cost_cells(usage), f"{sizes[side] / 1e6:.1f}"] for side, usage in middle.items()]
    if PEER in middle:
        ours, peer = middle[OURS], middle[PEER]
        ratios = (
            ours.wall_seconds / peer.wall_seconds,
            ours.cpu_seconds / peer.cpu_seconds,
            ours.peak_bytes / peer.peak_bytes,
            sizes[OURS] / sizes[PEER],
        )
        rows.append([f"{OURS} / {PEER}", *(f"{ratio:.2f}" for ratio in ratios)])
    table(title, ["", "wall s", "CPU s", "peak GB", "output MB"], rows)


def print_floor(floor: Floor, rates: dict[str, float], runs: dict[str, list[Usage]]) -> dict[str, float]:
    """The arithmetic and each side's distance from it; returns the floors in CPU seconds by forward dtype."""
    speed = ", ".join(f"{rate:.0f} in {dtype}" for dtype, rate in rates.items())
    rows = []
    for part, flop in floor.parts().items():
        seconds = [flop / 1e9 / rates[dtype] for dtype in DTYPES]
        # Everything but the forwards is float32 arithmetic: bfloat16 Hessians and factors would not do.
        cells = [f"{seconds[0]:.1f}", f"{seconds[1]:.1f}" if part == "forwards" else ""]
        rows.append([part, f"{flop / 1e9:.0f}", *cells])
    table(f"Arithmetic (GFLOP a CPU second here: {speed})", ["part", "GFLOP", *(f"CPU s, {d}" for d in DTYPES)], rows)
    floors = {dtype: floor.cpu_seconds(rates, forward_dtype=dtype) for dtype in DTYPES}
    rows = [
        [f"{dtype} forwards", f"{seconds:.1f}"]
        + [f"{median_run(usages).cpu_seconds / seconds:.2f}" for usages in runs.values()]
        for dtype, seconds in floors.items()
    ]
    table("CPU seconds as a multiple of the floor", ["floor with", "CPU s", *runs], rows)
    return floors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help=PEER_HELP)
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=32, help="windows of calibration tokens (default 32)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="builtin", help="calibration text, a .txt file (default: the package's own)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each side, in turn (default 1)")
    parser.add_argument("--work", type=Path, help="keep outputs and tokens in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rates = machine_rates()
    with work_folder(args.work) as work:
        runs = run_in_turn(args, work)
        sizes = {side: folder_bytes(work / side) for side in runs}
    windows = f"{args.num_samples} windows of {args.seq_len} tokens"
    title = f"{args.method} {args.bits} bits, groups of {args.group_size}, {windows}"
    print_costs(title, runs, sizes)
    result: dict[str, Any] = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "gflops_a_cpu_second": rates,
        "runs": {side: [usage.figures() for usage in usages] for side, usages in runs.items()},
        "output_bytes": sizes,
    }
    if args.peer_python:
        result["peer_reports"] = [last_json(usage.stdout) for usage in runs[PEER]]
    if args.method == "gptq":
        floor = gptq_floor(args.model, windows=args.num_samples, seq_len=args.seq_len)
        result["floor_cpu_seconds"] = print_floor(floor, rates, runs)
    save_json(args.json, result)


if __name__ == "__main__":
    main()
