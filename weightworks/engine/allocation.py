"""One choice for every unit, so that costs add up to least while sizes stay within a bound: exact dynamic programming.

Over units in their order, states are kept that no other beats in both size and cost; sizes are whole bytes, nothing is
rounded. Ties: of equal costs the smaller size, of these the choice that stands first, units compared from the first on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """A choice a unit, by number, with the sum of their sizes in bytes and of their costs."""

    choices: tuple[int, ...]
    size: int
    cost: float


@dataclass(frozen=True)
class _Front:
    """States by rising size and falling cost; ``parent`` is the front and the state each came from, ``choice`` the last one."""

    size: np.ndarray
    cost: np.ndarray
    choice: np.ndarray
    parent: np.ndarray  # [states, 2]


def front(
    sizes: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
    pairs: Sequence[np.ndarray] | None = None,
    limit: int | None = None,
) -> list[Plan]:
    """All plans that no other beats, by rising size; none is larger than ``limit``.

    ``sizes`` and ``costs`` are by unit and choice; ``pairs[u]`` [choices of u, choices of u + 1] is what choices of neighbours
    cost together beyond that.
    """
    least = np.cumsum([min(one) for one in sizes][::-1])[::-1]  # of a unit and all that follow
    room = [(np.inf if limit is None else limit) - rest for rest in [*least[1:].tolist(), 0]]
    layers: list[list[_Front]] = [
        [_Front(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros((1, 2), np.int64))]
    ]
    for unit, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        groups = [[choice] for choice in range(len(size))] if pairs is not None else [list(range(len(size)))]
        beyond = None if pairs is None or unit == 0 else pairs[unit - 1]
        layers.append([_extend(layers[-1], size, cost, group, beyond, room[unit]) for group in groups])
    last = _pruned([_tagged(one, number) for number, one in enumerate(layers[-1])])
    return [_plan(layers, last, row) for row in range(len(last.size))]


def _extend(
    before: Sequence[_Front],
    size: Sequence[int],
    cost: Sequence[float],
    choices: Sequence[int],
    beyond: np.ndarray | None,
    room: float,
) -> _Front:
    """States of the next unit that end in one of ``choices``."""
    found = []
    for number, states in enumerate(before):
        for choice in choices:
            grown = states.size + size[choice]
            fits = np.flatnonzero(grown <= room)
            more = cost[choice] + (0.0 if beyond is None else float(beyond[number, choice]))
            parent = np.stack([np.full(len(fits), number), fits], 1)
            found.append(_Front(grown[fits], states.cost[fits] + more, np.full(len(fits), choice), parent))
    return _pruned(found)


def _pruned(parts: Sequence[_Front]) -> _Front:
    """All states of ``parts`` that no other beats; of equal ones the first."""
    size, cost, choice = (np.concatenate([getattr(one, key) for one in parts]) for key in ("size", "cost", "choice"))
    parent = np.concatenate([one.parent for one in parts])
    order = np.lexsort((np.arange(len(size)), cost, size))
    cheapest = np.minimum.accumulate(cost[order])
    kept = order[np.r_[True, cost[order][1:] < cheapest[:-1]][: len(order)]]
    return _Front(size[kept], cost[kept], choice[kept], parent[kept])


def _tagged(states: _Front, number: int) -> _Front:
    """The same states, each its own parent."""
    parent = np.stack([np.full(len(states.size), number), np.arange(len(states.size))], 1)
    return _Front(states.size, states.cost, states.choice, parent)


def _plan(layers: Sequence[Sequence[_Front]], last: _Front, row: int) -> Plan:
    choices = []
    number, state = last.parent[row]
    for layer in reversed(layers[1:]):
        choices.append(int(layer[number].choice[state]))
        number, state = layer[number].parent[state]
    return Plan(tuple(reversed(choices)), int(last.size[row]), float(last.cost[row]))
