"""``compress sparsify``: as many zeros as asked, none changes nothing, more cost more, and killed runs continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from weightworks.engine import thresholds as engine
from weightworks.engine.thresholds import Histogram, _allocate
from weightworks.errors import ArchitectureError
from weightworks.plan.side import Written
from weightworks.plan.thresholds import FILE, REPORT, run_thresholds
from weightworks.stage.settings import Settings
from weightworks.stage.thresholds import ThresholdOptions
from weightworks.stream.builtin import HERE
from weightworks.stream.sparsified import sparsified
from weightworks.testing.tiny import make_model

SETTINGS = Settings(num_samples=4, seq_len=64, device="cpu", dataset=str(HERE / "calibration.txt"))


def find(model: Path, target: Path, **options: Any) -> Written:
    return run_thresholds(str(model), ThresholdOptions(**options), SETTINGS, output_dir=target)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93])
def test_quantiles(share: float) -> None:
    histogram = Histogram()
    values = torch.randn(40, 500, generator=torch.Generator().manual_seed(0)) * 3
    for part in values.split(7):
        histogram.add(part)
    limit = histogram.quantile(share)
    assert float((values.abs() <= limit).float().mean()) == pytest.approx(share, abs=2e-3)
    assert limit == pytest.approx(float(values.abs().quantile(share)) if share else 0, rel=4e-3)


def test_zeros_go_where_they_matter_least() -> None:
    """The third layer costs nothing, the first much: their mean by size is what was asked all the same."""
    sizes = [0.5, 0.3, 0.2]
    shares = _allocate(sizes, 0.4, lambda s: 10 * s[0] + s[1] ** 2)
    assert sum(size * share for size, share in zip(sizes, shares, strict=True)) == pytest.approx(0.4)
    assert shares[2] == pytest.approx(engine.MOST)
    assert shares[0] == 0


@pytest.fixture(scope="module")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("thresholds")
    options: dict[str, dict[str, Any]] = {
        "teal": {},
        "uniform": {"allocation": "uniform"},
        "none": {"sparsity": 0.0},
        "chess": {"method": "chess"},
        "little": {"method": "chess", "sparsity": 0.2},
    }

    def make(name: str) -> Path:
        if not (root / name).exists():
            find(small, root / name, **options[name])
        return root / name

    return make


def on_calibration(model: Path, folder: Path) -> tuple[dict[str, float], torch.Tensor]:
    """Zeros at every threshold in stock transformers, on the text they come from, and the logits there."""
    from weightworks.stream.calibration import load_windows

    tokens = load_windows(SETTINGS.dataset, model, num_samples=4, seq_len=64, seed=0).tokens
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad(), sparsified(stock, load_file(folder / FILE)) as counted:
        logits = stock(tokens).logits
        return counted.shares(), logits


def test_first_layers_have_the_zeros_asked_for(small: Path, made: Callable[[str], Path]) -> None:
    """Later ones read what earlier zeros have changed; the first block's do not, but for its feed-forward part."""
    shares, _ = on_calibration(small, made("uniform"))
    assert len(shares) == 14
    assert shares["inputs.model.layers.0.self_attn.q_proj"] == pytest.approx(0.5, abs=2e-3)
    assert sum(shares.values()) / len(shares) == pytest.approx(0.5, abs=0.03)
    shares, _ = on_calibration(small, made("chess"))
    assert set(shares) == {
        f"{kind}.model.layers.{block}.{name}"
        for block in (0, 1)
        for kind, name in (("inputs", "self_attn.q_proj"), ("inputs", "self_attn.o_proj"), ("outputs", "mlp.act_fn"))
    }
    assert shares["outputs.model.layers.0.mlp.act_fn"] == pytest.approx(0.5, abs=0.03)
    stored = load_file(made("chess") / FILE)["outputs.model.layers.0.mlp.act_fn"]
    assert stored.shape == (256,)
    assert stored.std() > 0


