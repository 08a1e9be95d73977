"""Block-wise fine-tuning: all kept weights of each block are trained towards the original's block, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import recover
from compress.recover import ebft
from weightworks.errors import MethodError
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import Masks
from weightworks.store.sources import file_digest
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {
    "steps": 8, "batch_size": 24, "held_out": 3, "lr": 1e-3, "num_samples": 27, "dataset": str(CALIBRATION_TEXT),
    "seq_len": 32, "device": "cpu", "dtype": "float32",
}  # fmt: skip


def test_every_kept_weight_of_the_blocks_is_trained(small: Path, sparse: Path, tmp_path: Path) -> None:
    outcome = recover(sparse, method="ebft", teacher=small, **QUICK, output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    assert outcome.provenance is not None
    for block in outcome.provenance["training"]["blocks"]:
        (figures,) = block
        assert figures["losses"][-1] < 0.9 * figures["losses"][0]
    before, after = (DenseView(Checkpoint.open(folder)) for folder in (sparse, outcome.target))
    assert file_digest(outcome.target / MASKS) == file_digest(sparse / MASKS)
    masks = Masks.of(sparse)
    assert masks is not None
    for name in after.names:
        if name not in masks.infos:
            assert torch.equal(after.read(name), before.read(name))
            continue
        mask, weight = masks.read(name, after.shape(name)), after.read(name)
        assert not weight[~mask].view(torch.int16).any()
        assert (weight != before.read(name))[mask].float().mean() > 0.5  # bfloat16 hides the smallest steps


def test_it_is_perps_reconstruction_of_all_weights(small: Path, sparse: Path, tmp_path: Path) -> None:
    """Two ways to say the same."""
    other = {"method": "perp", "mode": "reconstruct", "train": ["weights"]}
    ways = [{"method": "ebft"}, other]
    made = [
        recover(sparse, teacher=small, **QUICK, **way, inputs="dense", output_dir=tmp_path / way["method"]).target
        for way in ways
    ]
    assert file_digest(made[0] / "model.safetensors") == file_digest(made[1] / "model.safetensors")


def test_it_needs_the_original(sparse: Path, tmp_path: Path) -> None:
    assert ebft.Options().steps == 160
    with pytest.raises(MethodError, match=r"recover.ebft: reconstruction imitates the original"):
        recover(sparse, method="ebft", **QUICK, output_dir=tmp_path / "out")
