"""Low-rank error reconstruction: the best there is of its rank, an adapter as PEFT reads it, refused without the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import quantize, recover
from compress.recover import lqer
from weightworks.errors import MethodError
from weightworks.store.adapters import Adapter
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {
    "method": "lqer", "dataset": str(CALIBRATION_TEXT), "seq_len": 64, "num_samples": 8, "device": "cpu", "dtype": "float32",
}  # fmt: skip


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An error [rows, columns], inputs [tokens, columns] that are correlated, and their moments."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(512, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return error, inputs, inputs.T @ inputs / 512


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_error_left_is_what_eckart_and_young_say(shape: tuple[int, int]) -> None:
    error, inputs, moments = problem(*shape)
    values = torch.linalg.svdvals(inputs.double() @ error.double().T).square()
    for rank in (1, 5, 16):
        b, a, left = lqer.low_rank(error, moments, rank)
        lost = (inputs @ (error - b @ a).T).double().square().sum()
        assert float(lost) == pytest.approx(float(values[rank:].sum()), rel=1e-4)
        assert left == pytest.approx(float(values[rank:].sum() / values.sum()), rel=1e-3)
        plain, _, _ = lqer.low_rank(error, torch.eye(shape[1]), rank)
        assert float((inputs @ (error - plain @ (plain.T @ error)).T).square().sum()) > float(lost)


def test_whole_rank_is_exact() -> None:
    error, _, moments = problem(24, 40)
    b, a, left = lqer.low_rank(error, moments, 30)
    torch.testing.assert_close(b @ a, error, atol=1e-5, rtol=0)
    assert b.shape == (24, 30) and left == 0


@pytest.fixture(scope="module")
def base(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lqer") / "w2"
    return quantize(small, method="rtn", bits=2, group_size=32, device="cpu", output_dir=folder).target


def test_it_wins_back_what_rounding_lost(small: Path, base: Path, tmp_path: Path) -> None:
    made = {}
    for rank in (8, 256):
        outcome = recover(base, teacher=small, **QUICK, rank=rank, output_dir=tmp_path / str(rank))
        assert outcome.provenance is not None
        made[rank] = outcome.provenance
    original = quantize(small, method="rtn", bits=8, device="cpu", output_dir=tmp_path / "w8").provenance
    assert original is not None
    losses = [made[8]["quality"]["dense"], made[8]["quality"]["result"], made[256]["quality"]["result"]]
    assert losses[2] == pytest.approx(original["quality"]["dense"], rel=1e-3)  # nothing is lost any more
    assert all(row["relative_error"] < 1 for row in made[8]["report"]) and len(made[8]["report"]) == 14
    adapter = Adapter.open(tmp_path / "8")
    assert adapter.config["r"] == 8 and adapter.config["lora_alpha"] == 8 and adapter.base == base.name
    card = (tmp_path / "8/README.md").read_text()
    assert "solved for" in card and "PeftModel.from_pretrained" in card


def test_a_killed_run_goes_on(small: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recover(base, teacher=small, **QUICK, rank=4, output_dir=tmp_path / "whole").provenance
    calls, factors = [], lqer.Method.factors

    def stop(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return factors(self, *args)

    monkeypatch.setattr(lqer.Method, "factors", stop)
    with pytest.raises(KeyboardInterrupt):
        recover(base, teacher=small, **QUICK, rank=4, output_dir=tmp_path / "cut")
    monkeypatch.undo()
    again = recover(base, teacher=small, **QUICK, rank=4, output_dir=tmp_path / "cut").provenance
    assert whole is not None and again is not None
    assert again["files"] == whole["files"] and json.dumps(again["report"]) == json.dumps(whole["report"])


def test_the_original_is_needed(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="known from the original alone"):
        recover(base, **QUICK, output_dir=tmp_path / "out")
