"""The configuration of a smaller model, found by building it: nothing here knows what an architecture calls its sizes.

A configuration is right when the model that transformers builds from it has exactly the planned tensors. Candidates are
the entries whose value is the size that changes.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn

from weightworks.errors import ArchitectureError
from weightworks.stream.skeleton import Skeleton, Stored, build_for

MOST = 3  # entries that change together at most, where one size has several names
DEPTH = "num_hidden_layers"
NUMBERS = ("idx", "layer_id", "layer_number")  # what modules call the number of their block
NO_LISTS = ("token", "architectures")  # lists whose length or whole numbers have nothing to do with blocks


@dataclass(frozen=True)
class Configuration:
    """``raw`` is the content of config.json, ``known`` transformers' object of it as it was read; ``where`` names it."""

    raw: Mapping[str, Any]
    known: Any
    where: str
    trust_remote_code: bool = False

    @property
    def section(self) -> str | None:
        """The entry of ``raw`` that the language model's own configuration is under, None for the top."""
        text = self.known.get_text_config()
        found = (
            key for key, value in vars(self.known).items() if value is text and isinstance(self.raw.get(key), dict)
        )
        return None if text is self.known else next(found, None)

    @property
    def entries(self) -> dict[str, Any]:
        """All entries of the language model's configuration, defaults included, under the names that files have."""
        entries: dict[str, Any] = self.known.get_text_config().to_dict()
        return entries

    def called(self, name: str) -> str:
        """The name that transformers writes for the common ``name`` of an entry."""
        return self._names.get(name, name)

    def _aliases(self, key: str) -> list[str]:
        """Other names of an entry that files may have."""
        return [alias for alias, name in self._names.items() if name == key]

    @property
    def _names(self) -> Mapping[str, str]:
        names: Mapping[str, str] = getattr(self.known.get_text_config(), "attribute_map", {})
        return names

    def changed(self, values: Mapping[str, Any]) -> Configuration:
        """With other ``values`` of some entries; raises :class:`ArchitectureError` where transformers takes them not."""
        raw, section = copy.deepcopy(dict(self.raw)), self.section
        part = raw if section is None else raw[section]
        for key, value in values.items():  # under the names the file has: two that differ would contradict each other
            own = [name for name in (key, *self._aliases(key)) if name in part]
            part.update(dict.fromkeys(own or [key], value))
        try:
            with tempfile.TemporaryDirectory(prefix="weightworks-") as folder:  # read as it will be: from a file
                (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
                known = type(self.known).from_pretrained(folder)
        except Exception as error:  # whatever the configuration's own checks raise, it is no configuration
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            raise ArchitectureError(f"{self.where}: {reason}") from error
        return replace(self, raw=raw, known=known)

    def build(self, stored: Stored) -> Skeleton:
        """The model of this configuration, whose tensors must be the ``stored`` ones."""
        known = copy.deepcopy(self.known)  # building sets entries
        return build_for(known, stored, self.where, trust_remote_code=self.trust_remote_code)


def resized(base: Configuration, old: int, new: int, wanted: Stored) -> Configuration:
    """``base`` with the entries of value ``old`` set to ``new`` with which the model has the tensors ``wanted``.

    Raises :class:`ArchitectureError` if there are none: such a model has no configuration.
    """
    tried: dict[str, str] = {}
    for values in _candidates(base.entries, old, new):
        try:
            found = base.changed(values)
            found.build(wanted)
        except ArchitectureError as error:
            tried[", ".join(values)] = str(error).partition(": ")[2]
        else:
            return found
    named = [f"{names}: {reason[:160]}" for names, reason in tried.items() if base.entries.get(names) == old]
    why = f"no entry of that value makes such a model ({'; '.join(named[:3])})" if named else "no entry has that value"
    raise ArchitectureError(f"{base.where}: {type(base.known).__name__} cannot express {new} in place of {old}: {why}")


def _candidates(entries: Mapping[str, Any], old: int, new: int) -> Iterator[dict[str, Any]]:
    """Changes worth trying: each entry of value ``old``, several together, then entries without a value (a default)."""
    plain = [key for key, value in entries.items() if type(value) is int and value == old]
    lists = [
        key for key, value in entries.items() if isinstance(value, list) and value and all(one == old for one in value)
    ]
    names = [*plain, *lists]
    for count in range(1, min(MOST, len(names)) + 1):
        for chosen in combinations(names, count):
            yield {key: [new] * len(entries[key]) if key in lists else new for key in chosen}
    yield from ({key: new} for key, value in entries.items() if value is None and "token" not in key)


def with_heads(base: Configuration, heads: int, groups: int, size: int) -> Configuration:
    """``base`` with other numbers of query heads and of key and value heads; the ``size`` of a head is said outright."""
    entries = base.entries
    values = {base.called("num_attention_heads"): heads, "head_dim": size}
    if entries.get(name := base.called("num_key_value_heads")) is not None:
        values[name] = groups
    return base.changed(values)


def with_blocks(base: Configuration, kept: Sequence[int], *, every: bool) -> Configuration:
    """``base`` with only the blocks ``kept``, in this order: lists of layers follow, and those with an entry a layer.

    Such lists have ``layer`` in their names; ``every`` takes any list as long as there are blocks for one.
    """
    entries = base.entries
    count = int(entries[base.called(DEPTH)])
    places = {block: place for place, block in enumerate(kept)}
    values: dict[str, Any] = {base.called(DEPTH): len(kept)}
    for key, value in entries.items():
        if not isinstance(value, list) or not value or any(word in key for word in NO_LISTS):
            continue
        if len(value) == count and (every or "layer" in key):
            values[key] = [value[block] for block in kept]
        elif "layer" in key and all(type(one) is int and 0 <= one < count for one in value):
            values[key] = sorted(places[one] for one in value if one in places)
    return base.changed(values)


def fingerprint(skeleton: Skeleton, index: int) -> dict[str, Any]:
    """What a block is apart from its weights and its number: modules, shapes of tensors, and single values."""
    prefix, block = skeleton.blocks[index]
    found: dict[str, Any] = {
        name.removeprefix(prefix): tuple(skeleton.get(name).shape) for name in skeleton.names_of(index)
    }
    for name, module in block.named_modules():
        found[f"{name}()"] = type(module).__qualname__, _values(module, index)
    return found


def _values(module: nn.Module, index: int) -> dict[str, Any]:
    """The single values a module was made with, but for its block's number."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not (value == index and any(word in key for word in NUMBERS))
    }
