"""Numbers at their edges: zeros, constants, denormals, overflow, sparsity 0 and 1, groups and vocabularies of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import prune, quantize
from merge import merge
from weightworks.errors import WeightworksError
from weightworks.store.checkpoint import INDEX, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.testing.tiny import CALIBRATION_TEXT, make_model

ATTENTION, FFN = "model.layers.0.self_attn.", "model.layers.0.mlp."
CHECK = {"device": "cpu", "dataset": str(CALIBRATION_TEXT), "num_samples": 8, "seq_len": 32}
HELD = {"device": "cpu"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, narrow; not to be changed."""
    return make_model(tmp_path_factory.mktemp("plain") / "model", blocks=1, width=32)


def changed(model: Path, folder: Path, edit: Any, **config: Any) -> Path:
    """A copy of ``model`` whose tensors ``edit`` changes."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    before = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**before, **config}))
    return folder


@pytest.fixture(scope="module")
def odd(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers that are zero, constant, of equal rows, denormal; one row of a layer is zero."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{ATTENTION}q_proj.weight"].zero_()
        tensors[f"{ATTENTION}k_proj.weight"].fill_(0.25)
        tensors[f"{ATTENTION}v_proj.weight"][:] = tensors[f"{ATTENTION}v_proj.weight"][0].clone()
        tensors[f"{ATTENTION}o_proj.weight"].mul_(1e-39)
        tensors[f"{FFN}gate_proj.weight"][3] = 0

    return changed(plain, tmp_path_factory.mktemp("odd") / "model", edit)


def dense(folder: Path) -> dict[str, torch.Tensor]:
    view = DenseView(Checkpoint.open(folder))
    return {name: view.read(name, torch.float32) for name in view.names}


@pytest.mark.parametrize(("method", "group"), [("rtn", 1), ("rtn", 32), ("gptq", 16), ("gptq", -1)])
def test_quantizers(odd: Path, tmp_path: Path, method: str, group: int) -> None:
    more = CHECK if method == "gptq" else HELD
    made = quantize(odd, method=method, bits=4, group_size=group, output_dir=tmp_path / "out", **more)
    before, after = dense(odd), dense(made.target)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not after[f"{ATTENTION}q_proj.weight"].any()
    assert not after[f"{FFN}gate_proj.weight"][3].any()
    assert torch.allclose(after[f"{ATTENTION}k_proj.weight"], before[f"{ATTENTION}k_proj.weight"], rtol=0.02)
    rows = after[f"{ATTENTION}v_proj.weight"]
    assert torch.equal(rows, rows[:1].expand_as(rows))
    if group == 1:  # a scale a weight leaves nothing but the rounding of the scale
        assert all(torch.allclose(after[n], before[n], rtol=0.02, atol=1e-38) for n in after)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "ria"])
def test_pruners(odd: Path, tmp_path: Path, method: str) -> None:
    more = HELD if method == "magnitude" else CHECK
    made = prune(odd, method=method, sparsity=0.5, output_dir=tmp_path / "out", **more)
    after = dense(made.target)
    assert all(torch.isfinite(value).all() for value in after.values())
    for name in (f"{FFN}up_proj.weight", f"{FFN}down_proj.weight"):
        assert abs(float(after[name].count_nonzero() / after[name].numel()) - 0.5) < 0.02
    for sparsity in (0.0, 1.0):
        with pytest.raises(WeightworksError, match="sparsity"):
            prune(odd, method=method, sparsity=sparsity, output_dir=tmp_path / "none", **more)


def test_little_calibration(plain: Path, tmp_path: Path) -> None:
    """Two tokens make a Hessian of rank two: damping holds it, or the layer is rounded plainly. One token is refused."""
    few = {"device": "cpu", "dataset": str(CALIBRATION_TEXT), "num_samples": 1, "bits": 4, "group_size": 32}
    with pytest.raises(WeightworksError, match="'seq_len' = 1: input should be greater than or equal to 2"):
        quantize(plain, method="gptq", output_dir=tmp_path / "out", seq_len=1, **few)
    made = quantize(plain, method="gptq", output_dir=tmp_path / "out", seq_len=2, **few)
    assert all(torch.isfinite(value).all() for value in dense(made.target).values())


def test_vocabulary_of_one(plain: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:1].clone()

    model = changed(plain, tmp_path / "model", edit, vocab_size=1)
    with pytest.raises(WeightworksError, match=r"its tokenizer gives token .* the model knows 1 tokens"):
        quantize(model, method="rtn", bits=4, group_size=32, output_dir=tmp_path / "out", device="cpu")
    (model / "tokenizer.json").unlink()
    made = quantize(model, method="rtn", bits=4, group_size=32, output_dir=tmp_path / "out", device="cpu")
    assert dense(made.target)["lm_head.weight"].shape == (1, 32)


def test_overflow_of_float16(plain: Path, tmp_path: Path) -> None:
    """The largest values of float16: averages fit, and a sum that does not is refused by the name of its tensor."""

    def largest(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
        tensors[f"{FFN}up_proj.weight"].fill_(65504)

    model = changed(plain, tmp_path / "model", largest, dtype="float16")
    base = changed(plain, tmp_path / "base", lambda t: t.update({n: v.half() for n, v in t.items()}), dtype="float16")
    made = merge([model, model, model], method="soup", output_dir=tmp_path / "soup", check="files")
    assert torch.equal(dense(made.target)[f"{FFN}up_proj.weight"], dense(model)[f"{FFN}up_proj.weight"])
    with pytest.raises(WeightworksError, match="up_proj"):
        merge([model, model, model], method="task-arithmetic", base=base, output_dir=tmp_path / "sum", check="files")
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("method", ["soup", "ties", "karcher"])
def test_a_hundred_models(plain: Path, tmp_path: Path, method: str) -> None:
    base = {"base": plain} if method == "ties" else {}
    made = merge([plain] * 100, method=method, output_dir=tmp_path / "out", check="files", **base)
    before, after = dense(plain), dense(made.target)
    assert all(torch.allclose(after[name], before[name], rtol=1e-2, atol=1e-3) for name in before)


def test_merges_of_zeros_and_constants(odd: Path, plain: Path, tmp_path: Path) -> None:
    for method in ("slerp", "ties", "della", "model-stock", "breadcrumbs"):
        models = [odd, odd] if method == "slerp" else [odd, odd, plain]
        base = {} if method == "slerp" else {"base": plain}
        made = merge(models, method=method, output_dir=tmp_path / method, check="files", **base)
        assert all(torch.isfinite(value).all() for value in dense(made.target).values()), method


def test_many_shards(plain: Path, tmp_path: Path) -> None:
    """A shard a tensor in, a shard a tensor out."""
    tensors = load_file(plain / "model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((plain / name).read_bytes())
    weights = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        weights[name] = f"model-{number:05d}.safetensors"
        save_file({name: tensor}, folder / weights[name])
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    made = quantize(
        folder, method="rtn", bits=4, group_size=32, output_dir=tmp_path / "out", device="cpu", max_shard_size="1B"
    )
    whole = quantize(plain, method="rtn", bits=4, group_size=32, output_dir=tmp_path / "whole", device="cpu")
    assert len(list(made.target.glob("*.safetensors"))) == len(Checkpoint.open(whole.target).tensors)
    assert all(torch.equal(value, dense(whole.target)[name]) for name, value in dense(made.target).items())
