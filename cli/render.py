"""What people read: configuration, tables, errors. Everything goes to stderr; stdout is for ``--json`` alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from weightworks.errors import WeightworksError


def show(text: str = "") -> None:
    """One line for a person."""
    sys.stderr.write(text + "\n")


def show_error(error: WeightworksError) -> None:
    """What happened, and what to do."""
    show(f"error: {error}")
    if error.hint:
        show(f"  hint: {error.hint}")


def emit(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def pairs(values: dict[str, Any]) -> None:
    """Names and values, aligned."""
    width = max(len(name) for name in values)
    for name, value in values.items():
        shown = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
        show(f"  {name.replace('_', ' '):<{width}}  {shown}")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; numbers are right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(head[i]), *(len(row[i]) for row in cells), 1) for i in range(len(head))]
    show("  " + "  ".join(f"{name:<{width}}" for name, width in zip(head, widths, strict=True)).rstrip())
    for row in cells:
        line = (f"{cell:>{w}}" if _number(cell) else f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        show("  " + "  ".join(line).rstrip())


def size(count: float) -> str:
    """A byte count for people, in powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(cell: str) -> bool:
    return cell[:1].isdigit() or (cell[:1] in "+-" and cell[1:2].isdigit())
