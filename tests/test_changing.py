"""Inputs that change while they are read: nothing is made of two contents."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from commands import FEW, Commands
from test_resume import contents

DONE = "weightworks.store.writer:CheckpointWriter.done"
CLOSE = "weightworks.store.writer:CheckpointWriter.close"
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


def test_a_staging_folder_that_vanishes(compress: Commands, place: Path) -> None:
    run = compress(*QUANTIZE, cwd=place, faults=[["vanishing", DONE, 3, str(place / "out.partial")]])
    assert run.code == 1, run.err
    assert "out.partial/scratch" in run.err or "out.partial/" in run.err
    assert "cannot be read or written (No such file or directory)" in run.err or "cannot write" in run.err
    shutil.rmtree(place / "out.partial", ignore_errors=True)
    assert compress(*QUANTIZE, cwd=place).code == 0


@pytest.mark.parametrize("more", [1_000_000, 24_000_000, 48_000_000])
def test_little_memory(compress: Commands, place: Path, more: int) -> None:
    """Whether or not it comes through, nothing half-written is there, and the same command again goes on."""
    run = compress(*QUANTIZE, cwd=place, faults=[["little_memory", more]])
    assert run.code in (0, 1), run.err
    if run.code:
        assert "memory" in run.err
        assert not (place / "out").exists()
    assert compress(*QUANTIZE, cwd=place).code == 0


@pytest.mark.parametrize("call", ["os:pwrite", "os:fsync", "os:fdatasync", "os:posix_fallocate"])
def test_a_disk_that_is_full_for_once(compress: Commands, place: Path, call: str) -> None:
    run = compress(*QUANTIZE, cwd=place, faults=[["no_space", call, 1]])
    assert run.code == 1, run.err
    assert "cannot write: No space left on device" in run.err
    assert not (place / "out").exists()
    assert compress(*QUANTIZE, cwd=place).code == 0


def test_interrupted_twice(compress: Commands, place: Path) -> None:
    twice = ["signal_at", DONE, 3, {"sent": int(signal.SIGINT)}], ["signal_at", CLOSE, 1, {"sent": int(signal.SIGINT)}]
    run = compress(*QUANTIZE, cwd=place, faults=list(twice))
    assert run.code == 130, run.err
    assert not (place / "out").exists()
    again = compress(*QUANTIZE, cwd=place)
    assert again.code == 0
    assert "resuming after block" in again.err


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
