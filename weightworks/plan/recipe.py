"""A recipe file: what it holds once checked, and how it is read, extended and overridden.

The stages form a directed graph. ``matrix`` makes several stages of one, ``small[bits=3]`` and so on; a stage that
reads one checkpoint from such a stage is multiplied with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightworks.errors import nearest
from weightworks.plan.graph import Recipe
from weightworks.plan.located import Item, Place, Problems, load, merged, parse
from weightworks.plan.reader import TOP, Reader


def load_recipe(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read and check ``path``; ``sets`` are ``stage.option=value`` and ``vars.name=value``.

    Raises one :class:`UsageError` that lists all mistakes, each with its file and line.
    """
    problems = Problems()
    document = _read(path, problems, ())
    document = _overridden(document, sets, problems)
    reader = Reader(document, problems)
    recipe = Recipe(
        path.stem, str(path), path.read_text(encoding="utf-8"), reader.sources, reader.stages, reader.report
    )
    problems.raise_if_any(str(path))
    return recipe


def _read(path: Path, problems: Problems, above: tuple[Path, ...]) -> Item:
    """The document with what it extends beneath it."""
    document = load(path)
    if not isinstance(document.value, dict):
        problems.add(document.place, f"a recipe is a mapping with {', '.join(TOP)}; this is {document.kind}")
        return Item({}, document.place)
    extends = document.value.get("extends")
    if extends is None:
        return document
    parents = extends.value if isinstance(extends.value, list) else [extends]
    base = Item({}, document.place)
    for parent in parents:
        if not isinstance(parent.value, str):
            problems.add(parent.place, f"extends: a file name or a list of them is expected, this is {parent.kind}")
            continue
        other = (path.parent / parent.value).resolve()
        if other in (path.resolve(), *above):
            problems.add(parent.place, f"extends: {parent.value} extends this file in turn")
        elif not other.is_file():
            problems.add(parent.place, f"extends: no such file {path.parent / parent.value}")
        else:
            base = merged(base, _read(path.parent / parent.value, problems, (path.resolve(), *above)))
    return merged(base, document)


def _overridden(document: Item, sets: Sequence[str], problems: Problems) -> Item:
    """``document`` with what ``--set`` says."""
    for text in sets:
        place = Place(f"--set {text}", 0)
        name, equals, value = text.partition("=")
        path = name.split(".")
        if not equals or len(path) != 2 or not all(path):
            problems.add(place, "stage.option=value or vars.name=value is expected")
            continue
        parsed = parse(value, f"--set {text}") if value.strip() else Item("", place)
        item = Item(parsed.value, place) if not isinstance(parsed.value, dict | list) else parsed
        if path[0] == "vars":
            document = merged(document, Item({"vars": Item({path[1]: item}, place)}, document.place))
            continue
        stages = document.value.get("stages")
        known = stages.value if stages and isinstance(stages.value, dict) else {}
        if path[0] not in known:
            problems.add(place, f"no such stage '{path[0]}' ({nearest(path[0], known) if known else 'there are none'})")
            continue
        option = path[1].replace("-", "_")
        stage = known[path[0]].value
        matrix = stage.get("matrix") if isinstance(stage, dict) else None
        if matrix and isinstance(matrix.value, dict) and option in matrix.value:
            change = {"matrix": Item({option: item if isinstance(item.value, list) else Item([item], place)}, place)}
        else:
            change = {"with": Item({option: item}, place)}
        tree = Item({"stages": Item({path[0]: Item(change, known[path[0]].place)}, stages.place)}, document.place)
        document = merged(document, tree)
    return document
