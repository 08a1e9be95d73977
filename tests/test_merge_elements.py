"""Merges element by element and by singular values: hand-made cases of each."""

from __future__ import annotations

import pytest
import torch
from merges import merge as merge_
from merges import method, model, one, zeros

import merge.arcee_fusion
import merge.ema
import merge.iso
import merge.magmax
import merge.nearswap
import merge.passthrough
import merge.ram
import merge.sce
import merge.soup
import merge.task_arithmetic
import merge.tsv
import merge.wise_ft
from weightworks.errors import UsageError

METHODS = (
    merge.arcee_fusion, merge.ema, merge.iso, merge.magmax, merge.nearswap, merge.passthrough, merge.ram, merge.sce,
    merge.soup, merge.task_arithmetic, merge.tsv, merge.wise_ft,
)  # fmt: skip


def test_they_are_on_the_shelf() -> None:
    for module in METHODS:
        assert isinstance(method(module.__name__.removeprefix("merge.")), module.Method)


def test_wise_ft_ends_are_base_and_model() -> None:
    base, tuned = model(0), model(1)
    for alpha, expected in ((0.0, base), (1.0, tuned)):
        found = merge_("wise_ft", [tuned], base, alpha=alpha)
        assert all(torch.equal(found[name], expected[name]) for name in base)
    half = merge_("wise_ft", [tuned], base)
    assert all(torch.allclose(half[name], (base[name] + tuned[name]) / 2, atol=1e-6) for name in base)


def test_ema_has_its_closed_form() -> None:
    models = [model(seed) for seed in range(4)]
    found, mu = merge_("ema", models, mu=0.7), 0.7
    weights = [mu**3, *((1 - mu) * mu ** (3 - t) for t in (1, 2, 3))]
    assert sum(weights) == pytest.approx(1)
    for name in found:
        expected = torch.stack([w * each[name] for w, each in zip(weights, models, strict=True)]).sum(0)
        assert torch.allclose(found[name], expected, atol=1e-6)


def test_passthrough_copies_or_scales() -> None:
    tuned = model(0)
    assert all(torch.equal(merge_("passthrough", [tuned])[name], tuned[name]) for name in tuned)
    assert torch.equal(merge_("passthrough", [tuned], scale=-2.0)["blk.scale"], -2 * tuned["blk.scale"])


def test_magmax_takes_the_largest_change_and_the_later_of_equals() -> None:
    tasks = one((3.0, -1.0, 2.0), (-1.0, -4.0, -2.0))
    assert merge_("magmax", tasks, zeros(3), scaling=1.0)["w"].tolist() == [[3.0, -4.0, -2.0]]


def test_nearswap_takes_what_is_near() -> None:
    found = merge_("nearswap", one((0.05, 0.2, -0.4)), zeros(3), t=0.1)["w"]
    assert torch.allclose(found, torch.tensor([[0.05, 0.1, -0.1]]))  # w = 1, 1/2, 1/4 of the second


def test_ram_adds_what_one_changed_and_averages_what_several_did() -> None:
    tasks = one((1.0, 0.0, 4.0), (0.0, 2.0, 2.0))
    assert merge_("ram", tasks, zeros(3))["w"].tolist() == [[1.0, 2.0, 3.0]]
    assert merge_("ram", one((1.0, 0.0), (0.0, 2.0)), zeros(2))["w"].tolist() == [[1.0, 2.0]]
    found = merge_("ram", tasks, zeros(3), plus=True, rate=0.5, limit=1.0)["w"]
    assert found.tolist() == [[1.5, 3.0, 3.0]]  # one own change and one common: 1 + 0.5 x 1


def test_arcee_fusion_takes_what_stands_out() -> None:
    """One element is far off: it is taken, and little else."""
    base = {"w": torch.linspace(-1, 1, 400).reshape(4, 100)}
    tuned = {"w": base["w"] + 1e-3 * torch.linspace(1, 2, 400).reshape(4, 100)}
    tuned["w"][:, 7] += 1.0
    found = merge_("arcee_fusion", [tuned], base)["w"]
    assert torch.equal(found[:, 7], tuned["w"][:, 7])
    assert int((found != base["w"]).sum()) < 60


def test_arcee_fusion_measures_divergence_of_rows_that_hardly_differ(one_thread: None) -> None:
    """KL of rows that differ by 1e-4 is about 5e-9: float32 would see nothing but rounding."""
    from weightworks.stage.merging import Slab

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 64, generator=generator) * 0.02
    b = a + torch.randn(8, 64, generator=generator) * 1e-4
    p, q = b.double().softmax(1), a.double().softmax(1)
    expected = (b - a).abs() * (p * (p / q).log()).sum(1, keepdim=True)
    found = merge.arcee_fusion.importance(Slab("w", (8, 64), 0, (b.clone(),), a.clone()))
    assert torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=0)
    values = torch.arange(11.0)
    at = [float(values[rank]) for rank in merge.arcee_fusion._ranks("", 11)]
    assert merge.arcee_fusion.quartiles(at, 11) == torch.quantile(values, torch.tensor([0.25, 0.5, 0.75])).tolist()


def test_ram_plus_counts_over_the_model_or_the_tensor() -> None:
    """One own change and three common ones in all; in the tensor "a" one of each."""
    first = {"a": torch.tensor([[1.0, 1.0]]), "b": torch.tensor([[1.0, 1.0]])}
    second = {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor([[1.0, 1.0]])}
    base = {name: torch.zeros(1, 2) for name in first}
    options = {"plus": True, "rate": 0.1, "limit": 10.0}
    assert merge_("ram", [first, second], base, **options)["a"][0, 0].item() == pytest.approx(1.3)
    assert merge_("ram", [first, second], base, scope="tensor", **options)["a"][0, 0].item() == pytest.approx(1.1)


