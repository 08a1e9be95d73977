"""ARMOR: against the authors' step, against dense algebra, and as a folder: product, factors, loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import FEW, Commands
from safetensors.torch import load_file, save_file

from compress.columns import Columns
from compress.factored import FactoredLinear, load_factored
from compress.masks import Pattern, pattern_mask
from compress.prune import _armor, armor
from compress.prune._armor import Moments, Pairs, Parts
from weightworks.errors import CheckpointError
from weightworks.stage.protocols import Target
from weightworks.store.checkpoint import FACTORS
from weightworks.store.factors import FactorFile, Factors, check_factors, factor_specs

pytestmark = pytest.mark.usefixtures("one_thread")
STARTS = ("identity", "perturbed")
TINY = ("--ignore", "*.self_attn.*", "--ignore", "re:.*layers[.][1-9][.].*", "--block-size", "16", "--rounds", "2")


# The authors' own step, from ``../shared/golden``.


class Golden:
    """The stored problem: a weight, its normalised form in blocks, and what one step made of a starting point."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "64x64_b32.safetensors")
        facts = json.loads((folder / "64x64_b32.json").read_text())
        self.runs, self.size = facts["runs"], int(facts["block_size"])
        self.blocks = _armor.cut(self.tensors["Wbar"], self.size)
        self.energy = self.tensors["h"].view(-1, self.size)

    def start(self, name: str) -> Parts:
        if name == "identity":
            return _armor.start(self.blocks, self.energy)
        left, core, right = (self.tensors[f"step.{part}0"] for part in "ASB")
        return Parts(left, _armor.cut(core, self.size), right)


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    if not (shared / "golden" / "armor").is_dir():
        pytest.skip("no ../shared/golden/armor")
    return Golden(shared / "golden" / "armor")


