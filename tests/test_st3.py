"""ST-3: the gradient that passes straight through, thresholds and factors of the paper, exact masks, killed and continued."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands

from compress import prune
from compress.prune import st3
from compress.prune._straight import StraightThrough
from weightworks.errors import UsageError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.masks import Masks
from weightworks.store.sources import file_digest
from weightworks.stream.lessons import keyed
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {
    "method": "st3", "dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32", "steps": 6,
    "batch_size": 2, "held_out": 2, "lr": 1e-3,
}  # fmt: skip
DONE = "weightworks.store.writer:CheckpointWriter.done"
ALWAYS = [["constant", f"weightworks.engine.modelwise:SAVE_{name}", 0] for name in ("SECONDS", "SHARE")]


def layer(group: int = 0) -> tuple[torch.Tensor, StraightThrough]:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return weight, StraightThrough(weight, torch.ones(6, 8, dtype=torch.bool), keyed(0, "w"), group=group)


def test_nothing_pruned_is_the_weight_itself() -> None:
    weight, adapter = layer()
    assert torch.equal(adapter(weight), weight)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_gradient_passes_to_the_bit(pattern: str) -> None:
    """dL/dW is dL/dW', W' being what is multiplied with, at pruned weights too."""
    weight, adapter = layer(4 if pattern == "2:4" else 0)
    options = st3.Options(pattern=pattern)
    adapter.mask = options.mask(weight, 0.5)
    adapter.threshold = adapter.limit(weight, adapter.mask)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    made = adapter(weight)
    made.retain_grad()
    torch.tanh(x @ made.T).square().sum().backward()
    assert made.grad is not None
    assert adapter.raw.grad is not None
    assert torch.equal(adapter.raw.grad, made.grad)
    assert (adapter.raw.grad[~adapter.mask] != 0).all()


def test_values_are_those_of_the_paper() -> None:
    weight, adapter = layer()
    adapter.mask = st3.Options().mask(weight, 0.5)
    adapter.threshold = adapter.limit(weight, adapter.mask)
    threshold = weight.abs().flatten().kthvalue(24).values  # the largest that goes of 48
    kept = weight.abs() > threshold
    assert torch.equal(kept, adapter.mask)
    rest = (weight * kept).abs().mean(1, keepdim=True) / weight.abs().mean(1, keepdim=True)
    expected = 1.01 / (rest + 0.01) * (weight - weight.sign() * threshold) * kept
    torch.testing.assert_close(adapter(weight).detach(), expected)
    assert not adapter(weight)[~kept].any()


def test_sparsity_rises_and_stays() -> None:
    options = st3.Options(sparsity=0.8, rise=0.5)
    assert options.sparsity_at(0.0) == 0.0
    assert options.sparsity_at(0.25) == pytest.approx(0.8 * (1 - 0.5**3))
    assert options.sparsity_at(0.5) == options.sparsity_at(1.0) == 0.8


@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_masks_are_exact(small: Path, tmp_path: Path, amount: dict[str, Any]) -> None:
    outcome = prune(small, **QUICK, **amount, output_dir=tmp_path / "out")
    masks, view = Masks.of(outcome.target), Checkpoint.open(outcome.target)
    assert masks is not None
    assert len(masks.infos) == 14
    for name in masks.infos:
        weight = view.read(name)
        mask = masks.read(name, tuple(weight.shape))
        assert not weight[~mask].view(torch.int16).any()
        if "pattern" in amount:
            assert torch.all(mask.view(len(mask), -1, 4).sum(-1) == 2)
        else:
            assert int(mask.sum()) == mask.numel() - round(0.6 * mask.numel())


def test_killed_again_and_again(compress: Commands, small: Path, tmp_path: Path) -> None:
    """At every step, before and after masks are frozen; thresholds are those of the weights, wherever a run begins."""
    options = {**QUICK, "steps": 4}
    words = [text for key, value in options.items() for text in ("--" + key.replace("_", "-"), str(value))]
    command = ("prune", small, *words, "-q", "-o", "out")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert compress(*command, cwd=tmp_path / "a").code == 0
    faults, killed = [["signal_at", DONE, 1, {"after": True}], *ALWAYS], 0
    while (run := compress(*command, cwd=tmp_path / "b", faults=faults)).code == -signal.SIGKILL:
        killed += 1
        assert killed < 10
    assert run.code == 0, run.err
    assert killed == 7  # the proof, four steps, what was trained, what was copied
    made, expected = (
        {path.name: file_digest(path) for path in (tmp_path / name / "out").iterdir()} for name in ("b", "a")
    )
    assert made == expected


def test_patience_is_refused() -> None:
    with pytest.raises(UsageError, match="patience would keep values of a lower sparsity"):
        st3.Options.parse({"patience": 2}, where="prune.st3")
