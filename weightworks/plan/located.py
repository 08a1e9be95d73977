"""YAML with the place of every value: what error messages need to point at a line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightworks.errors import UsageError, nearest

VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\})")


@dataclass(frozen=True, order=True)
class Place:
    """A line of a file, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Item:
    """A value with its place: a dict of items, a list of items, or a scalar."""

    value: Any
    place: Place

    def plain(self) -> Any:
        """The value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    @property
    def kind(self) -> str:
        """What it is, in words."""
        names = {
            dict: "a mapping",
            list: "a list",
            str: "text",
            bool: "true or false",
            int: "a number",
            float: "a number",
        }
        return "empty" if self.value is None else names.get(type(self.value), type(self.value).__name__)


class Problems:
    """Mistakes, gathered so that all are told at once."""

    def __init__(self) -> None:
        self.found: dict[tuple[Place, str], None] = {}

    def add(self, place: Place, text: str) -> None:
        self.found[place, text] = None

    def raise_if_any(self, what: str) -> None:
        """One :class:`UsageError` with a line a mistake, in the order of the file."""
        if self.found:
            lines = [f"  {place}: {text}" for place, text in sorted(self.found)]
            count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
            raise UsageError(
                f"{what}: {count}; nothing was run\n" + "\n".join(lines), hint="see: compress schema, docs/recipes.md"
            )


def load(path: Path) -> Item:
    """The document at ``path`` (YAML 1.2); raises :class:`UsageError` with file and line if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{path}: cannot be read ({reason})", hint="give a recipe file, see recipes/") from None
    return parse(text, str(path))


def parse(text: str, file: str) -> Item:
    """``text`` as located data; ``file`` is what places are named after."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        value = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        reason = " ".join(str(error.problem or error.context or "cannot be read").split())
        raise UsageError(
            f"{Place(file, line)}: not valid YAML: {reason}", hint="mind indentation, colons and quotes"
        ) from None
    except YAMLError as error:
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    return _located(value, Place(file, 1))


def _located(value: Any, place: Place) -> Item:
    if isinstance(value, Mapping):
        items = {}
        for key, inner in value.items():
            at = Place(place.file, value.lc.key(key)[0] + 1)  # type: ignore[attr-defined]
            items[str(key)] = _located(inner, at)
        return Item(items, place)
    if isinstance(value, list):
        lines = [value.lc.item(index)[0] + 1 for index in range(len(value))]  # type: ignore[attr-defined]
        return Item([_located(inner, Place(place.file, line)) for inner, line in zip(value, lines, strict=True)], place)
    if isinstance(value, bool) or value is None:
        return Item(value, place)
    for plain in (int, float, str):  # ruamel's own scalar classes keep their spelling; we want the value
        if isinstance(value, plain):
            return Item(plain(value), place)
    return Item(value, place)


def merged(base: Item, child: Item) -> Item:
    """``child`` over ``base``: mappings key by key, anything else replaced; a null takes away what the base has."""
    if not isinstance(base.value, dict) or not isinstance(child.value, dict):
        return child
    items = dict(base.value)
    for key, item in child.value.items():
        if item.value is None and key in items:
            del items[key]
        else:
            items[key] = merged(items[key], item) if key in items else item
    return Item(items, child.place)


def substituted(item: Item, values: Mapping[str, Any], problems: Problems) -> Item:
    """``${name}`` replaced in every text; a text that is nothing else takes the variable's own type. ``$$`` is ``$``."""
    if isinstance(item.value, dict):
        return Item({key: substituted(inner, values, problems) for key, inner in item.value.items()}, item.place)
    if isinstance(item.value, list):
        return Item([substituted(inner, values, problems) for inner in item.value], item.place)
    if not isinstance(item.value, str) or "$" not in item.value:
        return item
    for name in names_in(item.value):
        if name not in values:
            problems.add(
                item.place, f"unknown variable '{name}' ({nearest(name, values) if values else 'no vars are given'})"
            )
            return item
    whole = re.fullmatch(r"\$\{([^}]*)\}", item.value)
    if whole:
        return Item(values[whole.group(1)], item.place)
    text = VARIABLE.sub(lambda found: "$" if found.group() == "$$" else str(values[found.group(1)]), item.value)
    return Item(text, item.place)


def names_in(text: str) -> Iterator[str]:
    """The variables that ``text`` refers to."""
    return (found.group(1) for found in VARIABLE.finditer(text) if found.group() != "$$")
