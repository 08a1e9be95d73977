"""Soups: members chosen and weights learned on held-out text, without a candidate being written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT_TEXT, Commands, Run
from safetensors.torch import load_file, save_file

from merge import merge as merge_models
from merge._greedy import greedy
from merge._learned import learn
from merge.soup import Method, Options
from weightworks.errors import CalibrationError, UsageError
from weightworks.score.perplexity import Method as Perplexity
from weightworks.score.perplexity import Options as PerplexityOptions
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings
from weightworks.testing.merging import merged

TOKENS = 512
SPREAD = 0.01


def quadratic(points: Sequence[Sequence[float]], goal: Sequence[float]) -> Callable[[Sequence[int]], float]:
    """A score: squared distance of the mean of some points from the goal, and one."""

    def score(members: Sequence[int]) -> float:
        mean = [sum(points[k][axis] for k in members) / len(members) for axis in range(len(goal))]
        return 1.0 + sum((a - b) ** 2 for a, b in zip(mean, goal, strict=True))

    return score


def test_greedy_finds_the_best_members_of_a_quadratic() -> None:
    """Two points whose mean is the goal, and two that lead away from it; 2 N - 1 scores."""
    points = [(1.0, 0.0), (3.0, 3.0), (-1.0, 0.0), (0.0, 5.0)]
    calls: list[tuple[int, ...]] = []

    def score(members: Sequence[int]) -> float:
        calls.append(tuple(members))
        return quadratic(points, (0.0, 0.0))(members)

    choice = greedy(list("abcd"), score)
    assert choice.members == (0, 2)
    assert choice.perplexity == 1.0
    assert len(calls) == len(set(calls)) == 2 * len(points) - 1
    assert [trial.accepted for trial in choice.trials] == [True, False, False]


def test_equal_models_are_tried_in_order_of_names() -> None:
    tried: list[tuple[int, ...]] = []
    greedy(["c", "b", "a"], lambda members: tried.append(tuple(members)) or 2.0)
    assert tried[3:] == [(1, 2), (0, 2)]  # a is the first, then b, then c


def test_what_counts_as_better() -> None:
    def score(members: Sequence[int]) -> float:
        return 4.0 if len(members) == 1 else 4.0 - gain

    gain = 0.0
    assert greedy(["a", "b"], score).members == (0,)
    assert greedy(["a", "b"], score, or_equal=True).members == (0, 1)
    gain = 0.04
    assert greedy(["a", "b"], score).members == (0, 1)
    assert greedy(["a", "b"], score, min_gain=0.02).members == (0,)


def test_a_model_without_a_score_is_no_candidate() -> None:
    scores = {(0,): math.nan, (1,): 3.0, (2,): 2.0, (1, 2): 1.0}
    choice = greedy(["a", "b", "c"], lambda members: scores[tuple(members)])
    assert choice.members == (1, 2)


class Toy:
    """A model of one weight and one bias by token, to learn mixtures of; ``goal`` is in the span of two of three."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        vocabulary = 16
        self.stacks: Mapping[str, torch.Tensor] = {
            "table": torch.randn(3, vocabulary, vocabulary, generator=generator),
            "bias": torch.randn(3, vocabulary, generator=generator),
        }
        self.blocks = {"table": "block 0", "bias": "outside"}
        self.tensors = {"table": ["table"], "bias": ["bias"]}
        table = 0.7 * self.stacks["table"][0] + 0.3 * self.stacks["table"][2]
        chances = (table + self.stacks["bias"][1]).softmax(-1)
        tokens = [torch.zeros(64, dtype=torch.int64)]
        for _ in range(63):
            tokens.append(torch.multinomial(chances[tokens[-1]], 1, generator=generator)[:, 0])
        self.windows = torch.stack(tokens, 1)  # [64, 64]

    def logits(self, parameters: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return parameters["table"][tokens] + parameters["bias"]


def test_learned_weights_are_those_that_made_the_text() -> None:
    learned = learn(Toy(), "tensor", 60)
    assert learned.weights["table"] == pytest.approx([0.7, 0.0, 0.3], abs=0.1)
    assert learned.weights["bias"][1] > 0.8
    assert learned.losses[-1] < learned.losses[0]
    assert learned.beta == pytest.approx(1.0, abs=0.15)
    assert all(sum(weights) == pytest.approx(1.0) for weights in learned.weights.values())
    assert learn(Toy(), "tensor", 2) == learn(Toy(), "tensor", 2)
    assert list(learn(Toy(), "block", 1).weights) == ["block 0", "outside"]
    assert list(learn(Toy(), "model", 1).weights) == ["model"]


def test_weights_found_replace_equal_ones() -> None:
    models = [{"a": torch.full((2, 2), 1.0)}, {"a": torch.full((2, 2), 3.0)}]
    assert float(merged(Method(Options()), models)["a"][0, 0]) == 2.0

    class Found(Method):
        def merge(self, slab: Any, found: Any) -> torch.Tensor:
            return super().merge(slab, {"a": [0.25, 0.75]})

    assert float(merged(Found(Options()), models)["a"][0, 0]) == 2.5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"greedy": True}, "give score, a text file"),
        ({"greedy": True, "learned": "tensor", "score": "x"}, "take one"),
        ({"greedy": True, "score": "x", "weights": [1.0]}, "leave weights out"),
        ({"score": "x"}, "with greedy or learned only"),
        ({"min_gain": 0.1}, "belong to greedy"),
    ],
)
def test_contradicting_options_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Options.parse(values, where="merge.soup")


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The embedded model moved to both sides, and far away: the mean of the first two is the embedded model."""
    folder = tmp_path_factory.mktemp("soups")
    weights = load_file(tiny_llama / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noise = {name: SPREAD * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    made = []
    for name, scale in (("plus", 1.0), ("minus", -1.0), ("far", 5.0)):
        shutil.copytree(tiny_llama, folder / name)
        moved = {key: (value.float() + scale * noise[key]).to(value.dtype) for key, value in weights.items()}
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
        made.append(folder / name)
    return made


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text to choose by and another to report on."""
    folder, text = tmp_path_factory.mktemp("texts"), SHORT_TEXT.read_text(encoding="utf-8")
    for name, part in (("val.txt", text[:6000]), ("test.txt", text[6000:12000])):
        (folder / name).write_text(part, encoding="utf-8")
    return folder / "val.txt", folder / "test.txt"


