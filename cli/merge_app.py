"""The ``merge`` command: each method of the shelf is a command of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import adapters
from cli.common import guarded, spell, version
from cli.params import JSON, QUIET, VERBOSE, command, given, parameters
from cli.render import duration, emit, pairs, show, show_error, size, table
from weightworks.stage import catalog
from weightworks.stage.catalog import Entry

SETTINGS = (  # those of a run's settings that a merge heeds
    "seed", "device", "max_memory", "max_shard_size", "overwrite", "resume", "strict", "trust_remote_code", "allow_pickle",
)  # fmt: skip
CONFIGURED = ("on_missing", "check")  # those of a merge's options that a configuration does not give itself


def merge(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="folders or hub ids, in the order that counts")
    ],
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="the checkpoint the models were fine-tuned from")
    ] = None,
    continue_from: Annotated[
        str | None,
        typer.Option("--continue-from", metavar="DIR", help="a finished merge that the models are added to [opcm]"),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("-o", "--output-dir", help="default: the base's name plus what was done, here")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print diagnostics, time, memory, disk and output size; write nothing")
    ] = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Merge checkpoints."""
    raise NotImplementedError  # a pattern: `method_command` makes the commands


def method_command(entry: Entry) -> Callable[..., int | None]:
    """The command of one method."""

    def run(
        models: list[str],
        base: str | None = None,
        continue_from: str | None = None,
        output_dir: Path | None = None,
        dry_run: bool = False,
        json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        **values: Any,
    ) -> int | None:
        from weightworks.stage.settings import divide

        options_class = entry.load().Options
        options, settings = divide(given(values, options_class), options_class, entry.label)

        from weightworks.plan.merge import run_merge
        from weightworks.report.progress import Progress

        outcome = run_merge(
            entry.name,
            models,
            options,
            settings,
            base=base,
            earlier=continue_from,
            output_dir=output_dir,
            dry_run=dry_run,
            progress=Progress(quiet=quiet, verbose=verbose),
            announce=(lambda facts: None) if quiet else show_plan,
        )
        return told(outcome, dry_run=dry_run, json=json, quiet=quiet, strict=settings.strict)

    run.__doc__, run.__name__ = entry.summary, entry.name
    return run


