"""Renormalised pruned models: layers put out what the original's do, measured by hooks of torch on stock models."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT_TEXT, Commands
from safetensors.torch import load_file, save_file
from test_renormalise import opt_model
from torch import nn
from transformers import AutoModelForCausalLM

from compress import prune, recover
from compress.recover import renormalise
from weightworks.errors import MethodError
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.masks import Masks
from weightworks.store.sources import file_digest
from weightworks.stream.calibration import load_windows
from weightworks.testing.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT: dict[str, Any] = {"dataset": str(SHORT_TEXT), "num_samples": 8, "seq_len": 64, "device": "cpu"}


def float_llama(folder: Path) -> Path:
    """The small model in float32, so that rounding hides nothing."""
    make_model(folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


@torch.no_grad()
def outputs_of(folder: Path) -> dict[str, torch.Tensor]:
    """Outputs float64 [tokens, out] of every linear and norm of the blocks for the windows of the text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = load_windows(TEXT["dataset"], folder, num_samples=8, seq_len=64, seed=0).tokens
    kept: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or "norm" in name) and ".layers." in name:
            module.register_forward_hook(
                lambda _, __, out, name=name: kept.setdefault(name, []).append(out.flatten(0, -2))
            )
    for window in tokens:
        model(window[None])
    return {name: torch.cat(parts).double() for name, parts in kept.items()}


def apart(seen: torch.Tensor, wanted: torch.Tensor, tie: int) -> float:
    """The largest relative difference of standard deviations, of units of ``tie`` rows."""
    made, target = (one.var(0, unbiased=False).view(-1, tie).mean(1).sqrt() for one in (seen, wanted))
    return float(((made - target) / target).abs().max())


@pytest.mark.parametrize(("make", "norms"), [(float_llama, False), (float_llama, True), (opt_model, False)])
def test_layers_put_out_what_the_originals_do(make: Callable[[Path], Path], norms: bool, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    pruned = prune(source, method="magnitude", pattern="2:4", device="cpu", output_dir=tmp_path / "pruned").target
    outcome = recover(pruned, method="renormalise", teacher=source, **TEXT, norms=norms, output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    assert outcome.provenance is not None
    facts = outcome.provenance["renormalisation"]
    dense, before, after = (outputs_of(folder) for folder in (source, pruned, outcome.target))
    for name in dense:
        if "norm" in name and not norms:
            continue
        figures = facts["factors"][f"{name}.weight"]
        assert 0.5 < figures["least"] <= figures["greatest"] < 2.0  # none is at its bound
        tied = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        tie = (16 if make is opt_model else 32) if tied else 1
        assert apart(after[name], dense[name], tie) < 1e-4, name
        if "norm" not in name:
            assert apart(before[name], dense[name], tie) > 1e-2, name
        if make is opt_model and not tied:  # there is a bias, and no rows that share a factor
            torch.testing.assert_close(after[name].mean(0), dense[name].mean(0), atol=1e-4, rtol=1e-4)
    left = set(facts["means_left"])
    assert left == {f"{name}.weight" for name in without_means(dense, make, norms)}
    masks, view = Masks.of(pruned), Checkpoint.open(outcome.target)
    assert masks is not None
    assert file_digest(outcome.target / MASKS) == file_digest(pruned / MASKS)
    for name in masks.infos:
        assert not view.read(name)[~masks.read(name, view.info(name).shape)].view(torch.int32).any()


def without_means(dense: dict[str, torch.Tensor], make: Callable[[Path], Path], norms: bool) -> list[str]:
    """Layers whose means cannot be met: those without a bias, and those whose rows share a factor."""
    if make is opt_model:
        return [name for name in dense if any(part in name for part in ("q_proj", "k_proj", "v_proj"))]
    met = "model.layers.0.input_layernorm"  # it sees the same embeddings
    return [name for name in dense if (norms and name != met) or "norm" not in name]


def test_the_original_stays(small: Path, tmp_path: Path) -> None:
    assert renormalise.Method.renormalises
    outcome = recover(small, method="renormalise", teacher=small, **TEXT, norms=True, output_dir=tmp_path / "out")
    before, after = (Checkpoint.open(folder) for folder in (small, outcome.target))
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_what_is_left_out_stays(small: Path, sparse: Path, tmp_path: Path) -> None:
    outcome = recover(
        sparse, method="renormalise", teacher=small, **TEXT, ignore=["*.mlp.*"], output_dir=tmp_path / "out"
    )
    before, after = (Checkpoint.open(folder) for folder in (sparse, outcome.target))
    changed = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    assert changed == {f"model.layers.{k}.self_attn.{part}_proj.weight" for k in (0, 1) for part in "qkvo"}
    assert file_digest(outcome.target / MASKS) == file_digest(sparse / MASKS)


def test_a_killed_renormalisation_goes_on(compress: Commands, small: Path, sparse: Path, tmp_path: Path) -> None:
    """With hidden states on disk the second time: that must not show."""
    words = [text for key, value in TEXT.items() for text in ("--" + key.replace("_", "-"), str(value))]
    command = ("recover", sparse, "--method", "renormalise", "--teacher", small, *words, "-q", "-o")
    where = "weightworks.engine.renormalising:Renormaliser._correct"
    assert compress(*command, "out", cwd=tmp_path, faults=[["signal_at", where, 2]]).code == -signal.SIGKILL
    faults = [["count_calls", where, str(tmp_path / "calls")], ["planned", {"on_disk": True}]]
    again = compress(*command, "out", cwd=tmp_path, faults=faults)
    assert again.code == 0, again.err
    assert (tmp_path / "calls").read_text() == "1"  # the first block had been journalled
    assert compress(*command, "undisturbed", cwd=tmp_path).code == 0
    made, expected = (tmp_path / name / "model.safetensors" for name in ("out", "undisturbed"))
    assert made.read_bytes() == expected.read_bytes()


def test_what_cannot_be_is_refused(sparse: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="layers are to put out what the original's do") as caught:
        recover(sparse, method="renormalise", **TEXT, output_dir=tmp_path / "out")
    assert caught.value.hint == "name it: --teacher ORIGINAL"
    with pytest.raises(MethodError, match="cannot be imitated block by block: it is of another shape"):
        recover(sparse, method="renormalise", teacher=tiny_llama, **TEXT, output_dir=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
