"""A configuration of mergekit read and checked: every mistake, and all that is not supported, with its line.

What it means is as in mergekit 0.1.5: of a parameter the innermost value counts (source, slice, file), a list is a gradient
over the depth, ``filter`` picks values by a part of a tensor's name. What is different here is noted in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightworks.plan.document import load
from weightworks.plan.located import Item, Place, Problems
from weightworks.plan.parameters import check_setting
from weightworks.plan.reader import unreachable
from weightworks.stage.catalog import Entry
from weightworks.stage.mergekit import Mergekit, known

TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip
STORED = ("float32", "bfloat16", "float16")
SEE = "see: docs/mergekit.md"


@dataclass(frozen=True)
class Source:
    """A model in a slice: its layers ``first`` to ``last`` - 1 (None: all), and its own parameters."""

    model: str
    place: Place
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Item] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the output, made of the same number of layers of each source."""

    sources: tuple[Source, ...]
    place: Place
    parameters: Mapping[str, Item] = field(default_factory=dict)


@dataclass
class Configuration:
    """What a file says, checked as far as that goes without the models.

    ``sliced`` tells slices from plain ``models``, which are one slice of all layers. ``base`` is ``base_model``, at
    ``base_place``. ``out_dtype`` is the dtype of the result, ``vocabulary`` that of its tokens (None: not said),
    ``tokenizer`` the model that it names, ``chat_template`` as given. ``notes`` say what is otherwise than in mergekit.
    """

    file: str
    plain: Any
    method: str
    entry: Entry
    form: Mergekit
    slices: tuple[Slice, ...]
    sliced: bool
    base: str | None
    base_place: Place
    parameters: Mapping[str, Item]
    out_dtype: str
    vocabulary: str | None
    tokenizer: Item | None
    chat_template: Item | None
    notes: list[str]

    @property
    def models(self) -> list[str]:
        """The models in order of first mention, the base first."""
        named = [source.model for one in self.slices for source in one.sources]
        return list(dict.fromkeys([*([self.base] if self.base else []), *named]))


def read(path: Path) -> tuple[Configuration, Problems]:
    """Read ``path``; mistakes that are found later, with the models open, go to the same :class:`Problems`.

    Raises :class:`UsageError` with a line a mistake if there are any.
    """
    problems = Problems()
    document = load(path, problems, hint="give a configuration of mergekit")
    if not isinstance(document.value, dict):
        problems.refuse(document, "a configuration must be a mapping with merge_method and models or slices")
        problems.raise_if_any(str(path), hint=SEE)
    configuration = _Reader(document, problems, str(path)).configuration()
    problems.raise_if_any(str(path), hint=SEE)
    assert configuration is not None, "without a method there is a problem"
    return configuration, problems


