"""The tokenizer of a checkpoint as GGUF metadata: tokens with their types, merges or scores, special ids, chat templates.

Two kinds of ``tokenizer.json`` have a place there: byte pairs over an alphabet of bytes (``gpt2``), and byte pairs as
sentencepiece makes them (``llama``), where engines know no merges but join the pair that makes the token of highest score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError
from weightworks.store.documents import read_json
from weightworks.store.gguffile import Value
from weightworks.store.tokenizerfile import CONFIG, FILE, Vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
TEMPLATE = "chat_template.jinja"
# How text is cut before merging, by the pattern in tokenizer.json, as engines call it.
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PATTERNS = {
    CONTRACTED + LETTERS + r"|\p{N}{1,3}" + ENDING: "llama-bpe",
    CONTRACTED + LETTERS + r"|\p{N}" + ENDING: "qwen2",
}


def vocabulary_of(root: Path, config: Mapping[str, Any], rows: int) -> tuple[dict[str, Value], list[str]]:
    """Metadata of the tokenizer in folder ``root`` for an embedding of ``rows`` rows, and what should be known of it.

    Raises :class:`CheckpointError` for a tokenizer that engines of GGUF files do not know.
    """
    vocabulary = Vocabulary.read(root)
    if vocabulary is None:
        return {}, [f"the folder has no {FILE}, so the file has no vocabulary: engines cannot read text with it"]
    if vocabulary.length > rows:
        raise CheckpointError(f"{root / FILE}: ids go up to {vocabulary.length - 1}, the embedding has {rows} rows")
    model = vocabulary.document["model"]
    settings = read_json(root / CONFIG) if (root / CONFIG).is_file() else {}
    tokens = [vocabulary.by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [_type(vocabulary, token, number) for number, token in enumerate(tokens)]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    cuts = list(_steps(vocabulary.document.get("pre_tokenizer")))
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in cuts):
        own, remarks = _byte_level(model, cuts)
    elif kind == "BPE" and model.get("byte_fallback"):
        own, remarks = _sentencepiece(root, vocabulary, tokens, types, cuts), []
    else:
        raise CheckpointError(
            f"{root / FILE}: a tokenizer of kind {kind} has no place in a GGUF file",
            hint="known: byte-level byte pairs, and byte pairs with byte_fallback; move the file away to go without one",
        )
    metadata: dict[str, Value] = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    metadata |= _special(vocabulary, settings, config)
    metadata |= _templates(root, settings)
    return metadata, remarks


def _type(vocabulary: Vocabulary, token: str, number: int) -> int:
    if number not in vocabulary.by_id:
        return UNUSED
    if token == vocabulary.document["model"].get("unk_token"):
        return UNKNOWN
    if (entry := vocabulary.added.get(token)) is not None:
        return CONTROL if entry.get("special") else USER_DEFINED
    fallback = vocabulary.document["model"].get("byte_fallback")
    return BYTE if fallback and len(token) == 6 and token.startswith("<0x") else NORMAL


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, normalizer or post-processor, sequences taken apart."""
    if part is None:
        return
    inner = next((part[key] for key in ("pretokenizers", "normalizers", "processors") if key in part), None)
    if inner is None:
        yield part
        return
    for step in inner:
        yield from _steps(step)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    rules = (rule if isinstance(rule, list) else rule.split(" ") for rule in model.get("merges") or [])
    return [(left, right) for left, right in rules]


def _byte_level(model: Mapping[str, Any], cuts: list[Mapping[str, Any]]) -> tuple[dict[str, Value], list[str]]:
    name = _cut(cuts)
    remarks = []
    if name is None:
        name = "default"
        remarks.append(
            "how the tokenizer cuts text has no name among those of llama.cpp; 'default' may give other tokens"
        )
    prefix = any(step.get("add_prefix_space") for step in cuts)
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return {"model": "gpt2", "pre": name, "merges": merges, "add_space_prefix": prefix}, remarks


def _cut(cuts: list[Mapping[str, Any]]) -> str | None:
    """The name that llama.cpp has for a way of cutting text; None if it is not known here."""
    kinds = [step["type"] for step in cuts]
    if kinds == ["ByteLevel"] and cuts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and cuts[0].get("individual_digits") and cuts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not cuts[1].get("use_regex", True):
        return PATTERNS.get((cuts[0].get("pattern") or {}).get("Regex", ""))
    return None


def _sentencepiece(
    root: Path, vocabulary: Vocabulary, tokens: list[str], types: list[int], cuts: list[Mapping[str, Any]]
) -> dict[str, Value]:
    """Scores instead of merges: the earlier a token is made, the higher. Sound only if the merges are all ways to put tokens
    together, those of one token one after the other; else refused."""
    merges = _merges(vocabulary.document["model"])
    made: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        if left + right in made and merges[rank - 1][0] + merges[rank - 1][1] != left + right:
            raise CheckpointError(
                f"{root / FILE}: merges that make '{left + right}' are apart: no scores mean the same"
            )
        made.setdefault(left + right, rank)
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    ways = {(token[:cut], token[cut:]) for token in normal for cut in range(1, len(token))}
    ways = {(left, right) for left, right in ways if left in normal and right in normal}
    if ways != set(merges):
        one = sorted(ways ^ set(merges))[0]
        raise CheckpointError(
            f"{root / FILE}: the merges are not all ways to make its tokens (such as {one}): no scores mean the same"
        )
    last = float(len(merges))
    scores = [
        0.0 if kind != NORMAL else -float(made[token]) if token in made else -last
        for token, kind in zip(tokens, types, strict=True)
    ]
    steps = [*_steps(vocabulary.document.get("normalizer")), *cuts]
    prefix = any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _special(vocabulary: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Value]:
    """Ids of special tokens, and whether texts begin or end with them."""
    found: dict[str, int] = {}
    for key in SPECIAL:
        token = settings.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = vocabulary.ids.get(str(token)) if token else config.get(f"{key}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            found[key] = number
    metadata: dict[str, Value] = {f"tokenizer.ggml.{SPECIAL[key]}_token_id": number for key, number in found.items()}
    around = _around(vocabulary, found)
    for key in ("bos", "eos"):
        metadata[f"tokenizer.ggml.add_{key}_token"] = bool(settings.get(f"add_{key}_token", False)) or key in around
    return metadata


def _around(vocabulary: Vocabulary, special: Mapping[str, int]) -> set[str]:
    """Which of the special tokens the post-processor puts around a text."""
    found = set()
    for step in _steps(vocabulary.document.get("post_processor")):
        names = [item["SpecialToken"]["id"] if "SpecialToken" in item else None for item in step.get("single") or []]
        for key, place in (("bos", 0), ("eos", -1)):
            if names and (name := names[place]) is not None and vocabulary.ids.get(str(name)) == special.get(key):
                found.add(key)
    return found


def _templates(root: Path, settings: Mapping[str, Any]) -> dict[str, Value]:
    """The chat template, and others by name."""
    template = settings.get("chat_template")
    if (root / TEMPLATE).is_file():
        template = (root / TEMPLATE).read_text(encoding="utf-8")
    named = {one["name"]: one["template"] for one in template} if isinstance(template, list) else {}
    if isinstance(template, str):
        named = {"default": template}
    metadata: dict[str, Value] = {}
    for name, text in named.items():
        metadata["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = text
    if others := sorted(set(named) - {"default"}):
        metadata["tokenizer.chat_templates"] = [*others]
    return metadata
