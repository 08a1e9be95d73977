"""Statistics in files: what they hold against a plain computation, what they say of themselves, kills, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import FEW, Commands
from safetensors import safe_open

from weightworks.engine.statistics import drawn
from weightworks.errors import CheckpointError, OutputError, ResourceError
from weightworks.plan.side import Written
from weightworks.plan.stats import run_stats
from weightworks.stage.settings import Settings
from weightworks.stage.statistics import StatisticsOptions
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.sources import file_digest
from weightworks.store.statistics import ENTRY, Statistics, packed, side_of, unpacked

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT: dict[str, Any] = {"num_samples": 3, "seq_len": 24, "device": "cpu", "dtype": "float32"}


def gather(model: Path, target: Path, kind: str = "gram", labels: str = "model", **settings: Any) -> Written:
    options = StatisticsOptions(kind=kind, labels=labels)  # type: ignore[arg-type]
    return run_stats(str(model), options, Settings(**{**SHORT, **settings}), output=target)


@pytest.fixture(scope="module")
def stock(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def grams(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    target = tmp_path_factory.mktemp("grams") / "tiny.gram.safetensors"
    return Statistics.open(gather(tiny_llama, target).target)


def windows(model: Path) -> torch.Tensor:
    """The calibration windows that ``gather`` uses."""
    from weightworks.stream.calibration import load_windows

    return load_windows("builtin", model, num_samples=3, seq_len=24, seed=0).tokens


def test_gram_matrices_are_those_of_stock_transformers(grams: Statistics, stock: Any, tiny_llama: Path) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0].detach().flatten(0, 1))
        )
        for name, module in stock.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    with torch.no_grad():
        stock(input_ids=windows(tiny_llama), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert {f"{name}.weight" for name in seen} == grams.names
    for name, inputs in seen.items():
        x = torch.cat(inputs).double()
        expected = x.T @ x / x.shape[0]
        found = grams.read(f"{name}.weight").double()
        assert torch.equal(found, found.T)
        assert float((found - expected).norm() / expected.norm()) < 1e-5, name


def test_the_library_reads_the_file_as_documented(grams: Statistics, tiny_llama: Path) -> None:
    with safe_open(grams.path, framework="pt") as file:
        facts = json.loads(file.metadata()[ENTRY])
        name = "model.layers.0.mlp.down_proj.weight"
        triangle, tokens = file.get_tensor(f"gram.{name}"), file.get_tensor(f"tokens.{name}")
    columns = Checkpoint.open(tiny_llama).tensors[name].shape[1]
    assert tuple(triangle.shape) == (columns * (columns + 1) // 2,)
    assert int(tokens) == 3 * 24
    assert facts["model"] == Checkpoint.open(tiny_llama).digest
    assert (facts["kind"], facts["text"]["tokens"], facts["transposed"]) == ("gram", 72, [])
    assert not list(grams.path.parent.glob("*.partial"))


def test_inputs_that_are_shared_have_the_same_matrix(grams: Statistics) -> None:
    q, k, o = (grams.read(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qko")
    assert torch.equal(q, k)
    assert not torch.equal(q, o)


@pytest.mark.parametrize("labels", ["text", "model"])
def test_fisher_is_the_mean_of_squared_gradients(labels: str, stock: Any, tiny_llama: Path, tmp_path: Path) -> None:
    target = gather(tiny_llama, tmp_path / "f.safetensors", "fisher", labels).target
    found, tokens = Statistics.open(target), windows(tiny_llama)
    assert found.names == set(Checkpoint.open(tiny_llama).tensors)  # the tied head is the embedding's own
    expected = {name: torch.zeros_like(value) for name, value in stock.named_parameters()}
    for number, window in enumerate(tokens):
        stock.zero_grad()
        logits = stock(input_ids=window[None], use_cache=False).logits[0, :-1]
        targets = window[1:] if labels == "text" else drawn(logits.detach(), 0, number)
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        for name, value in stock.named_parameters():
            expected[name] += value.grad.square()
    for name, value in expected.items():
        mean = value / (tokens.shape[0] * (tokens.shape[1] - 1))
        assert float((found.read(name) - mean).norm() / mean.norm()) < 1e-4, name
    assert torch.equal(found.read("model.norm.weight", 3, 9), found.read("model.norm.weight")[3:9])


def test_a_label_is_drawn_from_the_models_own_distribution() -> None:
    """Frequencies of many draws are the probabilities; the same seed and window draw the same."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(20000, 4)
    labels = drawn(logits, 0, 5)
    shares = torch.bincount(labels, minlength=4) / labels.numel()
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.015)
    assert torch.equal(labels, drawn(logits, 0, 5))
    assert not torch.equal(labels, drawn(logits, 0, 6))


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_triangles(size: int) -> None:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    matrix = matrix + matrix.T
    triangle = packed(matrix)
    assert triangle.numel() == size * (size + 1) // 2
    assert side_of(triangle.numel()) == size
    assert torch.equal(triangle, matrix[torch.triu(torch.ones(size, size)).bool()])
    assert torch.equal(unpacked(triangle), matrix)


