"""LLM-FP4: against the released code's own numbers, and what of it a container can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands
from safetensors.torch import load_file

from compress.minifloat import Minifloat, formats
from compress.quantize import llm_fp4
from compress.quantize.llm_fp4 import Method, Options, Samples, losses, search, search_weight
from weightworks.errors import UsageError
from weightworks.stage.protocols import Target
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.floats import decode

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = Target("model.layers.0.mlp.up_proj.weight", torch.bfloat16)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    case = load_file(shared / "golden" / "llm_fp4" / "d_64x128.safetensors")
    return {**case, "X": case["X"].float().flatten(0, 1)}


@pytest.fixture(scope="module")
def figures(shared: Path) -> dict[str, Any]:
    runs: dict[str, Any] = json.loads((shared / "golden" / "llm_fp4" / "d_64x128.json").read_text())["runs"]
    return runs


@pytest.mark.parametrize("kind", formats(4), ids=str)
def test_golden_search_of_weights(golden: dict[str, torch.Tensor], kind: Minifloat) -> None:
    found = search_weight(golden["W"], golden["X"], golden["X"] @ golden["W"].T, (kind,))
    alike = torch.isclose(found.bias[:, 0], golden[f"w_only.{kind}.w_bias"], rtol=1e-5)
    assert alike.float().mean() >= 0.97
    rounded = kind.round(golden["W"], golden[f"w_only.{kind}.w_bias"].unsqueeze(1))
    assert torch.isclose(rounded, golden[f"w_only.{kind}.w_quantised"], rtol=1e-5).float().mean() >= 0.995


def test_golden_search_of_weights_and_inputs(golden: dict[str, torch.Tensor], figures: dict[str, Any]) -> None:
    found = search(golden["W"], golden["X"], input_bits=4, rounds=3)
    assert (str(found.kind), str(found.input_kind)) == ("E2M1", "E2M1")
    assert found.input_bias is not None and found.channel_bias is not None
    assert torch.isclose(found.bias[:, 0], golden["w4a4.w_bias"], rtol=1e-4).float().mean() >= 0.7
    assert torch.isclose(found.input_bias, golden["w4a4.a_tensor_bias"], rtol=1e-5)
    assert torch.allclose(found.channel_bias, golden["w4a4.a_channel_bias_effective"])
    assert found.error == pytest.approx(figures["w4a4"]["output_mse_true_format"], rel=1e-3)
    rounded = Minifloat(2, 1).round(golden["X"], found.channel_bias).view(2, 32, 128)
    assert torch.isclose(rounded, golden["w4a4.x_quantised_true_format"], rtol=1e-5).float().mean() >= 0.995


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 64, generator=generator) * torch.rand(64, generator=generator).add(0.05)
    inputs[:, 3] *= 40
    return torch.randn(48, 64, generator=generator) / 20, inputs


def test_whole_shifts_of_channels_move_into_the_weights() -> None:
    """Products of inputs under one bias and weights whose columns are shifted are those of inputs under a bias a channel."""
    weight, inputs = problem()
    found = search(weight, inputs, input_bits=4, rounds=1)
    assert found.input_kind is not None and found.input_bias is not None and found.channel_bias is not None
    shift = (found.channel_bias - found.input_bias).round()
    assert bool((shift >= 0).all()) and 0 < float(shift.max()) <= found.input_kind.reach
    plain = found.input_kind.round(inputs * torch.exp2(shift), found.input_bias)
    rounded = found.input_kind.round(inputs, found.channel_bias)
    assert torch.allclose(plain @ (found.weight * torch.exp2(-shift)).T, rounded @ found.weight.T, atol=1e-5)


def test_eight_bits_of_inputs_lose_less_than_four() -> None:
    weight, inputs = problem()
    errors = [search(weight, inputs, input_bits=bits, rounds=2).error for bits in (16, 8, 4)]
    assert errors[0] <= errors[1] < errors[2]


def test_moments_give_the_losses_of_products() -> None:
    weight, inputs = problem()
    rounded = Minifloat(2, 1).round(inputs, Minifloat(2, 1).bias(inputs.abs().amax(0)))
    other = Minifloat(3, 0).round(weight, Minifloat(3, 0).bias(weight.abs().amax(1, keepdim=True)))
    direct = (rounded @ other.T - inputs @ weight.T).square().mean(0)
    assert torch.allclose(losses(weight, rounded, inputs @ weight.T)(other)[:, 0], direct, rtol=1e-3)


def test_samples_come_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_fp4, "TOKENS", 100)
    samples = Samples(1, torch.device("cpu"))
    for start in range(0, 4000, 50):
        samples.add(torch.arange(start, start + 50).unsqueeze(1).float())
    kept = samples.inputs()[:, 0]
    assert samples.tokens == 4000 and 100 <= len(kept) <= 200
    assert float(kept[0]) == 0 and float(kept[-1]) > 3800 and float(kept.diff().max()) <= 50
    samples.add(torch.full((50, 1), torch.nan))
    assert samples.dropped == 50


@pytest.mark.parametrize("scheme", ["W4A16", "W4A4"])
def test_what_is_packed_is_what_was_searched(scheme: str) -> None:
    weight, inputs = problem()
    method = Method(Options(scheme=scheme))
    samples = method.watch(64, torch.device("cpu"))
    samples.add(inputs)
    (solution,) = method.solve([weight.clone()], samples, [TARGET])
    packed = solution.weight
    assert (packed.scale.float() == packed.scale[:, :1].float()).all()  # one scale a row
    scale = packed.scale[:, :1].float() / packed.global_scale
    assert torch.equal(solution.dense(), decode(packed.codes, "E2M1") * scale)
    bias = 1 - torch.log2(scale)
    assert torch.allclose(solution.dense(), Minifloat(2, 1).round(weight, bias), atol=1e-6)
    assert (packed.input_scale is None) == (scheme == "W4A16") and not solution.fallbacks
    assert 0 < solution.facts["relative_error"] < 0.05


def test_dense_output_says_that_inputs_are_not_rounded() -> None:
    weight, inputs = problem()
    method = Method(Options(scheme="W4A8"))
    samples = method.watch(64, torch.device("cpu"))
    samples.add(inputs)
    (solution,) = method.solve([weight.clone()], samples, [TARGET])
    assert solution.facts["weight_format"] in ("E3M0", "E2M1", "E1M2")
    assert "which a dense checkpoint does not round" in solution.fallbacks[0]
    with pytest.raises(UsageError, match="no container has E2M1 weights and inputs of 8 bits"):
        Options.parse({"scheme": "W4A8", "format": "compressed-tensors"}, where="quantize.llm_fp4")


def test_too_few_tokens_are_told() -> None:
    weight, inputs = problem()
    method = Method(Options())
    samples = method.watch(64, torch.device("cpu"))
    samples.add(inputs[:10])
    (solution,) = method.solve([weight.clone()], samples, [TARGET])
    assert solution.fallbacks == ["saw 10 tokens (fewer than 64), searched for the weight itself"]


def test_the_command(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("--num-samples", "4", "--seq-len", "64", "--ignore", "re:.*layers\\.[1-5]\\.", "-o", "out")
    run = compress("quantize", tiny_llama, "--method", "llm-fp4", "--scheme", "W4A4", *words, cwd=tmp_path)
    assert run.code == 0, run.err
    view = DenseView(Checkpoint.open(tmp_path / "out"))
    assert view.scheme is not None and str(view.scheme.inputs) == "E2M1 with E4M3 scales, groups of 16"
    checks = json.loads((tmp_path / "out" / "provenance.json").read_text())["checks"]
    assert checks["loader"] == "stock transformers" and checks["dtype"] == "bfloat16"
