"""OPCM: both released codes, the invariants of the recursion, and merges that are continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointMaker
from merges import golden_file, method, model
from merges import merge as merge_

import merge.opcm
from merge.opcm import projected, protected
from weightworks.errors import MethodError
from weightworks.plan.merge import run_merge
from weightworks.stage.settings import Settings
from weightworks.store.sources import file_digest
from weightworks.testing.merge_contract import small_models
from weightworks.testing.merging import merged

LINEAR = {"plain": ["emb*"]}


@pytest.mark.parametrize(("code", "diagonal"), [("fusion_bench", True), ("author_opcm", False)])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_released_codes(shared: Path, code: str, diagonal: bool, alpha: float) -> None:
    case = golden_file(shared, "opcm/four_tasks")
    base, tasks = case.of("base"), [case.of(f"task{number}") for number in range(4)]
    run = f"{code}_a{round(100 * alpha)}"
    for step in (1, 2, 3):
        expected = case.of(f"{run}.step{step}")
        if not expected:
            continue
        found: dict[str, object] = {}
        options = {"alpha": alpha, "diagonal": diagonal, **LINEAR}
        result = merged(method("opcm", **options), tasks[: step + 1], base, found=found)
        for name, value in expected.items():
            assert torch.allclose(result[name], value, atol=1e-6), (step, name)
        assert found["lambda"] == pytest.approx(case.facts["runs"][run]["lambda_t"][step], rel=1e-4)


def test_what_is_added_is_orthogonal_and_norms_are_kept() -> None:
    base = model(0)
    tasks = [model(number, like=base, scale=0.1) for number in (1, 2, 3)]
    state: dict[str, torch.Tensor] = {}
    result = merged(method("opcm"), tasks, base, state=state)
    norms = [sum(float((task[name] - base[name]).square().sum()) for name in base) ** 0.5 for task in tasks]
    moved = sum(float((result[name] - base[name]).square().sum()) for name in base) ** 0.5
    assert moved == pytest.approx(sum(norms) / 3, rel=1e-5)
    earlier, delta = (
        tasks[0]["blk.up.weight"] - base["blk.up.weight"],
        tasks[1]["blk.up.weight"] - base["blk.up.weight"],
    )
    for alpha in (0.0, 0.5, 1.0):
        left = projected(delta, earlier, alpha=alpha, diagonal=True)
        assert abs(float((left * earlier).sum())) < 1e-5
    assert torch.allclose(projected(earlier, earlier, alpha=0.5, diagonal=True), torch.zeros_like(earlier), atol=1e-6)


def test_order_matters() -> None:
    base = model(0)
    tasks = [model(number, like=base, scale=0.1) for number in (1, 2, 3)]
    one, other = merge_("opcm", tasks, base), merge_("opcm", tasks[::-1], base)
    assert not torch.allclose(one["blk.up.weight"], other["blk.up.weight"], atol=1e-5)


def test_share_of_singular_values() -> None:
    """The index is that of the first sum beyond the share; all are protected at 1, none at 0 but by the diagonal."""
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    assert [protected(sigma, alpha) for alpha in (0.0, 0.3, 0.5, 0.7, 0.95, 1.0)] == [0, 0, 1, 2, 3, 4]
    assert protected(torch.zeros(3), 0.5) == 0


def test_the_full_decomposition_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    merged_, delta = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    u, sigma, vt = torch.linalg.svd(merged_)
    p = u.T @ delta @ vt.T
    p[torch.arange(5), torch.arange(5)] = 0
    rank = protected(sigma, 0.5)
    p[:rank, :rank] = 0
    assert torch.allclose(projected(delta, merged_, alpha=0.5, diagonal=True), u @ p @ vt)


def run(tmp_path: Path, name: str, models: list[Path], earlier: Path | None = None) -> Path:
    settings = Settings(device="cpu")  # type: ignore[call-arg]
    before = None if earlier is None else str(earlier)
    words = [str(one) for one in models]
    base = str(small_models()[0])
    target = tmp_path / name
    run_merge("opcm", words, {"check": "files"}, settings, base=base, earlier=before, output_dir=target)
    return target


def test_a_later_model_is_added_without_the_earlier_ones(tmp_path: Path) -> None:
    _, *models = small_models()
    whole = run(tmp_path, "whole", models)
    first = run(tmp_path, "first", models[:2])
    added = run(tmp_path, "added", models[2:], earlier=first)
    for name in ("model.safetensors", "merge_state.safetensors"):
        assert file_digest(added / name) == file_digest(whole / name)


def refused(tmp_path: Path, first: Path, **given: Any) -> str:
    """What is said when ``first`` is continued in another way than it was begun."""
    _, *models = small_models()
    options = {"check": "files", **given.pop("options", {})}
    base = given.pop("base", str(small_models()[0]))
    with pytest.raises(MethodError) as caught:
        run_merge(
            given.pop("name", "opcm"),
            [str(models[2])],
            options,
            Settings(device="cpu"),  # type: ignore[call-arg]
            base=base,
            earlier=str(first),
            output_dir=tmp_path / "refused",
            dry_run=True,
        )
    return str(caught.value)


def test_a_merge_is_continued_only_as_it_was_begun(tmp_path: Path) -> None:
    base, *models = small_models()
    first = run(tmp_path, "first", models[:2])
    assert "alpha is 0.5 there, 0.8 here" in refused(tmp_path, first, options={"alpha": 0.8})
    assert "its base is another one" in refused(tmp_path, first, base=str(models[0]))
    assert "no provenance.json: this is no merge" in refused(tmp_path, base)
    soup = tmp_path / "soup"
    run_merge("soup", [str(models[0])], {"check": "files"}, Settings(device="cpu"), output_dir=soup)  # type: ignore[call-arg]
    assert "no merge_state.safetensors" in refused(tmp_path, soup)


def test_directions_of_no_length_are_left_alone() -> None:
    """A merge of low rank: which vectors complete its decomposition is arbitrary, and must not matter."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(12, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    delta = torch.randn(12, 8, generator=generator)
    found = projected(delta, low, alpha=0.0, diagonal=True)
    u, _, vt = torch.linalg.svd(low.double(), full_matrices=False)
    expected = delta.double()
    for k in range(2):
        expected -= (u[:, k] @ delta.double() @ vt[k]) * torch.outer(u[:, k], vt[k])
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.equal(projected(delta, torch.zeros(12, 8), alpha=0.5, diagonal=True), delta)


def test_one_scale_needs_every_tensor_of_every_model(make_checkpoint: CheckpointMaker) -> None:
    both, one = {"a": torch.ones(4, 4), "b": torch.ones(4, 4)}, {"a": torch.ones(4, 4)}
    models = [str(make_checkpoint(both, name="one")), str(make_checkpoint(one, name="two"))]
    base = str(make_checkpoint(both, name="base"))
    with pytest.raises(MethodError, match=r"b: not in .*two; merge.opcm has one scale for the whole model"):
        run_merge("opcm", models, {"on_missing": "skip-model"}, Settings(), base=base, dry_run=True)  # type: ignore[call-arg]


def test_it_is_the_method_of_the_shelf() -> None:
    assert isinstance(method("opcm"), merge.opcm.Method)
