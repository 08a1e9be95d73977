"""What commands share that write something about a model beside it: statistics, thresholds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.outcomes import show_estimate
from cli.params import given, parameters
from cli.render import emit, pairs, show

if TYPE_CHECKING:
    from weightworks.options import Options

UNHEARD = ("max_shard_size", "strict")  # settings of a run that mean nothing here
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="print time, memory, disk; write nothing")]


def carry_out(
    name: str,
    kind: type[Options],
    values: dict[str, Any],
    run: Callable[..., Any],
    show_written: Callable[[Any], None],
    *,
    dry_run: bool,
    json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Divide what was typed into options of ``kind`` and settings, have ``run`` do the work, and tell what came of it."""
    from weightworks.stage.settings import divide

    options, settings = divide(given(values), kind, name)

    from weightworks.report.progress import Progress

    outcome = run(
        kind(**options),
        settings,
        dry_run=dry_run,
        progress=Progress(quiet=quiet, verbose=verbose),
        announce=(lambda facts: None) if quiet else partial(_show_plan, name),
    )
    if not quiet:
        if dry_run:
            show_estimate(outcome)
        elif outcome.cached:
            show(f"already done: {outcome.target} was made by this very command")
        else:
            show_written(outcome)
            for line in outcome.notes:
                show(f"  note: {line}")
    if json:
        told = {"estimate": outcome.estimate.facts()} if dry_run and outcome.estimate else {}
        emit({"target": str(outcome.target), "cached": outcome.cached, **told, **(outcome.facts or {})})
    return 0


def side_parameters(kind: type[Options], panel: str) -> list[Any]:
    """A command's options, those of ``kind`` and those of a run that it heeds."""
    from weightworks.stage.settings import Settings

    run = [one for one in parameters({"": Settings}, "Run") if one.name not in UNHEARD]
    return [*parameters({"": kind}, panel), *run]


def _show_plan(name: str, facts: dict[str, Any]) -> None:
    show(f"{name} {facts['model']}")
    pairs({key: value for key, value in facts.items() if key != "model"})
