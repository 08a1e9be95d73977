"""Divergence: equal to what two whole models give, exactly nothing for a model against itself."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT_TEXT, Commands
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightworks.errors import CalibrationError, MethodError, UsageError
from weightworks.score.divergence import Method, Options, divergences
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings
from weightworks.stream.activations import Activations

CPU = Settings(device="cpu")
TEXT = str(SHORT_TEXT)


def score(options: Options, *models: Path, settings: Settings = CPU) -> dict[str, Any]:
    """The result for ``models``, the first of which is the baseline."""
    subjects = [Subject(str(number), str(model)) for number, model in enumerate(models)]
    result = Method(options).score(subjects, "0", settings, lambda line: None)
    assert [row["model"] for row in result["models"]] == [subject.name for subject in subjects]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    base = result["models"][0]["metrics"]
    assert (base["kl"]["value"], base["top1"]["value"]) == (0.0, 1.0)
    return result


@torch.no_grad()
def test_equals_two_whole_models(tiny_llama: Path, quantized: Path) -> None:
    found = score(Options(texts=[TEXT], seq_len=64, max_tokens=640), tiny_llama, quantized)["models"][1]
    tokens = AutoTokenizer.from_pretrained(tiny_llama)(
        SHORT_TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    )["input_ids"]
    windows = torch.tensor(tokens[:640]).view(10, 64)
    p, q = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(windows).logits[:, :-1].double()
        for path in (tiny_llama, quantized)
    )
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)  # [windows]
    equal = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    for name, values, ideal in (("kl", kl, 0.0), ("top1", equal, 1.0)):
        metric = found["metrics"][name]
        assert metric["value"] == pytest.approx(float(values.mean()), rel=1e-3)
        assert metric["change"] == pytest.approx(float(values.mean()) - ideal, rel=1e-3)
        assert metric["error"] == metric["change_error"] == pytest.approx(float(values.std()) / math.sqrt(10), rel=1e-3)
    assert 1e-4 < found["metrics"]["kl"]["value"] < 0.1
    assert found["tokens"] == {TEXT: 630}


def test_a_model_has_none_from_itself(tiny_llama: Path, tmp_path: Path) -> None:
    """The same weights under another name: exactly 0 and 1, in memory and when hidden states go to a file."""
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    for settings in (CPU, Settings(device="cpu", max_memory="1MB")):
        metrics = score(Options(texts=[TEXT], seq_len=32, max_tokens=320), tiny_llama, other, settings=settings)
        assert metrics["models"][1]["metrics"] == {
            "kl": {"value": 0.0, "error": 0.0, "change": 0.0, "change_error": 0.0},
            "top1": {"value": 1.0, "error": 0.0, "change": 0.0, "change_error": 0.0},
        }


def test_hidden_states_in_a_file_change_nothing(
    tiny_llama: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, places = Options(texts=[TEXT], seq_len=32, max_tokens=320), []

    class Spied(Activations):
        def __init__(self, *args: Any, on_disk: bool) -> None:
            places.append(on_disk)
            super().__init__(*args, on_disk=on_disk)

    monkeypatch.setattr("weightworks.score._windows.Activations", Spied)
    in_memory = score(options, tiny_llama, quantized)
    assert score(options, tiny_llama, quantized, settings=Settings(device="cpu", max_memory="1MB")) == in_memory
    assert places == [False, False, True, True]


def test_several_texts_count_the_same(tiny_llama: Path, quantized: Path, tmp_path: Path) -> None:
    text = SHORT_TEXT.read_text(encoding="utf-8")
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text(text[:600])
    long.write_text(text[600:4000])
    found = score(Options(texts=[str(short), str(long)], seq_len=32), tiny_llama, quantized)["models"][1]
    for metric in ("kl", "top1"):
        parts = found["by_text"][metric]
        assert list(parts) == [str(short), str(long)]
        assert found["metrics"][metric]["value"] == pytest.approx(sum(parts.values()) / 2)


def test_divergence_of_rows() -> None:
    """By hand, for two distributions on two tokens, and in pieces of one row."""
    p, q = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    kl, equal = divergences(p.log() + 3, q.log() - 1)  # logits are known up to a constant
    expected = [
        0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5),
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
    ]
    assert kl.tolist() == pytest.approx(expected, rel=1e-6)
    assert kl.dtype == torch.float64
    assert equal.tolist() == [True, False]  # of equal ones the first counts


def test_rows_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    whole = divergences(p, q)
    monkeypatch.setattr("weightworks.score.divergence.CHUNK", 25)
    pieces = divergences(p, q)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


def test_one_window_has_no_error(tiny_llama: Path, quantized: Path) -> None:
    found = score(Options(texts=[TEXT], seq_len=64, max_tokens=64), tiny_llama, quantized)["models"][1]
    assert found["metrics"]["kl"]["value"] > 0
    assert found["metrics"]["kl"]["error"] is None


def test_other_tokenizers_and_vocabularies_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    options = Options(texts=[TEXT], seq_len=32, max_tokens=320)
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        MethodError, match=r"^1 and its baseline 0 have different tokenizers: they read other tokens in"
    ):
        score(options, tiny_llama, other)
    config = json.loads((tiny_llama / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 4096}))
    with pytest.raises(MethodError, match=r"^1 has a vocabulary of 4096 tokens and its baseline 0 one of 2048, so"):
        score(options, tiny_llama, other)


def test_what_cannot_be_compared_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="divergence compares models with a baseline, and there is only '0'"):
        score(Options(texts=[TEXT]), tiny_llama)
    with pytest.raises(CalibrationError, match="no such file"):
        score(Options(texts=[str(tmp_path / "none.txt")]), tiny_llama, tiny_llama)
    with pytest.raises(UsageError, match="option 'texts' is required"):
        Options.parse({}, where="score.divergence")


def test_files_are_the_texts() -> None:
    assert Method(Options(texts=[TEXT, "some/dataset"])).files() == [SHORT_TEXT]


def test_the_command(compress: Commands, tiny_llama: Path, quantized: Path) -> None:
    run = compress("evaluate", quantized, "--baseline", tiny_llama, "--divergence", TEXT, "--seq-len", "64", "--max-tokens", "640", "--json")  # fmt: skip
    assert run.code == 0, run.err
    base, packed = run.json["models"]
    assert base["model"] == run.json["baseline"] == str(tiny_llama)
    assert "perplexity" not in packed
    assert packed["metrics"] == run.json["scores"][0]["models"][1]["metrics"]
    line = run.err.splitlines()[-1]
    kl, top1 = packed["metrics"]["kl"], packed["metrics"]["top1"]
    assert f"{kl['value']:.4g} ± {kl['error']:.2g}" in line
    assert f"{top1['value']:.4g} ({top1['change']:+.3g} ± {top1['error']:.2g})" in line
    alone = compress("evaluate", tiny_llama, "--divergence", TEXT)
    assert alone.code == 2
    assert "there is only" in alone.err
