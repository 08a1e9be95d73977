"""Merges of models whose tokenizers differ: rows matched by token, nothing moved that no model means."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands, Run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from merge import soup, task_arithmetic
from weightworks.engine.inmemory import merged
from weightworks.errors import CheckpointError, VerificationError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.tokenizerfile import Vocabulary, extended
from weightworks.store.vocabulary import Member, align, views
from weightworks.stream.skeleton import build
from weightworks.stream.vocabulary import check_ids, vocabulary_tensors
from weightworks.testing.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
EMBED = "embed.weight"


class Held:
    """Tensors in memory, read as from a checkpoint."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.specs = [TensorSpec(name, tuple(one.shape), one.dtype) for name, one in tensors.items()]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.tensors[name].to(dtype or self.tensors[name].dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read(name, dtype)[start:stop].clone()


def member(name: str, tokens: Sequence[str], rows: int, first: float) -> Member:
    """A model whose row ``k`` is all ``first + k``, of tokens with ids in order."""
    document = {"model": {"type": "WordLevel", "vocab": {token: k for k, token in enumerate(tokens)}}}
    embed = (first + torch.arange(rows).float()).repeat(2, 1).T.contiguous()
    reader = Held({EMBED: embed, "norm.weight": torch.full((2,), float(first))})
    ids = document["model"]["vocab"]
    return Member(name, reader, Vocabulary(document, ids, {}), rows, frozenset({EMBED}))  # type: ignore[arg-type]


def column(view: Any) -> list[float]:
    return [float(value) for value in view.read(EMBED, torch.float32)[:, 0]]


def test_rows_of_the_base_matched_by_token() -> None:
    base = member("base", ["a", "b", "c"], 5, 0)  # rows 3 and 4 are padding
    other = member("other", ["c", "x", "a"], 4, 100)  # row 3 is padding
    alignment = align([base, other], "base")
    assert [places.tolist() for places in alignment.places] == [[0, 1, 2, 3, 4], [2, -1, 0, 3, -1]]
    one, two = views(alignment, has_base=True, weights=[1.0])
    assert column(one) == [0, 1, 2, 3, 4]
    assert column(two) == [102, 1, 100, 103, 4]  # what it lacks is the base's: no difference from it
    assert two.read("norm.weight").tolist() == [100, 100]
    assert [spec.shape for spec in two.specs] == [(5, 2), (2,)]
    assert alignment.lines == [
        "vocabulary of other: 2 tokens have another id; 1 tokens of its own are left out ('x'); 1 are missing ('b'); "
        "it has 4 rows, not 5"
    ]
    for start in range(5):
        for stop in range(start, 6):
            assert torch.equal(two.read_rows(EMBED, start, stop), two.read(EMBED)[start:stop])


def test_a_union_takes_padding_rows_first() -> None:
    base = member("base", ["a", "b"], 5, 0)  # rows 2 to 4 are padding
    other = member("other", ["y", "a", "x"], 3, 100)
    third = member("third", ["x", "z", "lost"], 2, 200)  # its tokenizer knows a token that its embedding lacks
    alignment = align([base, other, third], "union")
    assert dict(alignment.new) == {"y": 2, "x": 3, "z": 4}
    assert alignment.rows == 5
    one, two, three = views(alignment, has_base=True, weights=[1.0, 1.0])
    assert column(one) == [0, 1, 100, (102 + 200) / 2, 201]  # tokens new to the base: the mean of who has them
    assert column(two) == [101, 1, 100, 102, 201]
    assert column(three) == [0, 1, 100, 200, 201]
    more = align([base, member("other", ["p", "q", "r", "s"], 4, 100)], "union")
    assert more.rows == 6
    assert align([base, base], "union").rows == 5  # nothing new: padding rows stay


def test_averages_are_of_those_that_have_a_token() -> None:
    models = [member("one", ["a", "b"], 2, 0), member("two", ["a", "c"], 2, 10), member("three", ["c", "a"], 2, 20)]
    weights = [0.5, 0.3, 0.2]
    alignment = align(models, "union")
    seen = views(alignment, has_base=False, weights=weights)
    tensors = [{EMBED: view.read(EMBED)} for view in seen]
    result = merged(soup.Method(soup.Options(weights=weights)), tensors)[EMBED][:, 0]
    expected = [0.5 * 0 + 0.3 * 10 + 0.2 * 21, 1, (0.3 * 11 + 0.2 * 20) / 0.5]
    torch.testing.assert_close(result, torch.tensor(expected))


@pytest.mark.parametrize("seed", range(20))
def test_renumbered_copies_merge_to_the_base(seed: int) -> None:
    """A model that is the base with its tokens numbered otherwise, some of them forgotten, changes nothing."""
    draws = random.Random(seed)
    tokens = list("abcdefgh")
    order, padding, held = draws.sample(tokens, 8), draws.randint(0, 3), draws.randint(1, 8)
    base = member("base", tokens, 8 + padding, 1)
    kept = order[:held]
    rows = base.reader.read(EMBED)[[tokens.index(token) for token in kept]]
    ids = {token: k for k, token in enumerate(kept)}
    copy = Member("copy", Held({EMBED: rows}), Vocabulary({}, ids, {}), held, frozenset({EMBED}))
    one, two = views(align([base, copy], "base"), has_base=True, weights=[1.0])
    assert torch.equal(one.read(EMBED), base.reader.read(EMBED))
    method = task_arithmetic.Method(task_arithmetic.Options())
    result = merged(method, [{EMBED: two.read(EMBED)}], {EMBED: one.read(EMBED)})
    assert torch.equal(result[EMBED], base.reader.read(EMBED))


