"""``compress methods``: what there is, and one method in full."""

from __future__ import annotations

from typing import Any

from cli.render import emit, show, table
from weightworks.stage.catalog import Entry


def listing(rows: list[dict[str, Any]]) -> None:
    """All methods, a line each."""
    table(["method", "what it does"], [[row["method"], row["summary"]] for row in rows])


def describe(entry: Entry, *, json: bool) -> None:
    """One method: summary, paper, and every option with type, default and meaning."""
    module = entry.load()
    schema = module.Options.model_json_schema()
    options = [
        {
            "option": name,
            "type": kind(field),
            "default": field.get("default"),
            "meaning": field.get("description", ""),
        }
        for name, field in schema.get("properties", {}).items()
    ]
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
    table(["option", "type", "default", "meaning"], [[*row.values()] for row in options])


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
