"""How a method stands for those that mergekit registers: what its configurations call it and its options.

A method module that can do what methods of mergekit do says so itself, as ``MERGEKIT``: what it does by mergekit's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weightworks.stage import catalog
from weightworks.stage.catalog import Entry

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Mergekit:
    """A method of mergekit's by options of ours.

    ``shared`` are its parameters of a tensor, ``each`` those of every model, by the option of ours that they are; None:
    whatever it is, the result is the same here. ``values`` are mergekit's values that have another name here, and all that are
    supported; where two parameters together make an option, ``convert`` takes mergekit's values and gives ours.
    ``needed`` have no default. ``options`` are ours where mergekit's defaults are others. ``base`` is what becomes of
    ``base_model``: task vectors are "required" or "optional"ly taken from it, or it is the "first" of the models, or a
    "model" as any other. ``differs`` is what a user should know, in words.
    """

    shared: Mapping[str, str | None] = field(default_factory=dict)
    each: Mapping[str, str | None] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    convert: Callable[[Values], Values] | None = None
    needed: tuple[str, ...] = ()
    options: Values = field(default_factory=dict)
    base: Literal["required", "optional", "first", "model"] = "required"
    differs: str = ""


def known() -> dict[str, tuple[Entry, Mergekit]]:
    """The methods of mergekit that methods here stand for, by mergekit's name."""
    return {
        name: (entry, form)
        for entry in catalog.methods("merge").values()
        for name, form in sorted(getattr(entry.load(), "MERGEKIT", {}).items())
    }