def test_a_run_that_is_killed_goes_on_and_makes_the_same_bytes(
    grams: Statistics, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the second block; its work is not done again, and less memory makes no difference either."""
    import weightworks.engine.walk as module

    calls = 0
    run_block = module.run_block

    def stop(*args: Any, **values: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        run_block(*args, **values)

    target = tmp_path / "tiny.gram.safetensors"
    monkeypatch.setattr(module, "run_block", stop)
    with pytest.raises(KeyboardInterrupt):
        gather(tiny_llama, target)
    assert not target.exists()
    calls = 3
    gather(tiny_llama, target)
    assert calls == 3 + 4  # six blocks, two were done
    assert file_digest(target) == file_digest(grams.path)
    assert not target.with_name(target.name + ".partial").exists()


def test_rounds_and_files_of_activations_change_nothing(
    grams: Statistics, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix at a time, hidden states on disk: as when memory is short."""
    from dataclasses import replace

    import weightworks.plan.stats as module

    estimate = module._estimate
    monkeypatch.setattr(module, "_estimate", lambda *given: replace(estimate(*given), statistics_bytes=1, on_disk=True))
    found = gather(tiny_llama, tmp_path / "again.safetensors").target
    assert file_digest(found) == file_digest(grams.path)


def test_what_is_done_is_not_done_again_and_nothing_is_replaced(
    grams: Statistics, tiny_llama: Path, tmp_path: Path
) -> None:
    assert gather(tiny_llama, grams.path).cached
    with pytest.raises(OutputError, match="already exists"):
        gather(tiny_llama, grams.path, seed=7)
    with pytest.raises(OutputError, match="already exists"):
        gather(tiny_llama, grams.path, "fisher")
    copy = tmp_path / "copy.safetensors"
    shutil.copy(grams.path, copy)
    assert not gather(tiny_llama, copy, seed=7, overwrite=True).cached
    assert Statistics.open(copy).facts["identity"] != grams.facts["identity"]


def test_gradients_that_do_not_fit_are_refused_before_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"too little memory: .* \(weights, gradients and sums") as caught:
        gather(tiny_llama, tmp_path / "f.safetensors", "fisher", max_memory="200MB")
    assert "gradients need the whole model in memory" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_of_statistics_is_refused(tiny_llama: Path, grams: Statistics, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file of statistics"):
        Statistics.open(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="holds no statistics of a model"):
        Statistics.open(tiny_llama / "model.safetensors")
    (tmp_path / "text").write_text("this is no header, and long enough for one")
    with pytest.raises(CheckpointError):
        Statistics.open(tmp_path / "text")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(grams.path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        Statistics.open(cut)


def test_command(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "own.safetensors"
    run = compress("stats", tiny_llama, *FEW, "-o", target, "--json")
    assert run.code == 0, run.err
    assert run.json["kind"] == "gram"
    assert run.json["text"]["tokens"] == 16 * 64
    assert "1024 tokens of calibration.txt" in run.err
    planned = compress("stats", tiny_llama, *FEW, "--kind", "fisher", "--dry-run", "--json", "-o", tmp_path / "f")
    assert planned.code == 0, planned.err
    parameters = sum(info.nbytes // 2 for info in Checkpoint.open(tiny_llama).tensors.values())
    assert planned.json["estimate"]["output_bytes"] - 4 * parameters < 20_000
    refused = compress("stats", tiny_llama, "--kind", "hessian", "-o", target)
    assert refused.code == 2
    assert "'gram' or 'fisher'" in refused.err
