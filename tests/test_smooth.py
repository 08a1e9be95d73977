"""SmoothQuant: the function of the model stays, inputs become alike, and what no norm can take is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.quantize import gptq
from weightworks.engine.smoothing import SMALLEST
from weightworks.errors import MethodError
from weightworks.plan.stage import run_stage
from weightworks.plan.verify import verify
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.stream.norms import scaled
from weightworks.testing.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(num_samples=4, seq_len=64, dtype="float32")
OUTLIERS = slice(0, 4)


def with_outliers(folder: Path) -> Path:
    """The small model with a few input channels 64 times as large and the weights that read them as much smaller."""
    make_model(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers." in name and name.endswith("layernorm.weight"):
            tensor[OUTLIERS] *= 64
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, OUTLIERS] /= 64
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(source: Path, target: Path, method: str = "rtn", **options: Any) -> dict[str, Any]:
    outcome = run_stage("quantize", method, str(source), options, SETTINGS, output_dir=target)
    assert outcome.provenance is not None
    return outcome.provenance


@torch.no_grad()
def logits(folder: Path, weights: DenseView | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict({name: weights.read(name, torch.float32) for name in weights.names}, strict=False)
    return model(torch.arange(128).view(2, 64)).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_outliers(tmp_path_factory.mktemp("smooth") / "source")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_outliers_lose_their_harm(source: Path, tmp_path: Path, method: str) -> None:
    plain = run(source, tmp_path / "plain", method, scheme="W8A8")
    smooth = run(source, tmp_path / "smooth", method, scheme="W8A8", smooth=0.5)
    told = smooth["smoothing"]
    assert (told["strength"], told["norms"], told["weights"]) == (0.5, 4, 10)
    assert {name.split(".")[-2] for name in told["left"]} == {"o_proj", "down_proj"}
    assert (
        smooth["tensors"]["rescaled"] == 4
        and "handed part of their scale" in (tmp_path / "smooth/README.md").read_text()
    )
    expected = logits(source)
    errors = [(logits(tmp_path / name) - expected).square().mean() for name in ("plain", "smooth")]
    assert errors[1] < 0.2 * errors[0]
    assert all(check["ok"] for check in verify(str(tmp_path / "smooth")))
    assert plain["quality"]["dense"] == pytest.approx(smooth["quality"]["dense"], rel=1e-5)  # the function has stayed


def test_what_is_divided_is_what_is_multiplied(source: Path, tmp_path: Path) -> None:
    """Norm and weights are scaled against each other to the last bit: rounding the weights to 8 bits is all that is lost."""
    run(source, tmp_path / "out", scheme="W8A8", smooth=0.5)
    before, after = Checkpoint.open(source), DenseView(Checkpoint.open(tmp_path / "out"))
    norm, base = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"
    exact = before.read(norm, torch.float32) / after.read(norm, torch.float32)
    assert after.checkpoint.info(norm).dtype == torch.bfloat16 and float(exact.max() / exact.min()) > 8
    wanted = before.read(f"{base}.weight", torch.float32) * exact
    step = after.checkpoint.read(f"{base}.weight_scale", torch.float32)
    error = (after.read(f"{base}.weight") - wanted).abs() / step
    assert bool((error <= 0.501).float().mean() > 0.97) and float(error.max()) < 1.1  # the extremes may clip
    top = wanted.abs().amax(0)
    assert float(top[OUTLIERS].mean() / top[8:].mean()) == pytest.approx(1, abs=0.2)  # it was 1 / 64


@pytest.mark.parametrize(
    ("name", "norms", "left"),
    [("gemma2", 4, {"o_proj", "down_proj"}), ("opt", 4, {"out_proj", "fc2"}), ("falcon", 0, None), ("qwen3", 4, None)],
)
def test_norms_are_found_by_what_they_do(name: str, norms: int, left: set[str] | None, tmp_path: Path) -> None:
    """Gemma's multiply by one more than their weight, OPT's have biases, and falcon's feed two branches at once."""
    source = ARCHITECTURES[name].save(tmp_path / "source")
    told = run(source, tmp_path / "out", scheme="W8A8", smooth=0.5)
    assert told["quality"]["result"] == pytest.approx(told["quality"]["dense"], rel=0.02)
    smoothing = told["smoothing"]
    assert smoothing["norms"] >= norms
    if left is not None:
        assert {one.split(".")[-2] for one in smoothing["left"]} == left


def test_the_formula() -> None:
    weight, scale = torch.tensor([2.0, -1.0]), torch.tensor([4.0, 0.5])
    assert scaled(weight, scale, "plain").tolist() == [0.5, -2.0]
    assert scaled(weight, scale, "offset").tolist() == [-0.25, -1.0]
    assert SMALLEST == 1e-5


def test_weight_only_formats_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="helps where inputs are rounded"):
        run(source, tmp_path / "out", "gptq", smooth=0.5)


def test_a_killed_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(source, tmp_path / "whole", "gptq", scheme="NVFP4", smooth=0.5)
    calls = []

    def stop(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return solve(self, *args)

    solve = gptq.Method.solve
    monkeypatch.setattr(gptq.Method, "solve", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut", "gptq", scheme="NVFP4", smooth=0.5)
    monkeypatch.undo()
    again = run(source, tmp_path / "cut", "gptq", scheme="NVFP4", smooth=0.5)
    assert again["files"] == whole["files"] and json.dumps(again["report"]) == json.dumps(whole["report"])
