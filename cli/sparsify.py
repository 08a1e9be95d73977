"""The command that finds thresholds of activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.params import JSON, MODEL, QUIET, VERBOSE
from cli.render import duration, pairs
from cli.side import DRY_RUN, carry_out, side_parameters


def sparsify(
    model: MODEL,
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", metavar="TEXT", help="measure on this text too; may be repeated"),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("-o", "--output-dir", help="default: the model's name, method and share, here")
    ] = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Thresholds below which activations count as zero (TEAL, CHESS), as a file beside the model, with what they cost."""
    from weightworks.stage.thresholds import ThresholdOptions

    def run(options: ThresholdOptions, settings: Any, **how: Any) -> Any:
        from weightworks.plan.thresholds import run_thresholds

        return run_thresholds(model, options, settings, texts=tuple(perplexity or ()), output_dir=output_dir, **how)

    return carry_out(
        "sparsify", ThresholdOptions, values, run, _show, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose
    )


def sparsify_parameters() -> list[Any]:
    """The command's options."""
    from weightworks.stage.thresholds import ThresholdOptions

    return side_parameters(ThresholdOptions, "Thresholds")


def _show(outcome: Any) -> None:
    """Where the folder lies, and what was measured."""
    lines = {"written": str(outcome.target), "took": duration(outcome.seconds)}
    for text, seen in outcome.facts["measured"].items():
        gates = f", of gates {seen['zeros_of_gates']:.1%}" if "zeros_of_gates" in seen else ""
        lines[text] = (
            f"perplexity {seen['perplexity']:.4f} -> {seen['perplexity_sparse']:.4f}, "
            f"zeros of inputs {seen['zeros_of_inputs']:.1%}{gates}"
        )
    pairs(lines)
