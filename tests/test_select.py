"""Rows chosen for a recovery: the steps of PASER against golden numbers and planted cases, and the command on small models."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SHORT_TEXT, Commands
from safetensors.torch import load_file, save_file

from compress.clusters import assign, cluster, similarity
from compress.concepts import ConceptGraph, concepts
from compress.diffusion import diffusion_map, gaussian
from compress.select import paser, random
from compress.shares import share_out
from weightworks.engine import measuring
from weightworks.engine.measuring import Parts, filled, jensen_shannon
from weightworks.errors import CalibrationError, MethodError, UsageError
from weightworks.plan.lineage import rebuild
from weightworks.report.selection import colours, selection_page
from weightworks.stage.selecting import CHOSEN, NO_ROOM, Pool
from weightworks.store.writer import CheckpointWriter
from weightworks.testing import Check, conformance

ARITHMETIC = "Add the two numbers."
STORY = "Go on with the story of the ship."


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Independent float64 evaluations of the formulas."""
    folder = shared / "golden" / "paser"
    return json.loads((folder / "pieces.json").read_text())["results"], load_file(folder / "pieces.safetensors")


# Divergence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_divergence_is_that_of_the_golden_numbers(golden: Any, dtype: torch.dtype, tolerance: float) -> None:
    _, tensors = golden
    p, q = tensors["jsd.logits_original"].to(dtype), tensors["jsd.logits_pruned"].to(dtype)
    seen = jensen_shannon(p, q).double()
    assert torch.allclose(seen, tensors["jsd.per_token"], rtol=0, atol=tolerance)
    offsets = tensors["jsd.offsets"].tolist()
    means = torch.stack([seen[a:b].mean() for a, b in pairwise(offsets)])
    assert torch.allclose(means, tensors["jsd.per_sample"], rtol=0, atol=tolerance)


def test_divergence_is_bounded_and_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(64, 33, generator=generator) * 10 ** torch.linspace(-3, 3, 64)[:, None] for _ in range(2))
    found = jensen_shannon(p, q)
    assert ((found >= 0) & (found <= math.log(2))).all()
    assert found.max() > 0.69
    assert torch.equal(found, jensen_shannon(q, p))
    assert jensen_shannon(p, p + 7).max() < 1e-6
    monkeypatch.setattr(measuring, "LOGITS", 100)  # three rows at a time
    assert torch.allclose(found, jensen_shannon(p, q), atol=1e-7)


def test_tokens_that_cannot_come_add_nothing() -> None:
    p, q = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]]), torch.tensor([[-math.inf, -math.inf, -math.inf, 0.0]])
    assert jensen_shannon(p, q).item() == pytest.approx(math.log(2))
    assert jensen_shannon(p, p).item() == 0


# Map and clusters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_diffusion_map_is_that_of_the_golden_numbers(golden: Any, steps: int) -> None:
    facts, tensors = golden
    points = tensors["diffusion.embeddings"].double().numpy()
    found = diffusion_map(points, facts["diffusion"]["q"], steps=steps)
    assert found.sigma == pytest.approx(facts["diffusion"]["sigma"], rel=1e-9)
    assert np.allclose(found.degree, tensors["diffusion.degree"], atol=1e-9)
    assert np.allclose(found.values, tensors["diffusion.eigenvalues"][1:7], atol=1e-6)
    wanted = tensors[f"diffusion.coords_t{steps}"].numpy()
    signs = np.sign((found.coordinates * wanted).sum(0))
    assert np.allclose(found.coordinates * signs, wanted, atol=1e-6)


def blobs(sizes: tuple[int, ...], seed: int = 0) -> tuple[Any, Any]:
    """Points around a centre for each size, in mixed order, and whose they are."""
    generator = np.random.default_rng(seed)
    whose = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = 6 * generator.standard_normal((len(sizes), 12))
    return centres[whose] + generator.standard_normal((len(whose), 12)), whose


