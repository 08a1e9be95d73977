"""How the time and memory of ``compress quantize`` grow with layers, with width, and with calibration tokens.

    python benchmarks/growth.py

One of the three varies at a time, the others stay at 2 layers, hidden 512 and 32 windows of 512 tokens. Checkpoints
have Llama-3.2-1B's proportions and made-up weights. Memory should not grow with layers. The last column is the share of
the CPU seconds that the arithmetic floor (_floor.py, float32, at this machine's measured speed) explains; on small
models the fixed cost of starting up takes most of the rest.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from _floor import gptq_floor, machine_rates
from _measure import Usage, note, run, save_json, table
from _ours import Settings, Windows, cost_cells, fresh, make_checkpoint, quantize_command, work_folder

SEQ_LEN = 512


@dataclass(frozen=True)
class Case:
    """One size of problem."""

    layers: int = 2
    hidden: int = 512
    windows: int = 32


def checkpoint_of(case: Case, work: Path) -> Path:
    """The made-up checkpoint of this shape, made at first use."""
    model = work / f"model-{case.layers}x{case.hidden}"
    if not model.exists():
        make_checkpoint(model, layers=case.layers, hidden=case.hidden)
    return model


def measure(case: Case, work: Path, *, bits: int, group_size: int) -> tuple[Usage, Path]:
    """Quantize once."""
    model = checkpoint_of(case, work)
    note(f"quantizing: {case.layers} layers, hidden {case.hidden}, {case.windows} windows")
    out = fresh(work / "out")
    windows = Windows("builtin", case.windows, SEQ_LEN)
    return run(quantize_command(model, out, Settings("gptq", bits, group_size), windows)), model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--hidden", type=int, nargs="*", default=[512, 1024, 2048], help="multiples of 256")
    parser.add_argument("--windows", type=int, nargs="*", default=[8, 32, 128], help=f"of {SEQ_LEN} tokens")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--work", type=Path, help="keep checkpoints in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    base = Case()
    axes = {
        "layers": [replace(base, layers=value) for value in args.layers],
        "hidden": [replace(base, hidden=value) for value in args.hidden],
        "windows": [replace(base, windows=value) for value in args.windows],
    }
    rates = machine_rates()
    done: dict[Case, tuple[Usage, float]] = {}
    with work_folder(args.work) as work:
        for case in (case for cases in axes.values() for case in cases):
            if case not in done:
                usage, model = measure(case, work, bits=args.bits, group_size=args.group_size)
                floor = gptq_floor(model, windows=case.windows, seq_len=SEQ_LEN)
                done[case] = usage, floor.cpu_seconds(rates)
    for axis, cases in axes.items():
        rows = []
        for case in cases:
            usage, seconds = done[case]
            first = done[cases[0]][0]
            growth = [usage.cpu_seconds / first.cpu_seconds, usage.peak_bytes / first.peak_bytes]
            cells = [f"{growth[0]:.2f}", f"{growth[1]:.2f}", f"{seconds:.1f}", f"{seconds / usage.cpu_seconds:.0%}"]
            rows.append([str(getattr(case, axis)), *cost_cells(usage), *cells])
        if rows:
            fixed = ", ".join(f"{name} {value}" for name, value in asdict(base).items() if name != axis)
            headers = [axis, "wall s", "CPU s", "peak GB", "CPU x", "peak x", "floor CPU s", "floor share"]
            table(f"Growth with {axis} ({fixed}, {args.bits} bits, groups of {args.group_size})", headers, rows)
    results = [{**asdict(case), **usage.figures(), "floor_cpu_seconds": floor} for case, (usage, floor) in done.items()]
    save_json(args.json, {"gflops_a_cpu_second": rates, "seq_len": SEQ_LEN, "runs": results})


if __name__ == "__main__":
    main()
