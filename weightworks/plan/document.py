"""YAML 1.2 read with the line of every value. What a recipe cannot hold is told in a sentence, with its line.

Nodes are read, not objects made: dates stay text, as in the core schema of YAML 1.2, tags that would make objects are
refused, and both lines of a key given twice are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightworks.errors import UsageError
from weightworks.plan.located import UNKNOWN, Item, Place, Problems

CORE = "tag:yaml.org,2002:"
DEEPEST = 40  # levels of nesting; recipes have five
MOST_BYTES = 8_000_000  # of a file; one of thousands of stages is a tenth of it
MOST = 300_000  # values, those of aliases counted wherever they are used: a page of aliases can stand for billions
TEXT = ("str", "timestamp", "merge", "value", "!")  # a date is text, and so are a lone '<<' and '='


def load(path: Path, problems: Problems, *, hint: str = "give a recipe file, see recipes/") -> Item:
    """The document at ``path``; raises :class:`UsageError` with file and line if it cannot be read as YAML."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{path}: larger than {MOST_BYTES:,} bytes, which no recipe is", hint=hint)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{path}: cannot be read ({reason})", hint=hint) from None
    except ValueError:
        raise UsageError(f"{path}: no name of a file", hint=hint) from None
    try:
        return parse(text, str(path), problems)
    except Unreadable as error:
        place = Place(str(path), error.line)
        raise UsageError(f"{place}: {error}", hint="nothing was run; see: docs/recipes.md") from None


class Unreadable(Exception):
    """Text that is no YAML, or none that can be a recipe: a sentence, and the line."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.line = line


def parse(text: str, file: str, problems: Problems) -> Item:
    """``text`` as located data; ``file`` is what places are named after. Raises :class:`Unreadable`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    reader = YAML(typ="safe", pure=True)
    reader.composer.warn_double_anchors = False  # YAML allows them; the later one holds from there on
    try:
        node = reader.compose(text)
    except MarkedYAMLError as error:
        reason, line = _explained(error)
        raise Unreadable(f"not valid YAML: {reason}", line) from None
    except YAMLError as error:
        position, code = getattr(error, "position", 0) or 0, getattr(error, "character", None)
        seen = f"character U+{code:04X}" if isinstance(code, int) else "a character"
        raise Unreadable(
            f"not valid YAML: {seen} cannot stand in a text file", text.count("\n", 0, position) + 1
        ) from None
    except (OverflowError, ValueError):  # an escape beyond the last character
        line = text.count("\n", 0, max(text.find("\\U"), 0)) + 1
        raise Unreadable("not valid YAML: an escape \\U names no character", line) from None
    except RecursionError:
        raise Unreadable(f"values are nested more than {DEEPEST} deep", 0) from None
    return _Nodes(file, problems).item(node, Place(file, 1)) if node is not None else Item(None, Place(file, 1))


