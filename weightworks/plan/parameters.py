"""Parameters of a configuration of mergekit: their values for a tensor at a depth, and the methods that these make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from weightworks.plan.located import Item, Place, Problems
from weightworks.stage.mergekit import Mergekit

if TYPE_CHECKING:
    from weightworks.plan.mergekit import Configuration, Slice, Source

WRONG = object()  # a value that is not supported, which has been said


def check_setting(name: str, setting: Item, problems: Problems) -> None:
    """Note what is wrong with the form of a setting: a value, a list of values, or conditions ``{filter, value}``."""
    conditions = setting.value if isinstance(setting.value, list) else [setting]
    if not any(isinstance(one.value, dict) for one in conditions):
        _check_plain(name, setting, problems)
        return
    for one in conditions:
        if not isinstance(one.value, dict) or "value" not in one.value:
            problems.refuse(one, f"'{name}': every condition must be a mapping with value, and perhaps filter")
            continue
        for key, inner in one.value.items():
            if key not in ("filter", "value"):
                problems.add(inner.place, f"'{name}': a condition has no key '{key}' (known: filter, value)")
        if not isinstance(one.value.get("filter", one).value, str | dict | None):
            problems.refuse(one.value["filter"], f"'{name}': filter must be a part of a tensor's name, or '*'")
        _check_plain(name, one.value["value"], problems)


def _check_plain(name: str, setting: Item, problems: Problems) -> None:
    values = setting.value if isinstance(setting.value, list) else [setting]
    if not values or not all(isinstance(one.value, bool | int | float | str) for one in values):
        problems.refuse(setting, f"'{name}' must be a value, a list of values over the depth, or conditions")


def value_in(scopes: Iterable[Mapping[str, Item]], name: str, tensor: str, depth: float) -> Item | None:
    """The value of parameter ``name`` for ``tensor`` at ``depth`` in [0, 1]: the first of ``scopes`` that has one."""
    for scope in scopes:
        if name in scope and (found := value_at(scope[name], tensor, depth)) is not None:
            return found
    return None


def value_at(setting: Item, tensor: str, depth: float) -> Item | None:
    """The value of one setting; None where no filter fits."""
    values = setting.value if isinstance(setting.value, list) else [setting]
    if not any(isinstance(one.value, dict) for one in values):
        return (
            gradient(setting, depth) if isinstance(setting.value, list) else Item(number(setting.value), setting.place)
        )
    for one in values:
        wanted = one.value["filter"].value if "filter" in one.value else None
        if wanted in (None, "*") or wanted in tensor:
            return value_at(one.value["value"], tensor, depth)
    return None


def gradient(setting: Item, depth: float) -> Item:
    """The value at ``depth`` of a list spread over it: numbers on the lines between them, other values as they stand."""
    values: list[Any] = [number(item.value) for item in setting.value]
    place = depth * (len(values) - 1)
    below = int(place)
    if any(isinstance(value, bool | str) for value in values):
        return Item(values[below], setting.place)
    above, share = min(below + 1, len(values) - 1), place - below
    return Item((1 - share) * values[below] + share * values[above], setting.place)


def number(value: Any) -> Any:
    """A text that is a number as that number, as in mergekit: YAML 1.1 reads ``1e-5`` as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


