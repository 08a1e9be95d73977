"""A recipe's document checked and multiplied into stages. Every mistake is found, each with its line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from weightworks.errors import nearest
from weightworks.plan.graph import Stage, base_name
from weightworks.plan.located import Item, Place, Problems, substituted
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.store.sources import HUB_ID

TOP = ("version", "extends", "vars", "sources", "stages", "report")
STAGE = ("use", "from", "with", "matrix")
RUN_WIDE = ("overwrite", "resume", "strict", "max_memory")  # a whole run's, given on the command line
NAME = re.compile(r"[A-Za-z_][\w.-]*")
ONE, MAYBE, MANY = "one checkpoint", "one checkpoint or none", "checkpoints"
ROLES: dict[str, dict[str, str]] = {  # a method may say otherwise by a ROLES of its own
    "quantize": {"model": ONE},
    "prune": {"model": ONE},
    "recover": {"model": ONE, "teacher": MAYBE},
    "merge": {"models": MANY, "base": MAYBE},
    "score": {"models": MANY, "baseline": MAYBE},
}


@dataclass
class Draft:
    """A stage as written, before multiplication."""

    name: str
    place: Place
    use: Item | None = None
    roles: dict[str, Item] = field(default_factory=dict)
    given: dict[str, Item] = field(default_factory=dict)
    matrix: dict[str, Item] = field(default_factory=dict)


class Reader:
    """Checks a document and builds what :class:`Recipe` holds; mistakes go to ``problems``."""

    def __init__(self, document: Item, problems: Problems) -> None:
        self.problems = problems
        self.document: dict[str, Item] = document.value
        self.place = document.place
        for key, item in self.document.items():
            if key not in TOP:
                problems.add(item.place, f"unknown key '{key}' ({nearest(key, TOP)})")
        self._version()
        values = self._vars()
        self.sources = self._sources(values)
        drafts = self._drafts(values)
        self.members: dict[str, list[Stage]] = {}
        for name in self._order(drafts):
            self.members[name] = list(self._multiplied(drafts[name]))
        self.stages = {stage.name: stage for stages in self.members.values() for stage in stages}
        self.report = self._report()

    def _mapping(self, key: str, *, required: bool) -> dict[str, Item]:
        item = self.document.get(key)
        if item is None or item.value is None:
            if required:
                self.problems.add(item.place if item else self.place, f"'{key}' is missing")
            return {}
        if not isinstance(item.value, dict):
            self.problems.add(item.place, f"'{key}' is a mapping of names, this is {item.kind}")
            return {}
        return item.value

    def _written(self, key: str) -> dict[str, Item]:
        """What stands under a top key, well-formed or not: a faulty entry is not reported as missing too."""
        item = self.document.get(key)
        return item.value if item is not None and isinstance(item.value, dict) else {}

    def _version(self) -> None:
        item = self.document.get("version")
        if item is None:
            self.problems.add(self.place, "'version: 1' is missing")
        elif item.value != 1 or isinstance(item.value, bool):
            self.problems.add(item.place, f"version {item.value!r} is not known; this program reads version 1")

    def _vars(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, item in self._mapping("vars", required=False).items():
            if isinstance(item.value, dict | list) and not isinstance(item.value, list):
                self.problems.add(item.place, f"variable '{name}' is a value or a list, this is {item.kind}")
            else:
                values[name] = substituted(item, values, self.problems).plain()
        return values

    def _sources(self, values: Mapping[str, Any]) -> dict[str, str]:
        sources = {}
        for name, raw in self._mapping("sources", required=True).items():
            item = substituted(raw, values, self.problems)
            self._check_name("source", name, item.place)
            if not isinstance(item.value, str) or not item.value:
                self.problems.add(item.place, f"source '{name}' is a folder or a hub id, this is {item.kind}")
                continue
            sources[name] = item.value
            if raw.value == item.value and "$" in raw.value:
                continue  # an unknown variable, reported already
            if not Path(item.value).expanduser().exists() and not HUB_ID.fullmatch(item.value):
                self.problems.add(item.place, f"source '{name}': no such folder {item.value}")
        return sources

    def _check_name(self, what: str, name: str, place: Place) -> None:
        if not NAME.fullmatch(name):
            self.problems.add(place, f"{what} '{name}': a name is letters, digits, '_', '-' and '.', no digit first")

    def _drafts(self, values: Mapping[str, Any]) -> dict[str, Draft]:
        drafts = {}
        for name, raw in self._mapping("stages", required=True).items():
            self._check_name("stage", name, raw.place)
            if name in self.sources:
                self.problems.add(raw.place, f"'{name}' is a source already; a stage needs another name")
            if not isinstance(raw.value, dict):
                self.problems.add(raw.place, f"stage '{name}' is a mapping with {', '.join(STAGE)}; this is {raw.kind}")
                continue
            item = substituted(raw, values, self.problems)
            draft = drafts[name] = Draft(name, item.place)
            for key, value in item.value.items():
                if key not in STAGE:
                    self.problems.add(value.place, f"stage '{name}' has no key '{key}' ({nearest(key, STAGE)})")
            draft.given = self._options_of(item, "with", name)
            draft.matrix = self._options_of(item, "matrix", name)
            self._check_matrix(draft)
            draft.use = item.value.get("use")
            if draft.use is None and "use" not in draft.matrix:
                self.problems.add(item.place, f"stage '{name}': 'use' is missing, such as use: quantize.gptq")
            self._roles(draft, item.value.get("from"))
        return drafts

    def _options_of(self, item: Item, key: str, stage: str) -> dict[str, Item]:
        found = item.value.get(key)
        if found is None or found.value is None:
            return {}
        if not isinstance(found.value, dict):
            self.problems.add(found.place, f"stage '{stage}': '{key}' is a mapping of options, this is {found.kind}")
            return {}
        return {name.replace("-", "_"): value for name, value in found.value.items()}

    def _check_matrix(self, draft: Draft) -> None:
        for option, item in list(draft.matrix.items()):
            where = f"stage '{draft.name}': matrix option '{option}'"
            if option in draft.given:
                self.problems.add(item.place, f"{where} is given in 'with' too")
            if not isinstance(item.value, list) or not item.value:
                self.problems.add(item.place, f"{where} is a list of values, this is {item.kind}")
                del draft.matrix[option]
                continue
            shown = [_shown(option, inner.plain()) for inner in item.value]
            if len(set(shown)) < len(shown):
                self.problems.add(item.place, f"{where} holds a value twice")

    def _roles(self, draft: Draft, source: Item | None) -> None:
        """The inputs by role; a plain name or list is the first role of the method's kind."""
        if source is None or source.value is None or source.value in ("", [], {}):
            self.problems.add(source.place if source else draft.place, f"stage '{draft.name}': 'from' is missing")
        elif isinstance(source.value, dict):
            draft.roles = dict(source.value)
        else:
            draft.roles = {"": source}

    def _order(self, drafts: Mapping[str, Draft]) -> list[str]:
        """Names of drafts, inputs first; unknown names and cycles are reported."""
        known = {*self.sources, *drafts}
        before: dict[str, set[str]] = {}
        for draft in drafts.values():
            before[draft.name] = set()
            for item in self._names(draft):
                name = base_name(item.value)
                if name in drafts:
                    before[draft.name].add(name)
                elif name not in known and name not in self._written("sources"):
                    self.problems.add(
                        item.place,
                        f"stage '{draft.name}' reads '{item.value}', which is neither source nor stage ({nearest(name, known)})",
                    )
        while True:
            try:
                return list(TopologicalSorter(before).static_order())
            except CycleError as error:
                cycle = error.args[1][::-1]
                text = f"stages read each other in a circle: {' -> '.join(cycle)}"
                self.problems.add(drafts[cycle[0]].place, text)
                before = {name: needs - {*cycle} for name, needs in before.items() if name not in cycle}

    def _names(self, draft: Draft) -> Iterator[Item]:
        for item in draft.roles.values():
            for inner in item.value if isinstance(item.value, list) else [item]:
                if isinstance(inner.value, str):
                    yield inner
                else:
                    self.problems.add(
                        inner.place, f"stage '{draft.name}': 'from' names sources or stages, this is {inner.kind}"
                    )

    def _multiplied(self, draft: Draft) -> Iterator[Stage]:
        """All stages that a draft stands for."""
        names = list(draft.matrix)
        for values in itertools.product(*(draft.matrix[name].value for name in names)):
            chosen = dict(zip(names, values, strict=True))
            use = chosen.pop("use", draft.use)
            entry = self._entry(draft, use)
            if entry is None:
                return
            own = tuple((draft.name, name, item.plain()) for name, item in zip(names, values, strict=True))
            options, settings = self._options(draft, entry, {**draft.given, **chosen})
            for inputs, tags in self._inputs(draft, entry, own):
                name = draft.name + _suffix(tags)
                yield Stage(name, entry.kind, entry.name, inputs, options, settings, draft.place, tags)

    def _entry(self, draft: Draft, use: Item | None) -> catalog.Entry | None:
        if use is None:
            return None
        where = f"stage '{draft.name}'"
        if not isinstance(use.value, str):
            self.problems.add(use.place, f"{where}: 'use' is KIND.METHOD, this is {use.kind}")
            return None
        kind, _, method = use.value.partition(".")
        known = catalog.methods()
        if kind not in catalog.SHELVES:
            self.problems.add(
                use.place, f"{where}: unknown kind '{kind}' in use: {use.value} ({nearest(kind, catalog.SHELVES)})"
            )
            return None
        if use.value not in known:
            names = [entry.name for entry in known.values() if entry.kind == kind]
            which = nearest(method, names) if names else f"there is no method of kind {kind} yet"
            self.problems.add(use.place, f"{where}: unknown method '{method}' for {kind} ({which})")
            return None
        return known[use.value]

    def _options(
        self, draft: Draft, entry: catalog.Entry, given: Mapping[str, Item]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values for the method, and those for the run around it; wrong ones are reported."""
        own = entry.load().Options
        options = {name: item.plain() for name, item in given.items() if name in own.model_fields}
        settings = {name: item.plain() for name, item in given.items() if name in Settings.model_fields}
        known = {*own.model_fields, *Settings.model_fields}
        for name, item in given.items():
            if name not in known:
                self.problems.add(item.place, f"{entry.label} has no option '{name}' ({nearest(name, known)})")
            elif name in RUN_WIDE and name not in own.model_fields:
                self.problems.add(
                    item.place, f"'{name}' is for a whole run: give --{name.replace('_', '-')} on the command line"
                )
        for which, values in ((own, options), (Settings, settings)):
            for name, text in which.complaints(values, where=entry.label):
                self.problems.add(given[name].place if name in given else draft.place, text)
        return options, settings

    def _inputs(
        self, draft: Draft, entry: catalog.Entry, own: tuple[tuple[str, str, Any], ...]
    ) -> Iterator[tuple[dict[str, tuple[str, ...]], tuple[tuple[str, str, Any], ...]]]:
        """Inputs by role and tags, once for every fitting choice among multiplied stages it reads one of."""
        roles: dict[str, str] = getattr(entry.load(), "ROLES", None) or ROLES[entry.kind]
        where = f"stage '{draft.name}'"
        given = {(role or next(iter(roles))): item for role, item in draft.roles.items()}
        for role, item in given.items():
            if role not in roles:
                self.problems.add(item.place, f"{where}: {entry.label} has no input '{role}' ({nearest(role, roles)})")
        for role, wanted in roles.items():
            if role not in given and wanted != MAYBE and draft.roles:
                self.problems.add(draft.place, f"{where}: {entry.label} needs '{role}' in 'from'")
        fixed: dict[str, tuple[str, ...]] = {}
        choices: list[list[tuple[str, Stage | None, str]]] = []
        for role, item in given.items():
            if role not in roles:
                continue
            items = item.value if isinstance(item.value, list) else [item]
            found = [(inner, self._outputs(where, inner)) for inner in items if isinstance(inner.value, str)]
            if roles[role] == MANY:
                fixed[role] = tuple(dict.fromkeys(name for _, outputs in found for name, _ in outputs))
                continue
            if len(items) != 1:
                self.problems.add(
                    item.place, f"{where}: '{role}' of {entry.label} is {roles[role]}, {len(items)} are given"
                )
                continue
            choices += [[(role, stage, name) for name, stage in outputs] for _, outputs in found]
        for chosen in itertools.product(*choices):
            tags = _joined(own, [stage.tags for _, stage, _ in chosen if stage is not None])
            if tags is not None:
                yield {**fixed, **{role: (name,) for role, _, name in chosen}}, tags

    def _outputs(self, where: str, item: Item) -> list[tuple[str, Stage | None]]:
        """The checkpoints that a name stands for: a source, or one or all of what a stage was multiplied into."""
        name: str = item.value
        if name in self.sources:
            return [(name, None)]
        members = self.members.get(base_name(name), [])
        if name != base_name(name):
            exact = [stage for stage in members if stage.name == name]
            if members and not exact:
                known = nearest(name, [stage.name for stage in members])
                self.problems.add(item.place, f"{where} reads '{name}', which does not exist ({known})")
            members = exact
        if any(stage.kind == "score" for stage in members):  # scores are no checkpoints
            self.problems.add(item.place, f"{where} reads '{name}', a score, where a checkpoint is needed")
            return []
        return [(stage.name, stage) for stage in members]

    def _report(self) -> tuple[str, ...]:
        item = self.document.get("report")
        if item is None or item.value is None:
            return ()
        if not isinstance(item.value, list):
            self.problems.add(item.place, f"'report' is a list of score stages, this is {item.kind}")
            return ()
        names: list[str] = []
        for inner in item.value:
            members = [stage for name, stage in self.stages.items() if inner.value in (name, base_name(name))]
            if not members and inner.value not in self._written("stages"):
                self.problems.add(
                    inner.place, f"report: no such stage '{inner.plain()}' ({nearest(str(inner.value), self.members)})"
                )
            for stage in members:
                if stage.kind != "score":
                    self.problems.add(
                        inner.place, f"report: '{stage.name}' is no score; the report compares score stages"
                    )
                names.append(stage.name)
        return tuple(names)


def _joined(
    own: tuple[tuple[str, str, Any], ...], inherited: Sequence[tuple[tuple[str, str, Any], ...]]
) -> tuple[tuple[str, str, Any], ...] | None:
    """Own and inherited tags, or None where two inputs come from different members of one stage."""
    seen = {(stage, option): (stage, option, value) for stage, option, value in own}
    for tag in itertools.chain.from_iterable(inherited):
        if seen.setdefault(tag[:2], tag) != tag:
            return None
    return tuple(seen.values())


def _shown(option: str, value: Any) -> str:
    text = (
        str(value).rpartition(".")[2]
        if option == "use"
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
    return re.sub(r"[\s,\[\]=/]+", "-", text).strip("-")


def _suffix(tags: Sequence[tuple[str, str, Any]]) -> str:
    """``[bits=3,seed=0]``; an option that two stages vary bears the stage's name."""
    if not tags:
        return ""
    options = [option for _, option, _ in tags]
    parts = [
        f"{option if options.count(option) == 1 else f'{stage}.{option}'}={_shown(option, value)}"
        for stage, option, value in tags
    ]
    return f"[{','.join(parts)}]"
