"""PERP: what adapters make of a weight, that merging says the same, that every zero stays, and what it reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import Commands

from compress import prune, recover
from compress.recover import _training
from compress.recover._adapters import FORMULAS, LowRank
from compress.recover._principal import Principal
from compress.recover.perp import Method, Options
from weightworks.engine.job import Job
from weightworks.engine.modelwise import whole
from weightworks.engine.trained import given_masks
from weightworks.errors import MethodError, UsageError
from weightworks.plan.lineage import rebuild
from weightworks.report.progress import Progress
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import Masks
from weightworks.store.sources import file_digest
from weightworks.stream.lessons import keyed
from weightworks.stream.whole import Whole
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TEXT: dict[str, Any] = {"dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32"}
QUICK: dict[str, Any] = {**TEXT, "steps": 3, "batch_size": 2, "held_out": 2, "lr": 1e-2, "rank": 4}
KINDS = ("mask_lora", "scale_lora", "spp")
MERGED = (*KINDS, "lift")


Opened = Callable[..., Whole]


@pytest.fixture
def opened(sparse: Path, tmp_path: Path) -> Iterator[Opened]:
    """The pruned model in memory as the engine has it, adapters of the given options on it."""
    models = []

    def open_(folder: Path = sparse, **options: Any) -> Whole:
        method, settings = Method(Options(**options)), Settings(**TEXT)
        job = Job(
            "recover.perp", 1, method, settings, Checkpoint.open(folder), tmp_path / "out", Progress(quiet=True), CPU
        )
        model = whole(job, torch.float32)
        model.load(masks=given_masks(job))
        models.append(model)
        return model

    yield open_
    for model in models:
        model.unload()


def shaken(model: Whole) -> None:
    """Give the trained values others than they start with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.values.values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 8, generator=generator) < 0.5
    return torch.randn(6, 8, generator=generator).masked_fill(~mask, 0), mask


