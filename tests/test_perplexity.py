"""Perplexity: equal to that of the model transformers loads whole, and differences paired window by window."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT_TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightworks.errors import CalibrationError, UsageError
from weightworks.score._windows import cut
from weightworks.score.perplexity import Method, Options, geometric, paired
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings

CPU = Settings(device="cpu")


def score(options: Options, *models: Path) -> dict[str, Any]:
    """The result for ``models``, the first of which is the baseline."""
    subjects = [Subject(str(number), str(model)) for number, model in enumerate(models)]
    result = Method(options).score(subjects, "0", CPU, lambda line: None)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


@torch.no_grad()
def test_equals_the_whole_model(tiny_llama: Path) -> None:
    options = Options(texts=[str(SHORT_TEXT)], seq_len=64, max_tokens=1000)
    found = score(options, tiny_llama)["models"][0]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    text = SHORT_TEXT.read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(tiny_llama)(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(tokens[: 15 * 64]).view(15, 64)  # 1000 tokens are 15 windows and a remainder
    chances = model(windows).logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])  # [15, 63, 1]
    means = -chances[..., 0].double().mean(1)  # [15]
    metric = found["metrics"]["perplexity"]
    assert metric["value"] == pytest.approx(math.exp(float(means.mean())), rel=1e-5)
    assert metric["error"] == pytest.approx(metric["value"] * float(means.std()) / math.sqrt(15), rel=1e-4)
    assert (metric["change"], metric["change_error"]) == (0.0, 0.0)
    assert found["tokens"] == {str(SHORT_TEXT): 15 * 63}


def test_several_texts_are_scored_apart(tiny_llama: Path, tmp_path: Path) -> None:
    text = SHORT_TEXT.read_text(encoding="utf-8")
    parts = {str(tmp_path / "a.txt"): text[:3000], str(tmp_path / "b.txt"): text[3000:9000]}
    for path, part in parts.items():
        Path(path).write_text(part)
    together = score(Options(texts=list(parts), seq_len=32), tiny_llama)["models"][0]
    alone = score(Options(texts=list(parts)[1:], seq_len=32), tiny_llama)["models"][0]
    by_text = together["by_text"]["perplexity"]
    assert list(by_text) == list(parts)
    assert by_text[list(parts)[1]] == pytest.approx(alone["metrics"]["perplexity"]["value"])
    assert together["metrics"]["perplexity"]["value"] == pytest.approx(math.sqrt(math.prod(by_text.values())))


def test_windows_are_no_longer_than_the_context(tiny_llama: Path) -> None:
    found = score(Options(texts=[str(SHORT_TEXT)], max_tokens=1100), tiny_llama)
    assert found["seq_len"] == 512
    assert found["models"][0]["tokens"] == {str(SHORT_TEXT): 2 * 511}


def test_models_that_read_other_tokens_are_not_compared(tiny_llama: Path, tmp_path: Path) -> None:
    """Though there are as many of them."""
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = score(Options(texts=[str(SHORT_TEXT)], seq_len=32, max_tokens=320), tiny_llama, other)["models"]
    assert rows[0]["tokens"] == rows[1]["tokens"]
    metric = rows[1]["metrics"]["perplexity"]
    assert metric["value"] > rows[0]["metrics"]["perplexity"]["value"]
    assert (metric["change"], metric["change_error"]) == (None, None)


def test_names_must_tell_models_apart(tiny_llama: Path) -> None:
    method, model = Method(Options(texts=[str(SHORT_TEXT)])), str(tiny_llama)
    with pytest.raises(UsageError, match=r"several models to score are named a$"):
        method.score([Subject("a", model), Subject("a", model)], "a", CPU, lambda line: None)
    with pytest.raises(UsageError, match=r"the baseline 'b' is not among the models to score: a$"):
        method.score([Subject("a", model)], "b", CPU, lambda line: None)


def test_cut_leaves_out_the_remainder() -> None:
    assert cut(torch.arange(10), 4, "x").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(CalibrationError, match=r"x: 3 tokens is shorter than one window of 4"):
        cut(torch.arange(3), 4, "x")


def test_paired_difference_and_its_error() -> None:
    base = {"t": torch.tensor([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]])}
    assert paired(base, base) == (0.0, 0.0)
    worse = {"t": base["t"] + 0.1}  # by the same everywhere: no doubt about it
    change, error = paired(worse, base)
    assert change == pytest.approx(math.exp(0.1) - 1, rel=1e-5)
    assert error == pytest.approx(0.0, abs=1e-6)
    mixed = {"t": base["t"] + torch.tensor([[0.0], [0.1], [0.2]])}
    change, error = paired(mixed, base)
    assert change == pytest.approx(math.exp(0.1) - 1, rel=1e-5)
    assert error == pytest.approx(math.exp(0.1) * 0.1 / math.sqrt(3), rel=1e-5)


def test_one_window_says_nothing_of_the_error() -> None:
    base = {"t": torch.tensor([[1.0, 2.0]])}
    assert paired({"t": base["t"] + 0.5}, base) == (pytest.approx(math.expm1(0.5)), None)
    assert geometric([base["t"]]) == (pytest.approx(math.exp(1.5)), None)


def test_mean_over_texts_is_geometric() -> None:
    two = {"a": torch.zeros(1, 4), "b": torch.full((1, 4), 2.0)}
    assert geometric(list(two.values()))[0] == pytest.approx(math.e)
    assert geometric([torch.full((2, 4), math.log(8.0)), torch.full((2, 4), math.log(2.0))]) == (
        pytest.approx(4.0),
        0.0,
    )
    base = {name: torch.zeros(1, 4) for name in two}
    assert paired(two, base)[0] == pytest.approx(math.e - 1)


def test_files_are_the_texts(tmp_path: Path) -> None:
    assert Method(Options(texts=[str(SHORT_TEXT), "some/dataset"])).files() == [SHORT_TEXT]
    with pytest.raises(UsageError, match=r"'texts': \S*/none.txt: no such file"):
        Method(Options(texts=[str(SHORT_TEXT), str(tmp_path / "none.txt")])).files()
