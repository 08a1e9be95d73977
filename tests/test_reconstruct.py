"""Reconstruction: blocks come nearer to the original's, whatever is imitated on whatever inputs; streamed, killed, on disk."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import Commands

from compress import prune, recover
from weightworks.errors import ArchitectureError, MethodError
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import Masks
from weightworks.store.sources import file_digest
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {
    "mode": "reconstruct", "steps": 8, "batch_size": 24, "held_out": 3, "lr": 5e-3, "rank": 4, "num_samples": 27,
    "dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32",
}  # fmt: skip
DONE = "weightworks.store.writer:CheckpointWriter.done"


def windows(outcome: Any) -> list[dict[str, Any]]:
    """The figures of every window, in turn."""
    return [one for block in outcome.provenance["training"]["blocks"] for one in block]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


WAYS: list[dict[str, Any]] = [
    {},
    {"window": "both"},
    {"inputs": "dense"},
    {"targets": "trajectory"},
    {"window": "mlp", "inputs": "dense"},
    {"window": "attn", "targets": "trajectory", "accumulate": 2},
    {"train": ["weights"], "lr": 1e-3},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_blocks_come_nearer_and_zeros_stay(small: Path, sparse: Path, tmp_path: Path, way: dict[str, Any]) -> None:
    outcome = recover(sparse, teacher=small, **{**QUICK, **way}, output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    found = windows(outcome)
    assert len(found) == (4 if way.get("window") == "both" else 2)
    for one in found:
        assert one["before"] > 0.02
        assert one["after"] < 1.03 * one["before"]  # on text that it was not trained on; the weights are random
        assert one["losses"][-1] < 0.98 * one["losses"][0]  # on that it was, all of it in each step
    assert outcome.provenance is not None
    facts = outcome.provenance["training"]
    assert facts["steps"] == 8 * len(found)
    assert file_digest(outcome.target / MASKS) == file_digest(sparse / MASKS)
    masks, view = Masks.of(sparse), DenseView(Checkpoint.open(outcome.target))
    assert masks is not None
    for name in masks.infos:
        assert not view.read(name)[~masks.read(name, view.shape(name))].view(torch.int16).any()


def test_on_the_originals_inputs_both_aims_are_the_same(small: Path, sparse: Path, tmp_path: Path) -> None:
    made = [
        recover(sparse, teacher=small, **QUICK, inputs="dense", targets=targets, output_dir=tmp_path / targets).target
        for targets in ("local", "trajectory")
    ]
    digests = [file_digest(folder / "model.safetensors") for folder in made]
    assert digests[0] == digests[1]


def test_the_original_has_nothing_to_win(small: Path, tmp_path: Path) -> None:
    """A model that is its own teacher has no error and no gradient."""
    outcome = recover(small, teacher=small, **QUICK, output_dir=tmp_path / "out")
    assert [(one["before"], one["after"]) for one in windows(outcome)] == [(0.0, 0.0)] * 2
    before, after = (Checkpoint.open(folder) for folder in (small, outcome.target))
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_killed_again_and_again_and_on_disk(compress: Commands, small: Path, sparse: Path, tmp_path: Path) -> None:
    """After each journal entry, with activations on disk: the bytes of an undisturbed run that kept them in memory."""
    options = {**QUICK, "window": "both", "targets": "trajectory"}
    words = [text for key, value in options.items() for text in ("--" + key.replace("_", "-"), str(value))]
    command = ("recover", sparse, "--teacher", small, *words, "-q", "-o", "out")
    (tmp_path / "a").mkdir()
    assert compress(*command, cwd=tmp_path / "a").code == 0
    (tmp_path / "b").mkdir()
    faults, killed = (["signal_at", DONE, 1, {"after": True}], ["planned", {"on_disk": True}]), 0
    while (run := compress(*command, cwd=tmp_path / "b", faults=faults)).code == -signal.SIGKILL:
        killed += 1
        assert killed < 10
    assert run.code == 0, run.err
    assert killed == 6  # the proof, the losses before, two blocks, what was trained, what was copied
    assert contents(tmp_path / "b" / "out") == contents(tmp_path / "a" / "out")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_layouts(name: str, tmp_path: Path) -> None:
    source = ARCHITECTURES[name].save(tmp_path / "source")
    pruned = prune(source, method="magnitude", pattern="2:4", output_dir=tmp_path / "sparse").target
    outcome = recover(pruned, teacher=source, **QUICK, window="both", output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    assert all(one["losses"][-1] < one["losses"][0] for one in windows(outcome))


def test_what_cannot_be_imitated_is_refused(small: Path, sparse: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="reconstruction imitates the original"):
        recover(sparse, **QUICK, output_dir=tmp_path / "out")
    with pytest.raises(MethodError, match="cannot be imitated block by block: it is of another shape"):
        recover(sparse, teacher=tiny_llama, **QUICK, output_dir=tmp_path / "out")
    opt = ARCHITECTURES["opt"].save(tmp_path / "opt")
    with pytest.raises(ArchitectureError, match="OPTDecoderLayer: its weights are in self_attn, fc1, fc2") as caught:
        recover(opt, teacher=opt, **QUICK, window="mlp", output_dir=tmp_path / "out")
    assert caught.value.hint == "take --window block"
    assert not (tmp_path / "out.partial").exists()


def test_a_head_is_in_no_block(small: Path, sparse: Path, tmp_path: Path) -> None:
    options = {**QUICK, "train": ["norm", "head"], "steps": 1}
    outcome = recover(sparse, teacher=small, **options, output_dir=tmp_path / "out")
    assert outcome.fallbacks == ["head: left as it is; it is in no block"]
    assert outcome.provenance is not None
    changed = {row["tensor"] for row in outcome.provenance["report"]}
    assert changed == {
        f"model.layers.{k}.{part}_layernorm.weight" for k in (0, 1) for part in ("input", "post_attention")
    }


def test_estimate_of_a_reconstruction(compress: Commands, small: Path, sparse: Path, tmp_path: Path) -> None:
    words = [
        text
        for key, value in {**QUICK, "num_samples": 150, "seq_len": 64}.items()
        for text in ("--" + key.replace("_", "-"), str(value))
    ]
    command = ("recover", sparse, "--teacher", small, *words, "--dry-run", "--json", "-o", "out")
    costs = compress(*command, cwd=tmp_path).json["estimate"]
    assert costs["on_disk"] is False
    assert costs["disk_bytes"] > costs["output_bytes"]
    tight = compress(*command, "--max-memory", str(costs["peak_bytes"] - 1_000_000), cwd=tmp_path).json["estimate"]
    assert tight["on_disk"] is True
    assert not list(tmp_path.iterdir())
