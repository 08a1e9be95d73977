"""Prunes one checkpoint with this project and with llm-compressor, in turn, and compares cost and what came out.

    python benchmarks/make_checkpoint.py CKPT --layers 2
    python benchmarks/prune_vs_peer.py CKPT --peer-python PEER/bin/python

Both get the same model, calibration tokens and sparsity. Each run is a process of its own, measured from start to end:
imports, calibration, saving, and our verification too. CPU seconds are user plus system of the whole process tree, the
peak is its largest resident size. The sparsity of every output is counted in its files, and a side that did not prune what
was asked for ends the comparison: the peer can report success and leave a model dense. With --texts both outputs are
scored (perplexity, geometric mean; of trained models only). How to make the peer's environment: quantize_vs_peer.py --help.

On a busy machine read CPU seconds, not wall time. With --repeat N each side's run of median CPU seconds counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _measure import Usage, folder_bytes, note, run, save_json, table
from _ours import HERE, PEER_HELP, Windows, compress_command, fresh, work_folder, write_tokens
from _perplexity import geometric_mean, perplexities, windows_of
from quantize_vs_peer import OURS, PEER, print_costs
from weightworks.store.checkpoint import Checkpoint

METHODS = ("sparsegpt", "wanda")
WITHIN = 1e-3  # how far a side's sparsity may be from what was asked
TOKENS = 10_000  # of each text


def commands(args: argparse.Namespace, method: str, work: Path) -> dict[str, list[str | Path]]:
    """What runs for ``method``, by side."""
    amount: list[str | Path] = ["--method", method]
    amount += ["--pattern", args.pattern] if args.pattern else ["--sparsity", str(args.sparsity)]
    text = ["--dataset", args.text, "--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len)]
    ours = [compress_command(), "prune", args.model, *amount, *text, "--seed", str(args.seed), "-q", "--overwrite"]
    found = {OURS: [*ours, "-o", work / OURS]}
    if args.peer_python:
        script, tokens = HERE / "peers" / "llmcompressor_prune.py", work / "tokens.safetensors"
        found[PEER] = [args.peer_python, script, args.model, work / PEER, tokens, *amount]
    return found


def zeros(folder: Path, names: Sequence[str]) -> float:
    """The share of zeros in the weights ``names`` of a folder."""
    checkpoint, empty, whole = Checkpoint.open(str(folder)), 0, 0
    for name in names:
        weight = checkpoint.read(name)
        empty, whole = empty + int((weight == 0).sum()), whole + weight.numel()
    return empty / whole


def changed(model: Path, folder: Path) -> list[str]:
    """The tensors of ``folder`` that are not those of ``model``."""
    before, after = Checkpoint.open(str(model)), Checkpoint.open(str(folder))
    return [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]


def compare(args: argparse.Namespace, method: str, work: Path) -> dict[str, Any]:
    """Both sides in turn on ``method``: the tables printed, the figures returned."""
    sides = commands(args, method, work)
    runs: dict[str, list[Usage]] = {side: [] for side in sides}
    for turn in range(args.repeat):
        for side, command in sides.items():
            note(f"{method}, run {turn + 1} of {args.repeat}: {side}")
            fresh(work / side)
            runs[side].append(run(command, env={"OMP_NUM_THREADS": str(args.threads)}))
    asked = 0.5 if args.pattern else args.sparsity
    names = changed(args.model, work / OURS)
    found = {side: zeros(work / side, names) for side in sides}
    title = f"{method}, {args.pattern or f'{args.sparsity:.0%}'}, {args.num_samples} windows of {args.seq_len} tokens"
    print_costs(title, runs, {side: folder_bytes(work / side) for side in sides})
    quality = scores(args, sides, work)
    rows = [[side, f"{share:.4%}", *([f"{quality[side]:.3f}"] if quality else [])] for side, share in found.items()]
    table(f"What came out of {len(names)} weights", ["", "zeros", *(["perplexity"] if quality else [])], rows)
    if wrong := [side for side, share in found.items() if abs(share - asked) > WITHIN]:
        sys.exit(f"{', '.join(wrong)} did not prune {asked:.0%}: the figures above compare nothing")
    figures = {side: [usage.figures() for usage in usages] for side, usages in runs.items()}
    return {"runs": figures, "zeros": found, "perplexity": quality}


def scores(args: argparse.Namespace, sides: Mapping[str, Any], work: Path) -> dict[str, float]:
    """The perplexity of every side's output over ``--texts``."""
    texts = [windows_of(text, args.model, TOKENS) for text in args.texts]
    return {side: geometric_mean(perplexities(work / side, texts)) for side in sides} if texts else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help=PEER_HELP)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", choices=["2:4"], help="in place of --sparsity")
    parser.add_argument("--num-samples", type=int, default=32, help="windows of calibration tokens (default 32)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="builtin", help="calibration text, a .txt file (default: the package's own)")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="texts to score the outputs on")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of both sides (default 1)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each side, in turn (default 1)")
    parser.add_argument("--work", type=Path, help="keep outputs and tokens in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with work_folder(args.work) as work:
        if args.peer_python:
            windows = Windows(args.text, args.num_samples, args.seq_len, args.seed)
            write_tokens(args.model, work / "tokens.safetensors", windows)
        result = {method: compare(args, method, work) for method in args.methods}
    save_json(args.json, {"settings": {key: str(value) for key, value in vars(args).items()}, **result})


if __name__ == "__main__":
    main()
