"""``compress methods``: what there is, and one method in full. ``python -m cli.describe`` writes docs/methods.md."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from cli.render import emit, show, table
from weightworks.errors import UsageError, nearest
from weightworks.options import Options
from weightworks.stage import catalog
from weightworks.stage.catalog import Entry

HEAD = ("option", "type", "default", "meaning")


def tell(name: str | None, *, json: bool, shelves: Sequence[str | None] = (None,)) -> None:
    """All methods (of some ``shelves``), or the one called ``name``. Raises :class:`UsageError` if there is none of that name."""
    if name is not None:
        describe(_named(name), json=json)
        return
    found = [entry for shelf in shelves for entry in catalog.methods(shelf).values()]
    if json:
        facts = [_facts(entry) for entry in found]
        refused = [{**_facts(entry), "broken": entry.broken} for entry in catalog.broken()]
        emit({"methods": facts, "broken": refused})
    else:
        listing([_facts(entry) for entry in found])


def listing(rows: list[dict[str, Any]]) -> None:
    """All methods, a line each; then the plug-ins that cannot be used, each with the reason."""
    table(["method", "what it does"], [[row["method"], row["summary"]] for row in rows])
    for entry in catalog.broken():
        show(f"broken: {entry.label} of {entry.distribution}: {entry.broken}")


def describe(entry: Entry, *, json: bool) -> None:
    """One method: summary, paper, where a plug-in comes from, and every option with type, default and meaning."""
    module = entry.load()
    options = rows(module.Options)
    if json:
        emit({**_facts(entry), "paper": module.PAPER, "version": module.VERSION, "options": options})
        return
    show(f"{entry.label} (version {module.VERSION}): {entry.summary}")
    if entry.distribution is not None:
        show(f"plug-in: {entry.distribution}, {entry.module}")
    show(f"paper: {module.PAPER}")
    table(HEAD, [[*row.values()] for row in options])


def _facts(entry: Entry) -> dict[str, Any]:
    """A method in the listing."""
    facts = {"method": entry.label, "summary": entry.summary}
    return facts if entry.distribution is None else {**facts, "distribution": entry.distribution}


def _named(name: str) -> Entry:
    """The method of a name or label; one that is broken if there is no other."""
    sound = list(catalog.methods().values())
    for entries in (sound, catalog.broken()):
        found = [entry for entry in entries if name in (entry.name, entry.label)]
        if len({entry.label for entry in found}) > 1:
            labels = ", ".join(entry.label for entry in found)
            raise UsageError(f"'{name}' is the name of several methods: {labels}")
        if found:
            return found[0]
    raise UsageError(
        f"unknown method '{name}' ({nearest(name, [entry.name for entry in sound])})", hint="see: compress methods"
    )


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

    ours = [entry for entry in catalog.declared() if entry.distribution is None]
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
    parts += [
        "## Options of every run",
        "Those of `compress quantize`, whatever its method; merges heed those that are not about calibration.",
        _grid(rows(Settings)),
    ]
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
