"""Perplexity: equal to that of the model transformers loads whole, and differences paired window by window."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from commands import SHORT_TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightworks.errors import CalibrationError
from weightworks.score.perplexity import Options, Score, cut, geometric_mean, paired, score
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView

CPU = torch.device("cpu")


@torch.no_grad()
def test_equals_the_whole_model(tiny_llama: Path) -> None:
    options = Options(texts=[str(SHORT_TEXT)], seq_len=64, max_tokens=1000)
    found = score(DenseView(Checkpoint.open(tiny_llama)), options, device=CPU)[str(SHORT_TEXT)]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    text = SHORT_TEXT.read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(tiny_llama)(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(tokens[: 15 * 64]).view(15, 64)  # 1000 tokens are 15 windows and a remainder
    chances = model(windows).logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])  # [15, 63, 1]
    torch.testing.assert_close(found.losses, -chances[..., 0], rtol=1e-4, atol=1e-4)
    assert found.perplexity == pytest.approx(math.exp(-float(chances.double().mean())), rel=1e-5)


def test_several_texts_are_scored_apart(tiny_llama: Path, tmp_path: Path) -> None:
    text = SHORT_TEXT.read_text(encoding="utf-8")
    parts = {str(tmp_path / "a.txt"): text[:3000], str(tmp_path / "b.txt"): text[3000:9000]}
    for path, part in parts.items():
        Path(path).write_text(part)
    view = DenseView(Checkpoint.open(tiny_llama))
    together = score(view, Options(texts=list(parts), seq_len=32), device=CPU)
    alone = score(view, Options(texts=list(parts)[1:], seq_len=32), device=CPU)
    assert list(together) == list(parts)
    last = list(parts)[1]
    torch.testing.assert_close(together[last].losses, alone[last].losses)


def test_windows_are_no_longer_than_the_context(tiny_llama: Path) -> None:
    view = DenseView(Checkpoint.open(tiny_llama))
    found = score(view, Options(texts=[str(SHORT_TEXT)], max_tokens=1100), device=CPU)[str(SHORT_TEXT)]
    assert found.losses.shape == (2, 511)


def test_cut_leaves_out_the_remainder() -> None:
    assert cut(torch.arange(10), 4, "x").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(CalibrationError, match=r"x: 3 tokens is shorter than one window of 4"):
        cut(torch.arange(3), 4, "x")


def test_paired_difference_and_its_error() -> None:
    base = {"t": Score(torch.tensor([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]]))}
    assert paired(base, base) == (0.0, 0.0)
    worse = {"t": Score(base["t"].losses + 0.1)}  # by the same everywhere: no doubt about it
    change, error = paired(worse, base)
    assert change == pytest.approx(math.exp(0.1) - 1, rel=1e-5)
    assert error == pytest.approx(0.0, abs=1e-6)
    mixed = {"t": Score(base["t"].losses + torch.tensor([[0.0], [0.1], [0.2]]))}
    change, error = paired(mixed, base)
    assert change == pytest.approx(math.exp(0.1) - 1, rel=1e-5)
    assert error == pytest.approx(math.exp(0.1) * 0.1 / math.sqrt(3), rel=1e-5)


def test_mean_over_texts_is_geometric() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    two = {"a": Score(torch.zeros(1, 4)), "b": Score(torch.full((1, 4), 2.0))}
    base = {name: Score(torch.zeros(1, 4)) for name in two}
    assert paired(two, base)[0] == pytest.approx(math.e - 1)