def test_the_start_is_the_references(golden: Golden) -> None:
    scaled, rows, columns = _armor.normalised(golden.tensors["W"])
    for ours, name in ((scaled, "Wbar"), (rows, "r_row_norm"), (columns, "c_col_norm")):
        torch.testing.assert_close(ours, golden.tensors[name], rtol=1e-5, atol=0)
    parts = golden.start("identity")
    assert torch.equal(_armor.whole(parts.core) != 0, golden.tensors["nowagp_mask"])
    found = _armor.loss(golden.blocks, golden.energy, parts)
    assert found == pytest.approx(golden.runs["initial"]["proxy_loss_sum"], rel=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("choice", ["greedy", "random"])
def test_the_step_is_the_references(golden: Golden, start: str, choice: str) -> None:
    """One group in each block, mask and values, where the reference chose it; and where its greedy rule does."""
    parts, size, name = golden.start(start), golden.size, f"step.{start}.{choice}"
    moments, core = Moments.of(golden.blocks, golden.energy, parts), parts.core.clone()
    gradient, pairs = moments.gradient(core), Pairs(_armor.groups_of(moments.columns))
    steepest = gradient.abs().unflatten(-1, (-1, 4)).sum(-1)  # [K, J, b, groups]
    for number in range(4):
        j, k = divmod(number, 2)
        row, place = (int(golden.tensors[f"{name}.{what}"][number]) % size for what in ("row", "col0"))
        if choice == "greedy" and start == "perturbed":
            assert int(steepest[k, j].argmax()) == row * size // 4 + place // 4
        here, a = slice(place, place + 4), moments.rows[j, row, row]
        f = gradient[:, j : j + 1, row, here] - a * core[:, j : j + 1, row, here] @ moments.columns[:, here, here]
        values = pairs.best(f, place // 4)[k, 0] / -(a + _armor.ROW_DAMPING)
        expected, mask = (golden.tensors[f"{name}.{what}_after_groups"][number] for what in ("values", "mask"))
        assert torch.equal(values != 0, mask)
        torch.testing.assert_close(values, expected * mask, rtol=1e-3, atol=1e-6)
        core[k, j, row, here] = values
    after = _armor.loss(golden.blocks, golden.energy, parts._replace(core=core))
    assert after == pytest.approx(golden.runs[name]["loss_sum_after"], rel=1e-5)
    assert after <= golden.runs[name]["loss_sum_before"] * (1 + 1e-6)


# Against dense algebra.


def problem(rows: int = 16, width: int = 24, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, Parts]:
    """Blocks [K, J, b, b] of a normalised weight, h [K, b], and factors that are no longer the identity."""
    generator = torch.Generator().manual_seed(0)
    weight, energy = torch.randn(rows, width, generator=generator), torch.rand(width, generator=generator) + 0.1
    blocks, h = _armor.cut(_armor.normalised(weight)[0], size), energy.view(-1, size)
    begun = _armor.start(blocks, h)
    left, right = (part + 0.2 * torch.randn(part.shape, generator=generator) for part in (begun.left, begun.right))
    return blocks, h, Parts(left, begun.core, right)


def dense(parts: Parts) -> torch.Tensor:
    """A S B in float64 by whole matrices."""
    left, right = torch.block_diag(*parts.left.double()), torch.block_diag(*parts.right.double())
    return left @ _armor.whole(parts.core).double() @ right


def dense_loss(blocks: torch.Tensor, energy: torch.Tensor, parts: Parts) -> float:
    error = dense(parts) - _armor.whole(blocks)
    return float((error.square() * energy.flatten()).sum())


def test_products_by_blocks_are_those_of_matrices() -> None:
    blocks, energy, parts = problem()
    torch.testing.assert_close(_armor.whole(_armor.product(parts)).double(), dense(parts))
    assert _armor.loss(blocks, energy, parts) == pytest.approx(dense_loss(blocks, energy, parts), rel=1e-5)
    assert torch.equal(_armor.whole(_armor.cut(_armor.whole(blocks), 8)), _armor.whole(blocks))


def test_factors_are_the_least_squares() -> None:
    """No other A, and then no other B, is better: the gradient is zero there."""
    blocks, energy, parts = problem()
    for field in ("left", "right"):
        step = _armor.left_step(blocks, energy, parts) if field == "left" else _armor.right_step(blocks, parts)
        best = parts._replace(**{field: step})
        found = dense_loss(blocks, energy, best)
        assert found < dense_loss(blocks, energy, parts)
        for seed in range(5):
            noise = torch.randn(step.shape, generator=torch.Generator().manual_seed(seed))
            for sign in (1e-2, -1e-2):
                assert dense_loss(blocks, energy, best._replace(**{field: step + sign * noise})) > found


def test_a_core_step_is_brute_force_group_by_group() -> None:
    """Every group in turn: of its six pairs, each with the values that least squares give, the one of lowest loss."""
    blocks, energy, parts = problem(8, 8)
    ours = _armor.core_step(blocks, energy, parts)[0, 0]
    core, root = parts.core[0, 0].clone().double(), energy[0].sqrt().double()
    left, right, goal = parts.left[0].double(), parts.right[0].double() * root, blocks[0, 0].double() * root
    for row in range(8):
        for place in (0, 4):
            core[row, place : place + 4] = 0
            rest, tried = goal - left @ core @ right, []
            for pair in _armor.PAIRS:
                columns = [place + one for one in pair]
                design = torch.stack([torch.outer(left[:, row], right[one]).flatten() for one in columns], 1)
                values = torch.linalg.lstsq(design, rest.flatten()[:, None]).solution[:, 0]
                tried.append((float((rest.flatten() - design @ values).square().sum()), columns, values))
            _, columns, values = min(tried, key=lambda one: one[0])
            core[row, columns] = values
            torch.testing.assert_close(
                ours[row, place : place + 4].double(), core[row, place : place + 4], atol=1e-4, rtol=1e-3
            )
            core[row] = torch.cat([ours[row, : place + 4].double(), core[row, place + 4 :]])


def test_the_loss_never_rises_and_falls_far() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, energy = torch.randn(64, 128, generator=generator), torch.rand(128, generator=generator) + 0.1
    scaled = _armor.normalised(weight)[0]
    fitted = _armor.fit(scaled, energy, 32, 12)
    assert fitted.losses == sorted(fitted.losses, reverse=True)
    assert fitted.losses[-1] < 0.6 * fitted.losses[0]
    core = _armor.whole(fitted.parts.core)
    assert bool(((core != 0).view(64, -1, 4).sum(-1) == 2).all())


def test_without_rounds_it_is_nowag_p() -> None:
    weight, energy = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)), torch.rand(64) + 0.1
    scaled, rows, columns = _armor.normalised(weight)
    factors = armor.folded(_armor.fit(scaled, energy, 16, 0).parts, rows, columns)
    mask = pattern_mask(scaled.square() * energy, Pattern(2, 4))
    assert torch.equal(factors.mask, mask)
    torch.testing.assert_close(factors.dense(), weight.masked_fill(~mask, 0))  # norms folded in: exact but for rounding


