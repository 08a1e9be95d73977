"""The command that gathers statistics of a model, for merges that want them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.params import JSON, MODEL, QUIET, VERBOSE
from cli.render import duration, pairs, size
from cli.side import DRY_RUN, carry_out, side_parameters


def stats(
    model: MODEL,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="default: the model's name and the kind, here")
    ] = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Statistics of a model on a text, as a file: Gram matrices for merge regmean, Fisher information for merge fisher."""
    from weightworks.stage.statistics import StatisticsOptions

    def run(options: StatisticsOptions, settings: Any, **how: Any) -> Any:
        from weightworks.plan.stats import run_stats

        return run_stats(model, options, settings, output=output, **how)

    return carry_out(
        "stats", StatisticsOptions, values, run, _show, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose
    )


def stats_parameters() -> list[Any]:
    """The command's options."""
    from weightworks.stage.statistics import StatisticsOptions

    return side_parameters(StatisticsOptions, "Statistics")


def _show(outcome: Any) -> None:
    """Where the file lies."""
    text = outcome.facts["text"]
    pairs(
        {
            "written": f"{outcome.target}, {size(outcome.target.stat().st_size)}",
            "seen": f"{text['tokens']} tokens of {text['source']}",
            "took": duration(outcome.seconds),
        }
    )
