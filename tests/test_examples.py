"""Rows of data sets as examples: what is learned of them, what is left out and why, and that files of all kinds are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from compress import recover
from weightworks.errors import CalibrationError
from weightworks.stream.calibration import load_tokenizer
from weightworks.stream.examples import (
    NO_ANSWER,
    NO_FIELDS,
    NO_JSON,
    NO_PROMPT,
    NO_TEMPLATE,
    REFUSED,
    Maker,
    are_examples,
    load_examples,
    read_rows,
)
from weightworks.stream.lessons import IGNORED, Lessons, Rows
from weightworks.testing.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TINY = REPOSITORY / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(TINY / name, folder / name)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


def shown(root: Path, row: Any) -> tuple[str, str] | str:
    """What of a row is given and what is learned, in text."""
    made = Maker(root).example(row)
    if isinstance(made, str):
        return made
    backend: Any = load_tokenizer(root)
    pieces = {flag: [token for token, learned in zip(*made, strict=True) if learned == flag] for flag in (False, True)}
    given, learned = (backend.backend.decode(pieces[flag], skip_special_tokens=False) for flag in (False, True))
    return given, learned


END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "given", "learned"),
    [
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n1 and 2\n", "3" + END),
        ({"instruction": "Sing.", "input": "", "output": "La."}, "Sing.\n", "La." + END),
        ({"prompt": "The river", "response": " ran."}, "The river\n", " ran." + END),
        ({"question": "Why?", "answer": "So."}, "Why?\n", "So." + END),
        ({"text": "All of it."}, "", "All of it." + END),
        ("A line.", "", "A line." + END),
    ],
)
def test_answers_alone_are_learned(row: Any, given: str, learned: str) -> None:
    assert shown(TINY, row) == (given, learned)


def test_every_turn_of_the_assistant_is_learned(chatty: Path) -> None:
    turns = [
        ("system", "Be kind."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Bye."),
        ("assistant", "Farewell."),
    ]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    given, learned = shown(chatty, chat)
    assert learned == "Hello.</s>\nFarewell.</s>\n"
    assert given == "<system>Be kind.</s>\n<user>Hi.</s>\n<assistant><user>Bye.</s>\n<assistant>"
    other = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
    assert shown(chatty, other) == ("<user>Hi.</s>\n<assistant>", "Hello.</s>\n")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, NO_JSON),
        (7, NO_FIELDS),
        ({"title": "x"}, NO_FIELDS),
        ({"instruction": "Sing.", "output": " "}, NO_ANSWER),
        ({"output": "La."}, NO_PROMPT),
        ({"text": " "}, NO_FIELDS),
        ({"messages": [{"role": "user", "content": "Hi."}]}, NO_ANSWER),
        ({"messages": [{"role": "assistant", "content": ""}]}, NO_ANSWER),
    ],
)
def test_rows_that_cannot_be_used_say_why(chatty: Path, row: Any, reason: str) -> None:
    assert Maker(chatty).example(row) == reason


def test_templates_that_are_missing_or_refuse(chatty: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    assert Maker(TINY).example(chat) == NO_TEMPLATE
    for number, template in enumerate(
        ("{{ raise_exception('no') }}", "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    ):
        folder = shutil.copytree(chatty, tmp_path / str(number))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        assert Maker(folder).example(chat) == REFUSED


def rows_file(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_dropped_rows_are_counted_by_reason(tmp_path: Path) -> None:
    good = [{"instruction": f"Count to {k}.", "output": "one two three"} for k in range(12)]
    bad = ["{", {"instruction": "x", "output": ""}, {"title": 1}, {"instruction": "x " * 99, "output": "y"}]
    rows = read_rows(str(rows_file(tmp_path, [*good, *bad])))
    assert are_examples(rows)
    lessons = load_examples(rows, "rows", TINY, count=99, held_out=3, seq_len=40, seed=0)
    assert lessons.dropped == {"longer than 40 tokens": 1, NO_ANSWER: 1, NO_FIELDS: 1, NO_JSON: 1}
    assert (len(lessons.rows), len(lessons.held_out)) == (9, 3)
    assert lessons.facts()["dropped"] == dict(lessons.dropped)
    assert "left out: 1 longer than 40 tokens, 1 no answer" in lessons.told(40)
    few = load_examples(rows, "rows", TINY, count=6, held_out=1, seq_len=40, seed=0)
    assert len(few.rows) + len(few.held_out) == 6  # no more are looked at than needed
    other = load_examples(rows, "rows", TINY, count=6, held_out=1, seq_len=40, seed=1)
    assert other.digest != few.digest
    with pytest.raises(CalibrationError, match=r"rows: 0 of 16 rows can be trained on \(13 longer than 3 tokens, "):
        load_examples(rows, "rows", TINY, count=9, held_out=1, seq_len=3, seed=0)


def test_plain_texts_are_no_examples(tmp_path: Path) -> None:
    assert not are_examples(read_rows(str(rows_file(tmp_path, [{"text": "a"}, "b"]))))
    assert read_rows("builtin") == []
    (tmp_path / "a.txt").write_text("a")
    assert read_rows(str(tmp_path / "a.txt")) == []


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "response": ["c", "d"]}), tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet")) == [
        {"prompt": "a", "response": "c"},
        {"prompt": "b", "response": "d"},
    ]


def test_rows_of_other_lengths_are_padded_and_not_learned() -> None:
    rows = Rows.of([([1, 2, 3], [False, True, True]), ([4], [True]), ([5, 6], [False, True])])
    batch = rows.batch([2, 0])
    assert batch.tokens.tolist() == [[5, 6, 0], [1, 2, 3]]
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 2, 3]]
    assert batch.learned == 3
    assert Lessons(rows, rows, "x", 3, 3, 0).passed(2, 3) == 12


def test_padding_does_not_change_the_loss(tmp_path: Path) -> None:
    """A row alone and the same beside a longer one: what follows its end is not seen."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"), dtype=torch.float32)
    rows = Rows.of([(list(range(1, 9)), [True] * 8), (list(range(1, 30)), [True] * 29)])
    with torch.no_grad():
        alone, beside = (model(rows.batch(places).tokens).logits[0, :8] for places in ([0], [0, 1]))
    assert torch.allclose(alone, beside, atol=1e-4)


def test_recovery_on_instructions(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {k}.", "input": "Now.", "output": f"It is {k}."} for k in range(20)]
    path = rows_file(tmp_path, [*rows, {"instruction": "Nothing."}])
    outcome = recover(
        make_model(tmp_path / "model"), dataset=str(path), seq_len=64, steps=2, batch_size=4, held_out=4, train=["norm"],
        dtype="float32", device="cpu", num_samples=99, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert outcome.provenance is not None
    facts = outcome.provenance["calibration"]
    assert facts["dropped"] == {NO_ANSWER: 1}
    assert (facts["windows"], facts["windows_held_out"]) == (16, 4)
    assert 0 < facts["tokens_learned"] < facts["tokens"]
