"""``merge lora``, ``merge lego`` and ``merge extract-lora``: commands whose result is a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.params import JSON, QUIET, VERBOSE, given, parameters
from cli.render import duration, emit, pairs, show, show_error, size, table
from weightworks.errors import UsageError
from weightworks.stage import catalog

ADAPTERS = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="folders or hub ids of LoRA adapters")]
BASE = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="the checkpoint they are for: to check that they fit, and to score"),
]
OUTPUT = Annotated[Path | None, typer.Option("-o", "--output-dir", help="default: the names of the inputs, here")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="print time, memory and output size; write nothing")]
SETTINGS = ("seed", "max_memory", "overwrite", "resume", "strict", "trust_remote_code", "allow_pickle")


def lora(
    adapters: ADAPTERS,
    method: Annotated[str, typer.Option("--method", help="cat (exact), svd, core or lego")] = "cat",
    base: BASE = None,
    output_dir: OUTPUT = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Merge LoRA adapters into one adapter, in weight space; weights of -1 negate, 1,1,-1 make an analogy."""
    if method == "extract":
        raise UsageError("extract is no merge of adapters", hint="see: merge extract-lora --help")
    return _run(method, adapters, base, output_dir, dry_run, json, quiet, verbose, values)


def lego(
    adapters: ADAPTERS,
    base: BASE = None,
    output_dir: OUTPUT = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Merge LoRA adapters by clustering their rank-one units (LoRA-LEGO)."""
    return _run("lego", adapters, base, output_dir, dry_run, json, quiet, verbose, values)


def extract_lora(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the checkpoint the fine-tune started from")],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="the fine-tune; BASE+ADAPTER makes a plain LoRA of any")
    ],
    output_dir: OUTPUT = None,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    **values: Any,
) -> int | None:
    """Extract a fine-tune's difference from its base as a LoRA adapter, and report what it lacks."""
    return _run("extract", [tuned], base, output_dir, dry_run, json, quiet, verbose, values)


COMMANDS: dict[str, Callable[..., int | None]] = {"lora": lora, "lego": lego, "extract-lora": extract_lora}
METHODS = {"lora": ("cat", "svd", "core", "lego"), "lego": ("lego",), "extract-lora": ("extract",)}


def extra(command: str) -> list[Any]:
    """The options of a command's methods, and those of a run that it heeds."""
    from weightworks.stage.settings import Settings

    entries = catalog.methods("adapter").values()
    ours = METHODS[command]
    # Methods of plug-ins are merges of adapters: an extraction has one command and one method.
    wanted = [one for one in entries if one.name in ours or (command == "lora" and one.name not in ("extract", *ours))]
    run = [one for one in parameters({"": Settings}, "Run") if one.name in SETTINGS]
    return [*parameters({one.name: one.load().Options for one in wanted}, "Method"), *run]


def _run(
    method: str,
    inputs: Sequence[str],
    base: str | None,
    output_dir: Path | None,
    dry_run: bool,
    json: bool,
    quiet: bool,
    verbose: bool,
    values: dict[str, Any],
) -> int:
    """Make an adapter and tell what came of it."""
    from weightworks.stage.settings import divide

    entry = catalog.find("adapter", method)
    options_class = entry.load().Options
    options, settings = divide(given(values, options_class), options_class, entry.label)

    from weightworks.plan.adapters import run_adapter
    from weightworks.report.progress import Progress

    outcome = run_adapter(
        method,
        inputs,
        options,
        settings,
        base=base,
        output_dir=output_dir,
        dry_run=dry_run,
        progress=Progress(quiet=quiet, verbose=verbose),
        announce=(lambda facts: None) if quiet else show_plan,
    )
    if not quiet:
        show_estimate(outcome) if dry_run else show_outcome(outcome)
    if json:
        told = outcome.estimate.facts() if dry_run and outcome.estimate else {}
        facts = {"estimate": told} if dry_run else {"seconds": outcome.seconds, **(outcome.provenance or {})}
        emit({"target": str(outcome.target), "cached": outcome.cached, **facts})
    if settings.strict and not dry_run and (degraded := outcome.degraded()):
        show_error(degraded)
        return degraded.exit_code
    return 0


def show_plan(facts: dict[str, Any]) -> None:
    """The configuration as it will run."""
    show(f"adapter from {', '.join(facts.get('adapters') or [facts['fine-tune']])}")
    pairs({key: value for key, value in facts.items() if key not in ("notes", "adapters") and value not in (None, [])})
    for line in facts["notes"]:
        show(f"  note: {line}")


def show_estimate(outcome: Any) -> None:
    """The estimate of a dry run."""
    if outcome.cached:
        show(f"nothing to do: {outcome.target} was made by this very command and is intact")
        return
    costs = outcome.estimate
    pairs(
        {
            "time": f"about {duration(costs.seconds)}",
            "peak memory": f"about {size(costs.peak_bytes)}; allowed {size(costs.limit_bytes)}",
            "output": f"at most {size(costs.output_bytes)}",
        }
    )
    show("dry run: nothing was written")


def show_outcome(outcome: Any) -> None:
    """Where the adapter lies, module by module how far it is from what it stands for, and what is left out."""
    facts = outcome.provenance
    if outcome.cached:
        show(f"already done: {outcome.target} was made by this very command and is intact")
    rows = [row for row in facts["report"] if row.get("rank")]
    worst = sorted(rows, key=lambda row: -row["residual"])[:10]
    if worst and worst[0]["residual"] > 1e-6:
        columns = ("tensor", "rank", "norm", "residual", "residual_stored")
        table(["furthest from exact", *columns[1:4], "as stored"], [[row[key] for key in columns] for row in worst])
    ranks = sorted({row["rank"] for row in rows})
    summary = {
        "written": str(outcome.target),
        "size": size(facts["size"]["bytes_out"]),
        "modules": f"{len(rows)}, rank {'none' if not ranks else ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}",
    }
    if (share := facts["residual"]) is not None:
        summary["residual"] = f"{share['total']:.3%} of the norm of all updates, {share['stored']:.3%} as stored"
    if facts["quality"]:
        shown = ", ".join(f"{key} {value:.3f}" for key, value in facts["quality"].items())
        summary["perplexity"] = f"{shown} on the built-in check text"
    summary["verified"] = f"read back, opened by {facts['checks']['loader']}"
    summary["took"] = duration(outcome.seconds)
    pairs(summary)
    for line in outcome.fallbacks[:20]:
        show(f"  note: {line}")
    if len(outcome.fallbacks) > 20:
        show(f"  and {len(outcome.fallbacks) - 20} more notes, all in provenance.json")
