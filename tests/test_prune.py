"""Scores, budgets and repairs of masks: what each must equal, and what it must leave alone.

The methods: compress.prune.magnitude, compress.prune.wanda, compress.prune.ria; SparseGPT has a file of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.columns import Columns
from compress.masks import Pattern, top_mask
from compress.prune import magnitude, ria, wanda
from compress.prune._dsnot import ENOUGH, repaired
from compress.prune._global import one_threshold
from compress.prune._owl import budgets, owl
from compress.sparsity import SparsityOptions
from weightworks.errors import UsageError
from weightworks.plan.keys import reads_text
from weightworks.stage.protocols import Solution, Survey, Target

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def problem(rows: int = 16, width: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, width], and inputs [256, width] that differ in size and share an offset."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    inputs = torch.randn(256, width, generator=generator) + torch.randn(width, generator=generator)
    return weight, inputs * torch.rand(width, generator=generator).add(0.1)


def seen(inputs: torch.Tensor) -> Columns:
    columns = Columns(inputs.shape[1])
    columns.add(inputs)
    return columns


def solve(module: Any, weight: torch.Tensor, inputs: torch.Tensor, **options: Any) -> Solution:
    method = module.Method(module.Options(**options))
    if hasattr(method, "apply"):
        return method.apply(weight.clone(), Target("w", torch.float32))
    statistics = method.watch(weight.shape[1], CPU)
    statistics.add(inputs)
    return method.solve([weight.clone()], statistics, [Target("w", torch.float32)])[0]


def test_only_what_looks_at_inputs_reads_a_text() -> None:
    """So the key of an output depends on the calibration text where its bytes do."""
    for values, reads in (
        ({}, False),
        ({"scope": "global"}, False),
        ({"budget": "owl"}, True),
        ({"repair": "dsnot"}, True),
    ):
        assert reads_text(magnitude.Method(magnitude.Options(**values))) == reads, values
    assert reads_text(wanda.Method(wanda.Options()))


# Scores.


def test_wanda_is_magnitude_by_row_where_inputs_are_alike() -> None:
    weight, inputs = problem()
    alike = inputs.sign()  # every norm is one
    ours = solve(wanda, weight, alike, sparsity=0.6)
    plain = solve(magnitude, weight, alike, sparsity=0.6, scope="row")
    assert torch.equal(ours.dense(), plain.dense())


def test_scaling_an_input_and_its_column_leaves_wandas_mask() -> None:
    weight, inputs = problem()
    factor = 2.0 ** torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(1))
    before, after = solve(wanda, weight, inputs), solve(wanda, weight / factor, inputs * factor)
    assert torch.equal(before.mask, after.mask)
    assert not torch.equal(before.mask, solve(wanda, weight, inputs * factor).mask)


def test_kept_weights_are_not_touched() -> None:
    weight, inputs = problem()
    for module in (wanda, ria, magnitude):
        solution = solve(module, weight, inputs, sparsity=0.3)
        assert torch.equal(solution.dense(), weight.masked_fill(~solution.mask, 0))
        assert not torch.signbit(solution.dense()[~solution.mask]).any()


def test_ria_is_its_formula() -> None:
    weight, inputs = problem(4, 6)
    method = ria.Method(ria.Options())
    score = method.score(weight, seen(inputs))
    for i in range(4):
        for j in range(6):
            w = abs(float(weight[i, j]))
            shares = w / float(weight[i].abs().sum()) + w / float(weight[:, j].abs().sum())
            norm = float(inputs[:, j].square().mean().sqrt())
            assert float(score[i, j]) == pytest.approx(shares * norm**0.5, rel=1e-5)


def test_ria_takes_rows_and_columns_of_zeros() -> None:
    weight, inputs = problem(4, 8)
    weight[1], weight[:, 3] = 0, 0
    solution = solve(ria, weight, inputs, sparsity=0.5)
    assert torch.isfinite(ria.Method(ria.Options()).score(weight, seen(inputs))).all()
    assert int(solution.mask.sum()) == 16


def test_inputs_never_seen_leave_the_weights_to_decide() -> None:
    weight, inputs = problem()
    solution = solve(wanda, weight, inputs[:0])
    assert solution.fallbacks == ["saw no tokens, pruned by the weights alone"]
    assert torch.equal(solution.mask, solve(magnitude, weight, inputs, scope="row").mask)


def test_inputs_that_are_not_finite_are_left_out() -> None:
    weight, inputs = problem()
    method = wanda.Method(wanda.Options())
    statistics = method.watch(64, CPU)
    for batch in (inputs, torch.full((3, 64), torch.nan), torch.full((2, 64), torch.inf)):
        statistics.add(batch)
    solution = method.solve([weight], statistics, [Target("w", torch.float32)])[0]
    assert solution.fallbacks == ["5 inputs were not finite and left out"]
    assert torch.equal(solution.mask, solve(wanda, weight, inputs).mask)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pattern": "4:2"}, "keeps N of every M"),
        ({"pattern": "2:4", "sparsity": 0.7}, "pattern 2:4 means sparsity = 0.5, but 0.7 was given"),
        ({"pattern": "2:4", "budget": "owl"}, "the same share everywhere"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"scope": "global", "pattern": "2:4"}, "one threshold"),
        ({"scope": "global", "sparsity": 0.9, "min_density": 0.2}, "more than the 0.1 that stay"),
        ({"ignore": ["re:("]}, "not a regular expression"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        magnitude.Options.parse(values, where="prune.magnitude")
    assert said in str(caught.value)


def test_a_pattern_says_the_sparsity() -> None:
    assert magnitude.Options(pattern="1:4").sparsity == 0.75
    assert magnitude.Options(pattern="1:4").refusal((8, 6)) == (
        "width 6 is not a multiple of 4, as the pattern 1:4 needs"
    )


# One threshold for the model.


def surveyed(surveys: list[Survey], weights: dict[str, torch.Tensor]) -> dict[str, int]:
    found: Any = None
    for survey in surveys:
        figures = [survey.look([w], [None], [Target(name, torch.float32)], found) for name, w in weights.items()]
        found = survey.conclude(figures, found)
    keeps: dict[str, int] = found
    return keeps


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_one_threshold_is_that_of_a_sort(stored: torch.dtype, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{k}": (torch.randn(40, 30 + k, generator=generator) * 2.0**-k).to(stored).float() for k in range(4)}
    keeps = surveyed(one_threshold(sparsity, 0.0), weights)
    everything = torch.cat([w.flatten() for w in weights.values()]).abs()
    expected = top_mask(everything[None], everything.numel() - round(everything.numel() * sparsity))[0]
    parts = expected.split([w.numel() for w in weights.values()])
    assert list(keeps.values()) == [int(part.sum()) for part in parts]


def test_every_layer_keeps_its_floor_and_the_total_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{k}": torch.randn(50, 40, generator=generator) * 10.0**-k for k in range(4)}
    keeps = surveyed(one_threshold(0.7, 0.05), weights)
    assert sum(keeps.values()) == 8000 - 5600
    assert keeps["w2"] == keeps["w3"] == 100
    assert keeps["w0"] > 1500


def test_equal_weights_are_shared_out_by_place() -> None:
    """Of equal weights the first are pruned first."""
    keeps = surveyed(one_threshold(0.5, 0.0), {"a": torch.ones(2, 8), "b": torch.ones(2, 8)})
    assert keeps == {"a": 0, "b": 16}


# OWL.


def test_blocks_with_outliers_keep_more_and_the_mean_is_as_asked() -> None:
    figures = [{"sizes": {f"{k}.a": 700, f"{k}.b": 300}, "outliers": count} for k, count in enumerate((10, 20, 50, 20))]
    keeps = budgets(figures, None, density=0.3, reach=0.08)
    assert sum(keeps.values()) == 1200
    blocks = [(keeps[f"{k}.a"] + keeps[f"{k}.b"]) / 1000 for k in range(4)]
    assert blocks == pytest.approx([0.24, 0.28, 0.4, 0.28], abs=1e-3)  # 0.3 + r - mean(r); r = 0, 0.04, 0.16, 0.04
    assert keeps["2.a"] == pytest.approx(280, abs=1)


def test_blocks_alike_keep_alike() -> None:
    figures = [{"sizes": {str(k): 10}, "outliers": 3} for k in range(3)]
    assert budgets(figures, None, density=0.5, reach=0.08) == {"0": 5, "1": 5, "2": 5}


@pytest.mark.parametrize("density", [0.02, 0.95])
def test_densities_stay_within_bounds(density: float) -> None:
    figures = [{"sizes": {str(k): 1000}, "outliers": k * k} for k in range(6)]
    keeps = budgets(figures, None, density=density, reach=0.2)
    assert sum(keeps.values()) == round(6000 * density)
    assert min(keeps.values()) >= 9
    assert max(keeps.values()) <= 1000


def test_outliers_are_counted_over_a_block() -> None:
    weight, inputs = problem()
    other = 10 * weight
    survey = owl(SparsityOptions(owl_outlier=3.0))
    targets = [Target("a", torch.float32), Target("b", torch.float32)]
    figures = survey.look([weight, other], [seen(inputs), seen(inputs)], targets, None)
    scores = torch.cat([w.abs() * seen(inputs).norms() for w in (weight, other)])
    assert figures == {"sizes": {"a": 1024, "b": 1024}, "outliers": int((scores > 3 * scores.mean()).sum())}


def test_budgets_reach_the_method() -> None:
    weight, inputs = problem()
    method = wanda.Method(wanda.Options(budget="owl"))
    assert [survey.watch for survey in method.surveys()] == [Columns]
    solution = method.solve([weight], seen(inputs), [Target("w", torch.float32, keep=100)])[0]
    assert int(solution.mask.sum()) == 100


# DSnoT.


def mean_errors(mask: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return (weight * inputs.mean(0)).masked_fill(mask, 0).sum(1)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)], ids=str)
def test_repairs_make_mean_errors_small_and_keep_counts(pattern: Pattern | None) -> None:
    weight, inputs = problem(32, 128)
    mask = solve(wanda, weight, inputs, pattern="2:4" if pattern else "unstructured").mask
    mended, swaps = repaired(mask, weight, seen(inputs), pattern)
    before, after = mean_errors(mask, weight, inputs).abs(), mean_errors(mended, weight, inputs).abs()
    assert swaps > 0
    assert torch.equal(mended.sum(1), mask.sum(1))
    if pattern:
        assert torch.all(mended.view(32, -1, 4).sum(-1) == 2)
    assert torch.all(after <= before + 1e-5)
    assert float(after.mean()) < 0.5 * float(before.mean())
    quiet = before < ENOUGH
    assert torch.equal(mended[quiet], mask[quiet])


def test_nothing_to_repair_is_left_alone() -> None:
    weight, inputs = problem()
    centred = inputs - inputs.mean(0)
    mask = top_mask(weight.abs(), 512, "row")
    mended, swaps = repaired(mask, weight, seen(centred), None)
    assert swaps == 0
    assert torch.equal(mended, mask)


def test_any_method_can_be_repaired() -> None:
    weight, inputs = problem(32, 128)
    for module in (magnitude, wanda, ria):
        plain, mended = (solve(module, weight, inputs, repair=repair) for repair in ("none", "dsnot"))
        assert mended.facts["swaps"] > 0
        assert int(mended.mask.sum()) == int(plain.mask.sum())
        assert torch.equal(mended.dense(), weight.masked_fill(~mended.mask, 0))