def test_the_best_iterate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that makes things worse ends the descent and is not what comes back."""
    weight, energy = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)), torch.ones(32)
    scaled = _armor.normalised(weight)[0]
    good, rounds = _armor.fit(scaled, energy, 16, 2), []
    right = _armor.core_step

    def failing(blocks: torch.Tensor, h: torch.Tensor, parts: Parts) -> torch.Tensor:
        rounds.append(parts)
        return right(blocks, h, parts) * (1 if len(rounds) < 3 else 2)

    monkeypatch.setattr(_armor, "core_step", failing)
    fitted = _armor.fit(scaled, energy, 16, 8)
    assert len(fitted.losses) == 4
    assert fitted.losses[3] > fitted.losses[2]
    assert all(torch.equal(*pair) for pair in zip(fitted.parts, good.parts, strict=True))


def solve(weight: torch.Tensor, inputs: torch.Tensor, **options: Any) -> Any:
    method = armor.Method(armor.Options(**options))
    statistics = method.watch(weight.shape[1], torch.device("cpu"))
    if len(inputs):
        statistics.add(inputs)
    assert isinstance(statistics, Columns)
    return method.solve([weight.clone()], statistics, [Target("w", torch.float32)])[0]


def test_dead_inputs_weigh_as_others_and_zero_weights_stay() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, inputs = torch.randn(16, 32, generator=generator), torch.randn(64, 32, generator=generator)
    inputs[:, 3], weight[5], weight[:, 8:12] = 0, 0, 0
    solution = solve(weight, inputs, block_size=8)
    assert torch.isfinite(solution.dense()).all()
    assert not solution.dense()[5].any()
    assert solution.facts["proxy_loss"] < solution.facts["proxy_loss_at_first"]
    assert bool((solution.factors.mask.view(16, -1, 4).sum(-1) == 2).all())
    assert solve(weight, inputs[:0]).fallbacks == ["saw no tokens, pruned by the weights alone"]


def test_blocks_divide_every_weight() -> None:
    method = armor.Method(armor.Options(block_size=128))
    sides = {(256, 768): 128, (96, 64): 32, (36, 12): 12, (4, 400): 4}
    assert {shape: method.factored(shape) for shape in sides} == sides
    assert method.refusal((6, 8)) == "6 x 8: blocks need both sides to be multiples of 4"
    assert method.refusal((8, 12)) is None


def test_factors_take_what_the_formula_says() -> None:
    """b (R + C) / (R C) of the dense weight for A and B, 9/16 of it for the core in 16 bits."""
    rows, columns, size = 256, 768, 64
    made = sum(spec.nbytes for spec in factor_specs("w", (rows, columns), size, torch.bfloat16))
    assert made == 2 * rows * columns * (9 / 16 + size * (rows + columns) / (rows * columns))


# As a folder.


@pytest.fixture(scope="module")
def factored(compress: Commands, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLP of the embedded model's first block, factored; not to be changed."""
    folder = tmp_path_factory.mktemp("armor") / "out"
    run = compress("prune", tiny_llama, "--method", "armor", *FEW, *TINY, "-o", folder, "--json")
    assert run.code == 0, run.err
    size = run.json["size"]
    changed = sum(row["bytes_out"] for row in run.json["report"])
    assert size["factored_bytes"] == size["bytes_out"] - changed + size["factors_bytes"] < size["bytes_out"]
    assert run.json["checks"]["factors"]["kept"] * 2 == size["factored_weights"]
    return folder


