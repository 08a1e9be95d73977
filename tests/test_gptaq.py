"""GPTAQ: nearer to what the unchanged model puts out than GPTQ, the same where nothing has drifted, and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES

from compress import sweep as columns
from compress.grids import Grid, grouped
from compress.hessian import Drifted
from compress.quantize import gptq
from weightworks.plan.stage import run_stage
from weightworks.stage.settings import Settings
from weightworks.store.packing import IntScheme

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(num_samples=4, seq_len=64, dtype="float32")


def drifted(width: int = 128, tokens: int = 2048) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [64, width]; inputs [tokens, width] of an unchanged model, and of a rounded one, which has drifted from it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width) / 2
    before = torch.randn(tokens, width, generator=generator) @ mixing
    bent = torch.eye(width) + 0.1 * torch.randn(width, width, generator=generator) / width**0.5
    noise = 0.1 * torch.randn(tokens, width, generator=generator)
    return weight, before, before @ bent + noise


def solved(weight: torch.Tensor, before: torch.Tensor, after: torch.Tensor, bits: int, share: float) -> torch.Tensor:
    statistics = Drifted(weight.shape[1])
    for old, new in zip(before.split(500), after.split(500), strict=True):
        statistics.add(new, old)
    pairs = (statistics.finish_drift(), share) if share else None
    grid = Grid(IntScheme(bits, 32, True), torch.float32)
    return gptq.quantize(
        weight.clone(),
        statistics.finish(),
        grid,
        reorder=True,
        static_groups=True,
        damp_percent=0.01,
        pairs=pairs,
    )[0].dequantize()


def error(weight: torch.Tensor, before: torch.Tensor, after: torch.Tensor, rounded: torch.Tensor) -> float:
    """Of the unchanged model's output."""
    wanted = before @ weight.T
    return float((after @ rounded.T - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_the_outputs_are_nearer_to_the_unchanged_model(bits: int) -> None:
    problem = drifted()
    groups = grouped(problem[0], 32)
    grid = Grid(IntScheme(bits, 32, True), torch.float32)
    scale, zero = grid.fit(groups)
    plain = grid.encoded(grid.codes(groups, scale, zero), scale, zero).dequantize()
    errors = [
        error(*problem, plain),
        *(error(*problem, solved(*problem, bits, share)) for share in (0, 0.25, 1.0)),
    ]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.9 * errors[1]


def test_without_drift_it_is_gptq() -> None:
    weight, before, _ = drifted()
    assert torch.equal(solved(weight, before, before, 3, 1.0), solved(weight, before, before, 3, 0))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = drifted()
    whole = solved(*problem, 4, 1.0)
    monkeypatch.setattr(columns, "BLOCK", 1)  # a group, 32 columns, at a time
    assert float((solved(*problem, 4, 1.0) == whole).float().mean()) > 0.999


def run(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    given = {"bits": 3, "group_size": 32, "asymmetric_calibration": 1.0, **options}
    outcome = run_stage("quantize", "gptq", str(source), given, SETTINGS, output_dir=target)
    assert outcome.provenance is not None
    return outcome.provenance


def test_a_killed_run_goes_on(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second block, where the two models' hidden states differ."""
    whole = run(small, tmp_path / "whole")
    assert whole["fallbacks"] == []
    symmetric = run(small, tmp_path / "symmetric", asymmetric_calibration=None)
    assert whole["files"]["model.safetensors"] != symmetric["files"]["model.safetensors"]
    calls, solve = [], gptq.Method.solve

    def stop(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return solve(self, *args)

    monkeypatch.setattr(gptq.Method, "solve", stop)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "cut")
    monkeypatch.undo()
    again = run(small, tmp_path / "cut")
    assert again["files"] == whole["files"] and json.dumps(again["report"]) == json.dumps(whole["report"])


def test_experts_are_calibrated_on_what_reaches_them(tmp_path: Path) -> None:
    told = run(ARCHITECTURES["mixtral"].save(tmp_path / "source"), tmp_path / "out")
    unpaired = {row["tensor"] for row in told["report"] if any("alone" in text for text in row.get("fallbacks", ()))}
    assert unpaired and all(".experts." in name for name in unpaired)