def config(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="a configuration of mergekit")],
    output_dir: Annotated[
        Path | None, typer.Option("-o", "--output-dir", help="default: the base's name plus what was done, here")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print diagnostics, time, memory, disk and output size; write nothing")
    ] = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Merge and stack layers as a configuration of mergekit says."""
    from weightworks.stage.settings import divide

    options, settings = divide(given(values), _merge_options(), "merge.config")

    from weightworks.plan.config import run_config
    from weightworks.report.progress import Progress

    outcome = run_config(
        file,
        options,
        settings,
        output_dir=output_dir,
        dry_run=dry_run,
        progress=Progress(quiet=quiet, verbose=verbose),
        announce=(lambda facts: None) if quiet else show_plan,
    )
    return told(outcome, dry_run=dry_run, json=json, quiet=quiet, strict=settings.strict)


def told(outcome: Any, *, dry_run: bool, json: bool, quiet: bool, strict: bool) -> int:
    """Tell what came of a merge; returns the exit code."""
    if not quiet:
        show_estimate(outcome) if dry_run else show_outcome(outcome)
    if json:
        costs = outcome.estimate.facts() if dry_run and outcome.estimate else {}
        facts = {"estimate": costs} if dry_run else {"seconds": outcome.seconds, **(outcome.provenance or {})}
        emit({"target": str(outcome.target), "cached": outcome.cached, **facts})
    if strict and not dry_run and (degraded := outcome.degraded()):
        show_error(degraded)
        return int(degraded.exit_code)
    return 0


def show_plan(facts: dict[str, Any]) -> None:
    """The configuration as it will run, and what the task vectors look like."""
    diagnosis, notes, names = facts["diagnosis"], facts["notes"], facts["members"]
    show(f"merge {len(names)} models")
    hidden = {"diagnosis", "notes"} | ({"members"} if names == facts["models"] else set())
    pairs({key: value for key, value in facts.items() if key not in hidden and value not in (None, [])})
    for line in notes[:20]:
        show(f"  note: {line}")
    if len(notes) > 20:
        show(f"  and {len(notes) - 20} more notes, all in provenance.json")
    if not diagnosis:
        return
    count = len(names)
    seen = diagnosis["looked_at"] / max(diagnosis["elements"], 1)
    relative = "the base" if facts["base"] else "their mean"
    show(f"  task vectors, relative to {relative}" + ("" if seen == 1 else f" (from {seen:.1%} of all weights)"))
    columns = ["model", "norm", "changed", "below half an ulp", *(f"cosine to {k}" for k in range(1, count))]
    cosines = iter(diagnosis["cosines"])
    square = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            square[i][j] = square[j][i] = next(cosines)
    table(
        columns,
        [
            [
                f"{k + 1} {name}",
                diagnosis["delta_norms"][k],
                f"{diagnosis['density'][k]:.1%}",
                f"{diagnosis['below_half_ulp'][k]:.1%}",
                *("" if j == k else f"{square[k][j]:.3f}" for j in range(count - 1)),
            ]
            for k, name in enumerate(names)
        ],
    )
    show(
        f"  models disagree in sign on {diagnosis['sign_conflicts']:.1%} of the weights that two or more of them changed"
    )


def show_estimate(outcome: Any) -> None:
    """The estimate of a dry run."""
    if outcome.cached:
        show(f"nothing to do: {outcome.target} was made by this very command and is intact")
        return
    costs = outcome.estimate
    pairs(
        {
            "time": f"about {duration(costs.seconds)}",
            "peak memory": f"about {size(costs.peak_bytes)} ({costs.peak_phase}); allowed {size(costs.limit_bytes)}",
            "disk": f"{size(costs.disk_bytes)} while running",
            "output": f"{costs.output_bytes:,} bytes of weights",
        }
    )
    show("dry run: nothing was written")


def show_outcome(outcome: Any) -> None:
    """Where the result lies, what it is worth, what fell short."""
    facts = outcome.provenance
    if outcome.cached:
        show(f"already done: {outcome.target} was made by this very command and is intact")
    tensors, checks, quality = facts["tensors"], facts["checks"], facts["quality"]
    summary = {
        "written": str(outcome.target),
        "size": size(facts["size"]["bytes_out"]),
        "tensors": f"{tensors['transformed']} merged, {tensors['copied']} copied, {tensors['dropped']} left out",
    }
    if quality:
        before, after = quality["dense"], quality["result"]
        summary["perplexity"] = f"{before:.3f} (reference) -> {after:.3f} on the built-in check text"
        summary["verified"] = (
            f"read back, loaded by {checks['loader']}: perplexity {checks['perplexity_reloaded']:.4f}, "
            f"streamed {checks['perplexity_in_memory']:.4f}"
            + ("" if checks["blocks_loaded"] == checks["blocks"] else f" (first of {checks['blocks']} blocks)")
        )
    else:
        summary["verified"] = checks["loader"]
    summary["took"] = duration(outcome.seconds)
    pairs(summary)
    for line in outcome.fallbacks[:20]:
        show(f"  note: {line}")


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="a method")] = None, json: JSON = False
) -> int | None:
    """Every merge, its paper and its options."""
    from cli.describe import tell

    tell(None if name is None else name.replace("-", "_"), json=json, shelves=("merge", "adapter"))
    return 0


COMMANDS: dict[str, Callable[..., int | None]] = {
    **adapters.COMMANDS,
    "config": config,
    "methods": methods,
}  # no methods


def build(typed: str | None) -> typer.Typer:
    """The application; only the command ``typed`` gets its options."""
    app = typer.Typer(
        name="merge",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Combine checkpoints of one architecture: streamed, exact, verified, resumable.",
    )

    @app.callback()
    def root(
        show_version: Annotated[
            bool, typer.Option("--version", callback=version, is_eager=True, help="print the version and leave")
        ] = False,
    ) -> None:
        pass

    for entry in catalog.declared():
        if entry.kind != "merge" or entry.broken is not None:
            continue
        name = entry.name.replace("_", "-")
        function = method_command(entry)
        pattern = command(merge, extra(entry) if name == typed else [], guarded(function))
        pattern.__doc__ = entry.summary
        app.command(name)(pattern)
    for name, function in COMMANDS.items():
        own = []
        if name == typed:
            own = adapters.extra(name) if name in adapters.COMMANDS else config_extra() if name == "config" else []
        app.command(name)(command(function, own, guarded(function)))
    return app


def extra(entry: Entry) -> list[Any]:
    """The options of a method, and those of a run that merges heed."""
    from weightworks.stage.settings import Settings

    run = [one for one in parameters({"": Settings}, "Run") if one.name in SETTINGS]
    return [*parameters({entry.name: entry.load().Options}, "Method"), *run]


def config_extra() -> list[Any]:
    """The options of a configured merge, and those of a run that merges heed."""
    from weightworks.stage.settings import Settings

    own = [one for one in parameters({"": _merge_options()}, "Merge") if one.name in CONFIGURED]
    return [*own, *(one for one in parameters({"": Settings}, "Run") if one.name in SETTINGS)]


def _merge_options() -> Any:
    catalog.defer(catalog.HEAVY)
    from weightworks.stage.merging import MergeOptions

    return MergeOptions


def main() -> None:
    """Entry point of ``merge``."""
    sys.argv[1:] = spell(sys.argv[1:])
    typed = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    known = {*_labels(), *(f"merge.{name.replace('-', '_')}" for name in COMMANDS)}
    if typed is not None and (hyphened := typed.replace("_", "-")) != typed and f"merge.{typed}" in known:
        sys.argv[sys.argv.index(typed)] = typed = hyphened
    build(typed)()


def _labels() -> set[str]:
    return {entry.label for entry in catalog.declared()}
