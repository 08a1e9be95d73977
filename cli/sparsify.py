"""The command that finds thresholds of activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.outcomes import show_estimate
from cli.params import given, parameters
from cli.render import duration, emit, pairs, show

UNHEARD = ("max_shard_size", "strict")  # settings of a run that mean nothing here


def sparsify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a local folder, or org/name[@revision] on the hub")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", metavar="TEXT", help="measure on this text too; may be repeated"),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("-o", "--output-dir", help="default: the model's name, method and share, here")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print time, memory, disk; write nothing")] = False,
    json: Annotated[bool, typer.Option("--json", help="the report as one JSON object on stdout")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="errors only")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="more detail")] = False,
    **values: Any,
) -> int | None:
    """Thresholds below which activations count as zero (TEAL, CHESS), as a file beside the model, with what they cost."""
    from weightworks.stage.settings import divide
    from weightworks.stage.thresholds import ThresholdOptions

    options, settings = divide(given(values), ThresholdOptions, "sparsify")

    from weightworks.plan.thresholds import run_thresholds
    from weightworks.report.progress import Progress

    outcome = run_thresholds(
        model,
        ThresholdOptions(**options),
        settings,
        texts=tuple(perplexity or ()),
        output_dir=output_dir,
        dry_run=dry_run,
        progress=Progress(quiet=quiet, verbose=verbose),
        announce=(lambda facts: None) if quiet else _show_plan,
    )
    if not quiet:
        show_estimate(outcome) if dry_run else _show(outcome)
    if json:
        told = {"estimate": outcome.estimate.facts()} if dry_run and outcome.estimate else {}
        emit({"target": str(outcome.target), "cached": outcome.cached, **told, **(outcome.report or {})})
    return 0


def sparsify_parameters() -> list[Any]:
    """The command's options, and those of a run that it heeds."""
    from weightworks.stage.settings import Settings
    from weightworks.stage.thresholds import ThresholdOptions

    run = [one for one in parameters({"": Settings}, "Run") if one.name not in UNHEARD]
    return [*parameters({"": ThresholdOptions}, "Thresholds"), *run]


def _show_plan(facts: dict[str, Any]) -> None:
    show(f"sparsify {facts['model']}")
    pairs({key: value for key, value in facts.items() if key != "model"})


def _show(outcome: Any) -> None:
    """Where the folder lies, and what was measured."""
    if outcome.cached:
        show(f"already done: {outcome.target} was made by this very command")
        return
    lines = {"written": str(outcome.target), "took": duration(outcome.seconds)}
    for text, seen in outcome.report["measured"].items():
        gates = f", of gates {seen['zeros_of_gates']:.1%}" if "zeros_of_gates" in seen else ""
        lines[text] = (
            f"perplexity {seen['perplexity']:.4f} -> {seen['perplexity_sparse']:.4f}, "
            f"zeros of inputs {seen['zeros_of_inputs']:.1%}{gates}"
        )
    pairs(lines)
