"""A recipe file: what it holds once checked, and how it is read, extended and overridden.

The stages form a directed graph. ``matrix`` makes several stages of one, ``small[bits=3]`` and so on; a stage that
reads one checkpoint from such a stage is multiplied with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightworks.plan.document import Unreadable, load, parse
from weightworks.plan.graph import Recipe
from weightworks.plan.located import Item, Place, Problems, merged, names_in, texts_in
from weightworks.plan.reader import OPTIONS, TOP, Reader


def load_recipe(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read and check ``path``; ``sets`` are ``stage.option=value`` and ``vars.name=value``.

    Raises one :class:`UsageError` that lists all mistakes, each with its file and line.
    """
    problems = Problems()
    document = _read(path, problems, ())
    for text in sets:
        document = _overridden(document, text, problems)
    reader = Reader(document, problems)
    problems.raise_if_any(str(path))
    text = path.read_text(encoding="utf-8-sig")
    return Recipe(path.stem, str(path), text, reader.sources, reader.stages, reader.report)


def _read(path: Path, problems: Problems, above: tuple[Path, ...]) -> Item:
    """The document with what it extends beneath it."""
    document = load(path, problems)
    if not isinstance(document.value, dict):
        problems.refuse(document, f"a recipe must be a mapping with {', '.join(TOP)}")
        problems.partial = True
        return Item({}, document.place)
    document = _underscored(document, problems)
    extends = document.value.get("extends")
    if extends is None:
        return document
    base = Item({}, document.place)
    for parent in extends.value if isinstance(extends.value, list) else [extends]:
        if not isinstance(parent.value, str) or not parent.value:
            problems.refuse(parent, "'extends' must be a file name or a list of them")
            problems.partial = True
        elif (other := _extended(path, parent, problems, above)) is not None:
            base = merged(base, _read(other, problems, (path.resolve(), *above)))
        else:
            problems.partial = True
    return merged(base, document)


def _extended(path: Path, parent: Item, problems: Problems, above: tuple[Path, ...]) -> Path | None:
    """The file that ``path`` names under ``extends``, if it can be read and is none of those that wait for it."""
    other = path.parent / parent.value
    try:
        found = other.is_file()
    except OSError:  # such as a name that is too long
        found = False
    if not found:
        problems.add(parent.place, f"extends: no such file {other}; a path is relative to this file")
    elif other.resolve() in (path.resolve(), *above):
        problems.add(parent.place, f"extends: {parent.value} extends this file in turn, or is this file")
    else:
        return other
    return None


def _underscored(document: Item, problems: Problems) -> Item:
    """``document`` with options spelled ``num_samples`` that may be written ``num-samples``."""
    stages = document.value.get("stages")
    if stages is None or not isinstance(stages.value, dict):
        return document
    changed = {name: stage for name, stage in stages.value.items() if isinstance(stage.value, dict)}
    for name, stage in changed.items():
        keys = dict(stage.value)
        for key in OPTIONS:
            if key in keys and isinstance(keys[key].value, dict):
                options: dict[str, Item] = {}
                for option, item in keys[key].value.items():
                    spelled = option.replace("-", "_")
                    if spelled in options:
                        problems.add(item.place, f"stage '{name}': option '{spelled}' is given twice in '{key}'")
                    options[spelled] = item
                keys[key] = Item(options, keys[key].place)
        changed[name] = Item(keys, stage.place)
    return Item({**document.value, "stages": Item({**stages.value, **changed}, stages.place)}, document.place)


def _overridden(document: Item, text: str, problems: Problems) -> Item:
    """``document`` with what one ``--set`` says."""
    place = Place(f"--set {text}", 0)
    path, _, value = text.partition("=")
    owner, _, name = ("vars", "", path[5:]) if path.startswith("vars.") else path.rpartition(".")
    if "=" not in text or not owner or not name:
        problems.add(place, "STAGE.OPTION=VALUE or vars.NAME=VALUE is expected")
        return document
    within = Problems()
    try:
        item = parse(value, str(place), within).moved(place) if value.strip() else Item("", place)
    except Unreadable as error:
        problems.add(place, str(error))
        return document
    for _, mistaken in within.found:
        problems.add(place, mistaken)
    if owner == "vars":
        return _with_variable(document, name, item, problems)
    stages = document.value.get("stages")
    known = stages.value if stages and isinstance(stages.value, dict) else {}
    if stages is None or owner not in known:
        if not problems.partial:
            problems.add(place, f"no such stage '{owner}' ({problems.near(owner, known)})")
        return document
    option, stage = name.replace("-", "_"), known[owner].value
    matrix = stage.get("matrix") if isinstance(stage, dict) else None
    if matrix and isinstance(matrix.value, dict) and option in matrix.value:
        values = item if isinstance(item.value, list | None) else Item([item], place)
        change = {"matrix": Item({option: values}, place)}
    else:
        change = {option: item} if option in ("use", "from") else {"with": Item({option: item}, place)}
    tree = Item({"stages": Item({owner: Item(change, known[owner].place)}, stages.place)}, document.place)
    return merged(document, tree)


def _with_variable(document: Item, name: str, item: Item, problems: Problems) -> Item:
    given = document.value.get("vars")
    if given is not None and not isinstance(given.value, dict | None):
        return document  # what stands there is a mistake of its own
    known = given.value if given is not None and given.value is not None else {}
    wanted = {variable for text in texts_in(document) for variable in names_in(text)} | set(known)
    if name not in wanted and not problems.partial:
        problems.add(item.place, f"no such variable '{name}' ({problems.near(name, sorted(wanted))})")
        return document
    return merged(document, Item({"vars": Item({name: item}, item.place)}, document.place))
