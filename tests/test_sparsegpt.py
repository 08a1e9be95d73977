"""SparseGPT's own promises: the closed forms it must equal, the identity of its loss, what it does with bad statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress import sweep as columns_swept
from compress.columns import Columns
from compress.grids import Grid
from compress.hessian import Hessian, factor
from compress.masks import Pattern, pattern_mask, top_mask
from compress.prune import _refine, sparsegpt, wanda
from compress.prune.sparsegpt import Seen, evenly, remove
from weightworks.errors import UsageError
from weightworks.stage.protocols import Solution, Target
from weightworks.store.packing import IntScheme

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(rows: int, width: int, tokens: int = 1024, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, width], and inputs [tokens, width] that are correlated and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width) / 2
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    return weight, inputs * torch.rand(width, generator=generator).add(0.1)


def damped(inputs: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """H with the damping that the factor is of, float64 [in, in]."""
    hessian = 2 * inputs.double().T @ inputs.double() / len(inputs)
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def lower_of(inputs: torch.Tensor) -> torch.Tensor:
    statistics = Hessian(inputs.shape[1])
    statistics.add(inputs)
    found = factor(statistics.finish(), torch.arange(inputs.shape[1]), damp_percent=0.01)
    assert found.lower is not None
    return found.lower


def natural(weight: torch.Tensor) -> torch.Tensor:
    return torch.arange(weight.shape[1])


def test_a_prefix_mask_gives_the_least_squares_solution() -> None:
    """W_K + W_P H_PK inv(H_KK): the best values of the kept weights, for any prefix P of the columns."""
    weight, inputs = problem(8, 96)
    hessian, gone = damped(inputs), 40
    mask = torch.arange(96).expand(8, -1) >= gone
    result = weight.clone()
    remove(result, lower_of(inputs), natural(weight), mask=mask)
    w = weight.double()
    expected = w[:, gone:] + w[:, :gone] @ hessian[:gone, gone:] @ torch.linalg.inv(hessian[gone:, gone:])
    torch.testing.assert_close(result[:, gone:].double(), expected, rtol=1e-3, atol=1e-4)
    assert not result[:, :gone].any()


def test_a_suffix_mask_changes_no_kept_weight() -> None:
    weight, inputs = problem(8, 96)
    mask = torch.arange(96).expand(8, -1) < 40
    result = weight.clone()
    remove(result, lower_of(inputs), natural(weight), mask=mask)
    assert torch.equal(result, weight.masked_fill(~mask, 0))


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)], ids=str)
def test_the_loss_is_that_of_the_outputs(pattern: Pattern | None) -> None:
    """sum of e^2 = tr(E H E') by row, whatever the mask."""
    weight, inputs = problem(16, 160)
    result = weight.clone()
    answer = remove(result, lower_of(inputs), natural(weight), pruned=16 * 80, pattern=pattern)
    error = (result - weight).double()
    torch.testing.assert_close(answer.loss.double(), ((error @ damped(inputs)) * error).sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_a_diagonal_hessian_gives_wandas_mask_and_no_update(pattern: Pattern | None) -> None:
    """Score W^2 H_jj, Wanda's squared, here over the 128 columns of a block; with lambda spread evenly."""
    weight, _ = problem(16, 128)
    scale = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.1
    found = factor(scale.square().diag(), natural(weight), damp_percent=1e-9)
    assert found.lower is not None
    result = weight.clone()
    answer = remove(result, found.lower, natural(weight), pruned=16 * 64, pattern=pattern)
    scores = weight.abs() * scale
    expected = top_mask(scores, 16 * 64) if pattern is None else pattern_mask(scores, pattern)
    assert torch.equal(answer.mask, expected)
    assert torch.equal(result, weight.masked_fill(~expected, 0))


@pytest.mark.parametrize("block", [32, 64, 96])
def test_blocks_change_no_value_under_a_given_mask(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = problem(16, 192)
    mask, lower = weight.abs() > 0.7, lower_of(inputs)
    whole, parts = weight.clone(), weight.clone()
    remove(whole, lower, natural(weight), mask=mask)
    monkeypatch.setattr(columns_swept, "BLOCK", block)
    remove(parts, lower, natural(weight), mask=mask)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_blocks_share_out_the_count_exactly() -> None:
    assert evenly(1001, 300, 128, 10) == [427, 427, 147]
    assert sum(evenly(12345, 777, 128, 64)) == 12345


def test_single_removal_costs_what_surgeons_say() -> None:
    """Removing one weight w_p costs w_p^2 / inv(H)_pp and is best undone by -w_p inv(H)_p / inv(H)_pp (OBS)."""
    weight, inputs = problem(1, 24)
    inverse = torch.linalg.inv(damped(inputs))
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[0, 0] = False  # the first: every other column can still make up for it
    result = weight.clone()
    answer = remove(result, lower_of(inputs), natural(weight), mask=mask)
    w = weight.double()
    torch.testing.assert_close(answer.loss.double(), w[:, 0].square() / inverse[0, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(result.double(), w - w[:, :1] * inverse[:1] / inverse[0, 0], rtol=1e-3, atol=1e-5)


# The method.


def solve(weight: torch.Tensor, inputs: torch.Tensor, **options: Any) -> Solution:
    method = sparsegpt.Method(sparsegpt.Options(**options))
    seen = method.watch(weight.shape[1], torch.device("cpu"))
    seen.add(inputs)
    return method.solve([weight.clone()], seen, [Target("w", torch.float16)])[0]


def output_loss(weight: torch.Tensor, solution: Solution, inputs: torch.Tensor) -> float:
    error = (solution.dense() - weight).double() @ inputs.double().T
    return float(error.square().sum() / (weight.double() @ inputs.double().T).square().sum())


@pytest.mark.parametrize("words", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_updates_beat_wanda(words: dict[str, Any]) -> None:
    weight, inputs = problem(32, 256)
    scored = wanda.Method(wanda.Options(**words))
    columns = scored.watch(256, torch.device("cpu"))
    columns.add(inputs)
    plain = scored.solve([weight.clone()], columns, [Target("w", torch.float32)])[0]
    swept = solve(weight, inputs, **words)
    loss = output_loss(weight, swept, inputs)
    assert loss < 0.8 * output_loss(weight, plain, inputs)
    assert 1 <= swept.facts["relative_error"] / loss < 1.2  # with the damping
    assert swept.fallbacks == []


@pytest.mark.parametrize("words", [{"sym": False}, {"group_size": -1}, {"act_order": "static"}, {"bits": 8}], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruned_weights_are_zero_after_rounding(words: dict[str, Any], pattern: str) -> None:
    weight, inputs = problem(16, 128)
    solution = solve(weight, inputs, pattern=pattern, **{"bits": 4, "group_size": 32, **words})
    assert solution.mask is not None
    assert int(solution.mask.sum()) == weight.numel() // 2
    assert not solution.dense()[~solution.mask].any()
    alone = solve(weight, inputs, pattern=pattern, refine=0, act_order=words.get("act_order", "none"))
    assert output_loss(weight, alone, inputs) < output_loss(weight, solution, inputs) < 0.5


def test_rounding_in_the_sweep_beats_rounding_afterwards() -> None:
    weight, inputs = problem(32, 256)
    joint = solve(weight, inputs, bits=3, group_size=64)
    after = solve(weight, inputs, refine=0)
    grid = Grid(IntScheme(3, 64, True), torch.float16, signed=True)
    rounded = remove(after.dense().clone(), torch.eye(256), natural(weight), mask=after.mask, grid=grid).quantized
    assert rounded is not None
    assert output_loss(weight, joint, inputs) < 0.9 * output_loss(weight, Solution(rounded), inputs)


@pytest.mark.parametrize("act_order", ["static", "none"])
def test_orders_keep_patterns_whole(act_order: str) -> None:
    weight, inputs = problem(8, 64)
    solution = solve(weight, inputs, pattern="2:8", act_order=act_order)
    assert solution.mask is not None
    assert torch.all(solution.mask.view(8, -1, 8).sum(-1) == 2)


def test_repaired_masks_are_swept_again() -> None:
    weight, inputs = problem(16, 128)
    inputs = inputs + torch.randn(128, generator=torch.Generator().manual_seed(5))
    solution = solve(weight, inputs, repair="dsnot", sparsity=0.7, refine=0, act_order="none")
    assert solution.facts["swaps"] > 0
    assert solution.mask is not None
    assert int(solution.mask.sum()) == weight.numel() - round(0.7 * weight.numel())
    lower = lower_of(inputs)
    again = weight.clone()
    remove(again, lower, natural(weight), mask=solution.mask)
    torch.testing.assert_close(again, solution.dense(), rtol=1e-5, atol=1e-6)


def test_refining_ends_in_least_squares_for_any_mask() -> None:
    """W_K + W_P H_PK inv(H_KK) for the kept columns K of each row, in whatever order they were pruned."""
    weight, inputs = problem(8, 96)
    solution = solve(weight, inputs, sparsity=0.6, refine=60)
    hessian, w = damped(inputs), weight.double()
    assert solution.mask is not None
    for row, mask, result in zip(w, solution.mask, solution.dense().double(), strict=True):
        best = row[mask] + row[~mask] @ hessian[~mask][:, mask] @ torch.linalg.inv(hessian[mask][:, mask])
        torch.testing.assert_close(result[mask], best, rtol=1e-3, atol=1e-3)
        assert not result[~mask].any()


def test_every_step_of_refining_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = problem(32, 128)
    losses = [output_loss(weight, solve(weight, inputs, sparsity=0.7, refine=steps), inputs) for steps in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[4] < 0.9 * losses[0]
    solution = solve(weight, inputs, sparsity=0.7)
    assert 1 <= solution.facts["relative_error"] / output_loss(weight, solution, inputs) < 1.2  # with the damping
    monkeypatch.setattr(_refine, "COARSE", 0)
    exact = solve(weight, inputs, sparsity=0.7)
    assert output_loss(weight, solution, inputs) < 1.001 * output_loss(weight, exact, inputs)
    monkeypatch.setattr(_refine, "BAND", 5 * 128)
    banded = solve(weight, inputs, sparsity=0.7)
    torch.testing.assert_close(banded.dense(), exact.dense(), rtol=1e-4, atol=1e-5)


def test_refining_leaves_grids_and_dead_inputs_alone() -> None:
    with pytest.raises(UsageError, match="move weights off their grid"):
        sparsegpt.Options.parse({"bits": 4, "refine": 2}, where="prune.sparsegpt")
    assert sparsegpt.Options(bits=4).steps == 0
    weight, inputs = problem(8, 64)
    inputs[:, 5] = 0
    solution = solve(weight, inputs, sparsity=0.25)
    assert not solution.dense()[:, 5].any()


@pytest.mark.parametrize("tokens", [0, 63])
def test_cold_statistics_mean_magnitude(tokens: int) -> None:
    weight, inputs = problem(8, 64)
    solution = solve(weight, inputs[:tokens])
    said = f"saw {tokens} tokens (fewer than 64), pruned by magnitude without error compensation"
    assert solution.fallbacks == [said]
    assert torch.equal(solution.dense(), weight.masked_fill(~top_mask(weight.abs(), 256), 0))


def test_dead_inputs_go_first() -> None:
    weight, inputs = problem(8, 64)
    inputs[:, 5] = 0
    solution = solve(weight, inputs, sparsity=0.25)
    assert solution.facts["dead_inputs"] == 1
    assert not solution.dense()[:, 5].any()


def test_statistics_that_overflow_mean_magnitude() -> None:
    weight, inputs = problem(8, 64)
    solution = solve(weight, torch.cat([inputs, torch.full((1, 64), 1e30)]))
    assert solution.fallbacks == ["statistics are not finite, pruned by magnitude without error compensation"]
    assert torch.isfinite(solution.dense()).all()


def test_moments_are_kept_only_for_repairs() -> None:
    device = torch.device("cpu")
    assert Seen(4, device, moments=False).columns is None
    assert isinstance(Seen(4, device, moments=True).columns, Columns)
