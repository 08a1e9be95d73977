"""Merges by lengths and angles: SLERP and kin, Karcher mean, Model Stock; against mergekit's own output and hand-made cases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merges import assert_golden, golden, method, model, one, zeros
from merges import merge as merge_

import merge.karcher
import merge.model_stock
import merge.multislerp
import merge.nuslerp
import merge.slerp

METHODS = (merge.karcher, merge.model_stock, merge.multislerp, merge.nuslerp, merge.slerp)


@pytest.mark.parametrize(
    ("run", "first", "second", "t"),
    [
        ("slerp_near_t03", "base", "ft0", 0.3),
        ("slerp_far_t03", "base", "other", 0.3),
        ("slerp_far_t075", "ft1", "other", 0.75),
    ],
)
def test_slerp_is_that_of_mergekit(shared: Path, run: str, first: str, second: str, t: float) -> None:
    case = golden(shared, "mergekit")
    assert_golden(merge_("slerp", [case.of(first), case.of(second)], t=t), case.of(run), rtol=2e-5, atol=2e-7)


def test_nuslerp_is_that_of_mergekit(shared: Path) -> None:
    case = golden(shared, "mergekit")
    found = merge_("nuslerp", [case.of("ft1"), case.of("other")], weights=[0.6, 0.2])
    assert_golden(found, case.of("nuslerp_far"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("run", "filter_wise"), [("model_stock", False), ("model_stock_filterwise", True)])
def test_model_stock_is_that_of_mergekit(shared: Path, run: str, filter_wise: bool) -> None:
    case = golden(shared, "mergekit")
    models = [case.of(f"ft{number}") for number in range(3)]
    assert_golden(merge_("model_stock", models, case.of("base"), filter_wise=filter_wise), case.of(run), atol=1e-6)


def test_a_right_angle() -> None:
    """Half-way between orthogonal unit vectors lies their sum over the root of two; the ends are the models."""
    models = one((1.0, 0.0), (0.0, 1.0))
    half = math.sqrt(0.5)
    assert torch.allclose(merge_("slerp", models)["w"], torch.tensor([[half, half]]))
    assert merge_("slerp", models, t=0.0)["w"].tolist() == [[1.0, 0.0]]
    assert merge_("slerp", models, t=1.0)["w"].tolist() == [[0.0, 1.0]]
    for name in ("nuslerp", "multislerp", "karcher"):
        assert torch.allclose(merge_(name, models)["w"], torch.tensor([[half, half]])), name


def test_rows_are_vectors_of_their_own() -> None:
    models = [{"w": torch.tensor([[1.0, 0.0], [2.0, 0.0]])}, {"w": torch.tensor([[0.0, 1.0], [2.0, 0.0]])}]
    found = merge_("nuslerp", models, row_wise=True)["w"]
    half = math.sqrt(0.5)
    assert torch.allclose(found, torch.tensor([[half, half], [2.0, 0.0]]))


def test_karcher_mean_is_the_centre() -> None:
    """Unit vectors about an axis at one angle have it as their mean; on a circle the mean is that of the angles."""
    angle, turn = 0.4, 2 * math.pi / 3
    around = [
        (math.cos(angle), math.sin(angle) * math.cos(k * turn), math.sin(angle) * math.sin(k * turn)) for k in range(3)
    ]
    assert torch.allclose(merge_("karcher", one(*around))["w"], torch.tensor([[1.0, 0.0, 0.0]]), atol=1e-5)
    arcs = [(math.cos(a), math.sin(a)) for a in (0.0, 0.1, 1.2)]
    mean = 1.3 / 3
    expected = torch.tensor([[math.cos(mean), math.sin(mean)]])
    assert torch.allclose(merge_("karcher", one(*arcs))["w"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["multislerp", "karcher", "nuslerp", "slerp"])
def test_where_directions_cancel_the_mean_stands_for_them(name: str) -> None:
    found = merge_(name, one((1.0, 2.0), (-3.0, -6.0)))["w"]
    assert torch.allclose(found, torch.tensor([[-1.0, -2.0]]), atol=1e-6)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_a_vector_of_no_length_counts_only_in_the_length(name: str) -> None:
    found = merge_(name, one((0.0, 0.0), (3.0, 4.0)))["w"]
    assert torch.allclose(found, torch.tensor([[1.5, 2.0]]), atol=1e-6)
    assert not merge_(name, one((0.0, 0.0), (0.0, 0.0)))["w"].any()


def test_a_model_opposite_to_the_karcher_mean_is_left_out_of_the_step() -> None:
    found = merge_("karcher", one((1.0, 0.0), (1.0, 0.0), (-1.0, 0.0)))["w"]
    assert torch.allclose(found, torch.tensor([[1.0, 0.0]]), atol=1e-6)


def test_with_a_base_the_sphere_is_that_of_task_vectors() -> None:
    base = {"w": torch.tensor([[5.0, 5.0]])}
    models = one((6.0, 5.0), (5.0, 6.0))
    half = math.sqrt(0.5)
    for name in ("nuslerp", "multislerp", "karcher"):
        assert torch.allclose(merge_(name, models, base)["w"], torch.tensor([[5 + half, 5 + half]])), name


def test_nuslerp_follows_small_arcs() -> None:
    """At 0.01 radian SLERP takes the line, NuSLERP the arc, which is longer by an eighth of the square."""
    models = one((1.0, 0.0), (math.cos(0.01), math.sin(0.01)))
    assert float(merge_("nuslerp", models)["w"].double().norm()) == pytest.approx(1, abs=1e-7)
    assert float(merge_("slerp", models)["w"].double().norm()) == pytest.approx(1 - 0.01**2 / 8, abs=1e-7)


def test_model_stock_never_goes_beyond_the_models() -> None:
    """The formula has a pole where task vectors cancel."""
    for angle in (1.6, 2.0, 2.2, 2.6, 3.0, 3.14159):
        models = one((1.0, 0.0), (math.cos(angle), math.sin(angle)))
        assert float(merge_("model_stock", models, zeros(2))["w"].norm()) <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-6])
def test_model_stock_does_not_depend_on_scale(scale: float) -> None:
    """Cosine 0 gives the base, 1 the mean, and small task vectors are treated as large ones are."""
    orthogonal = one((scale, 0.0), (0.0, scale))
    assert merge_("model_stock", orthogonal, zeros(2))["w"].tolist() == [[0.0, 0.0]]
    equal = one((scale, scale), (scale, scale))
    assert torch.allclose(merge_("model_stock", equal, zeros(2))["w"], equal[0]["w"], atol=0)
    slanted = one((scale, 0.0), (scale * math.cos(1.0), scale * math.sin(1.0)))
    share = 2 * math.cos(1.0) / (1 + math.cos(1.0))
    expected = share * (slanted[0]["w"] + slanted[1]["w"]) / 2
    assert torch.allclose(merge_("model_stock", slanted, zeros(2))["w"], expected, rtol=1e-5, atol=0)
    assert merge_("model_stock", one((scale, 0.0), (-scale, 0.0)), zeros(2))["w"].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_copies_merge_to_themselves(name: str) -> None:
    base, tuned = model(0), model(1)
    found = merge_(name, [tuned, tuned], base if name == "model_stock" else None)
    for key, value in tuned.items():
        assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key


def test_they_are_on_the_shelf() -> None:
    for module in METHODS:
        assert isinstance(method(module.__name__.removeprefix("merge.")), module.Method)
