"""Iterative magnitude pruning: counts of every round, masks that only narrow, weights brought back, signs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES

from compress import prune as pruned
from compress.prune._activate import without_still
from compress.prune.imp import Method, Options, prune
from weightworks.errors import MethodError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import Masks
from weightworks.stream.linears import block_linears
from weightworks.stream.skeleton import build
from weightworks.stream.whole import Outline, Whole
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {
    "method": "imp", "steps": 2, "batch_size": 2, "held_out": 2,
    "dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32",
}  # fmt: skip


def whole(folder: Path, options: Options) -> Whole:
    """The model in ``folder`` as the engine hands it to the method."""
    view = DenseView(Checkpoint.open(folder))
    skeleton = build(view)
    dtypes = {name: info.dtype for name, info in view.checkpoint.tensors.items()}
    blocks = range(len(skeleton.blocks))
    linears = {one.tensor: one for index in blocks for one in block_linears(skeleton, index, dtypes)[0]}
    subset = Method(options).subset(Outline(skeleton, linears, None))
    model = Whole(skeleton, view, linears, subset, torch.float32, CPU)
    model.load()
    return model


@pytest.fixture
def model(small: Path) -> Iterator[Whole]:
    model = whole(small, Options())
    yield model
    model.unload()


def masks(model: Whole) -> dict[str, torch.Tensor]:
    return {name: model.mask(name).clone() for name in model.linears}


# The path of sparsity.


def test_densities_take_the_same_share_of_what_is_left() -> None:
    found = Options(sparsity=0.75, rounds=4).densities
    share = 1 - 0.25 ** (1 / 4)
    assert found == pytest.approx([1 - (1 - (1 - share) ** number) for number in range(1, 5)])
    assert found[-1] == 0.25
    assert Options(sparsity=0.7, rounds=1).densities == [1 - 0.7]


def test_rounds_take_a_fifth_unless_told() -> None:
    assert len(Options(sparsity=1 - 0.8**3).densities) == 3
    assert len(Options(sparsity=0.7).densities) == 6  # 0.8^5 is more than 0.3
    assert len(Options(sparsity=0.1).densities) == 1


def test_cubic_path_takes_most_at_first() -> None:
    found = Options(sparsity=0.8, rounds=4, path="cubic").densities
    assert found == pytest.approx([1 - (0.8 + (0 - 0.8) * (1 - number / 4) ** 3) for number in range(1, 5)])
    steps = [a - b for a, b in zip([1.0, *found], found, strict=False)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("path", ["geometric", "cubic"])
def test_masks_only_narrow_and_end_at_the_count(model: Whole, scope: str, path: str) -> None:
    options = Options.parse({"sparsity": 0.7, "rounds": 5, "scope": scope, "path": path}, where="prune.imp")
    total = sum(model.mask(name).numel() for name in model.linears)
    before = masks(model)
    generator = torch.Generator().manual_seed(0)
    for density in options.densities:
        facts = prune(model, options, density)
        after = masks(model)
        for name, mask in after.items():
            assert not (mask & ~before[name]).any()
            assert not model.weight(name)[~mask].any()
            kept = model.weight(name)
            kept.copy_(torch.randn(kept.shape, generator=generator).masked_fill_(~mask, 0))  # as training might
        assert abs(facts["kept"] - density * total) <= len(after)
        before = after
    gone = total - facts["kept"]
    assert (
        gone == sum(round(0.7 * mask.numel()) for mask in after.values()) if scope != "global" else round(0.7 * total)
    )


def test_negative_weights_that_stayed_go_first() -> None:
    weight = torch.tensor([[-1.0, -2.0, 3.0, -4.0], [0.5, 0.25, -5.0, -6.0]])
    start = torch.tensor([[-1.5, -2.0, 3.0, -4.1], [0.5, 0.25, -9.0, -6.0]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    gone = [~without_still(mask, weight, start, count) & mask for count in (1, 2, 5)]
    assert gone[0].nonzero().tolist() == [[0, 1]]  # not moved at all, and negative
    assert gone[1].nonzero().tolist() == [[0, 1], [0, 3]]
    assert gone[2].nonzero().tolist() == [
        [0, 0],
        [0, 1],
        [0, 3],
        [1, 1],
        [1, 2],
    ]  # four are negative; then the smallest


def test_activating_while_pruning(tmp_path: Path, small: Path) -> None:
    """Counts are those of any run, masks are others, and fewer negative weights are left where ReLU follows."""
    source = ARCHITECTURES["opt"].save(tmp_path / "opt")
    runs = [
        pruned(source, **QUICK, sparsity=0.7, rounds=3, lr=1e-2, activate=share, output_dir=tmp_path / f"out-{share}")
        for share in (0.0, 0.3)
    ]
    tables = [one.provenance["training"]["rounds"] for one in runs if one.provenance is not None]
    for plain, activated in zip(*tables, strict=True):
        assert plain["begun"]["kept_by_tensor"] == activated["begun"]["kept_by_tensor"]
    assert tables[0][0]["begun"]["masks"] == tables[1][0]["begun"]["masks"]  # in the first round nothing has moved
    assert tables[0][1]["begun"]["masks"] != tables[1][1]["begun"]["masks"]
    views = [DenseView(Checkpoint.open(one.target)) for one in runs]
    negative = [sum(int((view.read(name) < 0).sum()) for name in view.names if "fc1.weight" in name) for view in views]
    assert negative[1] < negative[0]
    with pytest.raises(MethodError, match=r"activate is for models with ReLU.*hidden_act = silu"):
        pruned(small, **QUICK, sparsity=0.5, activate=0.1, output_dir=tmp_path / "no")


def test_equal_weights_are_pruned_by_index(model: Whole) -> None:
    for name in model.linears:
        model.weight(name).fill_(0.5)
    prune(model, Options(sparsity=0.3), 0.7)
    for mask in masks(model).values():
        count = round(0.3 * mask.numel())
        assert not mask.flatten()[:count].any()
        assert mask.flatten()[count:].all()


def test_zeros_that_are_kept_are_not_taken_for_pruned_ones(model: Whole) -> None:
    """Weights that are pruned stay pruned, also beside kept ones that training has made zero."""
    prune(model, Options(sparsity=0.5), 0.6)
    before = masks(model)
    for name in model.linears:
        model.weight(name).fill_(0)
    prune(model, Options(sparsity=0.5), 0.5)
    for name, mask in masks(model).items():
        assert not (mask & ~before[name]).any()
        assert int(mask.sum()) == mask.numel() - round(0.5 * mask.numel())


def test_patterns_narrow_group_by_group(model: Whole) -> None:
    options = Options(pattern="2:8", rounds=3)
    kept = []
    for density in options.densities:
        prune(model, options, density)
        groups = torch.cat([mask.view(-1, 8).sum(-1) for mask in masks(model).values()])
        assert groups.min() == groups.max()
        kept.append(int(groups[0]))
    assert kept == [5, 3, 2]  # 8 * 0.25^(j / 3), rounded


def test_norm_lost_is_what_the_pruned_weights_had(model: Whole) -> None:
    weights = torch.cat([model.weight(name).flatten() for name in model.linears])
    facts = prune(model, Options(), 0.5)
    after = torch.cat([model.weight(name).flatten() for name in model.linears])
    assert facts["norm_lost"] == pytest.approx(float((weights - after).norm() / weights.norm()), rel=1e-4)
    assert facts["norm_lost"] < math.sqrt(facts["share_pruned"])  # the smallest weights have less than their share


# Rounds.


def test_rates_of_every_round_are_the_same() -> None:
    method = Method(Options(rounds=3, steps=20))
    first = method.rates(0, {})
    assert all(method.rates(number, {}) == first for number in range(3))
    adapted = Method(Options(rounds=3, steps=20, schedule="allr"))
    found = adapted.rates(1, {"norm_lost": 0.1, "share_pruned": 0.25})
    assert max(found) == pytest.approx(0.2 * adapted.options.lr)


@pytest.mark.parametrize("rewind", ["none", "init", "step"])
def test_weights_are_brought_back_under_the_new_mask(model: Whole, rewind: str) -> None:
    step = {"rewind_step": 1} if rewind == "step" else {}
    options = Options.parse({"sparsity": 0.5, "rounds": 2, "rewind": rewind, **step}, where="prune.imp")
    method = Method(options)
    start = {name: value.detach().clone() for name, value in model.values.items()}
    method.begin(0, model)
    earlier = {name: value.detach() + 1 for name, value in model.values.items()}
    model.earlier = earlier.__getitem__
    trained = {}
    with torch.no_grad():
        for name, value in model.values.items():
            value.mul_(-1.5)  # signs flip, magnitudes keep their order
            trained[name] = value.clone()
    assert method.end(0, model)["sign_flips"] == 1.0
    method.begin(1, model)
    wanted = {"none": trained, "init": start, "step": earlier}[rewind]
    for name, value in model.values.items():
        mask = model.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, wanted[name].masked_fill(~mask, 0))
    if rewind == "none":
        assert method.end(1, model)["sign_flips"] == 0.0  # since the round before


def test_earlier_values_are_those_of_the_step(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run goes back to in its second round is what another ends with that stops there."""
    seen: dict[str, torch.Tensor] = {}
    begin = Method.begin

    def watched(self: Method, number: int, model: Whole) -> dict[str, Any]:
        facts = begin(self, number, model)
        if number == 1:
            assert model.earlier is not None
            seen.update({name: model.earlier(name) for name in model.values})
            assert all(
                torch.equal(value.masked_fill(~model.masks[name], 0), model.values[name])
                for name, value in seen.items()
                if name in model.masks
            )
        return facts

    monkeypatch.setattr(Method, "begin", watched)
    constant = {**QUICK, "schedule": "ft", "sparsity": 0.51}
    pruned(
        small,
        **{**constant, "steps": 4, "rounds": 2, "rewind": "step", "rewind_step": 2, "sparsity": 1 - 0.49**2},
        output_dir=tmp_path / "a",
        num_samples=20,
    )
    pruned(small, **{**constant, "rounds": 1}, output_dir=tmp_path / "b", num_samples=20)
    result = Checkpoint.open(tmp_path / "b")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(seen[name].bfloat16(), result.read(name))


