"""Methods as functions of Python: names and values as on the command line, an outcome or an error raised on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from weightworks.plan.merge import run_merge
from weightworks.plan.select import run_select
from weightworks.plan.stage import Outcome, run_stage
from weightworks.report.progress import Progress
from weightworks.stage import catalog
from weightworks.stage.settings import Settings, divide


def run(
    kind: str,
    method: str,
    model: str | Path,
    values: Mapping[str, Any],
    *,
    teacher: str | Path | None = None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Run method ``kind.method`` on ``model``; ``values`` are options of the method and settings of the run, by name.

    Raises :class:`UsageError` naming every unknown option and wrong value, and with ``strict`` a
    :class:`DegradedError` once a result that needed a fallback is published.
    """
    entry = catalog.find(kind, method)
    options, settings = divide(values, entry.load().Options, entry.label)
    start = run_select if kind == "select" else partial(run_stage, kind)
    outcome = start(
        entry.name,
        str(model),
        options,
        settings,
        teacher=None if teacher is None else str(teacher),
        output_dir=None if output_dir is None else Path(output_dir),
        dry_run=dry_run,
        progress=progress,
    )
    return _strictly(outcome, settings)


def run_merging(
    method: str,
    models: Sequence[str | Path],
    values: Mapping[str, Any],
    *,
    base: str | Path | None = None,
    continue_from: str | Path | None = None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Merge ``models`` with ``merge.method``; as :func:`run` does."""
    entry = catalog.find("merge", method.replace("-", "_"))
    options, settings = divide(values, entry.load().Options, entry.label)
    outcome = run_merge(
        entry.name,
        [str(model) for model in models],
        options,
        settings,
        base=None if base is None else str(base),
        earlier=None if continue_from is None else str(continue_from),
        output_dir=None if output_dir is None else Path(output_dir),
        dry_run=dry_run,
        progress=progress,
    )
    return _strictly(outcome, settings)


def _strictly(outcome: Outcome, settings: Settings) -> Outcome:
    if settings.strict and (degraded := outcome.degraded()):
        raise degraded
    return outcome