def test_a_soup_of_copies_is_the_copy() -> None:
    tuned = model(0)
    for weights in ([], [1.0, 1.0, 1.0], [0.3, 0.1, 0.2], [0.0, 0.7, 0.4]):
        found = merge_("soup", [tuned] * 3, **({"weights": weights} if weights else {}))
        assert all(torch.equal(found[name], tuned[name]) for name in tuned)
    other = model(1)
    found = merge_("soup", [tuned, other], weights=[0.0, 2.0])
    assert all(torch.equal(found[name], other[name]) for name in tuned)


@pytest.mark.parametrize("name", ["soup", "task_arithmetic", "nuslerp", "multislerp", "karcher", "dare", "ties"])
def test_weights_that_cancel_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="sum to zero"):
        method(name, weights=[0.5, -0.5], normalize=True)


def test_soup_of_negative_weights_extrapolates() -> None:
    found = merge_("soup", one((1.0,), (3.0,)), weights=[2.0, -1.0])["w"]
    assert found.item() == pytest.approx(-1.0)


def test_sce_selects_among_the_weights_that_differ() -> None:
    """Three of four weights differ: a third of them is one. What all changed alike has no variance."""
    tasks = one((1.0, 5.0, 2.0, 1.0), (0.0, 1.0, 1.0, 1.0))
    assert (merge_("sce", tasks, zeros(4), select=0.34)["w"] != 0).tolist() == [[False, True, False, False]]
    same = one((1.0, 2.0), (1.0, 2.0))
    assert not merge_("sce", same, zeros(2), select=0.5)["w"].any()
    assert torch.allclose(merge_("sce", same, zeros(2))["w"], same[0]["w"])


def test_sce_coefficients_follow_from_squares() -> None:
    """Coefficients 0.1 and 0.9; where signs differ, that of the sum stays; small changes are no exception."""
    for scale in (1.0, 1e-5):
        tasks = one((scale, scale), (3 * scale, -3 * scale))
        found = merge_("sce", tasks, zeros(2))["w"] / scale
        assert torch.allclose(found, torch.tensor([[0.1 * 1 + 0.9 * 3, -3.0]]), rtol=1e-4)
    apart = merge_("sce", one((1.0, 5.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)), zeros(4), select=0.25)["w"]
    assert apart[0, [0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert apart[0, 1] > 1


def test_iso_makes_singular_values_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = [{"w": torch.randn(6, 4, generator=generator)} for _ in range(3)]
    found = merge_("iso", tasks, {"w": torch.zeros(6, 4)})["w"]
    total = torch.stack([task["w"] for task in tasks]).sum(0)
    sigma = torch.linalg.svdvals(total)
    assert torch.allclose(torch.linalg.svdvals(found), sigma.mean().expand(4), rtol=1e-4)
    apart = torch.linalg.svdvals(found - total)  # the directions are those of the sum
    assert torch.allclose(apart, (sigma - sigma.mean()).abs().sort(descending=True).values, atol=1e-4)


def test_tsv_of_copies_keeps_their_leading_directions() -> None:
    """Directions that depend on each other have no other polar factor to fall into."""
    task = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = merge_("tsv", [{"w": task}] * 2, {"w": torch.zeros(6, 4)})["w"]
    u, sigma, vt = torch.linalg.svd(task, full_matrices=False)
    assert torch.allclose(found, (u[:, :2] * sigma[:2]) @ vt[:2], atol=1e-5)


@pytest.mark.parametrize("name", ["iso", "tsv"])
def test_embeddings_are_averaged(name: str) -> None:
    base = model(0)
    tasks = [model(number, like=base, scale=0.1) for number in (1, 2)]
    mean = (tasks[0]["embed.weight"] + tasks[1]["embed.weight"]) / 2
    assert torch.allclose(merge_(name, tasks, base)["embed.weight"], mean, atol=1e-6)
    assert not torch.allclose(merge_(name, tasks, base, plain=["none"])["embed.weight"], mean, atol=1e-3)


def test_tsv_of_one_task_is_the_task_and_of_orthogonal_ones_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    task = {"w": torch.randn(6, 4, generator=generator)}
    assert torch.allclose(merge_("tsv", [task], {"w": torch.zeros(6, 4)})["w"], task["w"], atol=1e-5)
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    first[0, 0], first[1, 1], second[2, 2], second[3, 3] = 3.0, 2.0, 5.0, 1.0
    found = merge_("tsv", [{"w": first}, {"w": second}], {"w": torch.zeros(4, 4)})["w"]
    assert torch.allclose(found, first + second, atol=1e-5)


def test_task_arithmetic_and_soup() -> None:
    tasks = one((1.0, 2.0), (3.0, -2.0))
    assert merge_("task_arithmetic", tasks, zeros(2), scaling=0.5)["w"].tolist() == [[2.0, 0.0]]
    found = merge_("task_arithmetic", tasks, zeros(2), scaling=1.0, weights=[3.0, 1.0], normalize=True)["w"]
    assert found.tolist() == [[1.5, 1.0]]
    assert merge_("soup", tasks)["w"].tolist() == [[2.0, 0.0]]
    assert merge_("soup", tasks, weights=[3.0, 1.0])["w"].tolist() == [[1.5, 1.0]]
