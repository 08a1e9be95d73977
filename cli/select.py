"""The command that chooses rows of a data set for a recovery."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.params import JSON, MODEL, QUIET, VERBOSE, given
from cli.render import duration, emit, pairs, show, show_error, size, table
from cli.stages import DRY_RUN, OUTPUT
from weightworks.stage import catalog


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
    from weightworks.stage.settings import divide

    entry = catalog.find("select", method)
    options, settings = divide(given(values), entry.load().Options, entry.label)  # refused before the libraries load

    from weightworks.plan.select import run_select
    from weightworks.report.progress import Progress

    def announce(resolved: dict[str, Any]) -> None:
        if not quiet:
            show(f"select {resolved['model']}")
            pairs({key: value for key, value in resolved.items() if key != "model"})

    outcome = run_select(
        method,
        model,
        options,
        settings,
        teacher=teacher,
        output_dir=output_dir,
        dry_run=dry_run,
        progress=Progress(quiet=quiet, verbose=verbose),
        announce=announce,
    )
    if not quiet:
        _show(outcome, dry_run=dry_run)
    if json:
        told = {"estimate": outcome.estimate.facts()} if dry_run and outcome.estimate else {"seconds": outcome.seconds}
        emit({"target": str(outcome.target), "cached": outcome.cached, **told, **(outcome.provenance or {})})
    if settings.strict and (degraded := outcome.degraded()):
        show_error(degraded)
        return degraded.exit_code
    return 0


def _show(outcome: Any, *, dry_run: bool) -> None:
    """Where the choice lies, and the clusters it was made from; or what it would take."""
    if outcome.cached:
        show(f"already done: {outcome.target} was made by this very command and is intact")
    if dry_run and outcome.provenance is None:
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
        return
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
