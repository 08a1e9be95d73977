"""What a report says, read with care: its stages, scores and fallbacks, and words for its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STATES = ("ran", "cached", "failed", "skipped", "to run")

Rows = list[dict[str, Any]]


def verdict(report: Mapping[str, Any]) -> str:
    """How the run went, in one line."""
    stages = [stage for stage in stages_of(report.get("stages")) if stage.get("state") != "source"]
    counted = [f"{count} {state}" for state in STATES if (count := in_state(stages, state))]
    others = len(stages) - sum(in_state(stages, state) for state in STATES)
    counted += [f"{others} other"] if others else []
    parts = [f"{len(stages)} {plural('stage', len(stages))}" + (": " + ", ".join(counted) if counted else "")]
    seconds, peak = number(report.get("seconds")), number(report.get("peak_bytes"))
    parts += [duration(seconds)] if seconds is not None else []
    parts += [f"peak memory {size(peak)}"] if peak is not None else []
    count = len(fallbacks(stages_of(report.get("stages"))))
    parts.append(f"{count or 'no'} {plural('fallback', count)}")
    return " · ".join(parts)


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One model under one metric."""

    name: str
    size: float | None
    value: float | None
    error: float | None
    delta: float | None
    delta_error: float | None


@dataclass(frozen=True)
class Measure:
    """One metric of one score stage; ``relative`` if changes are shares of the baseline's value."""

    stage: str
    metric: str
    better: str
    baseline: str
    relative: bool
    models: list[Measured]

    def change(self, model: Measured) -> str:
        """The change against the baseline in words, with its error if known."""
        if model.delta is None or model.name == self.baseline:
            return ""
        error = "" if model.delta_error is None else f" ± {figure(model.delta_error, digits=2, percent=self.relative)}"
        return figure(model.delta, digits=3, percent=self.relative, sign=True) + error

    def spread(self, model: Measured) -> float:
        """The standard error that its bar shows: of the change on the same windows where there is one, the scatter
        between windows, which all models share, left out; else that of the value."""
        if model.name == self.baseline and any(other.delta_error is not None for other in self.models):
            return 0.0
        if model.delta_error is None:
            return max(model.error or 0.0, 0.0)
        base = next((other.value for other in self.models if other.name == self.baseline), None)
        return model.delta_error * (abs(base or 0.0) if self.relative else 1.0)


def read_measures(report: Mapping[str, Any]) -> list[Measure]:
    """Every metric of every score stage, in the report's order."""
    sizes = {stage["name"]: number(stage.get("bytes")) for stage in stages_of(report.get("stages"))}
    measures = []
    for score in map(entries, listed(report.get("scores"))):
        models = [model for model in map(entries, listed(score.get("models"))) if words(model.get("model"))]
        declared = entries(score.get("metrics"))
        for metric in dict.fromkeys([*declared, *(name for model in models for name in entries(model.get("metrics")))]):
            found = []
            for model in models:
                name, figures = words(model["model"]), entries(entries(model.get("metrics")).get(metric))
                own = number(model.get("bytes"))
                found.append(
                    Measured(
                        name,
                        sizes.get(name) if own is None else own,
                        *(number(figures.get(key)) for key in ("value", "error", "change", "change_error")),
                    )
                )
            baseline = words(score.get("baseline"))
            better = words(entries(declared.get(metric)).get("better"))
            change = words(entries(declared.get(metric)).get("change"))
            relative = change == "relative" if change else _is_relative(found, baseline)
            measures.append(Measure(words(score.get("stage")), metric, better, baseline, relative, found))
    return measures


def _is_relative(models: Sequence[Measured], baseline: str) -> bool:
    """Whether changes are nearer to shares of the baseline's value than to differences."""
    base = next((model.value for model in models if model.name == baseline), None)
    if not base:
        return False
    pairs = [(m.value, m.delta) for m in models if m.value is not None and m.delta is not None]
    share = sum(abs(value / base - 1 - delta) for value, delta in pairs)
    return share < sum(abs(value - base - delta) for value, delta in pairs)


# Stages and tensors ---------------------------------------------------------------------------------------------------


