"""``tokenizer.json`` as data: which token has which id, and the same file with more tokens."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError
from weightworks.store.documents import read_json

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
# Other files that hold a vocabulary: a tokenizer.json with more tokens would contradict them.
SLOW = frozenset(
    {
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
    }
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a ``tokenizer.json``: ``ids`` by string, and the entries of those that were ``added`` to its model."""

    document: Mapping[str, Any]
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, root: Path) -> Vocabulary | None:
        """The vocabulary of a checkpoint folder; None where it has no ``tokenizer.json``."""
        path = root / FILE
        if not path.is_file():
            return None
        document = read_json(path)
        try:
            vocabulary = document["model"]["vocab"]
            pairs = (
                vocabulary.items()
                if isinstance(vocabulary, dict)
                else ((one[0], k) for k, one in enumerate(vocabulary))
            )
            added = {one["content"]: one for one in document.get("added_tokens") or []}
            ids = {
                **{str(token): int(number) for token, number in pairs},
                **{name: int(one["id"]) for name, one in added.items()},
            }
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(f"{path}: no vocabulary of tokens and ids in it ({error})") from None
        return cls(document, ids, added)

    @cached_property
    def length(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def by_id(self) -> dict[int, str]:
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def digest(self) -> str:
        """sha256 of which token has which id."""
        return hashlib.sha256(json.dumps(sorted(self.ids.items())).encode()).hexdigest()


def extended(base: Vocabulary, new: Mapping[str, int], sources: Mapping[str, Vocabulary]) -> str:
    """The base's ``tokenizer.json`` with the tokens ``new`` (ids by string); ``sources`` says whose each is.

    Tokens that were added to their model are added here. Others become part of the model, with those of their source's merge
    rules that make them. Raises :class:`CheckpointError` where the base's kind of model cannot take them.
    """
    try:
        return _extended(base, new, sources)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{FILE}: not as the tokenizers library writes it ({error})") from None


def _extended(base: Vocabulary, new: Mapping[str, int], sources: Mapping[str, Vocabulary]) -> str:
    document = copy.deepcopy(dict(base.document))
    added = document.setdefault("added_tokens", [])
    plain = [token for token in new if token not in sources[token].added]
    if plain:
        _into_model(document, base, new, plain, sources)
    for token, number in new.items():
        if (entry := sources[token].added.get(token)) is not None:
            added.append({**entry, "id": number})
    added.sort(key=lambda entry: entry["id"])
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _into_model(
    document: dict[str, Any],
    base: Vocabulary,
    new: Mapping[str, int],
    plain: list[str],
    sources: Mapping[str, Vocabulary],
) -> None:
    """Put ``plain`` tokens into the model. All ids go there then: the library numbers added tokens it does not find there."""
    model = document["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind not in ("BPE", "WordPiece", "WordLevel"):
        raise CheckpointError(
            f"a vocabulary of kind {kind} cannot be given {len(plain)} more tokens (such as {plain[0]!r})",
            hint="use --vocabulary base",
        )
    model["vocab"] = {**model["vocab"], **{token: base.ids[token] for token in base.added}, **new}
    if kind != "BPE":
        return
    known = {_pair(rule) for rule in model.get("merges") or []}
    wanted = set(plain)
    for source in {id(sources[token]): sources[token] for token in plain}.values():
        for rule in source.document["model"].get("merges") or []:
            left, right = _pair(rule)
            there = left in model["vocab"] and right in model["vocab"]
            if left + right in wanted and there and (left, right) not in known:
                known.add((left, right))
                model["merges"].append([left, right] if _listed(model) else f"{left} {right}")


def _pair(rule: Any) -> tuple[str, str]:
    """A merge rule, which files spell as a list or as a text."""
    left, right = rule if isinstance(rule, list) else rule.split(" ")
    return left, right


def _listed(model: Mapping[str, Any]) -> bool:
    return not model["merges"] or isinstance(model["merges"][0], list)


def extended_config(text: str, new: Mapping[str, int], sources: Mapping[str, Vocabulary]) -> str:
    """``tokenizer_config.json`` with the added ones of the tokens ``new``, where it lists such."""
    config = json.loads(text)
    if isinstance(config.get("added_tokens_decoder"), dict):
        for token, number in new.items():
            if (entry := sources[token].added.get(token)) is not None:
                config["added_tokens_decoder"][str(number)] = {
                    key: value for key, value in entry.items() if key != "id"
                }
    return json.dumps(config, ensure_ascii=False, indent=2) + "\n"