def test_one_round_is_magnitude_pruning_and_training(small: Path, tmp_path: Path) -> None:
    once = pruned(small, **QUICK, lr=1e-2, rounds=1, sparsity=0.6, output_dir=tmp_path / "imp")
    plain = pruned(small, method="magnitude", sparsity=0.6, output_dir=tmp_path / "magnitude")
    ours, theirs = Masks.of(once.target), Masks.of(plain.target)
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(ours.packed(name), theirs.packed(name)) for name in theirs.infos)
    kept = Checkpoint.open(once.target).read("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(kept, Checkpoint.open(plain.target).read("model.layers.0.mlp.up_proj.weight"))


def test_signs_and_masks_of_every_round_are_reported(small: Path, tmp_path: Path) -> None:
    outcome = pruned(small, **{**QUICK, "lr": 0.1}, rounds=3, sparsity=0.6, output_dir=tmp_path / "out")
    assert outcome.provenance is not None
    rounds, rows = outcome.provenance["training"]["rounds"], outcome.provenance["report"]
    shares = [one["begun"]["sparsity"] for one in rounds]
    assert shares == pytest.approx([1 - density for density in Options(sparsity=0.6, rounds=3).densities], abs=1e-4)
    assert len({one["begun"]["masks"] for one in rounds}) == 3
    for one in rounds:
        kept = one["begun"]["kept_by_tensor"]
        assert sum(kept.values()) == one["begun"]["kept"]
        flips = one["ended"]["sign_flips_by_tensor"]
        assert one["ended"]["sign_flips"] == pytest.approx(sum(flips.values()) / one["begun"]["kept"])
        assert 0 < one["ended"]["sign_flips"] < 0.5
    masked = [row for row in rows if "kept" in row]
    assert {row["tensor"]: row["kept"] for row in masked} == rounds[-1]["begun"]["kept_by_tensor"]
    assert all(0 < row["sign_flips"] < 0.5 for row in masked)
    others = [row for row in rows if "kept" not in row]
    assert {row["tensor"] for row in others} >= {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert all(row["relative_change"] > 0 for row in others)


def test_what_is_pruned_already_stays_so(sparse: Path, tmp_path: Path) -> None:
    """An N:M model pruned further keeps its zeros, though its masks say nothing of magnitudes."""
    outcome = pruned(sparse, **QUICK, rounds=2, sparsity=0.6, output_dir=tmp_path / "second")
    before, after = Masks.of(sparse), Masks.of(outcome.target)
    assert before is not None
    assert after is not None
    for name in before.infos:
        shape = Checkpoint.open(sparse).info(name).shape
        assert not (after.read(name, shape) & ~before.read(name, shape)).any()
        assert int((~after.read(name, shape)).sum()) == round(0.6 * math.prod(shape))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama-tied-sharded"])
def test_layouts(name: str, tmp_path: Path) -> None:
    """Transposed layers, experts held fused, an embedding that is the head; verified like every output."""
    source = ARCHITECTURES[name].save(tmp_path / "source")
    outcome = pruned(source, **QUICK, rounds=2, pattern="2:4", output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    found = Masks.of(outcome.target)
    assert found is not None
    view = DenseView(Checkpoint.open(outcome.target))
    for tensor in found.infos:
        mask, weight = found.read(tensor, view.shape(tensor)), view.read(tensor)
        assert not weight[~mask].float().view(torch.int32).any()
        along = mask.T if name == "gpt2" else mask
        assert torch.all(along.reshape(len(along), -1, 4).sum(-1) == 2)
    names = set(Checkpoint.open(source).tensors)
    assert outcome.provenance is not None
    assert {row["tensor"] for row in outcome.provenance["report"]} == names


def test_ignored_layers_are_trained_all_the_same(small: Path, tmp_path: Path) -> None:
    outcome = pruned(small, **QUICK, lr=1e-2, rounds=1, ignore=["*.mlp.*"], output_dir=tmp_path / "out")
    found = Masks.of(outcome.target)
    assert found is not None
    assert not any("mlp" in name for name in found.infos)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(Checkpoint.open(outcome.target).read(name), Checkpoint.open(small).read(name))


def test_pruned_weights_cannot_be_left_out(sparse: Path, tmp_path: Path) -> None:
    """They would be trained, and their zeros lost."""
    with pytest.raises(MethodError, match="6 weights that the model's masks say are pruned are left out by --ignore"):
        pruned(sparse, **QUICK, sparsity=0.6, ignore=["*.mlp.*"], output_dir=tmp_path / "second")
