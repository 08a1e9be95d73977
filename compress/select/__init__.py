"""Ways to choose rows of a data set, one file each. The package itself can be called: it chooses what to train on.

    from compress import select

    chosen = select("tiny-llama-half", teacher="tiny-llama", dataset="rows.jsonl", budget=0.2, output_dir="chosen")
    print(chosen.target / "selected.jsonl", chosen.provenance["selection"]["clusters"])

``compress.select.paser`` is still the method's module.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightworks.plan.stage import Outcome
    from weightworks.report.progress import Progress


def select(
    model: str | Path,
    *,
    method: str = "paser",
    teacher: str | Path | None = None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Choose rows of a data set that win back what pruning the checkpoint ``model`` cost, as ``compress select`` does.

    ``teacher`` is the model as it was before. ``options`` are those of the method (``budget``, ``clusters``; see
    ``compress methods paser``) and those of every run (``dataset``, ``seq_len``, ``seed``), spelled with underscores.

    Arguments, outcome and errors are otherwise those of :func:`compress.quantize`; the output folder holds ``selected.jsonl``,
    ``scores.jsonl`` and ``report.html``.
    """
    from weightworks.plan.api import run

    return run(
        "select", method, model, options, teacher=teacher, output_dir=output_dir, dry_run=dry_run, progress=progress
    )


class _Callable(ModuleType):
    """This package, which is called like the function it is named after."""

    __call__ = staticmethod(select)


sys.modules[__name__].__class__ = _Callable
