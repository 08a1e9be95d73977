"""Merging of checkpoints, one method a file. From Python:

    from merge import merge

    outcome = merge(["math/", "code/"], method="task_arithmetic", base="base/", scaling=0.4, output_dir="both")
    print(outcome.target, outcome.provenance["diagnosis"], outcome.fallbacks)

It does what the command ``merge task-arithmetic`` does. Nothing heavy is imported before the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightworks.plan.stage import Outcome
    from weightworks.report.progress import Progress

__all__ = ["merge"]


def merge(
    models: Sequence[str | Path],
    *,
    method: str = "soup",
    base: str | Path | None = None,
    continue_from: str | Path | None = None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Merge the checkpoints ``models``, folders or hub ids, in the order given.

    ``base`` is the checkpoint they were fine-tuned from, ``continue_from`` a finished merge that they are added to (OPCM).
    ``options`` are those of the method (see ``merge methods NAME``) and those of every run (``seed``, ``overwrite``,
    ``max_memory``), spelled with underscores. Returns the :class:`~weightworks.plan.stage.Outcome`: where the result lies, its
    provenance, its fallbacks. Raises an error of :mod:`weightworks.errors`; with ``strict=True`` a
    :class:`DegradedError` after publishing a result that is not all that was asked for.
    """
    from weightworks.plan.api import run_merging

    return run_merging(
        method,
        models,
        options,
        base=base,
        continue_from=continue_from,
        output_dir=output_dir,
        dry_run=dry_run,
        progress=progress,
    )
