"""Quantization methods, one file each. The package itself can be called: it quantizes a checkpoint.

    from compress import quantize

    outcome = quantize("examples/tiny-llama", bits=4, output_dir="tiny-llama-w4")
    print(outcome.target, outcome.provenance["quality"], outcome.fallbacks)

``compress.quantize.gptq`` is still the method's module.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightworks.plan.stage import Outcome
    from weightworks.report.progress import Progress


def quantize(
    model: str | Path,
    *,
    method: str = "gptq",
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Quantize the linear layers of the checkpoint ``model``, a folder or a hub id, as ``compress quantize`` does.

    ``options`` are those of the method (``bits``, ``group_size``; see ``compress methods gptq``) and those of every run
    (``dataset``, ``num_samples``, ``seed``, ``overwrite``; see ``compress quantize --help``), spelled with underscores.
    ``output_dir`` is by default the model's name plus what was done, in the current folder. With ``dry_run`` only the
    estimate is made. ``progress`` (``weightworks.report.progress.Progress()``) tells on stderr what happens.

    Returns the :class:`~weightworks.plan.stage.Outcome`: where the result lies, its provenance, its fallbacks. Raises
    an error of :mod:`weightworks.errors`, its ``hint`` saying what to do: a :class:`UsageError` for an unknown name or
    a wrong value, all of them in one; with ``strict=True`` a :class:`DegradedError` after publishing a result that
    needed a fallback.
    """
    from weightworks.plan.api import run

    return run("quantize", method, model, options, output_dir=output_dir, dry_run=dry_run, progress=progress)


class _Callable(ModuleType):
    """This package, which is called like the function it is named after."""

    __call__ = staticmethod(quantize)


sys.modules[__name__].__class__ = _Callable
