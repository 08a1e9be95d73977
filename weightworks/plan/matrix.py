"""Stages as written multiplied into stages as run: methods found, options checked, inputs joined.

A stage is multiplied by the values of its own ``matrix`` and by the members of the multiplied stages it reads one
checkpoint from. Two such inputs that stem from one multiplied stage stem from the same member of it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightworks.errors import WeightworksError
from weightworks.options import Options
from weightworks.plan.files import missing
from weightworks.plan.graph import Stage, base_name
from weightworks.plan.located import Item, Place, Problems
from weightworks.plan.workspace import safe
from weightworks.stage import catalog
from weightworks.stage.settings import Settings

RUN_WIDE = ("overwrite", "resume", "strict", "max_memory")  # a whole run's, given on the command line
ONE, MAYBE, MANY = "one checkpoint", "one checkpoint or none", "checkpoints"
CHOSEN = "one choice of rows or none"
ROLES: dict[str, dict[str, str]] = {  # a method may say otherwise by a ROLES of its own; merges see `roles_of`
    "quantize": {"model": ONE},
    "prune": {"model": ONE},
    "recover": {"model": ONE, "teacher": MAYBE, "data": CHOSEN},
    "select": {"model": ONE, "teacher": MAYBE},
    "score": {"models": MANY, "baseline": MAYBE},
}
MOST = 100_000  # stages: more is a slip of the matrix, not a plan
LONGEST = 200  # characters of a stage's name, which becomes a folder's
VALUE = 40  # characters of a value in a stage's name; of a longer one, a digest stands there

Tag = tuple[str, str, Any]  # stage, option, value: what a member of a multiplied stage differs in


@dataclass
class Draft:
    """A stage as written, before multiplication."""

    name: str
    place: Place
    use: Item | None = None
    roles: dict[str, Item] = field(default_factory=dict)
    given: dict[str, Item] = field(default_factory=dict)
    matrix: dict[str, Item] = field(default_factory=dict)


class Multiplier:
    """Takes drafts, inputs first; ``stages`` are the stages they stand for, ``members`` those of each draft."""

    def __init__(self, sources: Mapping[str, str], problems: Problems) -> None:
        self.sources, self.problems = sources, problems
        self.stages: dict[str, Stage] = {}
        self.members: dict[str, list[Stage]] = {}
        self.entries: dict[str, catalog.Entry | None] = {}
        self.folders: dict[str, str] = {}
        self._looked_for: set[tuple[Any, ...]] = set()

    def add(self, draft: Draft) -> None:
        """Multiply ``draft`` into its stages."""
        members = self.members[draft.name] = []
        options = list(draft.matrix)
        count = math.prod(len(draft.matrix[option].value) for option in options)
        if count > MOST:
            self.problems.add(
                draft.place, f"stage '{draft.name}': its matrix makes {count:,} stages, more than {MOST:,}"
            )
            return
        ways: dict[str, list[tuple[dict[str, tuple[str, ...]], tuple[Tag, ...]]]] = {}  # of feeding it, by method
        for values in itertools.product(*(draft.matrix[option].value for option in options)):
            chosen = dict(zip(options, values, strict=True))
            entry = self._entry(draft, chosen.pop("use", draft.use))
            if entry is None:
                continue
            items = {**draft.given, **chosen}
            given, settings = self._options(draft, entry, items)
            self._check_files(draft, entry, items, given, settings)
            if entry.label not in ways:
                ways[entry.label] = self._ways(draft, entry)
                self._check_kinds(draft, entry, ways)
            own = tuple((draft.name, option, item.plain()) for option, item in zip(options, values, strict=True))
            for inputs, inherited in ways[entry.label]:
                tags = (*own, *inherited)
                name = draft.name + suffix(tags)
                if len(self.stages) >= MOST:
                    self.problems.add(
                        draft.place, f"stage '{draft.name}': with it the recipe has more than {MOST:,} stages"
                    )
                    return
                stage = Stage(name, entry.kind, entry.name, inputs, given, settings, draft.place, tags)
                self._check_folder(stage)
                self.stages[name] = stage
                members.append(stage)

    def _check_files(
        self,
        draft: Draft,
        entry: catalog.Entry,
        items: Mapping[str, Item],
        given: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        """Every file that well-formed options name must be there; looked for once for all members that name the same."""
        texts = (draft.name, entry.label, settings.get("dataset"), repr(given) if entry.kind == "score" else "")
        if texts in self._looked_for or any(item.faulty for item in items.values()):
            return
        self._looked_for.add(texts)
        if any(
            _complaints(which, values, "") for which, values in ((entry.load().Options, given), (Settings, settings))
        ):
            return
        for option, text in missing(entry, given, settings):
            self.problems.add(items[option].place if option in items else draft.place, text)

    def _check_kinds(self, draft: Draft, entry: catalog.Entry, labels: Mapping[str, Any]) -> None:
        kinds = sorted({label.partition(".")[0] for label in labels})
        if len(kinds) > 1:
            place = draft.matrix["use"].place
            self.problems.add(
                place, f"stage '{draft.name}': methods of one kind are expected, these are {' and '.join(kinds)}"
            )

    def _check_folder(self, stage: Stage) -> None:
        """Names become folders: each its own, none too long."""
        if len(stage.name) > LONGEST:
            text = f"stage '{stage.name[:60]}...': {len(stage.name)} characters are too long for a name; vary fewer options"
            self.problems.add(stage.place, text)
        other = self.folders.setdefault(safe(stage.name), stage.name)
        if other != stage.name:
            self.problems.add(
                stage.place, f"stages '{other}' and '{stage.name}' would share the folder {safe(stage.name)}"
            )

    def _entry(self, draft: Draft, use: Item | None) -> catalog.Entry | None:
        if use is None or use.faulty:
            return None
        where = f"stage '{draft.name}'"
        if not isinstance(use.value, str):
            self.problems.refuse(use, f"{where}: 'use' must be KIND.METHOD, such as quantize.gptq")
            return None
        if use.value not in self.entries:
            self.entries[use.value] = None
            kind, dot, method = use.value.partition(".")
            if not dot or kind not in catalog.SHELVES:
                labels = list(catalog.methods())
                same = [label for label in labels if label.endswith(f".{use.value}")]
                which = f"did you mean '{same[0]}'?" if same else self.problems.near(use.value, labels)
                self.problems.add(use.place, f"{where}: unknown method '{use.value}' ({which})")
            else:
                try:
                    entry = catalog.find(kind, method)
                    entry.load()
                    self.entries[use.value] = entry
                except WeightworksError as error:
                    some = any(known.kind == kind for known in catalog.methods().values())
                    self.problems.add(
                        use.place, f"{where}: {error if some else f'there is no method of kind {kind} yet'}"
                    )
        return self.entries[use.value]

    def _options(
        self, draft: Draft, entry: catalog.Entry, given: Mapping[str, Item]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values for the method, and those for the run around it; wrong ones are reported."""
        own = entry.load().Options
        for name, item in given.items():
            if name not in own.model_fields and name not in Settings.model_fields:
                known = sorted({*own.model_fields, *Settings.model_fields} - {*RUN_WIDE})
                self.problems.add(
                    item.place, f"{entry.label} has no option '{name}' ({self.problems.near(name, known)})"
                )
            elif name in RUN_WIDE and name not in own.model_fields:
                flag = f"--{name.replace('_', '-')}"
                self.problems.add(item.place, f"'{name}' is for a whole run: give {flag} on the command line")
        faulty = {name for name, item in given.items() if item.faulty}
        found = []
        for which in (own, Settings):
            values = {
                name: item.plain() for name, item in given.items() if name in which.model_fields and name not in faulty
            }
            for name, text in _complaints(which, values, entry.label):
                if name not in faulty:
                    self.problems.add(given[name].place if name in given else draft.place, text)
            found.append(values)
        return found[0], found[1]

    def _ways(self, draft: Draft, entry: catalog.Entry) -> list[tuple[dict[str, tuple[str, ...]], tuple[Tag, ...]]]:
        """Inputs by role and inherited tags, once for every fitting choice among members of the stages it reads one of."""
        roles = roles_of(entry)
        where = f"stage '{draft.name}'"
        given = {(role or next(iter(roles))): item for role, item in draft.roles.items()}
        for role, item in given.items():
            if role not in roles:
                near = self.problems.near(role, roles)
                self.problems.add(item.place, f"{where}: {entry.label} has no input '{role}' ({near})")
        for role, wanted in roles.items():
            if role not in given and wanted not in (MAYBE, CHOSEN) and draft.roles:
                self.problems.add(draft.place, f"{where}: {entry.label} needs '{role}' in 'from'")
        fixed: dict[str, tuple[str, ...]] = {}
        choices: list[tuple[str, list[tuple[str, tuple[Tag, ...]]]]] = []
        for role, item in given.items():
            if role not in roles or item.faulty:
                continue
            items = item.value if isinstance(item.value, list) else [item]
            if not items or (len(items) > 1 and roles[role] != MANY):
                count = len(items) or "none"
                self.problems.add(item.place, f"{where}: '{role}' of {entry.label} takes {roles[role]}, {count} given")
                continue
            outputs = [output for inner in items for output in self._outputs(where, inner, roles[role] == CHOSEN)]
            if roles[role] == CHOSEN and "dataset" in {**draft.given, **draft.matrix}:
                self.problems.add(item.place, f"{where}: the data set is given by '{role}' and by 'dataset' too")
            if roles[role] == MANY:
                fixed[role] = tuple(dict.fromkeys(name for name, _ in outputs))
            else:
                choices.append((role, outputs))
        return [({**fixed, **chosen}, tags) for chosen, tags in joined(choices)]

    def _outputs(self, where: str, item: Item, of_rows: bool) -> list[tuple[str, tuple[Tag, ...]]]:
        """Checkpoints (or choices ``of_rows``) and tags that a name stands for: a source, or one or all members of a stage."""
        name = item.value
        if not isinstance(name, str):
            return []  # told before
        if name in self.sources and not of_rows:
            return [(name, ())]
        members = self.members.get(base_name(name), [])
        if name != base_name(name):
            if name not in self.stages and (members or base_name(name) in self.sources):
                known = [stage.name for stage in members] or [base_name(name)]
                near = self.problems.near(name, known)
                self.problems.add(item.place, f"{where} reads '{name}', which does not exist ({near})")
            members = [self.stages[name]] if name in self.stages else []
        if any(stage.kind == "score" for stage in members):  # scores are no checkpoints
            self.problems.add(item.place, f"{where} reads '{name}', which is a score; a checkpoint is needed")
            return []
        if name in self.sources or any((stage.kind == "select") != of_rows for stage in members):
            wanted = ("a choice of rows", "a checkpoint") if of_rows else ("a checkpoint", "a choice of rows")
            self.problems.add(item.place, f"{where} reads '{name}', which is {wanted[1]}; {wanted[0]} is needed")
            return []
        return [(stage.name, stage.tags) for stage in members]


