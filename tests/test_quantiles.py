"""Order statistics from two histograms, against a sort: merge/_quantiles.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from merge import _quantiles
from weightworks.stage.merging import MergeOptions, Slab
from weightworks.testing.merging import merged

GENERATOR = torch.Generator().manual_seed(0)


def gaussian(count: int, scale: float = 1e-3) -> torch.Tensor:
    return torch.randn(count, generator=GENERATOR) * scale


HARD = torch.tensor(
    [0.0, 1e-45, -1e-45, 1e-38, -3e-39, 3.4e38, -3.4e38, 1.0, -1.0, 1.0000001, float("inf"), -float("inf")]
)
CASES = {
    "gaussian": gaussian(20_000),
    "many equal": (gaussian(20_000) * 4000).round() / 4000,
    "differences of bfloat16": (0.02 + gaussian(20_000)).bfloat16().float() - 0.02,
    "all equal": torch.full((500,), -0.25),
    "one": torch.tensor([-3.0]),
    "extremes": HARD,
    "wide": gaussian(5_000) * torch.logspace(-30, 30, 5_000),
}


def found_in(numbers: torch.Tensor, ranks: list[int], *, signed: bool, parts: int = 1) -> dict[str, list[Any]]:
    pieces = numbers.tensor_split(parts)
    places = _quantiles.places(sum(_quantiles.histogram(piece, signed=signed) for piece in pieces), ranks)
    counts = sum(_quantiles.detail(piece, places["buckets"], signed=signed) for piece in pieces)
    return _quantiles.values(counts, places, signed=signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_a_sort(case: str, signed: bool) -> None:
    numbers = CASES[case]
    order = (numbers if signed else numbers.abs()).sort().values
    total = len(order)
    ranks = sorted({0, total // 100, total // 2, int(0.8 * total), total - 1})
    found = found_in(numbers, ranks, signed=signed, parts=min(3, total))
    assert torch.equal(torch.tensor(found["values"]), order[ranks])
    assert found["above"] == [int((order >= order[rank]).sum()) for rank in ranks]


class Thresholds:
    """What the surveys find, as any method would use them: two after each other."""

    BASE, LEAST, MOST = "refused", 1, None

    def __init__(self, scope: Any) -> None:
        self.options, self.scope, self.seen = MergeOptions(), scope, []

    def surveys(self) -> list[Any]:
        def both(slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
            for number, model in enumerate(slab.models):
                yield f"model {number}", model
            if slab.matrix:
                yield "matrices", slab.models[0]

        def above(slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
            yield "again", slab.models[1] - found["model 1"]["values"][0]

        return [
            *_quantiles.surveys(both, lambda name, total: [0, total // 3, total - 1], scope=self.scope),
            *_quantiles.surveys(above, lambda name, total: [total // 2], signed=True, scope=self.scope),
        ]

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        self.seen.append(found)
        return slab.models[0]


MODELS = [{"w": gaussian(600).view(30, 20), "b": gaussian(50), "s": torch.tensor(2.0)} for _ in range(2)]


@pytest.mark.parametrize("rows", [None, 1, 7])
def test_as_surveys_of_a_model(rows: int | None) -> None:
    method = Thresholds("model")
    merged(method, MODELS, rows=rows)
    found = method.seen[0]
    assert all(seen == found for seen in method.seen)
    for number, model in enumerate(MODELS):
        order = torch.cat([tensor.flatten() for tensor in model.values()]).abs().sort().values
        assert found[f"model {number}"]["values"] == [order[0].item(), order[len(order) // 3].item(), 2.0]
        assert found[f"model {number}"]["above"][-1] == 1
    order = MODELS[0]["w"].flatten().abs().sort().values
    assert found["matrices"]["values"] == order[[0, 200, 599]].tolist()
    flat = torch.cat([tensor.flatten() for tensor in MODELS[1].values()])
    assert found["again"]["values"] == [(flat - flat.abs().sort().values[0]).sort().values[len(flat) // 2].item()]


@pytest.mark.parametrize("rows", [None, 7])
def test_as_surveys_of_a_tensor(rows: int | None) -> None:
    method = Thresholds("tensor")
    merged(method, MODELS, rows=rows)
    by_tensor = [method.seen[0], method.seen[-1 if rows is None else -5]]
    assert by_tensor[0]["model 0"]["values"] == MODELS[0]["b"].abs().sort().values[[0, 16, 49]].tolist()
    assert "matrices" not in by_tensor[0]
    assert by_tensor[1]["matrices"]["values"] == MODELS[0]["w"].flatten().abs().sort().values[[0, 200, 599]].tolist()


def test_a_rank_beyond_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="ranks"):
        _quantiles.places(_quantiles.histogram(torch.ones(3)), [3])
