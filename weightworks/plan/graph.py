"""The graph of a recipe: stages, what feeds what, and the part that some of them need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightworks.errors import UsageError, nearest
from weightworks.plan.located import Place


@dataclass(frozen=True)
class Stage:
    """One stage as it will run. ``inputs`` are names of sources and stages by role; values are as given, unresolved."""

    name: str
    kind: str
    method: str
    inputs: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    place: Place
    tags: tuple[tuple[str, str, Any], ...] = ()  # (stage, option, value) of every matrix it comes from

    @property
    def label(self) -> str:
        return f"{self.kind}.{self.method}"

    @property
    def needs(self) -> tuple[str, ...]:
        """All inputs, each once."""
        return tuple(dict.fromkeys(name for names in self.inputs.values() for name in names))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: ``stages`` by name, inputs before what reads them; ``report`` names score stages."""

    name: str
    path: str
    text: str
    sources: Mapping[str, str]
    stages: Mapping[str, Stage]
    report: tuple[str, ...]

    def only(self, wanted: Sequence[str]) -> Recipe:
        """The part that ``wanted`` stages need; a stage's plain name means all it was multiplied into."""
        chosen: set[str] = set()
        for word in wanted:
            found = [name for name in self.stages if word in (name, base_name(name))]
            if not found:
                names = {name for stage in self.stages for name in (stage, base_name(stage))}
                raise UsageError(f"--only {word}: no such stage ({nearest(word, names)})")
            chosen.update(found)
        for name in reversed(list(self.stages)):
            if name in chosen:
                chosen.update(self.stages[name].needs)
        stages = {name: stage for name, stage in self.stages.items() if name in chosen}
        sources = {name: model for name, model in self.sources.items() if name in chosen}
        report = tuple(name for name in self.report if name in chosen)
        return Recipe(self.name, self.path, self.text, sources, stages, report)


def base_name(name: str) -> str:
    """``small`` of ``small[bits=3]``."""
    return name.partition("[")[0]
