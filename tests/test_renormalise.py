"""Renormalised merges: layers put out what the models do, measured by hooks of torch on stock models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT_TEXT, Run
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from merge import merge as merge_models
from weightworks.engine.moments import Moments, Target, factor_of, target_of
from weightworks.errors import CalibrationError, WeightworksError
from weightworks.plan.renormalising import LENGTH, WINDOWS
from weightworks.stream.calibration import load_windows
from weightworks.testing.tiny import make_model

OPTIONS: dict[str, Any] = {"device": "cpu", "check": "files", "out_dtype": "float32"}


def moments(outputs: torch.Tensor) -> Moments:
    found = Moments.none(outputs.shape[1])
    for part in outputs.split(7):
        found.add(part)
    return found


def test_moments_are_those_of_all_outputs() -> None:
    outputs = 3 + 2 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    found = moments(outputs)
    torch.testing.assert_close(found.mean, outputs.double().mean(0))
    torch.testing.assert_close(found.variance, outputs.double().var(0, unbiased=False))


def test_factors() -> None:
    """The ratio of deviations, within bounds; what is silent stays; rows of a unit share the ratio of pooled variances."""
    outputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = moments(outputs * torch.tensor([1.0, 1e-9, 1.0, 1.0]))
    deviation = found.variance.sqrt()
    target = Target(found.mean, deviation * torch.tensor([1.25, 1.0, 9.0, 0.1], dtype=torch.float64))
    torch.testing.assert_close(factor_of(target, found, 1), torch.tensor([1.25, 1.0, 2.0, 0.5], dtype=torch.float64))
    pooled = factor_of(target_of([moments(1.5 * outputs)], [1.0], 2), moments(outputs), 2)
    torch.testing.assert_close(pooled, torch.full((4,), 1.5, dtype=torch.float64))


def test_targets_are_means_of_deviations() -> None:
    """Not of variances: models of deviations 1 and 3 have the target 2, weighted 3 to 1 they have 1.5."""
    one = torch.tensor([[-1.0], [1.0]])
    for weights, expected in (([1.0, 1.0], 2.0), ([3.0, 1.0], 1.5)):
        assert float(target_of([moments(one), moments(3 * one)], weights, 1).deviation) == pytest.approx(expected)


def opt_model(folder: Path) -> Path:
    """A model with biases, and the tokenizer of the other."""
    make_model(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    shutil.rmtree(folder / "model.safetensors", ignore_errors=True)
    model.save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, seed: int) -> Path:
    """A copy whose matrices are others: an average with it varies less."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor
        if tensor.ndim < 2
        else (tensor.float() + tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@torch.no_grad()
def outputs_of(folder: Path) -> dict[str, torch.Tensor]:
    """Outputs [tokens, out] of every linear of the blocks for the windows of the text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(LENGTH, model.config.max_position_embeddings)
    tokens = load_windows(str(SHORT_TEXT), folder, num_samples=WINDOWS, seq_len=length, seed=0).tokens
    kept: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(
                lambda _, __, out, name=name: kept.setdefault(name, []).append(out.flatten(0, -2))
            )
    for window in tokens:
        model(window[None])
    return {name: torch.cat(parts).double() for name, parts in kept.items()}


@pytest.mark.parametrize("make", [make_model, opt_model], ids=["llama", "opt"])
def test_layers_put_out_what_the_models_do(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Standard deviations of units (of heads, where rotary embeddings tie rows) are the mean of the models', and means
    where there are biases of single units."""
    one = make(tmp_path / "one")
    two = changed(one, tmp_path / "two", 1)
    outcome = merge_models([one, two], output_dir=tmp_path / "out", renormalise=str(SHORT_TEXT), **OPTIONS)
    assert outcome.provenance is not None
    facts = outcome.provenance["renormalisation"]
    assert facts["left"] == {}
    assert "| rows renormalised | on " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    seen = [outputs_of(tmp_path / name) for name in ("one", "two", "out")]
    merge_models([one, two], output_dir=tmp_path / "plain", **OPTIONS)
    plain = outputs_of(tmp_path / "plain")
    closer = 0
    for name in seen[0]:
        factors = facts["factors"][f"{name}.weight"]
        assert 0.5 < factors["least"] <= factors["greatest"] < 2.0  # none is at its bound
        head = 16 if make is opt_model else 32
        tie = head if any(part in name for part in ("q_proj", "k_proj", "v_proj")) else 1
        first, second, made, before = (
            each[name].var(0, unbiased=False).view(-1, tie).mean(1).sqrt() for each in (*seen, plain)
        )
        target = (first + second) / 2
        assert float(((made - target) / target).abs().max()) < 1e-4, name
        closer += int(((before - target) / target).abs().max() > 1e-2)
        if make is opt_model and tie == 1:
            mean = (seen[0][name].mean(0) + seen[1][name].mean(0)) / 2
            torch.testing.assert_close(seen[2][name].mean(0), mean, atol=1e-4, rtol=1e-4)
    assert closer > len(seen[0]) // 2  # without it they are not


def test_a_model_merged_with_itself_stays(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one")
    merge_models([one, one], output_dir=tmp_path / "out", renormalise="builtin", device="cpu", check="files")
    made, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    assert all(torch.equal(made[name], tensor) for name, tensor in before.items())


def test_the_text_is_part_of_the_identity(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one")
    text = tmp_path / "text.txt"
    for content, cached in ((SHORT_TEXT.read_text(), False), (SHORT_TEXT.read_text(), True), ("other " * 999, False)):
        text.write_text(content)
        outcome = merge_models(
            [one, one], output_dir=tmp_path / "out", renormalise=str(text), overwrite=not cached, **OPTIONS
        )
        assert outcome.cached == cached


def test_what_is_refused(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one")
    with pytest.raises(CalibrationError, match=r"nowhere.txt: no such file"):
        merge_models([one, one], output_dir=tmp_path / "out", renormalise="nowhere.txt", **OPTIONS)
    with pytest.raises(WeightworksError, match=r"shorter than one window"):
        short = tmp_path / "short.txt"
        short.write_text("too short")
        merge_models([one, one], output_dir=tmp_path / "out", renormalise=str(short), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_killed_renormalisation_goes_on(merge: Callable[..., Run], tmp_path: Path) -> None:
    one = make_model(tmp_path / "one")
    two = changed(one, tmp_path / "two", 1)
    where = "weightworks.engine.renormalising:Renormaliser._correct"
    words = ("soup", one, two, "--renormalise", SHORT_TEXT, "--check", "files", "-q", "-o")
    assert merge(*words, "soup", cwd=tmp_path, faults=[["signal_at", where, 2]]).code == -9
    again = merge(*words, "soup", cwd=tmp_path, faults=[["count_calls", where, str(tmp_path / "calls")]])
    assert again.code == 0, again.err
    assert (tmp_path / "calls").read_text() == "1"  # the first block had been journalled
    assert merge(*words, "undisturbed", cwd=tmp_path).code == 0
    made, expected = (tmp_path / name / "model.safetensors" for name in ("soup", "undisturbed"))
    assert made.read_bytes() == expected.read_bytes()