def perplexity(model: Path, text: Path) -> float:
    """By the score that users call."""
    options = PerplexityOptions(texts=[str(text)], max_tokens=TOKENS)
    result = Perplexity(options).score([Subject("m", str(model))], "m", Settings(device="cpu"), lambda line: None)
    value: float = result["models"][0]["metrics"]["perplexity"]["value"]
    return value


def test_greedy_soup_of_checkpoints(models: list[Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Better than its members on text that had no part in the choice; what was scored is what is written; NaN is named."""
    val, test = texts
    broken = Path(shutil.copytree(models[0], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    outcome = merge_models(
        [broken, *models],
        greedy=True,
        score=str(val),
        report=str(test),
        score_tokens=TOKENS,
        output_dir=tmp_path / "soup",
        device="cpu",
    )
    assert outcome.provenance is not None
    selection = outcome.provenance["selection"]
    assert selection["members"] == [str(models[0]), str(models[1])]
    assert selection["rejected"] == [str(broken)]
    assert f"{broken}: no candidate" in outcome.fallbacks[0]
    assert selection["candidates"][str(broken)] is None
    assert selection["perplexity"] == pytest.approx(perplexity(tmp_path / "soup", val), rel=1e-6)
    report = selection["report"]["perplexity"]
    assert report["the result"] == pytest.approx(perplexity(tmp_path / "soup", test), rel=1e-6)
    assert report["the result"] < min(value for name, value in report.items() if name != "the result")
    assert [trial["accepted"] for trial in selection["trials"]] == [True, False]
    assert len(outcome.provenance["diagnosis"]["delta_norms"]) == 2
    card = (tmp_path / "soup" / "README.md").read_text()
    assert f"| chosen by | greedy, perplexity on `val.txt` (sha256 {selection['digest'][:12]})" in card
    json.loads((tmp_path / "soup" / "provenance.json").read_text(), parse_constant=pytest.fail)  # no NaN in it


def test_learned_soup_of_checkpoints(models: list[Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    """It leaves the far model out, and is better than the uniform soup."""
    options = {"learned": "block", "epochs": 12, "score": str(texts[0]), "score_tokens": TOKENS, "device": "cpu"}
    provenance = merge_models(models, output_dir=tmp_path / "soup", **options).provenance
    assert provenance is not None
    selection = provenance["selection"]
    assert selection["perplexity"] < selection["uniform"]
    assert selection["perplexity"] == pytest.approx(perplexity(tmp_path / "soup", texts[0]), rel=1e-6)
    far = [weights[2] for weights in selection["weights"].values()]
    assert len(far) == 7  # six blocks and what is outside them
    assert sum(far) / len(far) < 0.25


def test_text_to_choose_by_is_not_reported_on(models: list[Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    val, _ = texts
    longer, spaced = tmp_path / "longer.txt", tmp_path / "spaced.txt"
    longer.write_text("Before. " + val.read_text() + " After.")
    spaced.write_text(val.read_text().replace(" ", "\n"))
    for report, said in ((val, "is the same as"), (spaced, "is the same as"), (longer, "is contained in")):
        with pytest.raises(CalibrationError, match=said):
            merge_models(models, greedy=True, score=str(val), report=str(report), output_dir=tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_models_that_do_not_fit_are_refused(
    merge: Callable[..., Run], models: list[Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("soup", *models, "--learned", "tensor", "--score", texts[0], "--max-memory", "200MB", "-o", "soup")
    run = merge(*words, cwd=tmp_path)
    assert run.code == 1
    assert "too little memory" in run.err
    assert "fitting weights with all models in memory" in run.err
    assert not list(tmp_path.iterdir())


def test_a_killed_choice_goes_on(
    merge: Callable[..., Run], models: list[Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Killed before its third score: two are not taken again, and the bytes are those of an undisturbed run."""
    where = "weightworks.plan.heldout:HeldOutBench._score"
    words = ("soup", *models, "--greedy", "--score", texts[0], "--score-tokens", str(TOKENS), "-q", "-o")
    assert merge(*words, "whole", cwd=tmp_path).code == 0
    killed = merge(*words, "cut", cwd=tmp_path, faults=[["signal_at", where, 3]])
    assert killed.code == -9
    again = merge(*words, "cut", cwd=tmp_path, faults=[["count_calls", where, str(tmp_path / "calls")]])
    assert again.code == 0, again.err
    assert (tmp_path / "calls").read_text() == "3"  # five in all
    for name in ("model.safetensors", "provenance.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


RECIPE = """
version: 1
sources: {{a: {0}, b: {1}}}
stages:
  soup: {{use: merge.soup, from: [a, b], with: {{greedy: true, score: {val}, score_tokens: 512}}}}
  scores: {{use: score.perplexity, from: [a, soup], with: {{texts: [{test}], max_tokens: 512}}}}
report: [scores]
"""


def test_in_recipes(compress: Commands, models: list[Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    """The text's content is part of the key; a score on the text that chose is refused."""
    val, test = tmp_path / "val.txt", texts[1]
    shutil.copy(texts[0], val)
    (tmp_path / "r.yaml").write_text(RECIPE.format(*models, val=val, test=test))
    assert compress("run", "r.yaml", "-q", cwd=tmp_path).code == 0
    val.write_text(val.read_text()[:-500])
    assert "a text changed" in compress("explain", "r.yaml", "--json", cwd=tmp_path).out
    (tmp_path / "leak.yaml").write_text(RECIPE.format(*models, val=val, test=val))
    leak = compress("run", "leak.yaml", cwd=tmp_path)
    assert leak.code == 2
    assert f"stage 'scores' reports on {val}, by which 'soup' chooses" in leak.err
