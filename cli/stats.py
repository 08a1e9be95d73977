"""The command that gathers statistics of a model, for merges that want them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.outcomes import show_estimate
from cli.params import given, parameters
from cli.render import duration, emit, pairs, show, size

UNHEARD = ("max_shard_size", "strict")  # settings of a run that mean nothing here


def stats(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a local folder, or org/name[@revision] on the hub")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="default: the model's name and the kind, here")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print time, memory, disk; write nothing")] = False,
    json: Annotated[bool, typer.Option("--json", help="the report as one JSON object on stdout")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="errors only")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="more detail")] = False,
    **values: Any,
) -> int | None:
    """Statistics of a model on a text, as a file: Gram matrices for merge regmean, Fisher information for merge fisher."""
    from weightworks.stage.settings import divide
    from weightworks.stage.statistics import StatisticsOptions

    options, settings = divide(given(values), StatisticsOptions, "stats")

    from weightworks.plan.stats import run_stats
    from weightworks.report.progress import Progress

    outcome = run_stats(
        model,
        StatisticsOptions(**options),
        settings,
        output=output,
        dry_run=dry_run,
        progress=Progress(quiet=quiet, verbose=verbose),
        announce=(lambda facts: None) if quiet else _show_plan,
    )
    if not quiet:
        show_estimate(outcome) if dry_run else _show(outcome)
    if json:
        told = {"estimate": outcome.estimate.facts()} if dry_run and outcome.estimate else {}
        emit({"target": str(outcome.target), "cached": outcome.cached, **told, **(outcome.facts or {})})
    return 0


def stats_parameters() -> list[Any]:
    """The command's options, and those of a run that it heeds."""
    from weightworks.stage.settings import Settings
    from weightworks.stage.statistics import StatisticsOptions

    run = [one for one in parameters({"": Settings}, "Run") if one.name not in UNHEARD]
    return [*parameters({"": StatisticsOptions}, "Statistics"), *run]


def _show_plan(facts: dict[str, Any]) -> None:
    show(f"stats {facts['model']}")
    pairs({key: value for key, value in facts.items() if key != "model"})


def _show(outcome: Any) -> None:
    """Where the file lies, and what fell short."""
    if outcome.cached:
        show(f"already done: {outcome.target} was made by this very command")
        return
    text = outcome.facts["text"]
    pairs(
        {
            "written": f"{outcome.target}, {size(outcome.target.stat().st_size)}",
            "seen": f"{text['tokens']} tokens of {text['source']}",
            "took": duration(outcome.seconds),
        }
    )
    for line in outcome.notes:
        show(f"  note: {line}")