class _Reader:
    """Checks a document; mistakes go to ``problems``."""

    def __init__(self, document: Item, problems: Problems, file: str) -> None:
        self.items: dict[str, Item] = {key: item for key, item in document.value.items() if item.value is not None}
        self.document, self.problems, self.file = document, problems, file
        self.notes: dict[str, None] = {}
        self.known = known()
        for key, item in document.value.items():
            if key not in TOP:
                problems.add(item.place, f"unknown key '{key}' ({problems.near(key, TOP)})")

    def configuration(self) -> Configuration | None:
        """The configuration; None if it has no method that is known."""
        found = self._method()
        self._refuse(
            "modules", "merging the modules of a model by different means is not supported; give models or slices"
        )
        given = [key for key in ("models", "slices", "modules") if key in self.items]
        if len(given) != 1:
            seen = f"; this has {' and '.join(given)}" if given else ""
            self.problems.add(self.document.place, f"exactly one of models, slices and modules must be there{seen}")
        base = self.base = self._model(self.items["base_model"], "base_model") if "base_model" in self.items else None
        name, entry, form = found or ("", None, None)
        self.form, self.method = form, name
        parameters = self._parameters(self.items.get("parameters"), "parameters", own=False)
        slices = (*self._models(), *self._slices())
        out_dtype, (vocabulary, tokenizer) = self._dtype(), self._tokenizer(base)
        if entry is None or form is None:
            return None
        base_place = self.items["base_model"].place if "base_model" in self.items else self.document.place
        if form.differs:
            self.notes[f"{name}: {form.differs}"] = None
        return Configuration(
            self.file, self.document.plain(), name, entry, form, slices, "slices" in self.items, base, base_place,
            parameters, out_dtype, vocabulary, tokenizer, self._template(), list(self.notes),
        )  # fmt: skip

    def _refuse(self, key: str, text: str) -> None:
        if key in self.items:
            self.problems.add(self.items[key].place, f"{key}: {text}")

    def _method(self) -> tuple[str, Entry, Mergekit] | None:
        item = self.items.get("merge_method")
        if item is None:
            self.problems.add(self.document.place, "'merge_method' is missing, such as merge_method: ties")
        elif not isinstance(item.value, str):
            self.problems.refuse(item, "'merge_method' must be the name of a method")
        elif item.value not in self.known:
            self.problems.add(
                item.place, f"unknown merge_method '{item.value}' ({self.problems.near(item.value, self.known)})"
            )
        else:
            return item.value, *self.known[item.value]
        return None

    def _model(self, item: Item, where: str) -> str | None:
        """A model by path, hub id, or either with ``@revision`` and ``+adapter``."""
        if not isinstance(item.value, str) or not item.value.strip():
            self.problems.refuse(item, f"{where}: a model is written as PATH, ORG/NAME@REVISION or MODEL+ADAPTER")
            return None
        if (reason := unreachable(item.value)) is not None:
            self.problems.add(item.place, f"{where}: {reason}")
            return None
        return item.value

    def _parameters(self, item: Item | None, where: str, *, own: bool) -> dict[str, Item]:
        """The parameters of a source (``own``) or of more; what mergekit would silently leave aside is noted."""
        if item is None or item.value is None:
            return {}
        if not isinstance(item.value, dict):
            self.problems.refuse(item, f"{where} must be a mapping of parameters")
            return {}
        every = {name for _, form in self.known.values() for name in (*form.shared, *form.each)}
        found = {}
        for name, setting in item.value.items():
            check_setting(name, setting, self.problems)
            if self.form is None:
                continue
            mine = {*self.form.shared, *self.form.each}
            if name not in every:
                self.problems.add(setting.place, f"unknown parameter '{name}' ({self.problems.near(name, mine)})")
            elif name not in mine:
                self.notes[f"{setting.place}: '{name}' is no parameter of {self.method}: it changes nothing"] = None
            elif own and name in self.form.shared:
                text = (
                    f"{setting.place}: '{name}' is of a tensor, not of a model: as in mergekit it changes nothing here"
                )
                self.notes[text] = None
            else:
                found[name] = setting
        return found

    def _keys(self, item: Item, what: str, allowed: Sequence[str]) -> dict[str, Item]:
        """The entries of a mapping; {} and a mistake if it is none."""
        if not isinstance(item.value, dict):
            self.problems.refuse(item, f"{what} must be a mapping with {', '.join(allowed)}")
            return {}
        for key, inner in item.value.items():
            if key not in allowed:
                self.problems.add(inner.place, f"{what} has no key '{key}' ({self.problems.near(key, allowed)})")
        return {key: inner for key, inner in item.value.items() if inner.value is not None}

    def _list(self, item: Item, what: str) -> list[Item]:
        if not isinstance(item.value, list) or not item.value:
            self.problems.refuse(item, f"'{what}' must be a list that holds something")
            return []
        return item.value

    def _models(self) -> Iterator[Slice]:
        """All layers of all models as one slice; the base is among them, as mergekit has it."""
        if "models" not in self.items:
            return
        sources: list[Source] = []
        for item in self._list(self.items["models"], "models"):
            keys = self._keys(item, "an entry of models", ("model", "parameters"))
            sources += self._source(item, keys, None)
        if self.base is not None and all(source.model != self.base for source in sources):
            sources.append(Source(self.base, self.items["base_model"].place))
        yield Slice(tuple(sources), self.items["models"].place)

    def _source(self, item: Item, keys: Mapping[str, Item], layers: tuple[int, int] | None) -> Iterator[Source]:
        parameters = self._parameters(keys.get("parameters"), "parameters", own=True)
        if "model" not in keys:
            if isinstance(item.value, dict):
                self.problems.add(item.place, "'model' is missing")
        elif (model := self._model(keys["model"], "model")) is not None:
            yield Source(model, keys["model"].place, layers, parameters)

    def _slices(self) -> Iterator[Slice]:
        for item in self._list(self.items["slices"], "slices") if "slices" in self.items else []:
            keys = self._keys(item, "a slice", ("sources", "base_model", "residual_weight", "parameters"))
            if "residual_weight" in keys:
                self.notes[f"{keys['residual_weight'].place}: residual_weight changes nothing, as in mergekit"] = None
            if "base_model" in keys and keys["base_model"].value != self._given("base_model"):
                self.problems.add(
                    keys["base_model"].place,
                    "base_model: a base of one slice alone is not supported; give one of the file",
                )
            if "sources" not in keys:
                self.problems.add(item.place, "a slice: 'sources' is missing")
                continue
            parameters = self._parameters(keys.get("parameters"), "parameters", own=False)
            sources: list[Source] = []
            for inner in self._list(keys["sources"], "sources"):
                inside = self._keys(inner, "a source", ("model", "layer_range", "parameters"))
                sources += self._source(inner, inside, self._range(inner, inside.get("layer_range")))
            if len({source.layers[1] - source.layers[0] for source in sources if source.layers}) > 1:
                self.problems.add(keys["sources"].place, "all sources of a slice must have the same number of layers")
            yield Slice(tuple(sources), item.place, parameters)

    def _given(self, key: str) -> Any:
        return self.items[key].value if key in self.items else None

    def _range(self, source: Item, item: Item | None) -> tuple[int, int] | None:
        if item is None:
            if isinstance(source.value, dict):
                self.problems.add(source.place, "'layer_range' is missing, such as layer_range: [0, 8]")
            return None
        ends = item.plain()
        if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) is int for end in ends):
            self.problems.refuse(item, "'layer_range' must be [first, last + 1]")
        elif not 0 <= ends[0] < ends[1]:
            self.problems.add(item.place, f"layer_range {ends} holds no layer")
        else:
            return ends[0], ends[1]
        return None

    def _dtype(self) -> str:
        """The dtype of the result: ``out_dtype``, else ``dtype``, in which mergekit computes too."""
        names = {}
        for key in ("dtype", "out_dtype"):
            if (item := self.items.get(key)) is not None:
                name = str(item.value).removeprefix("torch.")
                if name not in STORED and not (key == "dtype" and name == "float64" and "out_dtype" in self.items):
                    self.problems.add(item.place, f"{key}: {item.kind} cannot be written; known: {', '.join(STORED)}")
                names[key] = name
        if names.get("dtype") in ("bfloat16", "float16"):
            text = f"dtype {names['dtype']}: computed in float32 or wider all the same"
            self.notes[text + ("" if "out_dtype" in names else f", written as {names['dtype']}")] = None
        return names.get("out_dtype") or names.get("dtype") or "same"

    def _tokenizer(self, base: str | None) -> tuple[str | None, Item | None]:
        """What the vocabulary of the result is: that of the base, of all, or of the model that the item names."""
        item = self.items.get("tokenizer_source")
        if "tokenizer" in self.items:
            if item is not None:
                self.problems.add(
                    self.items["tokenizer"].place, "tokenizer: tokenizer_source is given too; give one of them"
                )
            keys = self._keys(self.items["tokenizer"], "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
            for key, text in (
                ("tokens", "choosing the rows of single tokens is not supported"),
                (
                    "pad_to_multiple_of",
                    "padding the vocabulary is not supported; rows that stand for no token are kept",
                ),
            ):
                if key in keys:
                    self.problems.add(keys[key].place, f"tokenizer: {key}: {text}")
            item = keys.get("source", Item("union", self.items["tokenizer"].place))
        if item is None:
            return None, None
        if item.value == "union":
            return "union", None
        if item.value == "base":
            if base is None and "base_model" not in self.items:
                self.problems.add(item.place, "tokenizer_source: base: there is no base_model")
            return "base", None
        return "base", item if self._model(item, "tokenizer_source") is not None else None

    def _template(self) -> Item | None:
        item = self.items.get("chat_template")
        if item is not None and not isinstance(item.value, str):
            self.problems.refuse(item, "chat_template must be auto, a name, or a template of Jinja")
            return None
        return item