def agreement(labels: Any, whose: Any) -> float:
    """Share of points in clusters that are mostly their own kind."""
    return sum(np.bincount(whose[labels == k]).max() for k in np.unique(labels)) / len(whose)


@pytest.mark.parametrize("sizes", [(40, 25), (60, 50, 40)])
def test_planted_clusters_are_found_and_counted(sizes: tuple[int, ...]) -> None:
    points, whose = blobs(sizes)
    found = cluster(similarity(diffusion_map(points, 8).coordinates))
    assert len(np.unique(found.factors.labels)) == len(sizes)
    assert agreement(found.factors.labels, whose) == 1.0
    errors = [found.errors[k] for k in sorted(found.errors)]
    assert errors == sorted(errors, reverse=True)


def test_points_are_put_among_landmarks_where_they_would_be() -> None:
    points, whose = blobs((300, 200, 100))
    mapped = diffusion_map(points[:150], 8, steps=2)
    assert np.allclose(mapped.place(points[:150]), mapped.coordinates, atol=1e-10)
    found = cluster(similarity(mapped.coordinates)).factors
    labels = assign(similarity(mapped.place(points[150:]), mapped.coordinates), found.v)
    assert agreement(np.concatenate([found.labels, labels]), whose) == 1.0
    assert (assign(similarity(mapped.coordinates), found.v) == found.labels).all()


def test_lanczos_gives_what_all_eigenpairs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = blobs((80, 60))
    whole = diffusion_map(points, 4)
    monkeypatch.setattr("compress.diffusion.DENSE", 10)
    few = diffusion_map(points, 4)
    assert np.allclose(whole.coordinates[:, :3], few.coordinates[:, :3], atol=1e-9)
    assert (diffusion_map(points, 4).coordinates == few.coordinates).all()  # the same bits again


def test_equal_points_have_no_map() -> None:
    with pytest.raises(ValueError, match="all points are one"):
        diffusion_map(np.ones((20, 3)), 2)
    assert (gaussian(np.full((4, 3), 1e6), np.full((4, 3), 1e6), 1.0) == 1).all()


# Budget and concepts --------------------------------------------------------------------------------------------------


def test_budget_is_that_of_the_golden_numbers(golden: Any) -> None:
    facts, _ = golden
    for case in facts["budget"]:
        assert share_out(case["B"], case["cds"], case["sizes"]) == case["with_redistribution"]


