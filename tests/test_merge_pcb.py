"""PCB-Merging: all four released scripts, hand-made cases, and what is defined where they divide zero by zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merges import golden, method, model, one, zeros
from merges import merge as merge_

import merge.pcb
from weightworks.testing.merging import merged

SCRIPTS: dict[str, dict[str, Any]] = {
    "root": {"inter": "raw", "clamp": 1e-4},
    "nlp": {"inter": "raw", "clamp": 0.01},
    "vision": {"inter": "summed", "clamp": 0.01},
    "es": {"inter": "pairwise", "clamp": 0.01},
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2])
def test_released_scripts(shared: Path, script: str, ratio: float) -> None:
    case = golden(shared, "pcb")
    run = f"{script}_r{round(100 * ratio):02d}"
    base, models = case.of("base"), [case.of(f"ft{number}") for number in range(3)]
    lambdas = case.facts["runs"][run]["lambdas"] or [1.0]
    found = merge_("pcb", models, base, ratio=ratio, scaling=lambdas, vectors="sparse", **SCRIPTS[script])
    flat = torch.cat([(found[name] - base[name]).flatten() for name in sorted(base)])
    expected = case.tensors[f"{run}.merged_tv"]
    both = (flat != 0) & (expected != 0)
    assert torch.equal(flat != 0, expected != 0)
    assert torch.allclose(flat[both], expected[both], rtol=1e-4, atol=3e-7)  # the base was added and taken away


def test_one_task_keeps_its_largest_elements_whole() -> None:
    base = model(0)
    tuned = model(1, like=base, scale=0.1)
    found = merge_("pcb", [tuned], base, ratio=0.25, clamp=0.0, vectors="sparse")
    flat = torch.cat([(tuned[name] - base[name]).flatten() for name in sorted(base)])
    got = torch.cat([(found[name] - base[name]).flatten() for name in sorted(base)])
    order = flat.abs().argsort(descending=True)
    kept = order[: flat.numel() - int(0.75 * flat.numel()) - 1]  # the element at the threshold weighs nothing
    assert torch.allclose(got[kept], flat[kept], atol=1e-6)
    dropped = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, kept, False)
    assert torch.equal(got[dropped], torch.zeros_like(got[dropped]))


def test_a_dissenter_is_dropped() -> None:
    """Three tasks move four elements alike; on the second, one of them dissents, and the others have it."""
    tasks = one((3.0, 2.0, 0.1, 0.0), (3.0, 2.0, 0.1, 0.0), (3.0, -2.0, 0.1, 0.0))
    found = merge_("pcb", tasks, zeros(4), ratio=0.75, clamp=0.0)["w"]
    assert torch.allclose(found[0, :2], torch.tensor([3.0, 2.0]))


@pytest.mark.parametrize("inter", ["pairwise", "raw", "summed"])
def test_nothing_divided_by_nothing(inter: str) -> None:
    """Opposed, constant and unmoved task vectors leave the base."""
    for tasks in (one((1.0, 2.0), (-1.0, -2.0)), one((1.0, 1.0), (1.0, 1.0)), one((0.0, 0.0), (0.0, 0.0))):
        assert torch.isfinite(merge_("pcb", tasks, zeros(2), inter=inter)["w"]).all()
    unmoved = merge_("pcb", one((0.0, 0.0)), zeros(2), inter=inter)["w"]
    assert unmoved.tolist() == [[0.0, 0.0]]


def test_rows_change_nothing_and_scale_goes_through() -> None:
    base = model(0)
    models = [model(number, like=base, scale=0.1) for number in (1, 2, 3)]
    whole = merge_("pcb", models, base)
    parts = merged(method("pcb"), models, base, rows=3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    larger = [{name: base[name] + 4 * (one_[name] - base[name]) for name in base} for one_ in models]
    scaled = merge_("pcb", larger, base)
    for name in base:
        expected = base[name] + 4 * (whole[name] - base[name])
        close = torch.isclose(scaled[name], expected, rtol=1e-4, atol=1e-5)
        assert int((~close).sum()) <= 1  # an element at the threshold


def test_at_most_the_ratio_of_each_task_is_kept() -> None:
    base = model(0)
    models = [model(number, like=base, scale=0.1) for number in range(1, 5)]
    found = merge_("pcb", models, base, ratio=0.05, vectors="sparse")
    changed = sum(int((found[name] != base[name]).sum()) for name in base)
    assert 0 < changed <= 4 * 0.05 * sum(value.numel() for value in base.values())


def test_many_models_do_not_overflow() -> None:
    """exp(N n^2) alone is infinite in float32 for N > 88."""
    base = model(0)
    found = merge_("pcb", [model(number, like=base, scale=0.1) for number in range(1, 100)], base)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not torch.equal(found["blk.up.weight"], base["blk.up.weight"])


def test_a_task_vector_with_few_changes_is_not_emptied() -> None:
    """Fewer than one in a hundred: the upper bound of magnitudes would be zero."""
    sparse = torch.zeros(1, 1000)
    sparse[0, :5] = torch.arange(1.0, 6.0)
    found = merge_("pcb", [{"w": sparse}], zeros(1000))["w"]
    assert torch.equal(found, sparse)


def test_vectors_are_averaged_unless_asked_for() -> None:
    base = model(0)
    models = [model(number, like=base, scale=0.1) for number in (1, 2, 3)]
    whole = merge_("pcb", models, base, scaling=[0.5])["blk.norm.weight"]
    mean = sum(each["blk.norm.weight"] for each in models) / 3
    torch.testing.assert_close(whole, (base["blk.norm.weight"] + mean) / 2)
    sparse = merge_("pcb", models, base, vectors="sparse")["blk.norm.weight"]
    assert bool((sparse == base["blk.norm.weight"]).any())


def test_scores_do_not_depend_on_where_a_slab_begins() -> None:
    """Passes compare scores bit by bit, so exp and tanh must give the same at every place of a vector."""
    deltas = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    bounds = [(0.01, 2.0)] * 2
    for inter in ("pairwise", "raw", "summed"):
        whole = list(merge.pcb.scores(deltas, bounds, inter=inter))
        for start, stop in ((0, 999), (1, 1000), (3, 17), (500, 507), (999, 1000)):
            part = merge.pcb.scores([delta[start:stop].clone() for delta in deltas], bounds, inter=inter)
            assert all(torch.equal(one, all_[start:stop]) for one, all_ in zip(part, whole, strict=True))


def test_it_is_the_method_of_the_shelf() -> None:
    assert isinstance(method("pcb"), merge.pcb.Method)
