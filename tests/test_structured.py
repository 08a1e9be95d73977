"""Structured pruning: worth of units, widths, ties, groups of heads, and least squares in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from test_reduce import SETTINGS, loaded, reduce

from compress.columns import Columns
from compress.hessian import Hessian
from compress.prune._taylor import Gradients
from compress.prune.structured import Method, Options, importance, least_squares, rounded, strongest
from weightworks.engine.narrowing import dealt
from weightworks.errors import UsageError
from weightworks.stage.reducing import Part
from weightworks.stream.calibration import load_windows
from weightworks.stream.passes import window_losses
from weightworks.stream.symmetry import GROUP, HEAD, Shape

pytestmark = pytest.mark.usefixtures("one_thread")


def channels(count: int, kept: int) -> Part:
    return Part(0, "mlp", "channels", count, 1, 1, kept, 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("count", "share", "width", "multiple", "left"),
    [
        (768, 0.25, 1, 64, 576),
        (768, 0.2, 1, 64, 640),  # 614 is nearer to 640 than to 576
        (11008, 0.25, 1, 128, 8320),  # 8256 is as near to 8192: the wider
        (96, 0.9, 1, 64, 64),  # never less than one multiple
        (40, 0.5, 1, 64, 40),  # nor more than there is
        (8, 0.25, 128, 64, 6),  # groups of heads are wide enough
        (8, 0.25, 80, 64, 8),  # 4 groups of 80 are the first multiple of 64
        (8, 0.4, 80, 64, 4),
        (4, 0.5, 16, 1, 2),
    ],
)
def test_widths_are_the_nearest_multiples(count: int, share: float, width: int, multiple: int, left: int) -> None:
    assert rounded(count, share, width, multiple) == left


def test_worth_is_the_mean_of_wandas_scores() -> None:
    weight, inputs = noise(5, 8), noise(64, 8, seed=1) * torch.arange(1, 9)
    columns = Columns(8)
    columns.add(inputs)
    expected = torch.stack([weight[:, j].abs().mean() * inputs[:, j].square().mean().sqrt() for j in range(8)])
    torch.testing.assert_close(importance(weight, columns.norms()), expected)


def test_the_strongest_stay_in_order_and_of_equals_the_first_go() -> None:
    worth = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0])[:, None]
    assert strongest(worth, channels(5, 3)).flatten().tolist() == [0, 2, 4]
    assert strongest(torch.ones(6, 1), channels(6, 2)).flatten().tolist() == [4, 5]


def test_heads_go_with_their_group_or_from_every_group() -> None:
    """Three groups of two heads, two inputs each; head worths 1 2 | 9 0 | 3 4."""
    worth = torch.tensor([[1.0, 2.0], [9.0, 0.0], [3.0, 4.0]])
    whole = strongest(worth, Part(0, "attention", "heads", 3, 2, 2, 2, 2))
    assert whole.tolist() == [[2, 3], [4, 5]]
    each = strongest(worth, Part(0, "attention", "heads", 3, 2, 2, 3, 1))
    assert each.tolist() == [[1], [2], [5]]


def test_repair_is_the_least_squares_solution() -> None:
    weight, inputs = noise(6, 12), noise(200, 12, seed=1) @ noise(12, 12, seed=2)
    hessian, kept = Hessian(12, torch.device("cpu")), torch.tensor([0, 3, 4, 7, 9, 11])
    hessian.add(inputs)
    found = least_squares(weight, hessian.finish(), kept, damp_percent=1e-7)
    expected = torch.linalg.lstsq(inputs[:, kept].double(), (inputs @ weight.T).double()).solution.T
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_without_correlation_there_is_nothing_to_repair() -> None:
    weight, kept = noise(4, 6), torch.tensor([1, 2, 5])
    found = least_squares(weight, torch.diag(torch.arange(1.0, 7.0)), kept, damp_percent=0.01)
    torch.testing.assert_close(found, weight[:, kept])


def choice(repair: str) -> Any:
    method = Method(Options.parse({"sparsity": 0.5, "repair": repair}, where="prune.structured"))
    statistics = method.watch(16, torch.device("cpu"))
    statistics.add(noise(300, 16, seed=3) @ (torch.eye(16) + 0.5 * noise(16, 16, seed=4)))
    return method.choose(channels(16, 8), noise(8, 16, seed=5), statistics, None)


def test_a_repaired_part_chooses_alike_and_errs_less() -> None:
    plain, repaired = choice("none"), choice("least-squares")
    assert torch.equal(plain.heads, repaired.heads)
    assert plain.weight is None
    inputs = noise(300, 16, seed=3) @ (torch.eye(16) + 0.5 * noise(16, 16, seed=4))
    weight, kept = noise(8, 16, seed=5), plain.heads.flatten()
    whole = inputs @ weight.T
    errors = [
        float((inputs[:, kept] @ one.T - whole).square().sum() / whole.square().sum())
        for one in (weight[:, kept], repaired.weight)
    ]
    assert errors[1] < 0.8 * errors[0]
    assert repaired.facts["relative_error"] == pytest.approx(errors[1], rel=1e-3)


def test_an_expert_without_tokens_is_chosen_by_its_weights_and_said_so() -> None:
    method = Method(Options(sparsity=0.5, repair="least-squares"))
    weight = noise(8, 16)
    found = method.choose(channels(16, 8), weight, method.watch(16, torch.device("cpu")), None)
    assert found.fallbacks == ["saw no tokens, chosen by the weights alone"]
    assert found.heads.flatten().tolist() == weight.abs().mean(0).topk(8).indices.sort().values.tolist()


def test_asking_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="sparsity and head_sparsity are both 0: nothing would be removed"):
        Options.parse({"sparsity": 0.0}, where="prune.structured")


def test_taylor_is_of_the_mean_gradient_and_the_mean_of_squares() -> None:
    weight, gradients = noise(3, 4), noise(5, 3, 4, seed=1)
    seen = Gradients(torch.device("cpu"))
    for gradient in gradients:
        seen.add(gradient)
    first, second = weight * gradients.mean(0), weight**2 * gradients.square().mean(0)
    torch.testing.assert_close(seen.worth(weight, "taylor"), first.abs())
    torch.testing.assert_close(seen.worth(weight, "taylor-second"), second)
    torch.testing.assert_close(seen.worth(weight, "taylor-mix"), (first - second / 2).abs())
    assert not Gradients(torch.device("cpu")).worth(weight, "taylor").any()


def test_what_a_group_shares_is_dealt_out_to_its_heads() -> None:
    """A head has two query rows, a group one key row."""
    rows = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4, 10, 20])
    assert dealt(((HEAD, 2), (GROUP, 1)), Shape(2, 2), rows).tolist() == [[7, 9], [16, 18]]


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_taylor_keeps_what_gradients_of_the_whole_model_say(repair: str, tmp_path: Path) -> None:
    source = ARCHITECTURES["llama"].save(tmp_path / "source")
    options = {"sparsity": 0.5, "head_sparsity": 0.5, "round_to": 8, "importance": "taylor", "repair": repair}
    outcome = reduce(source, tmp_path / "out", "structured", **options)
    assert outcome.provenance is not None
    assert outcome.fallbacks == []
    windows = load_windows(
        SETTINGS.dataset, source, num_samples=SETTINGS.num_samples, seq_len=SETTINGS.seq_len, seed=SETTINGS.seed
    )
    model, small = loaded(source), loaded(tmp_path / "out")
    losses = window_losses(model(windows.tokens, use_cache=False).logits, windows.tokens)
    losses.mean().backward()
    for block, left in zip(model.model.layers, small.model.layers, strict=True):
        worth = {name: (p * p.grad).abs() for name, p in block.named_parameters() if p.ndim == 2}
        mlp = (
            worth["mlp.gate_proj.weight"].sum(1)
            + worth["mlp.up_proj.weight"].sum(1)
            + worth["mlp.down_proj.weight"].sum(0)
        )
        kept = mlp.topk(48).indices.sort().values
        assert torch.equal(left.mlp.up_proj.weight, block.mlp.up_proj.weight[kept])
        attention = [worth[f"self_attn.{name}_proj.weight"].sum(1).view(2, -1).sum(1) for name in "qkv"]
        attention.append(worth["self_attn.o_proj.weight"].sum(0).view(2, -1).sum(1))
        group = int(torch.stack(attention).sum(0).argmax())
        assert torch.equal(left.self_attn.k_proj.weight, block.self_attn.k_proj.weight[16 * group :][:16])
        same = torch.equal(left.mlp.down_proj.weight, block.mlp.down_proj.weight[:, kept])
        assert same == (repair == "none")
