"""Schemes of weights that are not all quantized alike: which weight is of which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from weightworks.store.packing import Scheme, told

EVERY = "Linear"  # the class that stands for all weights


@dataclass(frozen=True)
class MixedScheme:
    """Schemes, each with the ``targets`` it is meant for: names of layers, regular expressions after ``re:``, or the class of
    all linear layers.

    As compressed-tensors has it, a name goes before an expression and that before a class; of equals the first holds.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]

    @classmethod
    def of_weights(cls, schemes: Mapping[tuple[str, ...], Scheme]) -> MixedScheme:
        """The scheme of weights that are known by the names in each key."""
        groups: dict[Scheme, list[str]] = {}
        for names, scheme in schemes.items():
            groups.setdefault(scheme, []).extend(name for name in names if name not in groups.get(scheme, ()))
        return cls(tuple((tuple(names), scheme) for scheme, names in groups.items()))

    @cached_property
    def _names(self) -> dict[str, Scheme]:
        found: dict[str, Scheme] = {}
        for targets, scheme in self.groups:
            for target in targets:
                found.setdefault(target, scheme)
        return found

    def of(self, base: str) -> Scheme | None:
        """The scheme of a layer; None if none is meant for it."""
        if base in self._names:
            return self._names[base]
        patterns = (target for target in self._names if target.startswith("re:"))
        target = next((target for target in patterns if re.match(target[3:], base)), EVERY)
        return self._names.get(target)


def all_of(scheme: Scheme | MixedScheme) -> list[Scheme]:
    """The schemes that weights may have, a scheme once."""
    return list(dict.fromkeys(one for _, one in scheme.groups)) if isinstance(scheme, MixedScheme) else [scheme]


def elements(scheme: Scheme | MixedScheme) -> str:
    """What codes are, kind by kind, for people."""
    return ", ".join(dict.fromkeys(one.element for one in all_of(scheme)))


def scheme_for(scheme: Scheme | MixedScheme | None, base: str) -> Scheme | None:
    """The scheme of one weight."""
    return scheme.of(base) if isinstance(scheme, MixedScheme) else scheme


def in_words(scheme: Scheme | MixedScheme) -> str:
    """One scheme, or all of a mixture, for people."""
    return ("mixed precision: " if isinstance(scheme, MixedScheme) else "") + " | ".join(map(told, all_of(scheme)))
