"""Values with the place of each: what error messages need to point at a line. Merged, substituted, complained about."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from weightworks.errors import UsageError, nearest

VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\})")
UNKNOWN = object()  # stands where a value was at fault and that has been said: nothing more is to be said of it
SHOWN = 50  # mistakes told at once; a generated recipe can have thousands
NAMES = 20  # names listed for want of a near one


@dataclass(frozen=True, order=True)
class Place:
    """A line of a file, counted from 1; 0 for what is not in a file."""

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

    def moved(self, place: Place) -> Item:
        """The same value, all of it at ``place``."""
        if isinstance(self.value, dict):
            return Item({key: item.moved(place) for key, item in self.value.items()}, place)
        if isinstance(self.value, list):
            return Item([item.moved(place) for item in self.value], place)
        return Item(self.value, place)

    @property
    def faulty(self) -> bool:
        """Whether a mistake in it has been told already."""
        if isinstance(self.value, dict):
            return any(item.faulty for item in self.value.values())
        if isinstance(self.value, list):
            return any(item.faulty for item in self.value)
        return self.value is UNKNOWN

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if isinstance(self.value, bool | int | float):
            return str(self.value).lower()
        names = {dict: "a mapping", list: "a list", str: f"'{self.value}'", type(None): "empty"}
        return names.get(type(self.value), "unknown")


class Problems:
    """Mistakes, gathered so that all are told at once.

    ``partial`` says that a part of the document could not be read: what seems to be missing may stand there.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[Place, str], None] = {}
        self.partial = False

    def add(self, place: Place, text: str) -> None:
        """Note a mistake: one sentence, whatever odd characters the values in it hold."""
        text = " ".join(text.split())
        self.found[place, "".join(letter if letter.isprintable() else "?" for letter in text)] = None

    def refuse(self, item: Item, text: str) -> None:
        """Note that ``item`` is not what ``text`` says it must be, unless it was at fault before."""
        if item.value is not UNKNOWN:
            self.add(item.place, f"{text}; this is {item.kind}")

    def near(self, word: str, known: Collection[str], *, but: str = "") -> str:
        """A phrase that suggests the nearest name, or lists names; cheap where there are very many of either."""
        if len(known) <= NAMES:
            names = [name for name in known if name != but]
            return nearest(word, names) if names else "there are none"
        if len(self.found) < SHOWN:
            text = nearest(word, [name for name in islice(known, 1000) if name != but])
            if text.startswith("did you mean"):
                return text
        return f"known: {', '.join(islice(known, 3))} and {len(known) - 3:,} more"

    def raise_if_any(self, what: str, *, hint: str = "see: compress schema, docs/recipes.md") -> None:
        """One :class:`UsageError` with a line a mistake, in the order of the file."""
        if self.found:
            lines = [f"  {place}: {text}" for place, text in sorted(self.found)]
            count = "1 mistake" if len(lines) == 1 else f"{len(lines):,} mistakes"
            if len(lines) > SHOWN:
                lines[SHOWN:] = [f"  and {len(lines) - SHOWN:,} more"]
            raise UsageError(f"{what}: {count}; nothing was run\n" + "\n".join(lines), hint=hint)


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


def substituted(item: Item, values: Mapping[str, Item], problems: Problems) -> Item:
    """``${name}`` replaced in every text; a text that is nothing else takes the variable's own type. ``$$`` is ``$``."""
    if isinstance(item.value, dict):
        return Item({key: substituted(inner, values, problems) for key, inner in item.value.items()}, item.place)
    if isinstance(item.value, list):
        return Item([substituted(inner, values, problems) for inner in item.value], item.place)
    if not isinstance(item.value, str) or "$" not in item.value:
        return item
    if "${" in VARIABLE.sub("", item.value):
        problems.add(item.place, f"'{item.value}': '}}' is missing after '${{'; write $${{ for a plain ${{")
        return Item(UNKNOWN, item.place)
    names = list(names_in(item.value))
    for name in names:
        if name not in values and not problems.partial:
            problems.add(item.place, f"unknown variable '{name}' ({problems.near(name, values)})")
    if any(name not in values or values[name].faulty for name in names):
        return Item(UNKNOWN, item.place)
    if names and item.value == f"${{{names[0]}}}":
        return values[names[0]].moved(item.place)
    for name in names:
        if isinstance(values[name].value, dict | list | None):
            problems.add(item.place, f"variable '{name}' is {values[name].kind}: it cannot be a part of a text")
            return Item(UNKNOWN, item.place)
    text = VARIABLE.sub(lambda found: "$" if found[1] is None else _spelled(values[found[1]].value), item.value)
    return Item(text, item.place)


def names_in(text: str) -> Iterator[str]:
    """The variables that ``text`` refers to."""
    return (found[1] for found in VARIABLE.finditer(text) if found[1] is not None)


def texts_in(item: Item) -> Iterator[str]:
    """All texts in ``item``, keys left out."""
    if isinstance(item.value, dict | list):
        for inner in item.value.values() if isinstance(item.value, dict) else item.value:
            yield from texts_in(inner)
    elif isinstance(item.value, str):
        yield item.value


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