def roles_of(entry: catalog.Entry) -> dict[str, str]:
    """The inputs of a method: how many checkpoints each of its roles takes."""
    module = entry.load()
    own: dict[str, str] | None = getattr(module, "ROLES", None)
    if own is not None or entry.kind not in ("merge", "adapter"):
        return own or ROLES[entry.kind]
    base = {"required": {"base": ONE}, "optional": {"base": MAYBE}}.get(module.Method.BASE, {})
    earlier = {"earlier": MAYBE} if getattr(module.Method, "CONTINUES", False) else {}
    return {"models": MANY, **base, **earlier}


def _complaints(which: type[Options], values: dict[str, Any], label: str) -> list[tuple[str, str]]:
    """What is wrong with ``values``, by option, even where a method's own check did not expect such a value at all."""
    try:
        return which.complaints(values, where=label)
    except TypeError:
        found = []
        for name, value in values.items():
            try:
                which.complaints({name: value}, where=label)
            except TypeError:
                found.append((name, f"{label}: option '{name}' = {value!r}: the value is of a wrong type"))
        return found or [("", f"{label}: an option has a value of a wrong type")]


def joined(
    choices: Sequence[tuple[str, Sequence[tuple[str, tuple[Tag, ...]]]]],
) -> Iterator[tuple[dict[str, tuple[str, ...]], tuple[Tag, ...]]]:
    """Every choice of one output a role with the tags of all, those left out that mix two members of one stage.

    A hash join: the outputs of a role are looked up by the tags that they share with the roles before.
    """
    rows: list[tuple[dict[str, tuple[str, ...]], dict[tuple[str, str], Tag]]] = [({}, {})]
    for role, outputs in choices:
        marked = [(name, {tag[:2]: tag for tag in tags}) for name, tags in outputs]
        common = [mark for mark in (rows[0][1] if rows else ()) if any(mark in marks for _, marks in marked[:1])]
        fitting = defaultdict(list)
        for name, marks in marked:
            fitting[_values(marks, common)].append((name, marks))
        rows = [
            ({**names, role: (name,)}, {**tags, **marks})
            for names, tags in rows
            for name, marks in fitting.get(_values(tags, common), ())
        ]
    return ((names, tuple(tags.values())) for names, tags in rows)


def _values(tags: Mapping[tuple[str, str], Tag], marks: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(shown(mark[1], tags[mark][2]) for mark in marks if mark in tags)


def shown(option: str, value: Any) -> str:
    """How a value stands in a stage's name: ``3``, ``true``, ``gptq``, ``a+b`` for a list."""
    if isinstance(value, list | tuple):
        text = "+".join(shown("", inner) for inner in value) or "none"
    elif value is None or isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = (
            re.sub(r"[\s,\[\]=/]+", "-", value.rpartition(".")[2] if option == "use" else value).strip("-") or "empty"
        )
    else:
        text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    return text if len(text) <= VALUE else hashlib.sha256(text.encode()).hexdigest()[:12]


def suffix(tags: Sequence[Tag]) -> str:
    """``[bits=3,seed=0]``; an option that two stages vary bears the stage's name."""
    if not tags:
        return ""
    options = [option for _, option, _ in tags]
    parts = [
        f"{option if options.count(option) == 1 else f'{stage}.{option}'}={shown(option, value)}"
        for stage, option, value in tags
    ]
    return f"[{','.join(parts)}]"