@dataclass
class Resolver:
    """Methods of the configuration's kind, by the values that parameters have for a tensor; equal ones are made once."""

    configuration: Configuration
    problems: Problems
    methods: dict[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> Mergekit:
        return self.configuration.form

    @cached_property
    def module(self) -> Any:
        return self.configuration.entry.load()

    def method(self, part: Slice, name: str, sources: Sequence[tuple[Source, str]], depth: float) -> Any | None:
        """The method that makes ``name`` of ``sources``, each with its tensor; None, and mistakes noted, if it cannot be."""
        options, places = dict(self.form.options), {}
        file = self.configuration.parameters
        given: dict[str, Any] = {}
        for parameter, option in self.form.shared.items():
            item = value_in((part.parameters, file), parameter, name, depth)
            if item is None and parameter in self.form.needed:
                self.problems.add(part.place, f"parameter '{parameter}' is missing")
                return None
            if item is not None and (value := self._value(parameter, item)) is not WRONG and option is not None:
                given[parameter], places[option] = value, item.place
        try:
            options |= self._ours(given)
        except ValueError as error:
            self.problems.add(next(iter(places.values())), str(error))
            return None
        for parameter, option in self.form.each.items():
            values = [
                value_in((source.parameters, part.parameters, file), parameter, tensor, depth)
                for source, tensor in sources
            ]
            if not self._each(parameter, option, values, sources, options, places):
                return None
        return self._made(options, places, sources)

    def _value(self, parameter: str, item: Item) -> Any:
        """A value as ours, where mergekit's have other names."""
        if parameter not in self.form.values:
            return item.value
        known = self.form.values[parameter]
        if item.value in known:
            return known[item.value]
        words = ", ".join(str(one).lower() for one in known)
        self.problems.add(
            item.place, f"'{parameter}: {item.kind}' is not supported for {self.configuration.method} (only {words})"
        )
        return WRONG

    def _ours(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.form.convert is not None:
            return self.form.convert(given)
        return {
            option: given[name] for name, option in self.form.shared.items() if option is not None and name in given
        }

    def _each(
        self,
        parameter: str,
        option: str | None,
        values: Sequence[Item | None],
        sources: Sequence[tuple[Source, str]],
        options: dict[str, Any],
        places: dict[str, Place],
    ) -> bool:
        """Take in a parameter of every model; a model that has none has the default."""
        if option is None or all(value is None for value in values):
            if parameter in self.form.needed and option is not None:
                for source, _ in sources:
                    self._missing(parameter, source)
                return False
            return True
        if option in self.module.Options.PER_MODEL:
            default = None if parameter in self.form.needed else self._default(option)
            numbers = [default if value is None else value.value for value in values]
            for (source, _), one in zip(sources, numbers, strict=True):
                if one is None:
                    self._missing(parameter, source)
            if None in numbers:
                return False
            options[option] = numbers
        else:
            default = self._default(option)
            numbers = [default if value is None else value.value for value in values]
            if any(one != numbers[0] for one in numbers):
                place = next(value.place for value in values if value is not None)
                self.problems.add(
                    place, f"'{parameter}' must be one for all models; it is {', '.join(map(str, numbers))}"
                )
                return False
            options[option] = numbers[0]
        places[option] = next(value.place for value in values if value is not None)
        return True

    def _default(self, option: str) -> Any:
        """What a model has that is given no value, while others are: densities stand in place of the density of all."""
        return self.defaults["density" if option == "densities" else option]

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The options where a file gives none."""
        return dict(self.module.Options(**self.form.options).resolved())

    def _missing(self, parameter: str, source: Source) -> None:
        self.problems.add(source.place, f"parameter '{parameter}' is missing for {source.model}")

    def _made(
        self, options: dict[str, Any], places: Mapping[str, Place], sources: Sequence[tuple[Source, str]]
    ) -> Any | None:
        options = {
            name: _typed(value, self.module.Options.model_fields[name].annotation) for name, value in options.items()
        }
        key = json.dumps([options, len(sources)], sort_keys=True, default=str)
        if key not in self.methods:
            self.methods[key] = None
            complaints = self.module.Options.complaints(options, where=self.configuration.method)
            for name, text in complaints:
                self.problems.add(
                    places.get(name, sources[0][0].place if sources else self.configuration.base_place), text
                )
            if not complaints:
                self.methods[key] = self.module.Method(self.module.Options(**options))
        return self.methods[key]


def _typed(value: Any, annotation: Any) -> Any:
    """Whole numbers as the kind of number that an option takes: YAML writes 1 for 1.0, gradients 10.0 for 10."""
    if isinstance(value, list):
        return [_typed(one, float) for one in value]
    if annotation is float and type(value) is int:
        return float(value)
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