class _Nodes:
    """Makes items of YAML nodes."""

    def __init__(self, file: str, problems: Problems) -> None:
        self.file, self.problems = file, problems
        self.count = 0
        self.above: set[int] = set()  # ids of the nodes that the one at hand stands in
        self.pairs: dict[int, dict[str, tuple[Any, Place]] | None] = {}  # by id of node; None while being made

    def item(self, node: Any, place: Place) -> Item:
        """``node`` as a value at ``place``."""
        self.count += 1
        if self.count > MOST:
            raise Unreadable(f"the recipe holds more than {MOST:,} values, those behind aliases counted", place.line)
        if isinstance(node.value, str):
            return self._scalar(node, place)
        if node.tag not in (f"{CORE}map", f"{CORE}seq"):
            return self._fault(place, f"the tag {_short(node.tag)} is not known here; a recipe holds plain values")
        if id(node) in self.above or len(self.above) >= DEEPEST:  # at once: each turn of a circle may double them
            return self._fault(place, f"values are nested more than {DEEPEST} deep, or hold themselves by an alias")
        self.above.add(id(node))
        if node.tag.endswith("seq"):
            found = Item([self.item(inner, self._line(inner, node)) for inner in node.value], place)
        else:
            found = Item({name: self.item(inner, at) for name, (inner, at) in self._pairs(node).items()}, place)
        self.above.remove(id(node))
        return found

    def _pairs(self, node: Any) -> dict[str, tuple[Any, Place]]:
        """Nodes and places by key; those merged by ``<<`` come first, and a key of the mapping itself replaces them."""
        if (known := self.pairs.get(id(node))) is not None:
            return known
        self.pairs[id(node)] = None
        own: dict[str, tuple[Any, Place]] = {}
        inherited: dict[str, tuple[Any, Place]] = {}
        for key, value in node.value:
            place = self._line(key, node)
            if key.tag == f"{CORE}merge":
                for parent in value.value if value.tag == f"{CORE}seq" else [value]:
                    inherited = {**self._parent(parent, place), **inherited}
            elif not isinstance(key.value, str):
                what = "a list" if key.tag == f"{CORE}seq" else "a mapping"
                self.problems.add(place, f"a key is a name; this one is {what}")
            elif not key.value or key.tag == f"{CORE}null":
                self.problems.add(place, "a key is a name; this one is empty")
            elif (name := key.value) in own:
                self.problems.add(place, f"key '{name}' is given twice, first in line {own[name][1].line}")
            elif self._scalar(key, place).value is not UNKNOWN:
                own[name] = (value, place)
        self.pairs[id(node)] = found = {**inherited, **own}
        return found

    def _parent(self, node: Any, place: Place) -> dict[str, tuple[Any, Place]]:
        """What a mapping that ``<<`` names brings along."""
        if node.tag != f"{CORE}map":
            self.problems.add(place, "'<<' takes a mapping by its alias, or a list of them, such as <<: *common")
        elif self.pairs.get(id(node), {}) is None:
            self.problems.add(place, "'<<' merges a mapping into itself")
        else:
            return self._pairs(node)
        return {}

    def _scalar(self, node: Any, place: Place) -> Item:
        text, tag = node.value, node.tag.removeprefix(CORE)
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            return self._fault(place, "a text holds a character that no text file can hold")
        if tag in TEXT:
            return Item(text, place)
        reader = READERS.get(tag)
        if reader is None:
            return self._fault(place, f"the tag {_short(node.tag)} is not known here; a recipe holds plain values")
        try:
            return Item(reader(text), place)
        except ValueError:
            return self._fault(place, f"'{text[:40]}' cannot be read as a number; put a text in quotes")

    def _fault(self, place: Place, text: str) -> Item:
        self.problems.add(place, text)
        return Item(UNKNOWN, place)

    def _line(self, node: Any, parent: Any) -> Place:
        """Where ``node`` stands; one that an alias fetched from further up stands where ``parent`` does."""
        return Place(self.file, max(node.start_mark.line, parent.start_mark.line) + 1)


def _integer(text: str) -> int:
    sign, digits = (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)
    base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2].lower(), 10)
    return int(sign + digits.replace("_", ""), base)


def _fraction(text: str) -> float:
    return float(re.sub(r"^([+-]?)\.(?=inf|nan)", r"\1", text.lower().replace("_", "")))


READERS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() in ("true", "yes", "on"),  # the latter two after %YAML 1.1 only
    "int": _integer,
    "float": _fraction,
}


def _short(tag: str) -> str:
    return tag.replace(CORE, "!!") if len(tag) < 60 else tag[:57] + "..."


def _explained(error: Any) -> tuple[str, int]:
    """A YAML error as a sentence that says what to write instead, and its line."""
    problem = " ".join(str(error.problem or error.context or "cannot be read").split())
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 0
    opened = error.context_mark.line + 1 if error.context_mark else line
    seen = re.search(r"character '(.*?)' that cannot start", problem)
    if seen and seen[1] == "\\t":
        return "a tab stands where only spaces may; indent with spaces", line
    if seen:
        return f"a text that starts with '{seen[1]}' needs quotes", line
    if found := re.search(r"undefined alias '(.*)'", problem):
        return f"'*{found[1]}' refers to no anchor '&{found[1]}'; a text that starts with '*' needs quotes", line
    if "alias" in str(error.context) or "anchor" in str(error.context):
        return "a text that starts with '*' or '&' needs quotes", line
    if "quoted scalar" in str(error.context) and "unexpected end" in problem:
        return "the quote that opens here is never closed", opened
    if "escape" in problem:
        return f"{problem.removeprefix('found ')}: in double quotes a backslash is an escape; use single quotes", line
    if "another document" in problem:
        return "a second document starts here; a recipe is one", line
    if "parsing a flow" in str(error.context):
        return (
            f"a comma or the end of what line {opened} opens with a bracket is expected; "
            "inside brackets, texts that hold [ ] { } or a comma need quotes, such as \"${name}\" and 'small[bits=3]'"
        ), line
    if "mapping values are not allowed" in problem:
        return "a ':' stands where none may; mind the indentation, and quote a text that holds ': '", line
    if "block scalar" in str(error.context):
        return "'|' and '>' open a text of several lines; a text that starts with one of them needs quotes", line
    if found := re.search(r"expected the node content, but found '(.*)'", problem):
        return f"a value is expected where '{found[1]}' stands; a text that starts with it needs quotes", line
    if "incompatible YAML" in problem:
        return "only YAML of version 1 can be read", line
    if "block end" in problem:
        return f"this does not fit what line {opened} begins; mind the indentation", line
    if "could not find expected ':'" in problem:
        return "a ':' after the key is missing", opened
    return problem, line
