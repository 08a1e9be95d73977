"""The page that compares this project with its peers: a chart, and tables in Markdown, of results that are kept.

    python benchmarks/quantize_vs_peer.py /tmp/llama-1b-2 --peer-python PEER/bin/python --json quantize.json
    python benchmarks/prune_vs_peer.py /tmp/llama-1b-2 --peer-python PEER/bin/python --json prune.json
    python benchmarks/merge_vs_peer.py --work /tmp/merges --peer-python MERGEKIT/bin/python --json merge.json
    python benchmarks/faulty_inputs.py --mergekit MERGEKIT/bin/python --llmcompressor PEER/bin/python --json faulty.json
    python benchmarks/comparison.py quantize.json prune.json merge.json --faulty faulty.json --picture comparison.png

Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import note, table

COLOURS = {"ours": "#1f6fb2", "peer": "#b9bec6"}


@dataclass(frozen=True)
class Pair:
    """One work done by both: CPU seconds and peak bytes, ours and the peer's."""

    name: str
    peer: str
    seconds: tuple[float, float]
    peaks: tuple[int, int]

    @classmethod
    def of(cls, name: str, peer: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Pair:
        seconds, peaks = "cpu_seconds", "peak_bytes"
        return cls(name, peer, (ours[seconds], theirs[seconds]), (ours[peaks], theirs[peaks]))


def pairs(found: Mapping[str, Any]) -> Iterator[Pair]:
    """What a file of results has, of whichever benchmark it is."""
    if "merges" in found:
        for name, runs in found["merges"].items():
            if "mergekit" in runs:
                yield Pair.of(f"merge: {name}", "mergekit", runs["ours, files"], runs["mergekit"])
    elif "runs" in found:
        runs = {side: best(times) for side, times in found["runs"].items()}
        settings = found["settings"]
        yield Pair.of(
            f"{settings['method']}, {settings['bits']} bits", "llm-compressor", runs["ours"], runs["llm-compressor"]
        )
    else:
        for name, part in found.items():
            if isinstance(part, dict) and "runs" in part:
                runs = {side: best(times) for side, times in part["runs"].items()}
                yield Pair.of(f"prune: {name}", "llm-compressor", runs["ours"], runs["llm-compressor"])


def best(times: list[dict[str, Any]]) -> dict[str, Any]:
    return min(times, key=lambda one: one["cpu_seconds"])


def draw(found: list[Pair], path: Path) -> None:
    """Two panels of bars, CPU seconds and peak memory, a pair of bars for each work."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    places = range(len(found))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 0.55 * len(found) + 1.2), sharey=True, layout="constrained")
    for panel, title, values in (
        (panels[0], "CPU seconds", [one.seconds for one in found]),
        (panels[1], "peak memory, GB", [(one.peaks[0] / 1e9, one.peaks[1] / 1e9) for one in found]),
    ):
        for shift, side in ((-0.2, "ours"), (0.2, "peer")):
            column = [value[side == "peer"] for value in values]
            label = "weightworks" if side == "ours" else "the peer"
            bars = panel.barh([place + shift for place in places], column, 0.38, color=COLOURS[side], label=label)
            panel.bar_label(bars, [f"{value:.3g}" for value in column], padding=3, fontsize=8)
        panel.set_title(title, fontsize=11, loc="left")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.margins(x=0.12)
    panels[0].set_yticks(list(places), [f"{one.name}\n({one.peer})" for one in found], fontsize=8)
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    note(f"wrote {path}")


def faults(found: Mapping[str, Mapping[str, Any]]) -> None:
    """A table a kind of work: what each tool did with each input."""
    for job in dict.fromkeys(key.split(" | ")[0] for key in found):
        keys = [key.split(" | ")[1:] for key in found if key.startswith(f"{job} | ")]
        names, sides = (list(dict.fromkeys(part[place] for part in keys)) for place in (0, 1))
        rows = [[name, *(verdict(found[f"{job} | {name} | {side}"]) for side in sides)] for name in names]
        table(job, ["input", *sides], rows)


def verdict(run: Mapping[str, Any]) -> str:
    if run["silent"]:
        return "**goes on, output written**"
    told = "named" if run["named"] else "not named"
    if run["exit"] == 0:
        return f"exit 0 and no output, {told}"
    left = f", leaves {len(run['left'])} files" if run["left"] else ""
    return f"{told}, {run['lines']} lines{left}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files that the benchmarks beside this one wrote")
    parser.add_argument("--faulty", type=Path, help="results of faulty_inputs.py")
    parser.add_argument("--picture", type=Path, help="draw a chart into this file")
    args = parser.parse_args()
    known = [pair for path in args.results for pair in pairs(json.loads(path.read_text()))]
    rows = [
        [
            one.name, one.peer, *(f"{value:.1f}" for value in one.seconds), f"{one.seconds[0] / one.seconds[1]:.2f}",
            *(f"{value / 1e9:.2f}" for value in one.peaks), f"{one.peaks[0] / one.peaks[1]:.2f}",
        ]
        for one in known
    ]  # fmt: skip
    head = ["", "peer", "CPU s", "its CPU s", "ratio", "peak GB", "its peak GB", "ratio"]
    table("What the same work took", head, rows)
    if args.faulty:
        faults(json.loads(args.faulty.read_text()))
    if args.picture:
        draw(known, args.picture)


if __name__ == "__main__":
    main()
