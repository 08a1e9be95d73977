"""AWQ: no worse than rounding by its own measure, the model's function kept, and what cannot be scaled told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.grids import Grid, grouped
from compress.quantize import awq
from weightworks.plan.stage import run_stage
from weightworks.plan.verify import verify
from weightworks.stage.settings import Settings
from weightworks.store.packing import IntScheme

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(num_samples=4, seq_len=64, dtype="float32")
GRID = Grid(IntScheme(4, 32, True), torch.float32)


def problem() -> tuple[torch.Tensor, awq.Sizes]:
    """A weight [32, 64] and inputs a few channels of which are large."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(32, 64, generator=generator), torch.randn(2048, 64, generator=generator)
    inputs[:, ::16] *= 20
    sizes = awq.Sizes(64)
    sizes.add(inputs)
    return weight, sizes


def lost(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error @ hessian) * error).sum())


def test_large_channels_are_rounded_finely() -> None:
    weight, seen = problem()
    sizes, hessian = seen.sizes / seen.tokens, seen.finish()
    scale = awq.search([weight], hessian, sizes, GRID)
    assert float(scale[::16].min()) > 2 * float(scale[1::16].max())
    plain = lost(awq.rounded(weight, GRID) - weight, hessian)
    assert lost(awq.rounded(weight * scale, GRID) / scale - weight, hessian) < 0.7 * plain
    alike = awq.search([weight], hessian, torch.ones(64), GRID)  # every power leaves these as they are
    assert torch.equal(alike, torch.ones(64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_costs_the_output_no_more(symmetric: bool) -> None:
    weight, seen = problem()
    grid, hessian = Grid(IntScheme(2, 32, symmetric), torch.float32), seen.finish()
    scale, zero = awq.clipped(weight, hessian, grid)
    groups = grouped(weight, 32)
    first = grid.from_range(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0))
    losses = []
    for one, other in (first, (scale, zero)):
        error = grid.snap(groups, one[..., None], other[..., None])[1] - groups
        losses.append(sum(lost(error[:, i], hessian[32 * i : 32 * i + 32, 32 * i : 32 * i + 32]) for i in range(2)))
    assert losses[1] < 0.8 * losses[0]


def run(source: Path, target: Path, method: str, **options: Any) -> dict[str, Any]:
    outcome = run_stage("quantize", method, str(source), {"group_size": 32, **options}, SETTINGS, output_dir=target)
    assert outcome.provenance is not None
    return outcome.provenance


def test_the_function_stays_before_rounding(small: Path, tmp_path: Path) -> None:
    told, plain = run(small, tmp_path / "awq", "awq"), run(small, tmp_path / "rtn", "rtn")
    assert told["quality"]["dense"] == pytest.approx(plain["quality"]["dense"], rel=1e-5)
    smoothing = told["smoothing"]
    assert (smoothing["norms"], smoothing["rows"]) == (4, 2)  # rows of up_proj, for the columns of down_proj
    assert {name.split(".")[-2] for name in smoothing["left"]} == {"o_proj"}  # which shares value heads with others
    assert told["size"]["bits_a_weight"] == plain["size"]["bits_a_weight"]
    assert all(check["ok"] for check in verify(str(tmp_path / "awq")))
