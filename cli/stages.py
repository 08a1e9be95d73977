"""Commands that make one checkpoint of one: quantize, prune, recover. A method's own options come from its class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.outcomes import show_estimate, show_outcome
from cli.params import JSON, MODEL, QUIET, VERBOSE, given
from cli.render import emit, pairs, show, show_error
from weightworks.stage import catalog

OUTPUT = Annotated[
    Path | None, typer.Option("-o", "--output-dir", help="default: the model's name plus what was done, here")
]
Show = Callable[[Any], None]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="print time, memory, disk and output size; write nothing")]


def quantize(
    model: MODEL,
    method: Annotated[str, typer.Option("--method", help="quantization method; see: compress methods")] = "gptq",
    output_dir: OUTPUT = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Quantize a checkpoint's linear layers: to integers of 2 to 8 bits, or to FP8, FP4 and MX formats."""
    return run_method("quantize", model, method, output_dir, dry_run, json, quiet, verbose, values)


def prune(
    model: MODEL,
    method: Annotated[str, typer.Option("--method", help="pruning method; see: compress methods")] = "sparsegpt",
    output_dir: OUTPUT = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Set weights of a checkpoint to zero (2:4 keeps 2 of 4), or remove channels, heads, blocks or experts of it."""
    return run_method("prune", model, method, output_dir, dry_run, json, quiet, verbose, values)


def recover(
    model: MODEL,
    method: Annotated[str, typer.Option("--method", help="recovery method; see: compress methods")] = "perp",
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
    """Train a pruned checkpoint to win back what pruning cost; every zero stays a zero."""
    return run_method("recover", model, method, output_dir, dry_run, json, quiet, verbose, values, teacher)


def run_method(
    kind: str,
    model: str,
    method: str,
    output_dir: Path | None,
    dry_run: bool,
    json: bool,
    quiet: bool,
    verbose: bool,
    values: dict[str, Any],
    teacher: str | None = None,
    shown: tuple[Show, Show] = (show_estimate, show_outcome),
) -> int | None:
    """Run one method on one checkpoint and tell what came of it; ``shown`` are what it will take and what it came to."""
    from weightworks.stage.settings import divide

    entry = catalog.find(kind, method)
    options, settings = divide(given(values), entry.load().Options, entry.label)  # refused before the libraries load

    from weightworks.plan.select import run_select
    from weightworks.plan.stage import run_stage
    from weightworks.report.progress import Progress

    def announce(resolved: dict[str, Any]) -> None:
        if not quiet:
            show(f"{kind} {resolved['model']}")
            pairs({key: value for key, value in resolved.items() if key != "model"})

    progress = Progress(quiet=quiet, verbose=verbose)
    start = run_select if kind == "select" else partial(run_stage, kind)
    outcome = start(
        method,
        model,
        options,
        settings,
        teacher=teacher,
        output_dir=output_dir,
        dry_run=dry_run,
        progress=progress,
        announce=announce,
    )
    if dry_run:
        facts = outcome.estimate.facts() if outcome.estimate else {}
        if not quiet:
            shown[0](outcome)
        if json:
            emit({"target": str(outcome.target), "cached": outcome.cached, "estimate": facts})
        return 0
    if not quiet:
        shown[1](outcome)
    if json:
        emit(
            {
                "target": str(outcome.target),
                "cached": outcome.cached,
                "seconds": outcome.seconds,
                **(outcome.provenance or {}),
            }
        )
    if settings.strict and (degraded := outcome.degraded()):
        show_error(degraded)
        return degraded.exit_code
    return 0
