"""Early stopping: the best of the looks is kept, the same bytes however often the run is killed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands

from compress import prune, recover
from weightworks.errors import UsageError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.sources import file_digest
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {
    "dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32", "batch_size": 2, "held_out": 4,
    "num_samples": 24, "steps": 12, "look_every": 2, "patience": 2, "schedule": "ft", "train": ["norm"],
}  # fmt: skip
# So few rows that they are soon known by heart.
FEW: dict[str, Any] = {**QUICK, "num_samples": 6, "batch_size": 4, "train": ["weights"], "lr": 5e-3}
DONE = "weightworks.store.writer:CheckpointWriter.done"
ALWAYS = [["constant", f"weightworks.engine.modelwise:SAVE_{name}", 0] for name in ("SECONDS", "SHARE")]


def round_of(outcome: Any) -> dict[str, Any]:
    (facts,) = outcome.provenance["training"]["rounds"]
    return facts


def test_the_best_values_are_those_of_a_run_that_ends_there(sparse: Path, tmp_path: Path) -> None:
    """Of so few rows that it gets worse: the run ends early, with the bytes of one of as many steps as the best look."""
    outcome = recover(sparse, **FEW, output_dir=tmp_path / "out")
    facts = round_of(outcome)
    losses = [loss for _, loss in facts["looks"]]
    best, _ = facts["looks"][losses.index(min(losses))]
    assert 0 < best < facts["steps"] == facts["looks"][-1][0] == best + 2 * 2 < 12  # patience times look_every
    assert facts["held_out_after"] == min(losses)
    assert outcome.provenance is not None
    assert outcome.provenance["training"]["steps"] == facts["steps"]
    assert "stopped early" in (outcome.target / "README.md").read_text()
    plain = {key: value for key, value in FEW.items() if key not in ("patience", "look_every", "steps")}
    short = recover(sparse, **plain, steps=best, output_dir=tmp_path / "short")
    assert file_digest(short.target / "model.safetensors") == file_digest(outcome.target / "model.safetensors")


def test_the_start_may_be_the_best(sparse: Path, tmp_path: Path) -> None:
    outcome = recover(sparse, **{**QUICK, "lr": 1.0}, output_dir=tmp_path / "out")
    assert round_of(outcome)["steps"] == 4
    before, after = (Checkpoint.open(folder) for folder in (sparse, outcome.target))
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_what_gets_better_takes_all_steps(sparse: Path, tmp_path: Path) -> None:
    outcome = recover(sparse, **QUICK, lr=1e-3, output_dir=tmp_path / "out")
    facts = round_of(outcome)
    assert facts["steps"] == 12
    assert [step for step, _ in facts["looks"]] == [0, 2, 4, 6, 8, 10, 12]
    assert facts["held_out_after"] == facts["looks"][-1][1] < facts["looks"][0][1]


def test_rounds_stop_one_by_one(small: Path, tmp_path: Path) -> None:
    options = {key: value for key, value in QUICK.items() if key != "train"}
    outcome = prune(small, method="imp", **options, rounds=2, lr=0.05, output_dir=tmp_path / "out")
    assert outcome.provenance is not None
    rounds = outcome.provenance["training"]["rounds"]
    assert all(facts["held_out_after"] == min(loss for _, loss in facts["looks"]) for facts in rounds)
    assert outcome.provenance["training"]["steps"] == sum(facts["steps"] for facts in rounds)
    assert all(len(facts["losses"]) == facts["steps"] for facts in rounds)


def test_killed_again_and_again(compress: Commands, sparse: Path, tmp_path: Path) -> None:
    options = {**FEW, "look_every": 1, "patience": 1}
    words = [
        text
        for key, value in options.items()
        for text in ("--" + key.replace("_", "-"), ",".join(value) if isinstance(value, list) else str(value))
    ]
    command = ("recover", sparse, *words, "-q", "-o", "out")
    (tmp_path / "a").mkdir()
    assert compress(*command, cwd=tmp_path / "a").code == 0
    (tmp_path / "b").mkdir()
    look = "weightworks.engine.modelwise:write_snapshot"  # of the best, or of the run
    killed = 0
    for fault in (
        ["signal_at", look, 2, {"after": True}],
        ["signal_at", look, 2],
        ["signal_at", DONE, 2, {"after": True}],
    ):
        killed += compress(*command, cwd=tmp_path / "b", faults=[fault, *ALWAYS]).code == -signal.SIGKILL
    assert killed >= 2
    run = compress(*command, cwd=tmp_path / "b")
    assert run.code == 0, run.err
    made, expected = (
        {path.name: file_digest(path) for path in (tmp_path / name / "out").iterdir()} for name in ("b", "a")
    )
    assert made == expected


def test_blocks_have_no_loss_to_wait_for(small: Path, sparse: Path) -> None:
    for way in ({"method": "ebft"}, {"mode": "reconstruct"}):
        with pytest.raises(UsageError, match="patience waits for the held-out loss of the whole model"):
            recover(sparse, teacher=small, patience=1, **way)
