"""A recipe's document checked, from its top keys to the order of its stages. Every mistake is found, each with its line."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from weightworks.errors import CheckpointError
from weightworks.plan.graph import base_name
from weightworks.plan.located import UNKNOWN, Item, Place, Problems, names_in, substituted, texts_in
from weightworks.plan.matrix import Draft, Multiplier, shown
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.store.sources import HUB_ID, parts

TOP = ("version", "extends", "vars", "sources", "stages", "report")
STAGE = ("use", "from", "with", "matrix")
OPTIONS = ("with", "matrix")  # keys whose keys are options
NAME = re.compile(r"[A-Za-z_][\w.-]*")
TAKEN = ("lock", "record.json", "stages.json", "report.html", "report.json")  # files where a stage's folder would lie


class Reader:
    """Checks a document and builds what :class:`Recipe` holds; mistakes go to ``problems``."""

    def __init__(self, document: Item, problems: Problems) -> None:
        self.problems = problems
        self.document: dict[str, Item] = document.value
        self.place = document.place
        self.values: dict[str, Item] = {}
        self.sources: dict[str, str] = {}
        multiplier = Multiplier(self.sources, problems)
        self.members, self.stages = multiplier.members, multiplier.stages
        for key, item in self.document.items():
            if key not in TOP:
                problems.add(item.place, f"unknown key '{key}' ({problems.near(key, TOP)})")
        self._version()
        self._vars()
        self._sources()
        drafts = self._drafts()
        for name in self._order(drafts):
            multiplier.add(drafts[name])
        self.report = tuple(self._report())

    def _mapping(self, key: str, *, required: bool = True) -> dict[str, Item]:
        item = self.document.get(key)
        if item is None or item.value is None or item.value == {}:
            if required and not self.problems.partial:
                text = f"'{key}' is missing" if item is None else f"'{key}' is empty"
                self.problems.add(item.place if item else self.place, text)
            return {}
        if not isinstance(item.value, dict):
            self.problems.refuse(item, f"'{key}' must be a mapping of names")
            return {}
        return item.value

    def _written(self, key: str) -> dict[str, Item]:
        """What stands under a top key, well-formed or not: a faulty entry is not reported as missing too."""
        item = self.document.get(key)
        return item.value if item is not None and isinstance(item.value, dict) else {}

    def _version(self) -> None:
        item = self.document.get("version")
        if item is None:
            if not self.problems.partial:
                self.problems.add(self.place, "'version: 1' is missing")
        elif type(item.value) is not int or item.value != 1:
            self.problems.refuse(item, "'version' must be 1, the only one this program reads")

    def _vars(self) -> None:
        """Variables, those that others refer to first."""
        raw = self._mapping("vars", required=False)
        for name in ordered({name: [*names_in(" ".join(texts_in(item)))] for name, item in raw.items()}, self._circle):
            item = raw[name]
            if isinstance(item.value, dict):
                self.problems.refuse(item, f"variable '{name}' must be a value or a list")
                item = Item(UNKNOWN, item.place)
            self.values[name] = substituted(
                item, {**dict.fromkeys(raw, Item(UNKNOWN, item.place)), **self.values}, self.problems
            )

    def _circle(self, names: list[str]) -> None:
        place = self._written("vars")[names[0]].place
        self.problems.add(place, f"variables refer to each other in a circle: {' -> '.join(names)}")

    def _sources(self) -> None:
        for name, raw in self._mapping("sources").items():
            item = substituted(raw, self.values, self.problems)
            self._check_name("source", name, item.place)
            self.sources[name] = item.value
            if not isinstance(item.value, str) or not item.value.strip():
                self.problems.refuse(item, f"source '{name}' must be a folder or a hub id")
            elif (text := unreachable(item.value)) is not None:
                self.problems.add(item.place, f"source '{name}': {text}")

    def _check_name(self, what: str, name: str, place: Place) -> None:
        if not NAME.fullmatch(name):
            text = "a name is made of letters, digits, '_', '-' and '.', and begins with a letter or '_'"
            self.problems.add(place, f"{what} '{name}': {text}")

    def _drafts(self) -> dict[str, Draft]:
        drafts = {}
        for name, raw in self._mapping("stages").items():
            self._check_name("stage", name, raw.place)
            if name in self.sources:
                self.problems.add(raw.place, f"stage '{name}': a source has this name; choose another")
            if name in TAKEN:
                self.problems.add(
                    raw.place, f"stage '{name}': a file of this name is written beside it; choose another"
                )
            if not isinstance(raw.value, dict):
                self.problems.refuse(raw, f"stage '{name}' must be a mapping with {', '.join(STAGE)}")
                continue
            item = substituted(raw, self.values, self.problems)
            draft = drafts[name] = Draft(name, item.place)
            draft.use = item.value.get("use")
            draft.given = self._options_of(item, "with", name)
            draft.matrix = self._options_of(item, "matrix", name)
            for key in [key for key in item.value if key not in STAGE]:
                self._unknown_key(draft, key, item.value[key])
            self._check_matrix(draft)
            if draft.use is None and "use" not in draft.matrix:
                self.problems.add(item.place, f"stage '{name}': 'use' is missing, such as use: quantize.gptq")
            self._roles(draft, item.value.get("from"))
        return drafts

    def _unknown_key(self, draft: Draft, key: str, item: Item) -> None:
        label = draft.use.value if draft.use and isinstance(draft.use.value, str) else ""
        entry = catalog.methods().get(label)
        option = key.replace("-", "_")
        if option in Settings.model_fields or (entry is not None and option in entry.load().Options.model_fields):
            which = "options stand under 'with'"
        else:
            which = self.problems.near(key, STAGE)
        self.problems.add(item.place, f"stage '{draft.name}' has no key '{key}' ({which})")

    def _options_of(self, item: Item, key: str, stage: str) -> dict[str, Item]:
        found = item.value.get(key)
        if found is None or found.value is None:
            return {}
        if not isinstance(found.value, dict):
            self.problems.refuse(found, f"stage '{stage}': '{key}' must be a mapping of options")
            return {}
        return dict(found.value)

    def _check_matrix(self, draft: Draft) -> None:
        """Every option of a matrix has values, each with a name of its own; faulty options are left out."""
        for option, item in list(draft.matrix.items()):
            where = f"stage '{draft.name}': matrix option '{option}'"
            if option in draft.given:
                self.problems.add(item.place, f"{where} is given in 'with' too")
            if option == "use" and draft.use is not None:
                self.problems.add(item.place, f"{where} is given outside of 'matrix' too")
            if not isinstance(item.value, list) or not item.value:
                given = Item(item.value or None, item.place) if isinstance(item.value, list) else item
                self.problems.refuse(given, f"{where} must be a list of values")
                del draft.matrix[option]
                continue
            names: dict[str, Item] = {}
            for inner in item.value:
                value = inner.plain()
                first = names.setdefault(shown(option, value), inner)
                if first is inner or inner.faulty or first.faulty:
                    continue
                if first.plain() == value and type(first.value) is type(inner.value):
                    self.problems.add(inner.place, f"{where} holds {value!r} twice")
                else:
                    text = f"{first.plain()!r} and {value!r} would both be called {shown(option, value)}"
                    self.problems.add(inner.place, f"{where}: {text}")

    def _roles(self, draft: Draft, source: Item | None) -> None:
        """The inputs by role; a plain name or list is the first role of the method's kind."""
        if source is None or source.value in (None, "", [], {}):
            place = source.place if source else draft.place
            self.problems.add(place, f"stage '{draft.name}': 'from' is missing; it names sources or stages")
        elif isinstance(source.value, dict):
            draft.roles = dict(source.value)
        elif source.value is not UNKNOWN:
            draft.roles = {"": source}

    def _order(self, drafts: Mapping[str, Draft]) -> list[str]:
        """Names of drafts, inputs first; unknown names and circles are reported."""
        known = {**dict.fromkeys(self._written("sources")), **dict.fromkeys(self._written("stages"))}
        before: dict[str, list[str]] = {}
        for draft in drafts.values():
            before[draft.name] = []
            for item in self._names(draft):
                name = base_name(item.value)
                if name not in known and (self.problems.partial or not self.sources):
                    continue
                if name not in known:
                    near = self.problems.near(name, known, but=draft.name)
                    text = f"stage '{draft.name}' reads '{item.value}', which is neither source nor stage ({near})"
                    self.problems.add(item.place, text)
                elif name in drafts and name not in self.sources:
                    before[draft.name].append(name)

        def circle(names: list[str]) -> None:
            text = f"stages read each other in a circle: {' -> '.join(names)}"
            if len(names) == 2:
                text = f"stage '{names[0]}' reads itself"
            self.problems.add(drafts[names[0]].place, text)

        return ordered(before, circle)

    def _names(self, draft: Draft) -> Iterator[Item]:
        """All names in 'from'."""
        for role, item in draft.roles.items():
            seen: set[str] = set()
            where = f"stage '{draft.name}': '{role}' in 'from'" if role else f"stage '{draft.name}': 'from'"
            for inner in item.value if isinstance(item.value, list) else [item]:
                if not isinstance(inner.value, str) or not inner.value:
                    self.problems.refuse(inner, f"{where} must name sources or stages")
                elif inner.value in seen:
                    self.problems.add(inner.place, f"{where} names '{inner.value}' twice")
                else:
                    seen.add(inner.value)
                    yield inner

    def _report(self) -> Iterator[str]:
        """The stages that the report compares."""
        item = substituted(self.document.get("report", Item(None, self.place)), self.values, self.problems)
        if item.value is None:
            return
        if not isinstance(item.value, list):
            self.problems.refuse(item, "'report' must be a list of score stages, such as [scores]")
            return
        written = self._written("stages")
        seen: set[str] = set()
        for inner in item.value:
            name = inner.value
            if not isinstance(name, str):
                self.problems.refuse(inner, "'report' must be a list of score stages")
                continue
            members = [self.stages[name]] if name in self.stages else self.members.get(name, [])
            if not members and name not in written and not self.problems.partial:
                known = (
                    written
                    if name == base_name(name)
                    else [stage.name for stage in self.members.get(base_name(name), [])]
                )
                self.problems.add(
                    inner.place, f"report: no such stage '{name}' ({self.problems.near(name, known or written)})"
                )
            if any(stage.kind != "score" for stage in members):
                self.problems.add(inner.place, f"report: stage '{name}' is no score; the report compares scores")
            if any(stage.name in seen for stage in members):
                self.problems.add(inner.place, f"report: stage '{name}' is named twice")
            seen.update(stage.name for stage in members)
            yield from (stage.name for stage in members)


