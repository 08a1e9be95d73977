"""TIES: the toy of its paper, both published implementations, thresholds of a model and of a tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merges import assert_golden, golden, merge, method, model, one, zeros

from weightworks.errors import UsageError
from weightworks.testing.merging import merged


@pytest.mark.parametrize("form", ["paper", "mergekit"])
def test_toy(form: str) -> None:
    """Signs + and -, means of those that agree."""
    models = one((1.0, -3.0), (2.0, 1.0), (-1.0, -1.0))
    assert merge("ties", models, zeros(2), density=1.0, form=form)["w"].tolist() == [[1.5, -2.0]]


@pytest.mark.parametrize(("share", "run"), [(0.2, "topk20"), (0.5, "topk50")])
def test_authors_code(shared: Path, share: float, run: str) -> None:
    """Their trimmed elements, their signs, their disjoint mean; the whole model is trimmed, vectors too."""
    case = golden(shared, "ties_original")
    base = case.of("base")
    models = [case.of(f"ft{number}") for number in range(3)]
    found = merge("ties", models, base, density=share, vectors="sparse")
    flat = torch.cat([(found[name] - base[name]).flatten() for name in sorted(base)])
    expected = case.tensors[f"{run}_mass_dis-mean.merged_tv"]
    assert torch.allclose(flat, expected, rtol=1e-5, atol=2e-7)  # the base was added and taken away: half its ulp
    assert torch.equal(flat != 0, expected != 0)

    one_kept = [merge("ties", [each], base, density=share, vectors="sparse") for each in models]
    kept = torch.stack([torch.cat([(each[name] - base[name]).flatten() for name in sorted(base)]) for each in one_kept])
    mask = case.tensors[f"{run}.trim_mask"]
    assert torch.equal(kept != 0, mask.bool().view_as(kept))


@pytest.mark.parametrize("run", ["ties", "ties_nonorm_l12", "ties_equalw_d100"])
def test_form_of_mergekit(shared: Path, run: str) -> None:
    case = golden(shared, "mergekit")
    given = case.facts["runs"][run]["parameters"]
    weights = given["weight"]
    options = {"density": given["density"]} if "density" in given else {}
    found = merge(
        "ties",
        [case.of(f"ft{number}") for number in range(3)],
        case.of("base"),
        form="mergekit",
        weights=list(weights.values()) if isinstance(weights, dict) else [weights],
        normalize=given.get("normalize", True),
        scaling=given.get("lambda", 1.0),
        **options,
    )
    assert_golden(found, case.of(run), strays=1)


def test_one_threshold_for_the_model() -> None:
    """A matrix whose changes are all small loses them all; vectors are neither counted nor trimmed."""
    base = {"big": torch.zeros(4, 4), "small": torch.zeros(4, 4), "norm": torch.zeros(4)}
    tuned = {"big": torch.arange(1.0, 17.0).view(4, 4), "small": torch.full((4, 4), 0.5), "norm": torch.full((4,), 0.1)}
    found = merge("ties", [tuned], base, density=0.25)
    assert int((found["big"] != 0).sum()) == 9  # the authors' int(d K) + 1
    assert not found["small"].any()
    assert torch.equal(found["norm"], tuned["norm"])
    by_tensor = merge("ties", [tuned], base, density=0.25, scope="tensor")
    assert int((by_tensor["big"] != 0).sum()) == 4
    assert bool(by_tensor["small"].all())  # sixteen equal magnitudes: all reach the threshold
    assert not merge("ties", [tuned], base, density=0.25, vectors="sparse")["norm"].any()


def test_majority_decides_where_signs_cancel() -> None:
    """The first weight cancels to zero; its sign is that of most others."""
    models = one((1.0, -1.0, -1.0), (-1.0, -2.0, -3.0))
    assert merge("ties", models, zeros(3), density=1.0)["w"].tolist() == [[-1.0, -1.5, -2.0]]
    models = one((1.0, 1.0, 1.0), (-1.0, 2.0, 3.0))
    assert merge("ties", models, zeros(3), density=1.0)["w"].tolist() == [[1.0, 1.5, 2.0]]


def test_opposed_task_vectors_leave_the_base() -> None:
    """Every sum is zero, so there is no majority either."""
    base = {name: torch.zeros_like(value) for name, value in model(0).items()}
    tuned = model(1)
    found = merge("ties", [tuned, {name: -value for name, value in tuned.items()}], base)
    assert all(not value.any() for value in found.values())


def test_election_comes_before_or_after_weighting() -> None:
    models = one((3.0,), (-2.0,))
    paper = merge("ties", models, zeros(1), density=1.0, weights=[0.1, 0.9])
    weighted = merge("ties", models, zeros(1), density=1.0, weights=[0.1, 0.9], election="weighted")
    assert paper["w"].item() == pytest.approx(3.0)
    assert weighted["w"].item() == pytest.approx(-2.0)


def test_rows_change_nothing() -> None:
    base = model(0)
    models = [model(seed, like=base, scale=0.1) for seed in (1, 2, 3)]
    whole = merged(method("ties"), models, base)
    for rows in (1, 5):
        part = merged(method("ties"), models, base, rows=rows)
        assert all(torch.equal(part[name], whole[name]) for name in whole)


def test_form_gives_defaults_that_options_override() -> None:
    options = method("ties", form="mergekit", density=0.3).options
    assert (options.density, options.scope, options.election) == (0.3, "tensor", "weighted")
    assert method("ties").options.scope == "model"
    again = type(options)(**options.resolved())
    assert again == options


def test_bounds() -> None:
    for wrong in ({"density": 0.0}, {"density": 1.5}, {"weights": [1.0, -1.0]}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            method("ties", **wrong)
