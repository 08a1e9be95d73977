"""The command that chooses rows of a data set for a recovery."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.params import JSON, MODEL, QUIET, VERBOSE
from cli.render import duration, pairs, show, size, table
from cli.stages import DRY_RUN, OUTPUT, run_method


def select(
    model: MODEL,
    method: Annotated[str, typer.Option("--method", help="way of choosing; see: compress methods")] = "paser",
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="ORIGINAL", help="the model as it was before it was pruned")
    ] = None,
    output_dir: OUTPUT = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Choose the rows of a data set that win back most of what pruning cost, with every score, for compress recover."""
    shown = show_costs, show_choice
    return run_method("select", model, method, output_dir, dry_run, json, quiet, verbose, values, teacher, shown)


def show_costs(outcome: Any) -> None:
    """What a choice would take, or that it is there already."""
    if outcome.cached:
        show(f"nothing to do: {outcome.target} was made by this very command and is intact")
        return
    costs = outcome.estimate
    pairs(
        {
            "time": f"about {duration(costs.seconds)}",
            "peak memory": f"about {size(costs.peak_bytes)} ({costs.peak_phase}); allowed {size(costs.limit_bytes)}",
            "activations": "on disk" if costs.on_disk else "in memory",
            "disk": f"{size(costs.disk_bytes)} while running",
        }
    )
    show("dry run: nothing was written")


def show_choice(outcome: Any) -> None:
    """Where the choice lies, and the clusters it was made from."""
    if outcome.cached:
        show(f"already done: {outcome.target} was made by this very command and is intact")
    selection = outcome.provenance["selection"]
    clusters = selection.get("clusters", [])
    if clusters:
        table(
            ["cluster", "rows", "degradation", "quota", "chosen", "contradicted", "concepts"],
            [
                [
                    *(one[key] for key in ("cluster", "rows", "degradation", "quota", "chosen", "contradicted")),
                    ", ".join(one.get("concepts", [])[:4]),
                ]
                for one in clusters
            ],
        )
    pairs(
        {
            "chosen": f"{selection['chosen']} of {selection['usable']} rows, "
            f"{selection['tokens_chosen']} of {selection['tokens']} tokens",
            "written": f"{outcome.target}: selected.jsonl, scores.jsonl, report.html",
            "took": duration(outcome.seconds),
        }
    )
    for line in outcome.fallbacks:
        show(f"  fallback: {line}")