def fallbacks(stages: Rows) -> list[tuple[str, str]]:
    """Stage and sentence of everything that was asked and not done so."""
    found = dict[tuple[str, str], None]()
    for stage in stages:
        told = [words(sentence) for sentence in listed(stage.get("fallbacks"))]
        for row in map(entries, listed(stage.get("rows"))):
            told += [f"{words(row.get('tensor'))}: {words(sentence)}" for sentence in listed(row.get("fallbacks"))]
        found |= dict.fromkeys((stage["name"], sentence) for sentence in told if sentence)
    return list(found)


def inputs_of(stage: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of inputs by role."""
    given = stage.get("from")
    roles = given if isinstance(given, dict) else {"model": given}
    return {
        role: names
        for role, value in roles.items()
        if (names := [words(name) for name in listed(value) if words(name)])
    }


def inputs_in_words(stage: Mapping[str, Any], *, most: int = 1000) -> str:
    """Inputs by role, ``most`` of each by name."""
    told = []
    roles = inputs_of(stage)
    for role, names in roles.items():
        more = f" and {len(names) - most} more" if len(names) > most + 1 else ""
        told.append((f"{role}: " if len(roles) > 1 else "") + ", ".join(names[:most] if more else names) + more)
    return "; ".join(told)


def block_and_kind(tensor: str) -> tuple[int | None, str]:
    """The block a tensor is in, by the first number in its name, and its name without numbers."""
    parts = tensor.removesuffix(".weight").split(".")
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 7]
    return (numbers[0] if numbers else None), ".".join("*" if part.isdigit() else part for part in parts)


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """The shortest ending of each kind, in whole words, that means no other."""
    kinds = list(kinds)
    names = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        clear = (
            ending
            for ending in endings
            if not ending.startswith("*") and sum(f".{other}".endswith(f".{ending}") for other in kinds) == 1
        )
        names[kind] = next(clear, kind)
    return names


# Words and values -----------------------------------------------------------------------------------------------------


def size(count: float | None) -> str:
    """A byte count for people, in powers of ten; nothing for None."""
    if count is None:
        return ""
    for unit, scale in (("bytes", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if abs(count) < 999.5 * scale:
            return f"{count:.0f} bytes" if scale == 1 else f"{figure(count / scale, digits=3)} {unit}"
    return f"{figure(count / 1e12, digits=3)} TB"


def duration(seconds: float | None) -> str:
    """A time for people; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 99.5:
        return f"{seconds:.{0 if seconds >= 9.95 else 1 if seconds >= 0.1 else 2}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figure(value: float | None, *, digits: int = 4, percent: bool = False, sign: bool = False) -> str:
    """A number in so many digits that count, without an exponent where that is readable; nothing for None."""
    if value is None:
        return ""
    if percent:
        return figure(100 * value, digits=min(digits, 3), sign=sign) + "%"
    mark = "+" if sign else ""
    if value and not 1e-5 <= abs(value) < 1e9:
        return f"{value:{mark}.{digits - 1}e}"
    if isinstance(value, int) and not sign:
        return str(value)
    places = digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:{mark}.{min(max(places, 0), 6)}f}"


def clean(value: Any) -> Any:
    """``value`` as JSON would have it, without numbers that are none and letters that cannot be written."""
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)


def listed(value: Any) -> list[Any]:
    """A list of what was given: none, one or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def entries(value: Any) -> dict[str, Any]:
    """Names with values; none if ``value`` is something else."""
    return value if isinstance(value, dict) else {}


def stages_of(value: Any) -> Rows:
    """Stages with a name and a state."""
    found = [stage for stage in listed(value) if isinstance(stage, dict)]
    return [{**stage, "name": words(stage.get("name")), "state": words(stage.get("state"))} for stage in found]


def words(value: Any) -> str:
    """``value`` as text; nothing for None."""
    return "" if value is None else value if isinstance(value, str) else as_json(value)


def as_json(value: Any) -> str:
    """``value`` as JSON writes it, text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number(value: Any) -> float | None:
    """``value`` if it is a number that can be drawn."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e200 else None


def in_state(stages: Iterable[Mapping[str, Any]], state: str) -> int:
    return sum(stage.get("state") == state for stage in stages)


def plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
