"""The conformance tests: what every method keeps to, ours and those of others, as checks a test file can run.

    import pytest
    from weightworks.testing import conformance

    @pytest.mark.parametrize("check", conformance("quantize.power"))
    def test_conformance(check, tmp_path):
        check(tmp_path)

Nothing of pytest is needed here: a check is called with an empty folder, and raises :class:`AssertionError` with a
sentence that says what the method did, and what it should do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightworks.errors import UsageError, nearest
from weightworks.stage import catalog
from weightworks.testing.contract import COMMAND, DECLARATION, RUNS, SAME
from weightworks.testing.trial import Trial

__all__ = ["Check", "conformance"]

CHANGING = ("quantize", "prune", "recover")  # kinds whose methods make one checkpoint of one checkpoint


@dataclass(frozen=True)
class Check:
    """One thing a method keeps to; ``text`` says what. Call it with an empty folder that it may write to."""

    text: str
    look: Callable[[Trial, Path], None]
    trial: Trial = field(repr=False)

    @property
    def __name__(self) -> str:
        """What pytest calls a test with this check."""
        return self.look.__name__

    def __call__(self, folder: Path) -> None:
        __tracebackhide__ = True
        self.look(self.trial, folder)


def conformance(label: str, *, model: str | Path | None = None) -> list[Check]:
    """The checks for the method ``label`` (``quantize.power``), in the order in which failures explain most.

    They run the method with its defaults on ``model``, by default a Llama of 330,000 random weights that is made on the
    spot (deeper, or a mixture of experts, for a method that removes these). Seconds in all: the checks share one run.
    Nothing is imported or run before a check is called, so a method that is missing or broken fails its checks, not the
    collection of tests. Raises :class:`UsageError` if ``label`` is not ``KIND.NAME``.
    """
    kind = label.partition(".")[0]
    if kind not in catalog.SHELVES or kind == label:
        raise UsageError(f"'{label}' is not KIND.NAME: unknown kind ({nearest(kind, catalog.SHELVES)})")
    trial = Trial(label, None if model is None else Path(model))
    results: Sequence[Callable[[Trial, Path], None]] = (*RUNS, *SAME) if kind in CHANGING else ()
    if kind == "prune":
        from weightworks.testing.prune_contract import PRUNING
        from weightworks.testing.reduce_contract import REDUCING, unless_smaller

        results = [*RUNS, *map(unless_smaller, [*SAME, *PRUNING]), *REDUCING]
    if kind == "merge":
        from weightworks.testing.merge_contract import MERGE

        results = MERGE
    if kind == "select":
        from weightworks.testing.select_contract import SELECT

        results = SELECT
    looks = [*DECLARATION, *(() if kind == "score" else COMMAND), *results]
    return [Check((look.__doc__ or "").partition("\n")[0].rstrip("."), look, trial) for look in looks]