def test_no_zeros_change_nothing(small: Path, made: Callable[[str], Path]) -> None:
    _, logits = on_calibration(small, made("none"))
    report = json.loads((made("none") / REPORT).read_text())["measured"]["check text"]
    assert report["perplexity"] == report["perplexity_sparse"]
    assert report["zeros_of_inputs"] < 1e-3
    _, changed = on_calibration(small, made("teal"))
    assert not torch.equal(logits, changed)


def test_shares_are_those_asked_for(small: Path, made: Callable[[str], Path]) -> None:
    report = json.loads((made("teal") / REPORT).read_text())
    sizes = {"q": 128, "k": 64, "v": 64, "o": 128, "gate": 256, "up": 256, "down": 256}  # rows or columns beside 128
    for block in (0, 1):
        shares = {n: report["shares"][f"inputs.model.layers.{block}.{m}.{n}_proj"] for n, m in _places()}
        mean = sum(sizes[n] * shares[n] for n in sizes) / sum(sizes.values())
        assert mean == pytest.approx(0.5, abs=1e-6)
        assert shares["q"] == shares["k"] == shares["v"]
        assert len({round(share, 6) for share in shares.values()}) > 1


def _places() -> list[tuple[str, str]]:
    return [(n, "self_attn") for n in "qkvo"] + [(n, "mlp") for n in ("gate", "up", "down")]


def test_greedy_is_closer_than_uniform(small: Path, made: Callable[[str], Path]) -> None:
    """On the calibration text's logits, of which the greedy search has seen none: block outputs only."""
    _, usual = on_calibration(small, made("none"))
    distances = {name: float((on_calibration(small, made(name))[1] - usual).norm()) for name in ("teal", "uniform")}
    assert distances["teal"] < distances["uniform"]
    little, much = (float((on_calibration(small, made(name))[1] - usual).norm()) for name in ("little", "chess"))
    assert 0 < little < much


def test_killed_runs_continue(small: Path, made: Callable[[str], Path], tmp_path: Path) -> None:
    right, seen = engine._chess, []

    def dying(*args: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(args)
        return right(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_chess", dying)
        with pytest.raises(KeyboardInterrupt):
            find(small, tmp_path / "again", method="chess")
    find(small, tmp_path / "again", method="chess")
    for name in (FILE, REPORT):
        assert (tmp_path / "again" / name).read_bytes() == (made("chess") / name).read_bytes()
    assert find(small, tmp_path / "again", method="chess").cached


def test_chess_needs_a_gate(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=512, bos_token_id=0, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    from weightworks.testing.tiny import _make_tokenizer

    _make_tokenizer(tmp_path / "gpt2")
    settings = Settings(num_samples=2, seq_len=32, device="cpu", dataset=str(HERE / "calibration.txt"))
    with pytest.raises(ArchitectureError, match="no gated feed-forward part"):
        run_thresholds(str(tmp_path / "gpt2"), ThresholdOptions(method="chess"), settings, output_dir=tmp_path / "out")


def test_experts_that_are_fused_are_told(tmp_path: Path) -> None:
    found = find(make_model(tmp_path / "mixture", experts=2), tmp_path / "out", allocation="uniform")
    assert [note.split(":")[0] for note in found.notes] == [
        f"model.layers.{block}.mlp.experts.{part}_proj" for block in (0, 1) for part in ("gate_up", "down")
    ]
    assert json.loads((tmp_path / "out" / REPORT).read_text())["left"] == list(found.notes)
    assert not any("experts" in name for name in load_file(tmp_path / "out" / FILE))


def test_command(small: Path, compress: Commands, tmp_path: Path) -> None:
    words = ("sparsify", small, "--method", "chess", "--num-samples", "2", "--seq-len", "64", "--device", "cpu")
    run = compress(*words, "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    assert sorted(path.name for path in (tmp_path / "model-chess-s50").iterdir()) == [REPORT, FILE]
    assert "zeros of inputs" in run.err
    assert compress(*words, "--json", cwd=tmp_path).json["cached"]
    assert compress("sparsify", small, "--sparsity", "1", cwd=tmp_path).code == 2
    assert compress(*words, "--dry-run", "-o", "other", cwd=tmp_path).code == 0
    assert not (tmp_path / "other").exists()
