"""Models of different vocabularies seen as of one: rows of embeddings and heads matched by their tokens' strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from weightworks.store.tensorfile import TensorSpec
from weightworks.store.tokenizerfile import Vocabulary

EXAMPLES = 5
Mode = Literal["base", "union"]
Fill = Callable[[str, torch.Tensor], torch.Tensor]


class Reader(Protocol):
    """Where tensors come from: a checkpoint, or a view of one."""

    @property
    def specs(self) -> list[TensorSpec]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Member:
    """A model whose rows are to be matched: ``rows`` is how many its embedding has, ``tensors`` are those with such an axis."""

    name: str
    reader: Reader
    vocabulary: Vocabulary
    rows: int
    tensors: frozenset[str]

    def row(self, token: str) -> int:
        """The row of a token, -1 where it has none: a tokenizer may know more than the embedding."""
        number = self.vocabulary.ids.get(token, -1)
        return number if number < self.rows else -1


@dataclass(frozen=True)
class Alignment:
    """The vocabulary of the output: ``rows`` of them, ``places[i]`` int64 [rows] the row of member i or -1.

    ``new`` are the tokens that the first member's tokenizer lacks, with their ids; ``sources`` whose they are.
    """

    mode: Mode
    members: Sequence[Member]
    rows: int
    places: Sequence[torch.Tensor]
    new: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, Vocabulary] = field(default_factory=dict)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """How the vocabularies differ, and what comes of it, as JSON-compatible data."""
        first, *others = self.members
        return {
            "mode": self.mode,
            "rows": self.rows,
            "reference": {"model": first.name, "tokens": len(first.vocabulary.ids), "rows": first.rows},
            "models": [_difference(first, other) for other in others],
            "added": len(self.new),
        }

    @property
    def lines(self) -> list[str]:
        """The same in words, a line a model that differs."""
        found = []
        for one in self.facts["models"]:
            fate = "added" if self.mode == "union" else "left out"
            texts = [f"{one['moved']} tokens have another id"] if one["moved"] else []
            texts += [f"{one['extra']} tokens of its own are {fate} ({_shown(one['extras'])})"] if one["extra"] else []
            texts += [f"{one['lacking']} are missing ({_shown(one['lacked'])})"] if one["lacking"] else []
            if one["rows"] != self.facts["reference"]["rows"]:
                texts.append(f"it has {one['rows']} rows, not {self.facts['reference']['rows']}")
            if texts:
                found.append(f"vocabulary of {one['model']}: {'; '.join(texts)}")
        return found


def _shown(examples: Sequence[str]) -> str:
    return ", ".join(map(repr, examples)) + (", ..." if len(examples) == EXAMPLES else "")


def _difference(first: Member, other: Member) -> dict[str, Any]:
    mine = {token for token in first.vocabulary.ids if first.row(token) >= 0}
    theirs = {token for token in other.vocabulary.ids if other.row(token) >= 0}
    extra, lacked = (sorted(one - two) for one, two in ((theirs, mine), (mine, theirs)))
    moved = sum(first.vocabulary.ids[token] != other.vocabulary.ids[token] for token in mine & theirs)
    return {
        "model": other.name,
        "tokens": len(other.vocabulary.ids),
        "rows": other.rows,
        "moved": moved,
        "extra": len(extra),
        "extras": extra[:EXAMPLES],
        "lacking": len(lacked),
        "lacked": lacked[:EXAMPLES],
    }


def align(members: Sequence[Member], mode: Mode) -> Alignment:
    """Match the rows of ``members``; the output has the vocabulary of the first, with ``union`` all others' tokens too.

    New tokens take the ids after the first tokenizer's last, so padding rows first. Rows that stand for no token keep their
    place, and are matched with those of other members that stand for none there either.
    """
    first = members[0]
    new: dict[str, int] = {}
    sources: dict[str, Vocabulary] = {}
    if mode == "union":
        for member in members[1:]:
            for number, token in sorted(member.vocabulary.by_id.items()):
                if token not in first.vocabulary.ids and token not in new and number < member.rows:
                    new[token] = first.vocabulary.length + len(new)
                    sources[token] = member.vocabulary
    rows = max(first.rows, first.vocabulary.length + len(new) if new else 0)
    tokens = {**{number: token for token, number in new.items()}, **first.vocabulary.by_id}
    return Alignment(mode, members, rows, [_places(member, tokens, rows) for member in members], new, sources)


def _places(member: Member, tokens: Mapping[int, str], rows: int) -> torch.Tensor:
    taken = member.vocabulary.by_id
    found = [
        member.row(token)
        if (token := tokens.get(row)) is not None
        else row
        if row < member.rows and row not in taken
        else -1
        for row in range(rows)
    ]
    return torch.tensor(found, dtype=torch.int64)


class AlignedView:
    """A member with the output's rows. What it lacks is given by ``fill(name, rows)``, float32 [rows, ...]."""

    def __init__(self, member: Member, places: torch.Tensor, fill: Fill) -> None:
        self.member, self.places, self.fill = member, places, fill

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """All tensors, those with a vocabulary axis of the output's length."""
        rows = len(self.places)
        return [
            TensorSpec(spec.name, (rows, *spec.shape[1:]), spec.dtype) if spec.name in self.member.tensors else spec
            for spec in self.member.reader.specs
        ]

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {spec.name: spec.dtype for spec in self.member.reader.specs}

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self.member.tensors:
            return self.member.reader.read(name, dtype)
        return self.read_rows(name, 0, len(self.places), dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of the output's vocabulary."""
        if name not in self.member.tensors:
            return self.member.reader.read_rows(name, start, stop, dtype)
        dtype = dtype or self._dtypes[name]
        places = self.places[start:stop]
        there = places >= 0
        known = self.own(name, places[there], dtype)
        if bool(there.all()):
            return known
        result = torch.empty((len(places), *known.shape[1:]), dtype=dtype)
        result[there] = known
        result[~there] = self.fill(name, torch.arange(start, stop)[~there]).to(dtype)
        return result

    def own(self, name: str, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The member's own rows ``places``, read in runs of neighbours."""
        reader = self.member.reader
        runs = [reader.read_rows(name, start, stop, dtype) for start, stop in _runs(places)]
        return torch.cat(runs) if runs else reader.read_rows(name, 0, 0, dtype)


def _runs(places: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Stretches of consecutive numbers, as (first, last + 1)."""
    if not len(places):
        return
    breaks = (places.diff() != 1).nonzero().flatten().tolist()
    for first, last in zip([0, *(k + 1 for k in breaks)], [*breaks, len(places) - 1], strict=True):
        yield int(places[first]), int(places[last]) + 1


def views(alignment: Alignment, *, has_base: bool, weights: Sequence[float]) -> list[AlignedView]:
    """A view of every member, the first one the base if ``has_base``; ``weights`` are those of the other members, or of all.

    A row that a model lacks is the base's, so that its difference from the base is zero; without a base it is the weighted mean
    of those that have it, so that an average is that of these alone. A row that the base lacks is that mean too.
    """
    made: list[AlignedView] = []
    models = range(1, len(alignment.members)) if has_base else range(len(alignment.members))

    def mean(name: str, rows: torch.Tensor) -> torch.Tensor:
        total, weight = None, torch.zeros(len(rows))
        for number, share in zip(models, weights, strict=True):
            if name not in made[number].member.tensors:
                continue
            places = alignment.places[number][rows]
            there = places >= 0
            own = made[number].own(name, places[there], torch.float32)
            total = torch.zeros(len(rows), *own.shape[1:]) if total is None else total
            total[there] += share * own
            weight[there] += share
        assert total is not None, "somebody has the tensor"
        divisor = torch.where(weight == 0, torch.ones_like(weight), weight)
        return total / divisor.reshape(-1, *[1] * (total.dim() - 1))

    def base(name: str, rows: torch.Tensor) -> torch.Tensor:
        if name not in made[0].member.tensors:
            return mean(name, rows)
        places = alignment.places[0][rows]
        there = places >= 0
        own = made[0].own(name, places[there], torch.float32)
        if bool(there.all()):
            return own
        result = torch.empty(len(rows), *own.shape[1:])
        result[there], result[~there] = own, mean(name, rows[~there])
        return result

    for number, (member, places) in enumerate(zip(alignment.members, alignment.places, strict=True)):
        made.append(AlignedView(member, places, base if has_base and number else mean))
    return made
