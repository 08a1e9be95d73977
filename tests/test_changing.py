"""Inputs that change while they are read: nothing is made of two contents."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commands import FEW, Commands
from test_resume import contents

DONE = "weightworks.store.writer:CheckpointWriter.done"
QUANTIZE = ("quantize", "model", *FEW, "--ignore", "*.mlp.*", "-o", "out")


@pytest.fixture
def place(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path


def test_a_source_that_changes_under_us(compress: Commands, place: Path) -> None:
    run = compress(*QUANTIZE, cwd=place, faults=[["changing", DONE, 3, str(place / "model" / "model.safetensors")]])
    assert run.code == 1, run.err
    assert "model.safetensors: was changed while it was read; what was made of it is discarded" in run.err
    assert "run the same command again once nothing writes there" in run.err
    assert sorted(path.name for path in place.iterdir()) == ["model", "out.run.log"]
    assert compress(*QUANTIZE, cwd=place).code == 0  # of what is there now


def test_a_source_that_vanishes(compress: Commands, place: Path) -> None:
    run = compress(*QUANTIZE, cwd=place, faults=[["vanishing", DONE, 3, str(place / "model")]])
    assert run.code == 1, run.err
    assert "Traceback" not in run.err
    assert "model" in run.err
    assert not (place / "out").exists()


def test_a_source_that_is_touched(compress: Commands, place: Path, tmp_path: Path) -> None:
    """The same bytes under another time: nothing is said, nothing is lost, and clocks may stand anywhere."""
    weights = place / "model" / "model.safetensors"
    assert compress(*QUANTIZE, cwd=place, faults=[["touched", DONE, 3, str(weights)]]).code == 0
    first = contents(place / "out")
    shutil.rmtree(place / "out")
    for year in (0, 4_000_000_000):  # 1970, 2096
        for path in (place / "model").iterdir():
            os.utime(path, (year, year))
        run = compress(*QUANTIZE, cwd=place, faults=[["clock", 10**9 if year else -(10**9)]])
        assert run.code == 0, run.err
        assert contents(place / "out") == first
        shutil.rmtree(place / "out")
