"""RegMean: closed forms, invariants, weights that are stored transposed, and statistics that do not belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merges import method, model

from merge.regmean import shrunk
from weightworks.errors import MethodError, UsageError
from weightworks.plan.merge import run_merge
from weightworks.stage.settings import Settings
from weightworks.testing.merge_contract import gathered, small_models
from weightworks.testing.merging import merged

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"off_diagonal": 1.0, "damping": 1e-9}
Side = dict[str, dict[str, torch.Tensor]]


def inputs(seed: int, columns: int, count: int = 100) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side(name: str, x: torch.Tensor, kind: str = "gram") -> Side:
    return {name: {kind: (x.T @ x / x.shape[0]).float()}}


def solved(models: list[dict[str, torch.Tensor]], statistics: list[Side], **options: Any) -> dict[str, torch.Tensor]:
    return merged(method("regmean", **options), models, side=statistics)


def test_it_is_the_least_squares_solution() -> None:
    """The gradient of sum_i ||W X_i - W_i X_i||^2 / n vanishes."""
    models = [model(seed) for seed in (1, 2, 3)]
    xs = [inputs(seed, 8) @ torch.diag(torch.linspace(0.1, seed, 8, dtype=torch.float64)) for seed in (1, 2, 3)]
    found = solved(models, [side("blk.up.weight", x) for x in xs], **EXACT)
    w = found["blk.up.weight"].double()
    grams = [x.T @ x / x.shape[0] for x in xs]
    slope = sum((w - each["blk.up.weight"].double()) @ gram for each, gram in zip(models, grams, strict=True))
    assert float(torch.as_tensor(slope).abs().max()) < 1e-5
    mean = sum(each["blk.up.weight"] for each in models) / 3
    assert float((found["blk.up.weight"] - mean).abs().max()) > 0.1
    torch.testing.assert_close(found["embed.weight"], sum(each["embed.weight"] for each in models) / 3)


def test_equal_matrices_give_the_mean() -> None:
    models, x = [model(seed) for seed in (1, 2, 3)], inputs(0, 8)
    found = solved(models, [side("blk.up.weight", x)] * 3)
    torch.testing.assert_close(
        found["blk.up.weight"].float(), sum(each["blk.up.weight"] for each in models) / 3, rtol=0, atol=1e-6
    )


def test_exact_recovery_where_models_agree_on_what_they_saw() -> None:
    """Model i equals W on the inputs it saw and is anything elsewhere: W comes back."""
    w = model(0)["blk.up.weight"]
    models, statistics = [], []
    for number, seen in enumerate((slice(0, 4), slice(4, 8))):
        own = w.clone()
        own[:, [k for k in range(8) if k not in range(seen.start, seen.stop)]] += 3.0 * (number + 1)
        x = torch.zeros(100, 8, dtype=torch.float64)
        x[:, seen] = inputs(number, 4)
        models.append({"blk.up.weight": own})
        statistics.append(side("blk.up.weight", x))
    found = solved(models, statistics, **EXACT)["blk.up.weight"]
    torch.testing.assert_close(found.float(), w, rtol=0, atol=1e-5)
    average = sum(each["blk.up.weight"] for each in models) / 2
    assert float((average - w).abs().max()) > 1


def test_a_single_model_is_itself_bit_for_bit() -> None:
    alone = model(1)
    found = solved([alone], [side("blk.up.weight", inputs(0, 8))])
    assert all(torch.equal(found[name].float(), value) for name, value in alone.items())


def test_weights_count_as_copies_of_a_model() -> None:
    models, xs = [model(1), model(2)], [inputs(1, 8), inputs(2, 8)]
    statistics = [side("blk.up.weight", x) for x in xs]
    found = solved(models, statistics, weights=[2.0, 1.0])
    expected = solved([models[0], *models], [statistics[0], *statistics])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_order_of_the_models_does_not_matter() -> None:
    models, xs = [model(seed) for seed in (1, 2, 3)], [inputs(seed, 8) for seed in (1, 2, 3)]
    statistics = [side("blk.up.weight", x) for x in xs]
    one, other = solved(models, statistics), solved(models[::-1], statistics[::-1])
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-6)


def test_an_input_nobody_used_gets_the_mean() -> None:
    """A column of zeros in every Gram matrix, and a layer that no token reached."""
    models = [model(1), model(2)]
    mean = (models[0]["blk.up.weight"] + models[1]["blk.up.weight"]) / 2
    xs = [inputs(1, 8), inputs(2, 8)]
    for x in xs:
        x[:, 3] = 0
    found = solved(models, [side("blk.up.weight", x) for x in xs])["blk.up.weight"].float()
    torch.testing.assert_close(found[:, 3], mean[:, 3], rtol=0, atol=1e-6)
    assert float((found[:, 4] - mean[:, 4]).abs().max()) > 1e-3
    dead = solved(models, [side("blk.up.weight", torch.zeros(1, 8))] * 2)["blk.up.weight"]
    torch.testing.assert_close(dead.float(), mean)


def test_weights_stored_by_inputs() -> None:
    """GPT-2's layers: the same numbers, transposed."""
    models, xs = [model(1), model(2)], [inputs(1, 8), inputs(2, 8)]
    expected = solved(models, [side("blk.up.weight", x) for x in xs])["blk.up.weight"]
    turned = [{"w": each["blk.up.weight"].T.contiguous()} for each in models]
    found = solved(turned, [side("w", x, "gram of rows") for x in xs])["w"]
    assert torch.equal(found, expected.T)


def test_shrinking_to_the_diagonal() -> None:
    gram = torch.tensor([[4.0, 2.0], [2.0, 0.0]])
    assert shrunk(gram, 0.5).tolist() == [[4.0, 1.0], [1.0, 0.0]]


def run(tmp_path: Path, statistics: list[Path], **options: Any) -> Any:
    _, *models = small_models()
    return run_merge(
        "regmean",
        [str(one) for one in models],
        {"check": "files", "statistics": [str(path) for path in statistics], **options},
        Settings(device="cpu"),  # type: ignore[call-arg]
        output_dir=tmp_path / "merged",
    )


def test_statistics_are_those_of_these_models_or_refused(tmp_path: Path) -> None:
    grams = gathered("gram")
    with pytest.raises(UsageError, match="a file of statistics for each model: 2 given, for 3 models"):
        run(tmp_path, grams[:2])
    with pytest.raises(MethodError, match=r"was made of model1, and is given for .*model0") as caught:
        run(tmp_path, [grams[1], grams[0], grams[2]])
    assert str(caught.value).count("was made of") == 2
    assert "compress stats" in caught.value.hint
    with pytest.raises(MethodError, match="is of kind fisher, gram is wanted"):
        run(tmp_path, [*grams[:2], gathered("fisher")[2]])
    with pytest.raises(UsageError, match="not of aligned ones"):
        run(tmp_path, grams, align=True)
    assert not list(tmp_path.iterdir())


def test_provenance_names_the_statistics_by_content(tmp_path: Path) -> None:
    """Where a file lies is not part of what is made of it."""
    import shutil

    outcome = run(tmp_path, gathered("gram"))
    identity = outcome.provenance["identity"]
    assert len(identity["input"]["statistics"]) == 3
    assert "statistics" not in identity["options"]
    elsewhere = [Path(shutil.copy(path, tmp_path / path.name)) for path in gathered("gram")]
    assert run(tmp_path, elsewhere).cached
