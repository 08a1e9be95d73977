"""Rows of a data set as examples: a prompt that is given, an answer that is learned. What cannot be used is counted.

Known are ``messages`` (or ``conversations``) with the tokenizer's chat template, ``instruction`` with ``input`` and ``output``,
``prompt`` with ``response``, their usual other names, and ``text``, learned whole.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CalibrationError
from weightworks.store.documents import read_json
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
NOT_LOOKED_AT = "not among those looked at (--num-samples)"

Part = tuple[str, bool]  # a piece of text, and whether it is learned
Example = tuple[list[int], list[bool]]  # tokens, and which of them are learned


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
    found: list[Example] = []
    for place in torch.randperm(len(rows), generator=keyed(seed, "rows")).tolist():
        made = maker.usable(rows[place], seq_len)
        if isinstance(made, str):
            dropped[made] += 1
        else:
            found.append(made)
        if len(found) == count:
            break
    _refuse_few(len(found), len(rows), dropped, source)
    aside = set_aside(len(found), held_out, source)
    rows_, others = Rows.of(found[aside:]), Rows.of(found[:aside])
    return Lessons(rows_, others, source, count, seq_len, seed, dict(sorted(dropped.items())))


def _refuse_few(found: int, rows: int, dropped: Counter[str], source: str) -> None:
    if found < 2:
        told = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
        raise CalibrationError(
            f"{source}: {found} of {rows} rows can be trained on ({told or 'there are no rows'})",
            hint="rows are objects with messages, instruction and output, prompt and response, or text; or raise --seq-len",
        )


@dataclass(frozen=True)
class Examples:
    """All rows of a data set that can be trained on, in its order.

    ``rows`` are their tokens, ``given`` int64 [n] how many of those come before the first that is learned (all of them where
    there are none before), ``prompts`` and ``texts`` what they say without the answers and with them, ``numbers`` their places in
    the data set; ``left_out`` tells of the others, by place, why they are not among them.
    """

    rows: Rows
    given: torch.Tensor
    prompts: list[str]
    texts: list[str]
    numbers: list[int]
    left_out: Mapping[int, str]
    source: str
    digest: str

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens that are given and that are learned, int64 [n, 2]."""
        lengths = self.rows.starts.diff()
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.rows.learned.long().cumsum(0)])
        learned = sums[self.rows.starts].diff()
        return torch.stack([lengths - learned, learned], 1)

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows were left out, by reason."""
        return dict(sorted(Counter(self.left_out.values()).items()))

    def told(self) -> str:
        """The rows in words."""
        text = f"{len(self.rows)} rows of at most {self.rows.longest} tokens from {self.source}"
        left = ", ".join(f"{number} {reason}" for reason, number in self.dropped.items())
        return text + (f"; left out: {left}" if left else "")


def all_examples(
    rows: Sequence[Any],
    source: str,
    root: Path,
    *,
    seq_len: int,
    count: int | None,
    seed: int,
    trust_remote_code: bool = False,
) -> Examples:
    """Every row that can be trained on, of a seeded choice of ``count`` rows if that is given.

    Raises :class:`CalibrationError` with the reasons where hardly any can be used.
    """
    looked = list(range(len(rows)))
    if count is not None and count < len(rows):
        looked = torch.randperm(len(rows), generator=keyed(seed, "rows"))[:count].sort().values.tolist()
    left_out = dict.fromkeys(set(range(len(rows))).difference(looked), NOT_LOOKED_AT)
    maker = Maker(root, trust_remote_code=trust_remote_code)
    digest, made = hashlib.sha256(), list[Example]()
    prompts, texts, numbers = list[str](), list[str](), list[int]()
    for number in looked:
        digest.update((json.dumps(rows[number], sort_keys=True) + "\n").encode())
        parts = maker.parts(rows[number])
        example = parts if isinstance(parts, str) else maker.usable_parts(rows[number], parts, seq_len)
        if isinstance(parts, str) or isinstance(example, str):
            left_out[number] = str(example)
            continue
        made.append(example)
        given = "".join(text for text, learned in parts if not learned)
        texts.append("".join(text for text, _ in parts))
        prompts.append(given or texts[-1])
        numbers.append(number)
    _refuse_few(len(made), len(looked), Counter(left_out[n] for n in looked if n in left_out), source)
    lengths = [len(tokens) for tokens, _ in made]
    before = [flags.index(True) for _, flags in made]
    given_tokens = torch.tensor([first or length for first, length in zip(before, lengths, strict=True)])
    return Examples(
        Rows.of(made), given_tokens, prompts, texts, numbers, dict(sorted(left_out.items())), source, digest.hexdigest()
    )


class Maker:
    """Makes examples for the tokenizer in the folder ``root``."""

    def __init__(self, root: Path, *, trust_remote_code: bool = False) -> None:
        self.root, self.trust = root, trust_remote_code
        self.tokenizer: Tokenizer = load_tokenizer(root, trust_remote_code=trust_remote_code)
        end = read_json(root / "config.json").get("eos_token_id")
        self.end: int | None = end[0] if isinstance(end, list) and end else end if isinstance(end, int) else None
        self.templates = _has_template(root)
        self._chat: Any = None

    def example(self, row: Any) -> Example | str:
        """Tokens of a row with what of them is learned, or why it cannot be used."""
        parts = self.parts(row)
        return parts if isinstance(parts, str) else self.joined(row, parts)

    def joined(self, row: Any, parts: Sequence[Part]) -> Example:
        """Tokens of the ``parts`` of a row with what of them is learned."""
        tokens: list[int] = []
        learned: list[bool] = []
        for text, is_learned in parts:
            ids = self.tokenizer.encode(text)
            tokens, learned = tokens + ids, learned + [is_learned] * len(ids)
        chat = isinstance(row, dict) and any(row.get(key) for key in CHATS)  # a template ends answers itself
        if not chat and self.end is not None:
            tokens, learned = [*tokens, self.end], [*learned, True]
        return tokens, learned

    def usable(self, row: Any, seq_len: int) -> Example | str:
        """:meth:`example` of at most ``seq_len`` tokens, with something to predict; or why it cannot be used."""
        parts = self.parts(row)
        return parts if isinstance(parts, str) else self.usable_parts(row, parts, seq_len)

    def usable_parts(self, row: Any, parts: Sequence[Part], seq_len: int) -> Example | str:
        """The same of a row whose ``parts`` are known."""
        made = self.joined(row, parts)
        if len(made[0]) > seq_len:
            return f"longer than {seq_len} tokens"
        return made if any(made[1][1:]) else NO_ANSWER

    def parts(self, row: Any) -> list[Part] | str:
        """The texts a row is made of, each with whether it is learned, or why it cannot be used."""
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
    except (ValueError, RecursionError):
        return None