def test_the_loader_gives_the_logits_of_the_product(factored: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(48).view(2, 24)
    plain = AutoModelForCausalLM.from_pretrained(factored, dtype=torch.float32)
    model = load_factored(factored, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    assert len(layers) == 3
    with torch.no_grad():
        # the dense product is rounded to bfloat16 once more than the factors
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=2e-2, atol=5e-2)
        found = FactorFile.of(factored)
        assert found is not None
        layer, x = layers[0], torch.randn(5, layers[0].in_features)
        torch.testing.assert_close(layer(x), x @ found.read(found.names[0]).dense().T, rtol=1e-4, atol=1e-4)


def test_weights_and_factors_are_held_against_each_other(factored: Path, compress: Commands, tmp_path: Path) -> None:
    run = compress("verify", factored, "--json")
    assert run.code == 0, run.err
    assert "3 tensors are their product, their cores keep 50.0000%" in json.dumps(run.json)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in factored.iterdir():
        if path.name != FACTORS:
            (broken / path.name).symlink_to(path)
    tensors = load_file(factored / FACTORS)
    name = next(name for name in tensors if name.endswith(".left"))
    save_file(tensors | {name: tensors[name] * 1.1}, broken / FACTORS)
    run = compress("verify", broken)
    assert run.code != 0
    assert "is not the product of its factors" in run.out + run.err


def test_factors_come_back_and_must_fit(tmp_path: Path) -> None:
    core = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
    mask = pattern_mask(core.abs(), Pattern(2, 4))
    made = Factors(torch.randn(2, 4, 4), core * mask, mask, torch.randn(4, 4, 4)).to(torch.bfloat16)
    save_file(made.tensors("w"), tmp_path / FACTORS)
    assert {spec.name: spec.shape for spec in factor_specs("w", (8, 16), 4, torch.bfloat16)} == {
        name: tuple(tensor.shape) for name, tensor in made.tensors("w").items()
    }
    found = FactorFile(tmp_path).read("w")
    assert all(torch.equal(getattr(found, part), getattr(made, part)) for part in ("left", "core", "mask", "right"))
    save_file(made.tensors("w") | {"w.mask": torch.zeros(8, 2, dtype=torch.uint8)}, tmp_path / FACTORS)
    with pytest.raises(CheckpointError, match="does not keep 2 of every 4"):
        FactorFile(tmp_path).read("w")
    save_file(made.tensors("w") | {"w.values": torch.zeros(8, 4)}, tmp_path / FACTORS)
    with pytest.raises(CheckpointError, match="do not fit each other"):
        FactorFile(tmp_path).read("w")


def test_layers_stored_the_other_way_round_are_factored(compress: Commands, tmp_path: Path) -> None:
    """GPT-2 stores [in, out]; factors are of [out, in]."""
    from transformers import AutoModelForCausalLM

    source = ARCHITECTURES["gpt2"].save(tmp_path / "source")
    words = ("prune", source, "--method", "armor", *FEW, "--block-size", "16", "--rounds", "2", "-o", tmp_path / "out")
    run = compress(*words)
    assert run.code == 0, run.err
    with pytest.raises(CheckpointError, match=r"has no factors\.safetensors"):
        load_factored(source)
    tokens = torch.arange(16)[None]
    plain, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32),
        load_factored(tmp_path / "out", dtype=torch.float32),
    )
    assert any(isinstance(module, FactoredLinear) for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-2, atol=1e-3)
    from weightworks.store.checkpoint import Checkpoint
    from weightworks.store.dense import DenseView

    assert check_factors(DenseView(Checkpoint.open(tmp_path / "out"))) is not None