@pytest.mark.parametrize("budget", [1, 7, 60, 1000])
def test_budget_is_spent_whole(budget: int) -> None:
    sizes = [50, 3, 20, 1]
    counts = share_out(budget, [0.1, 0.4, 0.0, 0.1], sizes)
    assert sum(counts) == min(budget, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert share_out(6, [0.0, 0.0], [20, 10]) == [4, 2]  # no damage: by rows


def test_concepts_are_consistent_as_in_the_golden_numbers(golden: Any) -> None:
    facts, _ = golden
    for case in facts["ccg"].values():
        graph = ConceptGraph()
        assert [k for k, sample in enumerate(case["samples"]) if graph.accept(sample)] == case["accepted"]
        assert (graph.nodes, graph.edges) == (case["nodes"], case["edges"])


def test_third_sample_that_joins_what_was_apart_is_refused() -> None:
    graph = ConceptGraph()
    assert graph.accept(["a", "b"])
    assert graph.accept(["c", "d"])
    assert graph.conflict(["a", "c"]) == ("a", "c")
    assert not graph.accept(["a", "c"])
    assert (graph.nodes, graph.edges) == (4, 2)


def test_concepts_are_phrases_between_stop_words() -> None:
    text = "The washing machines of the old mill were in the mill. Washing machines!\nQueens' gardens and the mill"
    assert concepts(text, 3) == ("washing machine", "queen garden", "old mill")
    assert concepts("of the and", 3) == ()


# The method -----------------------------------------------------------------------------------------------------------


class Table:
    """Embeddings in memory."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.shape = rows, (rows.shape[0], rows.shape[1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.rows[start:stop]


def pool(degradation: Callable[[Any], Any], sizes: tuple[int, ...] = (60, 60, 40)) -> tuple[Pool, Any]:
    """Rows in planted clusters; ``degradation`` of each follows from whose it is."""
    points, whose = blobs(sizes)
    suffered = torch.from_numpy(degradation(whose)).double()
    tokens = torch.full((len(whose), 2), 20) + torch.arange(len(whose))[:, None]
    return Pool(
        [f"row{k}" for k in range(len(whose))], tokens, 0, Table(torch.from_numpy(points).float()), suffered
    ), whose


def paser_of(**options: Any) -> paser.Method:
    return paser.Method(paser.Options(**options))


@pytest.mark.parametrize("landmarks", [2000, 64])
def test_one_degraded_capability_draws_the_budget(landmarks: int) -> None:
    rows, whose = pool(lambda whose: np.where(whose == 2, 0.3, 0.01))
    choice = paser_of(landmarks=landmarks).select(rows, 32, lambda line: None)
    taken = np.bincount(whose[choice.order], minlength=3)
    assert taken.tolist() == [1, 1, 30]
    assert [choice.outcomes[row] for row in choice.order] == [CHOSEN] * 32
    even, _ = pool(lambda whose: np.full(len(whose), 0.1))
    assert np.bincount(whose[paser_of().select(even, 33, lambda line: None).order]).tolist() == [11, 11, 11]


def test_rows_of_a_cluster_come_by_divergence_over_cost(golden: Any) -> None:
    _, tensors = golden
    found = paser.efficiencies(tensors["jsd.per_sample"].numpy(), tensors["ies.tokens_x_y"].numpy())
    assert np.allclose(found, tensors["ies.score"].numpy(), rtol=1e-12)
    assert (paser.by_efficiency(np.arange(len(found)), found) == tensors["ies.order"].numpy()).all()


def test_a_cluster_whose_rows_contradict_hands_on_its_share() -> None:
    members = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    found = [("a", "b"), ("c", "d"), ("a", "c"), ("e",), ("f",), ("g",)]
    order, outcomes = paser.choose(5, members, [0.9, 0.1], found)
    assert order == [0, 1, 3, 4, 5]
    assert "'a' and 'c'" in outcomes[2]
    order, outcomes = paser.choose(4, members, [0.9, 0.1], None)
    assert (order, outcomes[4]) == ([0, 1, 2, 3], NO_ROOM)


def test_what_could_not_be_chosen_is_told() -> None:
    rows, whose = pool(lambda whose: np.zeros(len(whose)))
    texts = ["sea. sky"] * len(rows)
    for kind in range(3):  # once both were chosen apart, no row that joins them is
        one, other = np.flatnonzero(whose == kind)[:2]
        texts[one], texts[other] = "sea", "sky"
    same = Pool(texts, rows.tokens, 0, rows.embeddings, rows.degradation)
    choice = paser_of().select(same, 20, lambda line: None)
    assert sorted(texts[row] for row in choice.order) == ["sea"] * 3 + ["sky"] * 3
    assert sum("never stand together" in outcome for outcome in choice.outcomes) == len(rows) - 6
    assert any(line.startswith("6 of 20 rows chosen: all others contradict") for line in choice.shortfalls)
    assert any("predicts what the original does" in line for line in choice.shortfalls)
    few = Pool(texts[:5], rows.tokens[:5], 0, rows.embeddings, rows.degradation)
    with pytest.raises(MethodError, match="5 rows can be trained on, at least 8"):
        paser_of().select(few, 2, lambda line: None)


def test_chance_is_seeded() -> None:
    rows = Pool(["row"] * 50, torch.ones(50, 2, dtype=torch.int64), 0)
    method = random.Method(random.Options(budget=10.0))
    first, again = (method.select(rows, 10, lambda line: None).order for _ in range(2))
    other = method.select(Pool(rows.texts, rows.tokens, 1), 10, lambda line: None).order
    assert first == again != other
    assert len(set(first)) == 10


def test_budget_is_rows_or_a_share() -> None:
    assert paser.Options(budget=0.25).count(101) == 25
    assert paser.Options(budget=40.0).count(10) == 40
    assert paser.Options(budget=0.001).count(10) == 1
    assert "a number of rows, or a share below 1" in paser.Options.problems({"budget": 2.5}, where="select.paser")[0]


@pytest.mark.parametrize("check", [check for name in ("paser", "random") for check in conformance(f"select.{name}")])
def test_ways_of_choosing_keep_to_the_contract(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


# Models ---------------------------------------------------------------------------------------------------------------


def test_parts_hold_all_rows_once() -> None:
    assert [filled(length, 4096) for length in (1, 16, 17, 100, 129, 1000)] == [16, 16, 32, 112, 160, 1024]
    assert filled(100, 104) == 104
    parts = Parts([5, 40, 17, 100, 3, 60], 128, tokens=128)
    assert list(parts) == [(0, 3), (3, 5), (5, 6)]
    assert list(parts.groups(0, 3)) == [(16, [0]), (32, [2]), (48, [1])]
    assert parts.largest == 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two kinds, and two that cannot be used."""
    numbers = torch.Generator().manual_seed(0)
    rows: list[Any] = []
    for k in range(16):
        a, b = torch.randint(100, (2,), generator=numbers).tolist()
        rows.append({"id": f"sum-{k}", "instruction": ARITHMETIC, "input": f"{a} + {b}", "output": f"{a + b}"})
        tail = " and ".join(["the wind", "the sea", "a long grey night", "the captain"][: 1 + k % 4])
        rows.append({"id": f"story-{k}", "instruction": STORY, "input": f"It was late; {tail} came", "output": tail})
    rows += [{"instruction": "Say nothing."}, {"instruction": STORY, "output": "long " * 300}]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chosen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def forgetful(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model that no longer knows the digits: rows without any are read as before."""
    from tokenizers import Tokenizer

    folder = shutil.copytree(small, tmp_path_factory.mktemp("forgetful") / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits = [number for text, number in tokenizer.get_vocab().items() if text.isdigit()]
    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(len(digits), 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors["model.embed_tokens.weight"][digits] += noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_divergences_are_those_of_the_whole_models(small: Path, sparse: Path, data: Path, tmp_path: Path) -> None:
    """Rows streamed in parts and filled up against stock transformers, one row at a time."""
    from transformers import AutoModelForCausalLM

    from compress import select
    from weightworks.stream.examples import Maker

    outcome = select(
        sparse, teacher=small, dataset=str(data), budget=6, dtype="float32", device="cpu", output_dir=tmp_path / "o"
    )
    scores = [json.loads(line) for line in (outcome.target / "scores.jsonl").read_text().splitlines()]
    assert [row["row"] for row in scores] == list(range(34))
    assert [row["outcome"] for row in scores[32:]] == ["no answer", "longer than 128 tokens"]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (small, sparse)]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number in (0, 1, 7, 31):
        tokens, learned = Maker(small).example(rows[number])
        with torch.no_grad():
            p, q = (model(torch.tensor([tokens])).logits[0].double().softmax(-1) for model in models)
        mean = (p + q) / 2
        each = ((p * (p / mean).log() + q * (q / mean).log()) / 2).sum(-1)[:-1]
        assert scores[number]["degradation"] == pytest.approx(float(each[torch.tensor(learned[1:])].mean()), rel=1e-4)
        assert scores[number]["answer_tokens"] == sum(learned)


def test_what_a_model_has_forgotten_is_chosen(
    small: Path, forgetful: Path, data: Path, compress: Commands, tmp_path: Path
) -> None:
    command = ("select", forgetful, "--teacher", small, "--dataset", data, "--device", "cpu")
    run = compress(*command, "--budget", "8", "--clusters", "2", "--concepts", "0", "-o", "out", "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    rows = chosen(tmp_path / "out")
    assert len(rows) == 8
    assert [row["selection"]["rank"] for row in rows] == list(range(1, 9))
    assert all(row["id"].startswith("sum") for row in rows)
    assert run.json["selection"]["chosen"] == 8
    assert run.json["selection"]["dropped"] == {"longer than 128 tokens": 1, "no answer": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    assert rows[0]["input"] in page
    again = compress(*command, "--budget", "8", "--clusters", "2", "--concepts", "0", "-o", "out", cwd=tmp_path)
    assert "already done" in again.err


def test_recover_learns_from_what_was_chosen(small: Path, sparse: Path, data: Path, tmp_path: Path) -> None:
    from compress import recover, select

    picked = select(sparse, method="random", dataset=str(data), budget=0.5, seed=3, output_dir=tmp_path / "picked")
    assert len(chosen(picked.target)) == 16
    assert picked.provenance is not None
    assert picked.provenance["selection"]["usable"] == 32
    healed = recover(
        sparse,
        dataset=str(picked.target / "selected.jsonl"),
        steps=2,
        batch_size=2,
        seq_len=64,
        device="cpu",
        output_dir=tmp_path / "h",
    )
    assert healed.provenance is not None
    assert healed.provenance["training"]["steps"] == 2
    assert "use: select.random" in rebuild(healed.target)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    small: Path, sparse: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import select

    monkeypatch.setattr(measuring.Parts.__init__, "__defaults__", (256,))
    values: dict[str, Any] = {"teacher": small, "dataset": str(data), "budget": 6, "device": "cpu"}
    whole = select(sparse, **values, output_dir=tmp_path / "whole" / "out").target
    done, steps = CheckpointWriter.done, []

    def interrupted(self: CheckpointWriter, step: str, facts: Any = None) -> None:
        if steps == ["part 0", "part 1"]:
            raise KeyboardInterrupt
        steps.append(step)
        done(self, step, facts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "done", interrupted)
        select(sparse, **values, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    asked: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            CheckpointWriter, "done", lambda self, step, facts=None: (asked.append(step), done(self, step, facts))
        )
        target = select(sparse, **values, output_dir=tmp_path / "out").target
    assert asked[0] == "part 2"
    for name in ("selected.jsonl", "scores.jsonl", "report.html", "provenance.json"):
        assert (target / name).read_bytes() == (whole / name).read_bytes()


def test_an_original_of_other_tokens_is_refused(small: Path, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    from compress import select

    values: dict[str, Any] = {"dataset": str(data), "device": "cpu", "output_dir": tmp_path / "out"}
    with pytest.raises(MethodError, match=r"knows 2,048 tokens and .* 512: their predictions cannot be compared"):
        select(small, teacher=tiny_llama, **values)
    other = tmp_path / "other"
    shutil.copytree(small, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"add_prefix_space": false', '"add_prefix_space": true').replace(
            '"add_prefix_space":false', '"add_prefix_space":true'
        )
    )
    with pytest.raises(MethodError, match="have different tokenizers"):
        select(small, teacher=other, **values)


def test_predictions_that_are_not_finite_are_refused(
    small: Path, sparse: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import select

    monkeypatch.setattr(
        measuring, "answer_divergence", lambda p, q, labels: torch.full((len(labels),), math.nan).double()
    )
    with pytest.raises(MethodError, match=r"rows 0 to 31: .* in torch.float32 is not finite"):
        select(sparse, teacher=small, dataset=str(data), dtype="float32", device="cpu", output_dir=tmp_path / "out")


def test_states_on_disk_change_nothing(
    small: Path, sparse: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import select
    from weightworks.plan import select as plan

    values: dict[str, Any] = {"teacher": small, "dataset": str(data), "budget": 6, "device": "cpu"}
    one = select(sparse, **values, output_dir=tmp_path / "memory" / "out").target
    monkeypatch.setattr(plan, "STATES_SHARE", 1 << 40)
    outcome = select(sparse, **values, output_dir=tmp_path / "out")
    assert outcome.estimate is not None
    assert outcome.estimate.on_disk
    assert (outcome.target / "scores.jsonl").read_bytes() == (one / "scores.jsonl").read_bytes()
    assert sorted(path.name for path in outcome.target.iterdir()) == sorted(path.name for path in one.iterdir())


def test_prompts_may_be_embedded_by_sentence_transformers(
    small: Path, sparse: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package stands in for itself: what matters is what it is asked, and that its answer places the rows."""
    from compress import select

    asked: list[str] = []

    class SentenceTransformer:
        def __init__(self, name: str, device: str) -> None:
            assert (name, device) == ("all-MiniLM-L6-v2", "cpu")

        def encode(self, texts: list[str], **others: Any) -> Any:
            asked.extend(texts)
            noise = np.random.default_rng(0).standard_normal((len(texts), 5))
            return (noise + [[9.0 * (STORY in text)] for text in texts]).astype(np.float32)

    module = types.ModuleType("sentence_transformers")
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr(module, "SentenceTransformer", SentenceTransformer, raising=False)
    values: dict[str, Any] = {"teacher": small, "dataset": str(data), "budget": 6, "device": "cpu"}
    outcome = select(sparse, **values, embedding="all-MiniLM-L6-v2", clusters=2, output_dir=tmp_path / "out")
    assert len(asked) == 32
    assert asked[1].startswith(STORY + "\nIt was late")
    assert outcome.provenance is not None
    assert [cluster["rows"] for cluster in outcome.provenance["selection"]["clusters"]] == [16, 16]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"dataset": "builtin"}, "rows are chosen from a data set, 'builtin' has none"),
        ({"dataset": "gone.jsonl"}, "gone.jsonl: no such file"),
        ({"dataset": str(SHORT_TEXT)}, "calibration.txt: no rows to choose from"),
        ({"teacher": None}, "select.paser compares the model with what it was before"),
        ({"embedding": "all-MiniLM-L6-v2"}, "needs the package sentence-transformers"),
        ({"budgets": 3}, "did you mean 'budget'"),
    ],
)
def test_what_cannot_be_is_refused(small: Path, data: Path, values: dict[str, Any], text: str, tmp_path: Path) -> None:
    from compress import select

    with pytest.raises((UsageError, CalibrationError), match=text):
        select(small, **{"teacher": small, "dataset": str(data), "output_dir": tmp_path / "out", **values})
    assert not any(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(small: Path, sparse: Path, data: Path, compress: Commands, tmp_path: Path) -> None:
    command = ("select", sparse, "--teacher", small, "--dataset", data, "--dry-run", "--json", "-q", "-o", "out")
    run = compress(*command, cwd=tmp_path)
    assert run.code == 0, run.err
    assert run.json["estimate"]["peak_bytes"] > 0
    assert not any(tmp_path.iterdir())


# Recipes --------------------------------------------------------------------------------------------------------------


def test_recipe_chooses_and_recovers(small: Path, sparse: Path, data: Path, compress: Commands, tmp_path: Path) -> None:
    recipe = f"""\
version: 1
sources: {{base: {small}, sparse: {sparse}}}
stages:
  rows: {{use: select.paser, from: {{model: sparse, teacher: base}}, with: {{dataset: {data}, budget: 12, concepts: 0}}}}
  healed:
    use: recover.perp
    from: {{model: sparse, teacher: base, data: rows}}
    with: {{steps: 2, batch_size: 2, held_out: 2, train: [norm]}}
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    plan = compress("explain", "recipe.yaml", cwd=tmp_path)
    assert plan.code == 0, plan.err
    run = compress("run", "recipe.yaml", "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    assert [stage["state"] for stage in run.json["stages"]] == ["source", "source", "ran", "ran"]
    healed = Path(run.json["stages"][-1]["folder"])
    provenance = json.loads((healed / "provenance.json").read_text())
    assert provenance["calibration"]["dataset"] == "rows/selected.jsonl"
    assert provenance["calibration"]["windows"] == 5
    assert provenance["calibration"]["windows_held_out"] == 1
    assert str(tmp_path) not in (healed / "provenance.json").read_text()
    again = compress("run", "recipe.yaml", "--json", "--set", "rows.budget=11", cwd=tmp_path)
    assert [stage["state"] for stage in again.json["stages"]] == ["source", "source", "ran", "ran"]
    (tmp_path / "rebuilt.yaml").write_text(rebuild(healed))
    text = (tmp_path / "rebuilt.yaml").read_text()
    assert "data: paser" in text
    assert text.count("dataset:") == 1
    built = compress("run", "rebuilt.yaml", "--json", cwd=tmp_path)
    assert built.code == 0, built.err
    made = Path(built.json["stages"][-1]["folder"])
    assert (made / "model.safetensors").read_bytes() == (healed / "model.safetensors").read_bytes()


def test_recipes_tell_rows_from_checkpoints(small: Path, data: Path, compress: Commands, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"""\
version: 1
sources: {{base: {small}}}
stages:
  rows: {{use: select.random, from: base, with: {{dataset: {data}}}}}
  builtin: {{use: select.paser, from: base}}
  pruned: {{use: prune.magnitude, from: rows}}
  healed: {{use: recover.perp, from: {{model: base, data: base}}}}
  both: {{use: recover.perp, from: {{model: base, data: rows}}, with: {{dataset: {data}}}}}
"""
    )
    run = compress("explain", "recipe.yaml", cwd=tmp_path)
    assert run.code == 2
    for text in (
        "'pruned' reads 'rows', which is a choice of rows; a checkpoint is needed",
        "'healed' reads 'base', which is a checkpoint; a choice of rows is needed",
        "'both': the data set is given by 'data' and by 'dataset' too",
        "select.paser: 'dataset': rows are chosen from a data set, 'builtin' has none",
    ):
        assert text in run.err


# The page -------------------------------------------------------------------------------------------------------------


def test_page_shows_what_rows_say_and_runs_nothing_of_it() -> None:
    clusters = [
        {
            "cluster": k,
            "rows": 2,
            "degradation": 0.1 * k,
            "tokens_a_row": 9.0,
            "quota": 1.0,
            "chosen": 1,
            "contradicted": 0,
        }
        for k in range(2)
    ]
    scores = [
        {
            "row": row,
            "outcome": CHOSEN,
            "rank": row + 1 if row < 2 else None,
            "cluster": row % 2,
            "x": row / 7,
            "y": -row / 7,
        }
        for row in range(4)
    ]
    selection = {**scores[0], "degradation": 0.2, "efficiency": 0.01, "prompt_tokens": 3, "answer_tokens": 4}
    rows = [{"instruction": "<script>alert(1)</script>", "output": "word " * 200, "selection": selection}]
    facts = {"chosen": 1, "usable": 4, "tokens": 36, "tokens_chosen": 9, "dropped": {"no answer": 3}, "landmarks": 4}
    provenance = {
        "selection": {**facts, "degradation": 0.1, "clusters": clusters},
        "calibration": {"source": "rows.jsonl"},
        "identity": {"method": "select.paser", "options": {"budget": 1.0}},
        "fallbacks": ["too <few>"],
    }
    page = selection_page("chosen", provenance, scores, rows)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "too &lt;few&gt;" in page
    assert "…</td>" in page
    assert "3 no answer" in page
    assert page.count('class="swatch"') == 2
    assert page == selection_page("chosen", provenance, scores, rows)
    low, high = colours([0.0, 0.3])
    assert low != high
    assert page.count(low) > 1  # in the table and on the map
    without = {**provenance, "selection": facts}
    assert "<svg" not in selection_page("chosen", without, [{"row": 0, "outcome": CHOSEN, "rank": 1}], rows)
