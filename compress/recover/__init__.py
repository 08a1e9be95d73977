"""Recovery methods, one file each. The package itself can be called: it trains a pruned checkpoint, its zeros held.

    from compress import recover

    outcome = recover("tiny-llama-half", dataset="train.txt", steps=200, output_dir="tiny-llama-healed")
    print(outcome.target, outcome.provenance["training"]["held_out"])

``compress.recover.perp`` is still the method's module.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightworks.plan.stage import Outcome
    from weightworks.report.progress import Progress


def recover(
    model: str | Path,
    *,
    method: str = "perp",
    teacher: str | Path | None = None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Win back what pruning the checkpoint ``model`` cost, as ``compress recover`` does; every zero stays a zero.

    ``teacher`` is the model as it was before: what is won back is measured by it, and it is imitated where a method does that.
    ``options`` are those of the method (``steps``, ``train``; see ``compress methods perp``) and those of every run (``dataset``,
    ``seq_len``, ``seed``; see ``compress recover --help``), spelled with underscores.

    Arguments, outcome and errors are otherwise those of :func:`compress.quantize`.
    """
    from weightworks.plan.api import run

    return run(
        "recover", method, model, options, teacher=teacher, output_dir=output_dir, dry_run=dry_run, progress=progress
    )


class _Callable(ModuleType):
    """This package, which is called like the function it is named after."""

    __call__ = staticmethod(recover)


sys.modules[__name__].__class__ = _Callable
