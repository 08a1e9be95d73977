"""Tokenizers as GGUF metadata: transformers reads the same ids from it, whatever the kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weightworks.errors import CheckpointError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.gguffile import opening
from weightworks.store.ggufvocabulary import PATTERNS, vocabulary_of
from weightworks.stream.builtin import HERE

LEARNED = (HERE / "calibration.txt").read_text(encoding="utf-8")[:60_000]
TEXTS = [
    "It's 12345 o'clock;  the bread\n\n\tcosts €3.50 — naïve?  END",
    "<s>one<think>two </think> three",
    LEARNED[7000:9000],
]


def trained(pattern: str | None) -> Tokenizer:
    """Byte pairs over bytes; text is cut by ``pattern``, or as GPT-2 cuts it."""
    tokenizer = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, whole]) if cut else whole
    tokenizer.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<s>"],
    )
    tokenizer.train_from_iterator([LEARNED], learn)
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Byte pairs as a sentencepiece model is converted: all ways to make a token are merges, in the order of its score."""
    alphabet = sorted(set(LEARNED.replace(" ", "▁")))
    first = Tokenizer(models.BPE())
    first.normalizer = normalizers.Replace(" ", "▁")
    first.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    first.train_from_iterator([LEARNED], trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    learned = sorted(json.loads(first.to_str())["model"]["vocab"].items(), key=lambda pair: pair[1])
    pieces = [token for token, _ in learned if len(token) > 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *alphabet]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in pieces
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    around = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = around
    return tokenizer


def folder_of(tokenizer: Tokenizer, folder: Path, **more: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **more).save_pretrained(
        folder
    )
    return folder


def read_back(folder: Path, rows: int) -> tuple[Any, dict[str, Any], list[str]]:
    """The tokenizer that transformers make of a file with nothing but this vocabulary; the metadata; the remarks."""
    metadata, remarks = vocabulary_of(folder, {}, rows)
    (folder / "a.gguf").write_bytes(opening("llama", {"llama.block_count": 1, **metadata}, []))
    return AutoTokenizer.from_pretrained(folder, gguf_file="a.gguf"), dict(metadata), remarks


@pytest.mark.parametrize("name", [None, *PATTERNS.values()])
def test_byte_pairs_over_bytes(name: str | None, tmp_path: Path) -> None:
    pattern = next((one for one, called in PATTERNS.items() if called == name), None)
    source = trained(pattern)
    folder = folder_of(source, tmp_path)
    found, metadata, remarks = read_back(folder, 610)
    for text in TEXTS:
        assert found(text)["input_ids"] == source.encode(text).ids
    assert metadata["tokenizer.ggml.pre"] == (name or "gpt-2")
    assert not remarks
    types = metadata["tokenizer.ggml.token_type"]
    assert (types[0], types[600], types[601], types[602]) == (3, 3, 4, 5)
    assert metadata["tokenizer.ggml.tokens"][609] == "[PAD609]"
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 600)
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_patterns_without_a_name_are_told(tmp_path: Path) -> None:
    _, metadata, remarks = read_back(folder_of(trained(r"\p{L}+|[^\p{L}]"), tmp_path), 602)
    assert metadata["tokenizer.ggml.pre"] == "default"
    assert "'default' may give other tokens" in remarks[0]


def test_sentencepiece(tmp_path: Path) -> None:
    source = sentencepiece()
    found, metadata, _ = read_back(folder_of(source, tmp_path, unk_token="<unk>"), source.get_vocab_size())
    assert "tokenizer.ggml.merges" not in metadata
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    for text in (TEXTS[0], TEXTS[2], "ωmega"):
        assert found(text)["input_ids"] == source.encode(text).ids


def test_merges_without_scores_are_refused(tmp_path: Path) -> None:
    folder = folder_of(sentencepiece(), tmp_path)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"].pop(40)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="merges"):
        vocabulary_of(folder, {}, 2000)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)]))
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="kind Unigram has no place"):
        vocabulary_of(tmp_path, {}, 2)
    with pytest.raises(CheckpointError, match="ids go up to 1, the embedding has 1 rows"):
        vocabulary_of(tmp_path, {}, 1)


def test_chat_templates(tiny_llama: Path, tmp_path: Path) -> None:
    root = Checkpoint.open(tiny_llama).root
    (tmp_path / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
    named = [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    metadata, _ = vocabulary_of(tmp_path, {"eos_token_id": [0, 5]}, 2048)
    assert metadata["tokenizer.chat_template"] == "A"
    assert metadata["tokenizer.chat_template.tools"] == "B"
    assert metadata["tokenizer.chat_templates"] == ["tools"]
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert vocabulary_of(tmp_path, {}, 2048)[0]["tokenizer.chat_template"] == "{{ messages }}"
