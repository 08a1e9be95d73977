"""Pruning methods, one file each. The package itself can be called: it prunes a checkpoint.

    from compress import prune

    outcome = prune("examples/tiny-llama", sparsity=0.5, output_dir="tiny-llama-half")
    print(outcome.target, outcome.provenance["quality"], outcome.fallbacks)

``compress.prune.sparsegpt`` is still the method's module.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightworks.plan.stage import Outcome
    from weightworks.report.progress import Progress


def prune(
    model: str | Path,
    *,
    method: str = "sparsegpt",
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Prune the checkpoint ``model``, a folder or a hub id, as ``compress prune`` does.

    ``options`` are those of the method (``sparsity``, ``pattern``; see ``compress methods sparsegpt``) and those of every
    run (``dataset``, ``num_samples``, ``seed``, ``overwrite``; see ``compress prune --help``), spelled with underscores.
    In ``pattern="2:4"`` the first number is how many of four consecutive inputs are kept. The result is as large as the
    model on disk, with zeros in it, and has ``masks.safetensors`` beside its weights; that of ``structured``, ``shortgpt``,
    ``laco`` and ``experts`` is a smaller model.

    Arguments, outcome and errors are otherwise those of :func:`compress.quantize`.
    """
    from weightworks.plan.api import run

    return run("prune", method, model, options, output_dir=output_dir, dry_run=dry_run, progress=progress)


class _Callable(ModuleType):
    """This package, which is called like the function it is named after."""

    __call__ = staticmethod(prune)


sys.modules[__name__].__class__ = _Callable