# Adapters.


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_an_adapter_starts_as_nothing(kind: str, rank: int) -> None:
    weight, mask = problem()
    adapter = LowRank(kind, weight, mask, keyed(0, "w"), rank=rank, alpha=32.0)
    assert torch.equal(adapter(weight), weight)
    again = LowRank(kind, weight, mask, keyed(0, "w"), rank=rank, alpha=32.0)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def test_formulas_are_those_of_the_papers() -> None:
    weight, mask = problem()
    product = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    made = {kind: formula(weight, ~mask, product, 2.0) for kind, formula in FORMULAS.items()}
    assert torch.equal(made["mask_lora"], weight + mask * (2 * product))
    assert torch.equal(made["scale_lora"], weight * product)
    assert torch.equal(made["spp"], weight + 2 * weight * product)
    assert torch.equal(made["lora"], weight + 2 * product)
    for kind in KINDS:
        assert not made[kind][~mask].abs().view(torch.int32).any()
    assert made["lora"][~mask].all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    weight, mask = problem()
    adapter = LowRank(kind, weight, mask, keyed(0, "w"), rank=2, alpha=4.0).double()
    with torch.no_grad():
        adapter.B.add_(torch.randn(6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        effective = adapter.formula(weight.double(), adapter.get_buffer("pruned"), B @ A, adapter.scale)
        return torch.tanh(x @ effective.T).square().sum()

    assert torch.autograd.gradcheck(loss, (adapter.A.detach().requires_grad_(), adapter.B.detach().requires_grad_()))


def test_gradients_of_mask_lora_in_closed_form() -> None:
    """dB = s (G * M) A', dA = s B' (G * M), G being the gradient of the weight that is multiplied with."""
    weight, mask = problem()
    adapter = LowRank("mask_lora", weight, mask, keyed(0, "w"), rank=2, alpha=4.0)
    with torch.no_grad():
        adapter.B.add_(1.0)
    effective = adapter(weight)
    gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    effective.backward(gradient)
    assert adapter.A.grad is not None
    assert adapter.B.grad is not None
    assert torch.allclose(adapter.B.grad, 2 * (gradient * mask) @ adapter.A.T, atol=1e-6)
    assert torch.allclose(adapter.A.grad, 2 * adapter.B.T @ (gradient * mask), atol=1e-6)


def test_principal_weights_are_the_largest_after_rank_reduction() -> None:
    """A weak pattern of rank one under large entries that belong to none: magnitudes alone would choose those."""
    columns = torch.tensor([0.0, 0, 1, 1, 0, 1, 0, 0])
    weight = 0.5 * torch.outer(torch.ones(6), columns)
    weight[0, 0], weight[3, 7] = 0.9, -0.9
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[5] = False
    adapter = Principal(weight * mask, mask, keyed(0, "w"), rank=1, count=15)
    chosen = torch.zeros(48, dtype=torch.bool)
    chosen[adapter.get_buffer("places")] = True
    assert torch.equal(chosen.view(6, 8), (columns > 0) & mask)
    adapter.added.data.fill_(2.0)
    assert torch.equal(adapter(weight * mask), weight * mask + 2 * chosen.view(6, 8))
    assert len(Principal(weight * mask, mask, keyed(0, "w"), rank=1, count=48).added) == 40  # no more than are kept


# The model.


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", MERGED)
def test_merged_model_is_the_adapted_one(opened: Opened, kind: str) -> None:
    model = opened(adapter=kind, rank=4)
    before = logits(model.model)
    assert torch.equal(before, logits(opened(train=["norm"]).model))  # nothing is changed at the start
    shaken(model)
    adapted = logits(model.model)
    merged = {tensor: make().clone() for tensor, make in model.stored()}
    plain = opened(train=["norm"])
    for tensor, value in merged.items():
        name = next(name for name, pieces in plain.skeleton.pieces.items() if pieces[0].tensor == tensor)
        plain.skeleton.get(name).data.copy_(value)
    assert (adapted - before).abs().max() > 0.1
    assert torch.allclose(logits(plain.model), adapted, atol=1e-4)


def test_lora_that_is_pruned_when_merged_is_another_model(opened: Opened) -> None:
    """Training W + s BA and merging W + s M * (BA), as one of the published variants does, changes the model."""
    model = opened(rank=4)
    for adapter in model.adapters.values():
        adapter.formula = FORMULAS["lora"]
    shaken(model)
    trained = logits(model.model)
    for adapter in model.adapters.values():
        adapter.formula = FORMULAS["mask_lora"]
    assert (logits(model.model) - trained).abs().max() > 0.1


@pytest.mark.parametrize("kind", MERGED)
def test_zeros_stay_and_patterns_hold(sparse: Path, tmp_path: Path, kind: str) -> None:
    outcome = recover(sparse, **QUICK, adapter=kind, output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    assert file_digest(outcome.target / MASKS) == file_digest(sparse / MASKS)
    before, after, masks = (
        DenseView(Checkpoint.open(sparse)),
        DenseView(Checkpoint.open(outcome.target)),
        Masks.of(sparse),
    )
    assert masks is not None
    for name in masks.infos:
        mask, weight = masks.read(name, before.shape(name)), after.read(name)
        assert not weight[~mask].view(torch.int16).any()  # to the bit
        assert torch.all(mask.view(len(mask), -1, 4).sum(-1) == 2)
        assert not torch.equal(weight, before.read(name))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after.read(name), before.read(name))
    assert not torch.equal(after.read("model.norm.weight"), before.read("model.norm.weight"))


@pytest.mark.parametrize("train", [["adapters"], ["weights"]])
def test_zeros_without_masks_are_taken_as_pruned(sparse: Path, tmp_path: Path, train: list[str]) -> None:
    bare = shutil.copytree(sparse, tmp_path / "bare")
    for name in (MASKS, "provenance.json"):
        (bare / name).unlink()
    outcome = recover(bare, **QUICK, train=train, output_dir=tmp_path / "out")
    view, after = DenseView(Checkpoint.open(sparse)), DenseView(Checkpoint.open(outcome.target))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not after.read(name)[view.read(name) == 0].any()
    assert not (outcome.target / MASKS).exists()


@pytest.mark.parametrize(
    ("train", "changed"),
    [
        (["norm"], {"input_layernorm", "post_attention_layernorm", "norm"}),
        (["head"], {"lm_head"}),
        (["adapters"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["weights"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["head,norm"], {"input_layernorm", "post_attention_layernorm", "norm", "lm_head"}),
    ],
)
def test_what_is_trained_is_what_was_asked_for(
    sparse: Path, tmp_path: Path, train: list[str], changed: set[str]
) -> None:
    outcome = recover(sparse, **QUICK, train=train, output_dir=tmp_path / "out")
    assert outcome.provenance is not None
    rows = outcome.provenance["report"]
    assert {row["tensor"].removesuffix(".weight").rpartition(".")[2] for row in rows} == changed
    assert all(row["relative_change"] > 0 for row in rows)
    assert outcome.provenance["checks"]["masks"]["kept"] * 2 == outcome.provenance["checks"]["masks"]["weights"]
    assert outcome.provenance["size"]["kept_weights"] * 2 == outcome.provenance["size"]["masked_weights"]
    facts = outcome.provenance["training"]
    assert facts["trained_parameters"] == sum(facts["rounds"][0]["begun"]["trained"].values())


def test_half_of_the_layers_of_each_block_are_trained(sparse: Path, tmp_path: Path) -> None:
    before, drawn = DenseView(Checkpoint.open(sparse)), []
    for seed in (0, 1):
        outcome = recover(sparse, **QUICK, train=["half"], seed=seed, output_dir=tmp_path / f"out-{seed}")
        after = DenseView(Checkpoint.open(outcome.target))
        drawn.append({name for name in before.names if not torch.equal(before.read(name), after.read(name))})
    for changed in drawn:
        assert [sum(f"layers.{block}." in name for name in changed) for block in (0, 1)] == [3, 4]  # of seven
        assert all(name.endswith("proj.weight") for name in changed)
    assert drawn[0] != drawn[1]


def test_biases_and_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    """OPT has biases everywhere and one matrix for embedding and head: that is left alone, and said so."""
    source = ARCHITECTURES["opt"].save(tmp_path / "source")
    outcome = recover(source, **QUICK, train=["bias", "head"], output_dir=tmp_path / "out")
    assert outcome.fallbacks == [
        "head: left as it is; it is the embedding too, which an adapter of the head would change"
    ]
    assert outcome.provenance is not None
    rows = outcome.provenance["report"]
    assert all(row["tensor"].endswith(".bias") for row in rows)
    assert len(rows) == sum(name.endswith(".bias") for name in Checkpoint.open(source).tensors)
    with pytest.raises(MethodError, match="nothing to train: the model has none of what was asked for"):
        recover(source, **QUICK, train=["head"], output_dir=tmp_path / "none")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_layouts(name: str, tmp_path: Path) -> None:
    """Transposed layers, and experts held fused, each with an adapter of its own."""
    source = ARCHITECTURES[name].save(tmp_path / "source")
    pruned = prune(source, method="magnitude", pattern="2:4", output_dir=tmp_path / "sparse").target
    outcome = recover(pruned, **QUICK, output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    masks, view = Masks.of(pruned), DenseView(Checkpoint.open(outcome.target))
    assert masks is not None
    before = DenseView(Checkpoint.open(pruned))
    for tensor in masks.infos:
        mask, weight = masks.read(tensor, view.shape(tensor)), view.read(tensor)
        assert not weight[~mask].any()
        assert not torch.equal(weight, before.read(tensor))


# What it tells.


def test_teacher_says_how_much_is_won_back(compress: Commands, small: Path, sparse: Path, tmp_path: Path) -> None:
    words = [text for key, value in QUICK.items() for text in ("--" + key.replace("_", "-"), str(value))]
    run = compress("recover", sparse, *words, "--teacher", small, "-o", "out", "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    losses: Mapping[str, float] = run.json["training"]["held_out"]
    assert set(losses) == {"before", "after", "teacher"}
    assert losses["teacher"] < losses["before"]
    assert "of the original" in run.err
    assert run.json["source"]["teacher"]["name"] == str(small)
    assert run.json["identity"]["teacher"] == Checkpoint.open(small).digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained to win back what pruning cost, zeros held (perp)" in card
    assert f"--teacher {small}" in card
    recipe = rebuild(tmp_path / "out")
    assert "use: recover.perp" in recipe
    assert "teacher: source" in recipe
    assert "already done" in compress("recover", sparse, *words, "--teacher", small, "-o", "out", cwd=tmp_path).err


def test_recipe_prunes_and_recovers(compress: Commands, small: Path, tmp_path: Path) -> None:
    text = json.dumps({**QUICK, "train": ["norm"]})
    (tmp_path / "recipe.yaml").write_text(
        f"""\
version: 1
sources: {{base: {small}}}
stages:
  sparse: {{use: prune.magnitude, from: base, with: {{sparsity: 0.5}}}}
  healed: {{use: recover.perp, from: {{model: sparse, teacher: base}}, with: {text}}}
"""
    )
    run = compress("run", "recipe.yaml", "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    assert [stage["state"] for stage in run.json["stages"]] == ["source", "ran", "ran"]
    again = compress("run", "recipe.yaml", "--json", "--set", "healed.train=[norm,bias]", cwd=tmp_path)
    assert [stage["state"] for stage in again.json["stages"]] == ["source", "cached", "ran"]


def test_a_teacher_of_other_tokens_is_refused(sparse: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"is no teacher of .*: it knows 2,048 tokens, not 512"):
        recover(sparse, **QUICK, teacher=tiny_llama, output_dir=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"train": ["norms"]},
            "'norms' is no part that can be trained; known: bias, norm, head, adapters, weights, half, full",
        ),
        ({"train": []}, "something must be trained"),
        ({"train": ["weights", "adapters"]}, "by its adapter or by its weights, not by both"),
        ({"adapter": "lora_prune"}, "option 'adapter' = 'lora_prune'"),
        ({"schedule": "allr"}, "option 'schedule' = 'allr'"),
        ({"rank": 0}, "option 'rank' = 0"),
    ],
)
def test_what_cannot_be_is_refused(sparse: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        recover(sparse, **{**QUICK, **options})


def test_parts_are_named_once_in_their_order() -> None:
    assert Options(train=["adapters,norm", "norm"]).train == ["norm", "adapters"]
    assert _training.PARTS == ("bias", "norm", "head", "adapters", "weights", "half", "full")