# Tokenizers.


def vocabulary(path: Path) -> Vocabulary:
    found = Vocabulary.read(path)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("vocabulary") / "base")


def add_tokens(folder: Path, *tokens: str, special: bool = True) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """The base with its tokens numbered backwards, two special tokens and three padding rows more."""
    folder = base.parent / "other"
    shutil.copytree(base, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    count = len(document["model"]["vocab"])
    document["model"]["vocab"] = {token: count - 1 - number for token, number in document["model"]["vocab"].items()}
    for entry in document["added_tokens"]:
        entry["id"] = count - 1 - entry["id"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    add_tokens(folder, "<user>", "<bot>")
    state = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = torch.full((5, state[name].shape[1]), 0.25, dtype=torch.bfloat16)
        extra[3:] = 0.5
        state[name] = torch.cat([state[name].flip(0), extra])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": count + 5}))
    return folder


def test_tensors_with_a_vocabulary_axis_are_known_by_structure(base: Path) -> None:
    skeleton = build(DenseView(Checkpoint.open(base)))
    assert vocabulary_tensors(skeleton) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_added_and_ordinary_tokens_get_their_ids(base: Path, tmp_path: Path) -> None:
    first = vocabulary(base)
    shutil.copytree(base, tmp_path / "more")
    document = json.loads((tmp_path / "more" / "tokenizer.json").read_text())
    known = set(first.ids)
    left, right = next((a, b) for a in "abcdefgh" for b in "jkqxz" if a + b not in known)
    document["model"]["vocab"][left + right] = len(known)
    document["model"]["merges"].append([left, right])
    (tmp_path / "more" / "tokenizer.json").write_text(json.dumps(document))
    add_tokens(tmp_path / "more", "<user>")
    source = vocabulary(tmp_path / "more")
    new = {"<user>": len(known), left + right: len(known) + 1}
    (tmp_path / "tokenizer.json").write_text(extended(first, new, dict.fromkeys(new, source)))
    check_ids(tmp_path / "tokenizer.json", {**first.ids, **new})
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode(left + right).ids == [len(known) + 1]  # reached by its merge rule
    assert loaded.encode("<user>").ids == [len(known)]
    before = Tokenizer.from_file(str(base / "tokenizer.json"))
    text = (Path(__file__).parent.parent / "README.md").read_text().replace(left + right, "")
    assert loaded.encode(text).ids == before.encode(text).ids
    with pytest.raises(VerificationError, match="1 tokens did not get their ids: '<user>' has id 512, not 7"):
        check_ids(tmp_path / "tokenizer.json", {"<user>": 7})


def test_kinds_that_cannot_take_tokens() -> None:
    base = Vocabulary({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, {"a": 0}, {})
    other = Vocabulary({"model": {"type": "Unigram", "vocab": [["b", 0.0]]}}, {"b": 0}, {})
    with pytest.raises(CheckpointError, match="a vocabulary of kind Unigram cannot be given 1 more tokens"):
        extended(base, {"b": 1}, {"b": other})


# From the command line.


def run_merge(compress: Commands, *words: str | Path, cwd: Path) -> Run:
    return compress(*words, program="merge", cwd=cwd)


def test_base_and_union_from_folder_to_folder(compress: Commands, base: Path, other: Path, tmp_path: Path) -> None:
    run = run_merge(compress, "soup", base, other, "-o", "out", "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    text = "512 tokens have another id; 2 tokens of its own are left out ('<bot>', '<user>'); it has 517 rows, not 512"
    assert text in run.err
    assert run.json["vocabulary"]["models"][0]["moved"] == 512
    before, result = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    for name in before.tensors:  # the other one is the base, told otherwise
        assert torch.equal(result.read(name), before.read(name))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

    run = run_merge(
        compress, "task-arithmetic", other, "--base", base, "--vocabulary", "union", "-o", "all", cwd=tmp_path
    )
    assert run.code == 0, run.err
    assert "2 tokens of its own are added" in run.err
    result = Checkpoint.open(tmp_path / "all")
    assert result.config["vocab_size"] == 514
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = result.read(name)
        assert torch.equal(rows[:512], before.read(name))
        assert rows[512:].tolist() == torch.full((2, rows.shape[1]), 0.25).tolist()
    check_ids(tmp_path / "all" / "tokenizer.json", {**vocabulary(base).ids, "<user>": 512, "<bot>": 513})
    assert compress("verify", tmp_path / "all").code == 0


def test_nothing_is_known_without_a_tokenizer(compress: Commands, base: Path, other: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(other, bare)
    (bare / "tokenizer.json").unlink()
    run = run_merge(compress, "soup", base, bare, "-o", "out", cwd=tmp_path)
    assert run.code == 1
    assert "model.embed_tokens.weight: [517, 128] in" in run.err
    run = run_merge(compress, "soup", base, bare, "--vocabulary", "union", "-o", "out", cwd=tmp_path)
    assert "has no tokenizer.json, so its tokens are not known" in run.err
