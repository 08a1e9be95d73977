"""``compress methods``: what there is, and one method in full. ``python -m cli.describe`` writes docs/methods.md."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from cli.render import emit, show, table
from weightworks.options import Options
from weightworks.stage import catalog
from weightworks.stage.catalog import Entry

HEAD = ("option", "type", "default", "meaning")


def listing(rows: list[dict[str, Any]]) -> None:
    """All methods, a line each."""
    table(["method", "what it does"], [[row["method"], row["summary"]] for row in rows])


def describe(entry: Entry, *, json: bool) -> None:
    """One method: summary, paper, and every option with type, default and meaning."""
    module = entry.load()
    options = rows(module.Options)
    if json:
        emit(
            {
                "method": entry.label,
                "summary": entry.summary,
                "paper": module.PAPER,
                "version": module.VERSION,
                "options": options,
            }
        )
        return
    show(f"{entry.label} (version {module.VERSION}): {entry.summary}")
    show(f"paper: {module.PAPER}")
    table(HEAD, [[*row.values()] for row in options])


def rows(options: type[Options]) -> list[dict[str, Any]]:
    """The fields of an option class."""
    return [
        dict(zip(HEAD, (name, kind(field), field.get("default"), field.get("description", "")), strict=True))
        for name, field in options.model_json_schema().get("properties", {}).items()
    ]


def kind(field: dict[str, Any]) -> str:
    """A JSON Schema type in a few words."""
    if "enum" in field:
        return "|".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(kind(part) for part in field["anyOf"])
    if "const" in field:
        return str(field["const"])
    text = {"null": "none", "integer": "int", "number": "float", "boolean": "yes/no"}.get(
        field.get("type", ""), field.get("type", "")
    )
    bounds = [
        f"{sign} {field[key]}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in field
    ]
    return f"{text} {', '.join(bounds)}".strip()


def markdown() -> str:
    """The page of all methods of this package (no plug-ins) and their options, made from the option classes alone."""
    from weightworks.stage.settings import Settings

    ours = [entry for entry in catalog.methods().values() if entry.module.startswith(catalog.SHELVES[entry.kind] + ".")]
    parts = [
        "# Methods and their options",
        "Made by `python -m cli.describe > docs/methods.md` from the option classes; do not edit it by hand. On the "
        "command line an option is spelled with dashes (`--group-size`), in Python with underscores (`group_size`). "
        "A yes/no option is switched with `--name` and `--no-name`; the opposite of `--sym` is `--asym`.",
    ]
    for shelf, entries in groupby(ours, key=lambda entry: entry.kind):
        parts.append(f"## {shelf}")
        for entry in entries:
            module = entry.load()
            parts += [f"### {entry.name}", entry.summary, f"Version {module.VERSION}. Source: {module.PAPER}."]
            parts.append(_grid(rows(module.Options)))
    parts += ["## Options of every run", "Those of `compress quantize`, whatever its method.", _grid(rows(Settings))]
    return "\n\n".join(parts) + "\n"


def _grid(options: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of options."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in options:
        cells = [f"`{row['option']}`", row["type"], _default(row["default"]), row["meaning"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    """A default as people would type it."""
    if value in (None, []):
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(markdown())
