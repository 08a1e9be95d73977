"""Merges three checkpoints with this project and with mergekit, in turn, and compares what it cost.

    python benchmarks/merge_vs_peer.py --work DIR --peer-python PEER/bin/python

A base and three models of made-up weights are made in DIR (1.1 GB each: eight layers of Llama-3.2-1B's shape, bfloat16,
500 MB a shard) unless they are there. Every merge is a process of its own, measured from start to end, imports, hashing
and saving included; ours once as it is (``full``: the result is loaded by stock transformers and scored) and once with
``--check files`` (read back and accounted for), since mergekit checks nothing. The floor is what plain copies of the
inputs to nowhere and of one output to a file take. CPU seconds are user plus system of the whole process tree, the peak
is its largest resident size. To make the peer's environment:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install mergekit==0.1.5
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from _measure import Usage, note, run, save_json, table

HERE = Path(__file__).resolve().parent
NAMES = ("base", "a", "b", "c")
COPY = """
import sys
inputs, output = sys.argv[1:-1], sys.argv[-1]
buffer = bytearray(16 << 20)
for path in inputs:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
with open(output, "wb", buffering=0) as out, open(inputs[0], "rb", buffering=0) as file:
    while count := file.readinto(buffer):
        out.write(memoryview(buffer)[:count])
"""
DENSITY = 0.5
MERGES: dict[str, tuple[list[str], bool, str]] = {  # our command and options, whether it has a base, mergekit's YAML
    "linear": (["soup"], False, "merge_method: linear\nparameters: {weight: 1.0}"),
    "task arithmetic": (
        ["task-arithmetic", "--scaling", "0.5"],
        True,
        "merge_method: task_arithmetic\nparameters: {weight: 0.5}",
    ),
    "TIES": (["ties"], True, f"merge_method: ties\nparameters: {{weight: 1.0, density: {DENSITY}}}"),
    "DARE-TIES": (["dare"], True, f"merge_method: dare_ties\nparameters: {{weight: 1.0, density: {DENSITY}}}"),
    "SLERP": (["slerp", "--t", "0.5"], False, "merge_method: slerp\nparameters: {t: 0.5}"),
    "model stock": (["model-stock"], True, "merge_method: model_stock"),
}


def models(work: Path, layers: int) -> dict[str, Path]:
    """The checkpoints, made where they are not there yet."""
    folders = {name: work / f"{name}-{layers}" for name in NAMES}
    for seed, folder in enumerate(folders.values()):
        if not (folder / "config.json").exists():
            note(f"making {folder}")
            words = [sys.executable, HERE / "make_checkpoint.py", folder, "--layers", str(layers)]
            run([*words, "--seed", str(seed), "--max-shard-size", "500MB"])
    return folders


def ours(name: str, folders: dict[str, Path], out: Path, check: str) -> list[str | Path]:
    """The command line of this project."""
    words, based, _ = MERGES[name]
    inputs = [folders[key] for key in ("a", "b", "c")][: 2 if name == "SLERP" else 3]
    base: list[str | Path] = ["--base", folders["base"]] if based else []
    program = "from cli.program import merge; merge()"
    return [sys.executable, "-c", program, *words, *inputs, *base, "-o", out, "-q", "--check", check, "--overwrite"]


def peers(name: str, folders: dict[str, Path], out: Path, python: Path, work: Path) -> list[str | Path]:
    """The command line of mergekit, and its configuration written."""
    _, based, text = MERGES[name]
    inputs = [folders[key] for key in ("a", "b", "c")][: 2 if name == "SLERP" else 3]
    base = folders["base"] if based else folders["a"] if name == "SLERP" else None
    lines = [text, "models:", *(f"  - model: {path}" for path in inputs), "dtype: bfloat16"]
    lines += [f"base_model: {base}"] if base else []
    config = work / "mergekit.yaml"
    config.write_text("\n".join(lines) + "\n")
    return [python.parent / "mergekit-yaml", config, out, "--out-shard-size", "500000000"]


def cells(usage: Usage) -> list[str]:
    return [f"{usage.wall_seconds:.1f}", f"{usage.cpu_seconds:.1f}", f"{usage.peak_bytes / 1e9:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and outputs")
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help="the Python of mergekit's environment")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=list(MERGES), default=list(MERGES), help="some of the merges")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folders = models(args.work, args.layers)
    shards = [path for key in ("a", "b", "c") for path in sorted(folders[key].glob("*.safetensors"))]
    floor = run([sys.executable, "-c", COPY, *shards, args.work / "floor.bin"])
    (args.work / "floor.bin").unlink()
    rows = [["plain copies (of one shard out)", *cells(floor), "", "", ""]]
    result: dict[str, Any] = {"floor": floor.figures(), "merges": {}}
    for name in args.only:
        runs: dict[str, Usage] = {}
        for side in ("ours, full", "ours, files", "mergekit"):
            out = args.work / "out"
            shutil.rmtree(out, ignore_errors=True)
            if side == "mergekit":
                if args.peer_python is None:
                    continue
                command = peers(name, folders, out, args.peer_python, args.work)
            else:
                command = ours(name, folders, out, side.split()[-1])
            note(f"{name}: {side}")
            runs[side] = run(command)
        peer = runs.get("mergekit")
        for side, usage in runs.items():
            ratios = ["", "", ""]
            if peer is not None and usage is not peer:
                ratios = [
                    f"{usage.wall_seconds / peer.wall_seconds:.2f}",
                    f"{usage.cpu_seconds / peer.cpu_seconds:.2f}",
                    f"{usage.peak_bytes / peer.peak_bytes:.2f}",
                ]
            rows.append([f"{name}: {side}", *cells(usage), *ratios])
        result["merges"][name] = {side: usage.figures() for side, usage in runs.items()}
    title = f"Merging models of {args.layers} layers; ratios are ours to mergekit's"
    table(title, ["", "wall s", "CPU s", "peak GB", "wall ratio", "CPU ratio", "peak ratio"], rows)
    save_json(args.json, result)


if __name__ == "__main__":
    main()