def unreachable(source: str) -> str | None:
    """Why ``source`` cannot be a checkpoint, as far as a look at the disk can tell; None if it can."""
    try:
        for part in parts(source):
            path = Path(part).expanduser()
            if path.is_file():
                return f"{part} is a file; give the checkpoint folder that holds it"
            if not path.is_dir() and not HUB_ID.fullmatch(part):
                return f"no such folder {part}; a path is relative to the working directory"
    except (OSError, RuntimeError):  # a name too long for a file; a home that nobody has
        return f"no such folder {source}; a path is relative to the working directory"
    except CheckpointError as error:
        return str(error)
    return None


def ordered(before: Mapping[str, Iterable[str]], circle: Callable[[list[str]], None]) -> list[str]:
    """Names, each after those ``before`` it, else as they come. ``circle`` is told of every circle, which is then cut."""
    places = {name: index for index, name in enumerate(before)}
    needs = {name: [other for other in dict.fromkeys(others) if other in before] for name, others in before.items()}
    while True:
        sorter = TopologicalSorter(needs)
        try:
            sorter.prepare()
            break
        except CycleError as error:
            names = error.args[1][::-1]  # first and last are the same
            start = min(range(len(names) - 1), key=lambda index: places[names[index]])
            names = names[start:-1] + names[: start + 1]
            circle(names)
            cut = set(names)
            needs |= {name: [other for other in needs[name] if other not in cut] for name in cut}
    found: list[str] = []
    ready: list[tuple[int, str]] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, (places[name], name))
        _, name = heapq.heappop(ready)
        found.append(name)
        sorter.done(name)
    return found
