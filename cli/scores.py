"""What people read of ``compress evaluate``: one table of all models and all their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli.render import size, table


def show_scores(report: dict[str, Any], texts: list[str]) -> None:
    """One table of all models: perplexity by text with its mean and change, then a column for every other metric."""
    kinds = {name: kind for result in report["scores"] for name, kind in result["metrics"].items()}
    on_text = kinds.pop("perplexity", None)
    head = ["model", "size"]
    if on_text:
        head += [*(Path(text).name for text in texts), "geometric mean", "against baseline"]
    rows = []
    for row in report["models"]:
        is_base = row["model"] == report["baseline"]
        cells = [row["model"], size(row["bytes"])]
        if on_text:
            changed = change(row["metrics"]["perplexity"], on_text["change"])
            cells += [*(row["perplexity"][text] for text in texts), row["mean"], "" if is_base else changed]
        for name, kind in kinds.items():
            found = row["metrics"].get(name)
            cells.append("" if found is None else metric(found, kind["change"], is_base=is_base))
        rows.append(cells)
    table([*head, *kinds], rows)


def metric(found: dict[str, Any], kind: str, *, is_base: bool) -> str:
    """A value, and behind it how far it is from the baseline's: ``0.366 (-0.012 ± 0.009)``."""
    value = f"{found['value']:.4g}"
    if is_base:
        return value
    if found["change"] == found["value"]:  # a distance to the baseline is its own change
        return value + plus_minus(found["change_error"])
    return f"{value} ({change(found, kind)})"


def change(found: dict[str, Any], kind: str) -> str:
    """A change against the baseline in words, with its standard error if that is known."""
    if found["change"] is None:
        return "reads other tokens"
    if kind == "relative":
        error = found["change_error"]
        return f"{found['change']:+.2%}" + ("" if error is None else f" ± {error:.2%}")
    return f"{found['change']:+.3g}" + plus_minus(found["change_error"])


def plus_minus(error: float | None) -> str:
    """A standard error to stand behind a number."""
    return "" if error is None else f" ± {error:.2g}"
