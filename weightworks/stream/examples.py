"""Rows of a data set as examples: a prompt that is given, an answer that is learned. What cannot be used is counted.

Known are ``messages`` (or ``conversations``) with the tokenizer's chat template, ``instruction`` with ``input`` and ``output``,
``prompt`` with ``response``, their usual other names, and ``text``, learned whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CalibrationError
from weightworks.store.checkpoint import read_json
from weightworks.store.sources import is_text_file
from weightworks.stream.calibration import Tokenizer, hub_rows, load_tokenizer, parquet_rows
from weightworks.stream.lessons import Lessons, Rows, keyed, set_aside

PROMPTS = (
    "instruction",
    "prompt",
    "question",
    "input",
    "context",
)  # fields of a prompt, in the order they are put together
ANSWERS = ("output", "response", "completion", "answer")
TEXTS = ("text", "content")
CHATS = ("messages", "conversations")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}  # what some data sets call them
NO_JSON, NO_FIELDS, NO_ANSWER = "not valid JSON", "no fields that are known", "no answer"
NO_PROMPT, NO_TEMPLATE, REFUSED = (
    "no prompt",
    "messages, and the tokenizer has no chat template",
    "refused by the chat template",
)

Part = tuple[str, bool]  # a piece of text, and whether it is learned


def read_rows(dataset: str) -> list[Any]:
    """All rows of a .jsonl or .parquet file or a hub data set; None for a line that is no JSON. Other texts have none."""
    path = Path(dataset).expanduser()
    if path.is_file() and path.suffix.lower() == ".jsonl":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{dataset}: cannot be read as UTF-8 text: {error}") from None
        return [_parsed(line) for line in lines if line.strip()]
    if path.is_file():
        return parquet_rows(path) if path.suffix.lower() == ".parquet" else []
    if is_text_file(dataset) or path.exists() or dataset in ("builtin", "self"):
        return []
    return list(hub_rows(dataset))


def are_examples(rows: Sequence[Any]) -> bool:
    """Whether some row is more than plain text: it has an answer of its own, or is a chat."""
    return any(isinstance(row, dict) and any(row.get(key) for key in (*CHATS, *ANSWERS)) for row in rows)


def load_examples(
    rows: Sequence[Any],
    source: str,
    root: Path,
    *,
    count: int,
    held_out: int,
    seq_len: int,
    seed: int,
    trust_remote_code: bool = False,
) -> Lessons:
    """``count`` examples of at most ``seq_len`` tokens from ``rows``, looked at in a seeded order, ``held_out`` of them aside.

    Raises :class:`CalibrationError` with the reasons where hardly any can be used.
    """
    maker = Maker(root, trust_remote_code=trust_remote_code)
    dropped: Counter[str] = Counter()
    found: list[tuple[list[int], list[bool]]] = []
    for place in torch.randperm(len(rows), generator=keyed(seed, "rows")).tolist():
        made = maker.example(rows[place])
        if isinstance(made, str):
            dropped[made] += 1
        elif len(made[0]) > seq_len:
            dropped[f"longer than {seq_len} tokens"] += 1
        elif not any(made[1][1:]):
            dropped[NO_ANSWER] += 1
        else:
            found.append(made)
        if len(found) == count:
            break
    if len(found) < 2:
        told = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
        raise CalibrationError(
            f"{source}: {len(found)} of {len(rows)} rows can be trained on ({told or 'there are no rows'})",
            hint="rows are objects with messages, instruction and output, prompt and response, or text; or raise --seq-len",
        )
    aside = set_aside(len(found), held_out, source)
    rows_, others = Rows.of(found[aside:]), Rows.of(found[:aside])
    return Lessons(rows_, others, source, count, seq_len, seed, dict(sorted(dropped.items())))


class Maker:
    """Makes examples for the tokenizer in the folder ``root``."""

    def __init__(self, root: Path, *, trust_remote_code: bool = False) -> None:
        self.root, self.trust = root, trust_remote_code
        self.tokenizer: Tokenizer = load_tokenizer(root, trust_remote_code=trust_remote_code)
        end = read_json(root / "config.json").get("eos_token_id")
        self.end: int | None = end[0] if isinstance(end, list) and end else end if isinstance(end, int) else None
        self.templates = _has_template(root)
        self._chat: Any = None

    def example(self, row: Any) -> tuple[list[int], list[bool]] | str:
        """Tokens of a row with what of them is learned, or why it cannot be used."""
        parts = self._parts(row)
        if isinstance(parts, str):
            return parts
        tokens: list[int] = []
        learned: list[bool] = []
        for text, is_learned in parts:
            ids = self.tokenizer.encode(text)
            tokens, learned = tokens + ids, learned + [is_learned] * len(ids)
        chat = isinstance(row, dict) and any(row.get(key) for key in CHATS)  # a template ends answers itself
        if not chat and self.end is not None:
            tokens, learned = [*tokens, self.end], [*learned, True]
        return tokens, learned

    def _parts(self, row: Any) -> list[Part] | str:
        if isinstance(row, str):
            return [(row, True)] if row.strip() else NO_ANSWER
        if not isinstance(row, dict):
            return NO_JSON if row is None else NO_FIELDS
        if chat := next((row[key] for key in CHATS if row.get(key)), None):
            return self._chat_parts(chat)
        prompt = "\n".join(str(row[key]) for key in PROMPTS if row.get(key))
        answer = next((str(row[key]) for key in ANSWERS if row.get(key)), "")
        if answer.strip():
            return [(prompt + "\n", False), (answer, True)] if prompt.strip() else NO_PROMPT
        text = next((str(row[key]) for key in TEXTS if row.get(key)), "")
        if text.strip():
            return [(text, True)]
        return NO_ANSWER if prompt.strip() else NO_FIELDS

    def _chat_parts(self, chat: Any) -> list[Part] | str:
        """A chat through the template: what the assistant says is learned, and the end of its turn."""
        if not self.templates:
            return NO_TEMPLATE
        turns = list(_turns(chat))
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"].strip()]
        if not answers:
            return NO_ANSWER
        parts: list[Part] = []
        done = ""
        for place in answers:
            try:
                given = self._rendered(turns[:place], prompt=True)
                whole = self._rendered(turns[: place + 1], prompt=False)
            except Exception:  # a template is a program of its own, and refuses what it does not like in its own way
                return REFUSED
            if not (given.startswith(done) and whole.startswith(given)):
                return REFUSED  # it writes earlier turns in another way once later ones follow
            parts += [(given[len(done) :], False), (whole[len(given) :], True)]
            done = whole
        return [part for part in parts if part[0]]

    def _rendered(self, turns: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        if self._chat is None:
            from transformers import AutoTokenizer

            self._chat = AutoTokenizer.from_pretrained(self.root, trust_remote_code=self.trust)
        text: str = self._chat.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt)
        return text


def _turns(chat: Any) -> Iterator[dict[str, str]]:
    for turn in chat if isinstance(chat, list) else ():
        if isinstance(turn, dict):
            role = str(turn.get("role", turn.get("from", "")))
            yield {"role": ROLES.get(role, role), "content": str(turn.get("content", turn.get("value")) or "")}


def _has_template(root: Path) -> bool:
    if (root / "chat_template.jinja").is_file():
        return True
    path = root / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
