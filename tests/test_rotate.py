"""Rotation: orthogonal, exact on every model that it takes, refused on others, and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LLAMA, TIED, Architecture
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from compress.quantize import gptq
from weightworks.engine.rotating import rotated
from weightworks.errors import MethodError
from weightworks.plan.stage import run_stage
from weightworks.plan.verify import verify
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.rotations import Rotation, paley, split

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(num_samples=4, seq_len=64, dtype="float32")
TAKEN = {
    **{name: ARCHITECTURES[name] for name in ("llama", "llama-tied-sharded", "qwen2", "qwen3", "phi3", "mixtral")},
    "gemma": Architecture("gemma", {**TIED, "head_dim": 16}),
    "odd-llama": Architecture("llama", {**LLAMA, "hidden_size": 52, "attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("size", [1, 12, 43, 64, 96, 320])
def test_it_is_orthogonal_and_undone(size: int) -> None:
    rotation, eye = Rotation(size, 3), torch.eye(size, dtype=torch.float64)
    q = rotation.right(eye)
    torch.testing.assert_close(q @ q.T, eye, atol=1e-12, rtol=0)
    x = torch.randn(2 * size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.left(x), torch.block_diag(q, q).T @ x)
    torch.testing.assert_close(rotation.back(rotation.right(x.T)), x.T)
    if size != 43:  # a prime that no Paley matrix has for its side
        torch.testing.assert_close(q.abs(), torch.full_like(q, size**-0.5))


def test_hadamard_factors() -> None:
    assert [split(size) for size in (4096, 3072, 5120, 172)] == [(4096, 1), (256, 12), (256, 20), (4, 43)]
    assert torch.equal(paley(12) @ paley(12).T, 12 * torch.eye(12, dtype=torch.float64))
    assert not torch.equal(Rotation(64, 0).right(torch.eye(64)), Rotation(64, 1).right(torch.eye(64)))


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    """Of stock transformers, in float64, its norms too, which are float32 there whatever the model is."""
    config = AutoConfig.from_pretrained(checkpoint.root)
    if checkpoint.untied:
        config.tie_word_embeddings = False
    folder = checkpoint.root
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in checkpoint.tensors:
            parameter.copy_(checkpoint.read(name, torch.float64))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = exact_norm(module)
    return model(torch.arange(48).view(2, 24)).logits


def exact_norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    gain = norm.weight + (type(norm).__name__ == "GemmaRMSNorm")
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return lambda x: gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("name", [name for name in TAKEN if name != "mixtral"])
def test_logits_stay(name: str, tmp_path: Path) -> None:
    """Exact but for rounding in float64: gains are folded, biases turned, heads untied, and all value heads found."""
    source = Checkpoint.open(TAKEN[name].save(tmp_path / "source"))
    turned = rotated(source, seed=1)
    before, after = logits(source), logits(turned)
    assert float((after - before).abs().max()) < 1e-9 * float(before.abs().max())
    turns = turned.turns or {}
    assert sum(turn.heads is not None for turn in turns.values() if turn.right) == 2
    assert turned.untied == bool(source.config.get("tie_word_embeddings"))
    weights = [one for one in source.tensors if one.endswith("_proj.weight")]
    assert all(not torch.equal(source.read(one), turned.read(one)) for one in weights)
    rows = turned.read_rows("model.embed_tokens.weight", 3, 7)
    assert torch.equal(rows, turned.read("model.embed_tokens.weight")[3:7])


@pytest.mark.parametrize(
    ("name", "why"),
    [("opt", "LayerNorm"), ("gpt2", "LayerNorm"), ("gemma2", "scales channels"), ("gpt_neox", "LayerNorm")],
)
def test_others_are_refused(name: str, why: str, tmp_path: Path) -> None:
    source = Checkpoint.open(ARCHITECTURES[name].save(tmp_path / "source"))
    with pytest.raises(MethodError, match=why):
        rotated(source, seed=0)


def test_large_channels_are_spread_out(small: Path) -> None:
    source = Checkpoint.open(small)
    turned = rotated(source, seed=0)
    turn = (turned.turns or {})["model.layers.0.self_attn.q_proj.weight"]
    weight = source.read("model.layers.0.self_attn.q_proj.weight")
    weight[:, :3] *= 16
    assert kurtosis(weight) > 20 and kurtosis(turn.apply(weight, source)) < 3.5  # 3 is that of normal numbers


def kurtosis(weight: torch.Tensor) -> float:
    centred = weight.double() - weight.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def quantized(source: Path, target: Path, method: str = "rtn", **options: Any) -> dict[str, Any]:
    outcome = run_stage("quantize", method, str(source), options, SETTINGS, output_dir=target)
    assert outcome.provenance is not None
    return outcome.provenance


def test_the_trained_model_stays_what_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    """A dense output in 8 bits is the model itself in another basis, which stock transformers loads."""
    told = quantized(tiny_llama, tmp_path / "out", bits=8, rotate=True, format="dense")
    after = load_file(tmp_path / "out/model.safetensors")
    assert told["quality"]["result"] == pytest.approx(told["quality"]["dense"], rel=2e-3)
    assert told["rotation"]["value_heads"] and told["tensors"]["rotated"]
    assert all(float(after[name].float().sub(1).abs().max()) == 0 for name in after if name.endswith("norm.weight"))
    assert all(check["ok"] for check in verify(str(tmp_path / "out")))


@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_gptq_follows(name: str, tmp_path: Path) -> None:
    """Experts, and a head that was shared: packed, reloaded by stock transformers, as the run's own weights are."""
    source = TAKEN[name].save(tmp_path / "source")
    told = quantized(source, tmp_path / "out", "gptq", bits=8, group_size=32, rotate=True)
    assert told["quality"]["result"] == pytest.approx(told["quality"]["dense"], rel=0.02)
    assert told["checks"]["loader"].startswith("stock transformers")


def test_the_basis_follows_the_seed(small: Path, tmp_path: Path) -> None:
    """A killed run goes on to the same bytes; another seed is another basis."""
    whole = quantized(small, tmp_path / "whole", "gptq", rotate=True)
    calls, solve = [], gptq.Method.solve

    def stop(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return solve(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq.Method, "solve", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(small, tmp_path / "cut", "gptq", rotate=True)
    assert quantized(small, tmp_path / "cut", "gptq", rotate=True)["files"] == whole["files"]
    first, second = (rotated(Checkpoint.open(small), seed=seed).read("lm_head.weight") for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_pruned_model_is_refused(sparse: Path) -> None:
    with pytest.raises(MethodError, match="fills its zeros"):
        rotated(Checkpoint.open(sparse), seed=0)
