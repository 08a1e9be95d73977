"""Fisher merging: its limits, scales and floors, and what it does with tensors that have no statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merges import method, model

from weightworks.testing.merging import merged

pytestmark = pytest.mark.usefixtures("one_thread")
Tensors = dict[str, torch.Tensor]
PLAIN = {"normalize": False, "floor": 1e-9}


def fisher(seed: int, *, scale: float = 1.0) -> dict[str, Tensors]:
    drawn = model(seed)
    return {name: {"fisher": scale * value.square()} for name, value in drawn.items()}


def result(models: list[Tensors], statistics: list[dict[str, Tensors]], **options: Any) -> Tensors:
    return merged(method("fisher", **options), models, side=statistics)


def mean(models: list[Tensors], name: str) -> torch.Tensor:
    return torch.stack([each[name] for each in models]).mean(0)


def test_it_is_the_average_weighted_by_fisher_information() -> None:
    models, statistics = [model(1), model(2), model(3)], [fisher(4), fisher(5), fisher(6)]
    found = result(models, statistics, **PLAIN)
    for name in models[0]:
        shares = torch.stack([one[name]["fisher"] for one in statistics]).double()
        stacked = torch.stack([one[name] for one in models]).double()
        expected = (shares * stacked).sum(0) / shares.sum(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_information_gives_the_mean(normalize: bool) -> None:
    models = [model(1), model(2)]
    found = result(models, [fisher(4), fisher(4)], normalize=normalize)
    for name in models[0]:
        torch.testing.assert_close(found[name], mean(models, name))


def test_all_information_in_one_model_gives_that_model() -> None:
    models = [model(1), model(2)]
    found = result(models, [fisher(4, scale=1e12), fisher(5)], **PLAIN)
    for name in models[0]:
        torch.testing.assert_close(found[name], models[0][name], rtol=1e-3, atol=1e-3)


def test_normalized_information_has_no_scale() -> None:
    """A model that is surer of everything counts no more; without normalization it does."""
    models = [model(1), model(2)]
    plain = result(models, [fisher(4), fisher(5)])
    scaled = result(models, [fisher(4, scale=1000.0), fisher(5)])
    unscaled = result(models, [fisher(4, scale=1000.0), fisher(5)], normalize=False)
    for name in models[0]:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unscaled["blk.up.weight"], plain["blk.up.weight"], atol=0.1)


def test_the_floor_leads_to_the_mean() -> None:
    models = [model(1), model(2)]
    found = result(models, [fisher(4), fisher(5)], floor=1e6)
    for name in models[0]:
        torch.testing.assert_close(found[name], mean(models, name), rtol=1e-4, atol=1e-4)
    for statistics in ([fisher(4, scale=0.0)] * 2, [{}, {}]):  # nobody cares; nothing is known
        plain = result(models, statistics)
        assert all(torch.allclose(plain[name], mean(models, name)) for name in models[0])


def test_a_tensor_without_statistics_is_averaged_beside_others() -> None:
    models, statistics = [model(1), model(2)], [fisher(4), fisher(5)]
    for one in statistics:
        del one["embed.weight"]
    found = result(models, statistics, weights=[3.0, 1.0])
    expected = 0.75 * models[0]["embed.weight"] + 0.25 * models[1]["embed.weight"]
    torch.testing.assert_close(found["embed.weight"], expected)


def test_equal_models_stay_as_they_are_and_rows_do_not_matter() -> None:
    alone = model(1)
    assert all(
        torch.equal(value, alone[name]) for name, value in result([alone, alone], [fisher(4), fisher(5)]).items()
    )
    models, statistics = [model(1), model(2)], [fisher(4), fisher(5)]
    whole = result(models, statistics)
    parts = merged(method("fisher"), models, side=statistics, rows=3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)
