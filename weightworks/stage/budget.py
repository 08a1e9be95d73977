"""The shape of a budget: what quantized weights may take or cost, and the schemes to choose from, weight by weight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from weightworks.stage.settings import parse_size

if TYPE_CHECKING:  # recipes are checked without torch
    from weightworks.store.packing import Scheme

BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:bpw|bits?)\s*", re.IGNORECASE)
SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Budget:
    """What schemes are chosen by, and from.

    One of three: ``bits`` a quantized weight, scales and all else that is stored for it included; ``nbytes`` of all weight files;
    ``increase``, the share by which perplexity may rise. ``neighbours`` says that what errors in neighbouring layers do together
    is measured too.
    """

    choices: tuple[Scheme, ...]
    bits: float | None = None
    nbytes: int | None = None
    increase: float | None = None
    neighbours: bool = False


class Budgeted(Protocol):
    """What a quantizer has that can give every weight a scheme of its own: it takes ``Target.scheme``."""

    def budget(self) -> Budget | None:
        """What schemes are chosen by; None if all weights have the method's."""


def budget_of(method: Any) -> Budget | None:
    """What the schemes of a method's weights are chosen by; None if they have all one."""
    found: Budget | None = method.budget() if hasattr(method, "budget") else None
    return found


def parse_bits(text: str) -> float | None:
    """Bits a weight of ``3.5bpw``; None if it is not that."""
    found = BITS.fullmatch(text)
    return float(found.group(1)) if found else None


def parse_budget(text: str) -> tuple[float | None, int | None]:
    """Bits a weight, or bytes. Raises :class:`ValueError` for neither; a number alone could mean both."""
    if (bits := parse_bits(text)) is not None:
        return bits, None
    if not re.fullmatch(r"[\s\d.]*", text) and (size := parse_size(text)) is not None:
        return None, size
    raise ValueError("must be bits a weight such as 3.5bpw, or the size of the weight files such as 2.5GB or 800MiB")


def parse_increase(text: str) -> float:
    """The share that ``2%`` is. Raises :class:`ValueError` for what is none, or nothing."""
    found = SHARE.fullmatch(text)
    if found is None or float(found.group(1)) <= 0:
        raise ValueError("must be a share above nothing such as 2%")
    return float(found.group(1)) / 100
