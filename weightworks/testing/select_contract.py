"""The contract of methods that choose rows, on made-up rows of three kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from weightworks.stage.selecting import CHOSEN, Choice, Pool
from weightworks.testing.contract import simplest
from weightworks.testing.trial import Trial, demand, told

KINDS = ("sum of two numbers", "song of the sea", "law about trade")
ROWS, WIDTH, BUDGET = 60, 12, 15


class _Rows:
    """Embeddings in memory."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.shape = rows, (rows.shape[0], rows.shape[1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.rows[start:stop]


def made_up() -> Pool:
    """Rows of three kinds, each around a place of its own; the last kind has suffered most."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(ROWS) % len(KINDS)
    centres = 6 * torch.randn(len(KINDS), WIDTH, generator=generator)
    points = centres[kinds] + torch.randn(ROWS, WIDTH, generator=generator)
    texts = [f"{KINDS[kind]} number{row}" for row, kind in enumerate(kinds.tolist())]
    tokens = torch.randint(4, 40, (ROWS, 2), generator=generator)
    suffered = 0.01 + 0.1 * kinds.double() + 0.01 * torch.rand(ROWS, generator=generator).double()
    return Pool(texts, tokens, 0, _Rows(points), suffered)


def _choice(trial: Trial, pool: Pool, count: int = BUDGET) -> Choice:
    method = trial.module.Method(simplest(trial.module.Options))
    if not method.measures:
        pool = replace(pool, embeddings=None, degradation=None)
    with told(f"{trial.label}: Method.select fails"):
        found: Choice = method.select(pool, count, lambda line: None)
    return found


def keeps_to_the_budget(trial: Trial, folder: Path) -> None:
    """It chooses so many rows as it is told, each once, and says what became of every row."""
    for count in (1, BUDGET, 2 * ROWS):
        choice = _choice(trial, made_up(), count)
        order = choice.order
        demand(len(set(order)) == len(order), f"{trial.label}: a row is chosen twice")
        wanted = min(count, ROWS)
        fell_short = len(order) < wanted and bool(choice.shortfalls)
        demand(
            len(order) == wanted or fell_short,
            f"{trial.label}: {len(order)} rows chosen of {count}, and nothing said of it",
        )
        demand(len(choice.outcomes) == ROWS, f"{trial.label}: {len(choice.outcomes)} outcomes of {ROWS} rows")
        said = {row for row, outcome in enumerate(choice.outcomes) if outcome == CHOSEN}
        demand(said == set(order), f"{trial.label}: outcomes say '{CHOSEN}' of other rows than are chosen")
        uneven = [name for name, column in choice.scores.items() if len(column) != ROWS]
        demand(not uneven, f"{trial.label}: scores without a value for every row: {', '.join(uneven)}")


def same_seed_same_choice(trial: Trial, folder: Path) -> None:
    """The same rows and seed give the same choice and figures."""
    first, second = (_told(_choice(trial, made_up())) for _ in range(2))
    demand(first == second, f"{trial.label}: two runs on the same rows choose differently")


def _told(choice: Choice) -> Any:
    return choice.order, choice.outcomes, {name: list(column) for name, column in choice.scores.items()}, choice.facts


SELECT = (keeps_to_the_budget, same_seed_same_choice)
