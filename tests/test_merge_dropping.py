"""DARE, DELLA and Breadcrumbs: mergekit's output given the masks it drew, and what the papers promise on average."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from merges import assert_golden, golden, method, model, one, zeros
from merges import merge as merge_

import merge.breadcrumbs
import merge.dare
import merge.della
from weightworks.errors import UsageError
from weightworks.stage.merging import Slab

METHODS = (merge.breadcrumbs, merge.dare, merge.della)


def test_they_are_on_the_shelf() -> None:
    for module in METHODS:
        assert isinstance(method(module.__name__.removeprefix("merge.")), module.Method)


@pytest.mark.parametrize("start", [0, 3, 40])
def test_random_numbers_are_those_of_philox_at_their_places(start: int) -> None:
    """Whichever rows are asked for."""
    slab = Slab("w", (64, 5), start, (torch.zeros(6, 5),), None, ("model",), 7)
    key = hashlib.sha256(b"7\0w\0model").digest()[:16]
    raw = numpy.random.Philox(key=int.from_bytes(key, "little"), counter=0).random_raw(160).view(numpy.uint32)
    expected = (raw >> 8).astype(numpy.float32) * numpy.float32(2.0**-24)
    assert numpy.array_equal(slab.uniform(0).flatten().numpy(), expected[5 * start : 5 * start + 30])


@pytest.mark.parametrize(
    ("run", "name", "options"),
    [
        ("dare_linear", "dare", {"election": "none"}),
        ("dare_ties", "dare", {"election": "weighted"}),
        ("della", "della", {}),
        ("della_linear", "della", {"election": "none", "normalize": False}),
        ("breadcrumbs", "breadcrumbs", {}),
        ("breadcrumbs_ties", "breadcrumbs", {"election": "weighted"}),
    ],
)
def test_form_of_mergekit(
    shared: Path, monkeypatch: pytest.MonkeyPatch, run: str, name: str, options: dict[str, Any]
) -> None:
    """Its masks stand for the random numbers."""
    case = golden(shared, "mergekit")
    given = case.facts["runs"][run]["parameters"]
    if name != "breadcrumbs":
        masks = case.masks(run, 3)

        def drawn(slab: Slab, number: int) -> torch.Tensor:
            kept = masks[number][slab.name].reshape(slab.shape)[slab.start : slab.start + len(slab.models[0])]
            return torch.where(kept.bool(), 0.0, 1.0)

        monkeypatch.setattr(Slab, "uniform", drawn)
    known = {key: given[key] for key in ("density", "epsilon", "gamma") if key in given}
    found = merge_(
        name,
        [case.of(f"ft{number}") for number in range(3)],
        case.of("base"),
        form="mergekit",
        weights=list(given["weight"].values()),
        **{**known, **options},
    )
    assert_golden(found, case.of(run), strays=1)


def test_probabilities_of_mergekit(shared: Path) -> None:
    case = golden(shared, "mergekit")
    given = case.facts["runs"]["della"]["parameters"]
    base, tuned = case.of("base"), case.of("ft0")
    for name, value in base.items():
        expected = case.tensors.get(f"della.keep_prob.ft0.{name}")
        if expected is not None:
            found = merge.della.probabilities(tuned[name] - value, given["density"], given["epsilon"])
            assert torch.allclose(found, expected.reshape(found.shape), atol=1e-6), name


def test_density_one_is_task_arithmetic() -> None:
    base = model(0)
    models = [model(seed, like=base) for seed in (1, 2)]
    found = merge_("dare", models, base, density=1.0, normalize=False)
    expected = merge_("task_arithmetic", models, base, scaling=1.0)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in base)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_nothing_changes_on_average(name: str) -> None:
    """Survivors are as many as the density says, and make up for the others: the mean over seeds is the task vector."""
    from weightworks.testing.merging import merged

    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(8, 512)}
    task = {"w": torch.randn(8, 512, generator=generator)}
    draws = torch.stack(
        [merged(method(name, density=0.7, scaling=1.0), [task], base, seed=seed)["w"] for seed in range(200)]
    )
    kept = float((draws != 0).float().mean())
    assert kept == pytest.approx(0.7, abs=0.005)
    slope = float((draws.mean(0) * task["w"]).sum() / task["w"].square().sum())
    assert slope == pytest.approx(1, abs=0.01)


def test_della_keeps_large_changes_more_often() -> None:
    from weightworks.testing.merging import merged

    task, base = one(tuple(float(k + 1) for k in range(100))), zeros(100)
    draws = torch.stack([merged(method("della"), task, base, seed=seed)["w"][0] for seed in range(400)])
    share = (draws != 0).float().mean(0)
    assert float(share[90:].mean()) == pytest.approx(0.764, abs=0.03)
    assert float(share[:10].mean()) == pytest.approx(0.636, abs=0.03)


def test_breadcrumbs_keeps_the_middle() -> None:
    task = one(tuple(float(k) for k in range(1, 11)))
    found = merge_("breadcrumbs", task, zeros(10), density=0.5, gamma=0.1, scaling=1.0)["w"]
    assert found.tolist() == [[0, 0, 0, 0, 5, 6, 7, 8, 9, 0]]


def test_seed_and_place_decide() -> None:
    from weightworks.testing.merging import merged

    base = model(0)
    models = [model(seed, like=base) for seed in (1, 2)]
    first = merged(method("dare", density=0.5), models, base)
    turned = merged(method("dare", density=0.5), models[::-1], base, keys=["model 1", "model 0"])
    other = merged(method("dare", density=0.5), models, base, seed=1)
    assert all(torch.allclose(first[name], turned[name], atol=1e-6) for name in base)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_probabilities_are_probabilities() -> None:
    with pytest.raises(UsageError, match=r"density \+- epsilon is -0.1 to 0.3"):
        method("della", density=0.1, epsilon=0.2)
