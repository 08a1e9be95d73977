"""Methods that make adapters: their identities, degenerate cases, and the results of PEFT and mergekit.

merge.adapters.cat, merge.adapters.svd, merge.adapters.core, merge.adapters.lego, merge.adapters.extract.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge.adapters import _factors, cat, core, extract, lego, svd
from merge.adapters._factors import balanced, decomposed, generator, leading, rank_for, split
from weightworks.errors import UsageError
from weightworks.stage.adapting import Factors, Made, Updates

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 9, 7


def factors(rank: int, seed: int, rows: int = ROWS, columns: int = COLUMNS) -> Factors:
    draws = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rows, rank, generator=draws, dtype=torch.float64),
        torch.randn(rank, columns, generator=draws, dtype=torch.float64),
    )


def product(part: Factors) -> torch.Tensor:
    return part.b @ part.a


def updates(
    *parts: Factors, adapters: tuple[int, ...] | None = None, count: int | None = None, seed: int = 0
) -> Updates:
    return Updates("m", parts, adapters or tuple(range(len(parts))), count or len(parts), seed)


def combined(method: Any, *parts: Factors, seed: int = 0, **options: Any) -> torch.Tensor:
    made: Made = method.Method(method.Options(**options)).combine(updates(*parts, seed=seed))
    return product(made.factors)


def turned(part: Factors, seed: int = 3) -> Factors:
    """The same update, its directions mixed: B T and T^-1 A."""
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(part.rank, part.rank, generator=draws, dtype=torch.float64)
    return Factors(part.b @ mix, torch.linalg.solve(mix, part.a))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert float((a - b).norm()) <= tolerance * float(b.norm())


# Algebra.


def test_norms_and_distances_without_the_product() -> None:
    one, two = factors(2, 0), factors(3, 1)
    assert math.isclose(one.norm, float(product(one).norm()), rel_tol=1e-12)
    assert math.isclose(one.distance(two), float((product(one) - product(two)).norm()), rel_tol=1e-12)
    assert one.distance(turned(one)) < 1e-12 * one.norm
    close(product(split(*decomposed(two))), product(two))
    wide = factors(20, 2)  # a rank beyond both sides
    close(product(split(*decomposed(wide))), product(wide))
    assert len(decomposed(wide)[1]) == min(ROWS, COLUMNS)


def test_balanced_halves() -> None:
    part = factors(3, 0)
    part.b[:, 1] = 0
    even = balanced(part)
    close(product(even), product(part))
    assert torch.allclose(even.b.norm(dim=0), even.a.norm(dim=1))
    assert not even.a[1].any()


# Merges of adapters.


def test_cat_is_the_sum() -> None:
    one, two = factors(2, 0), factors(3, 1)
    made = cat.Method(cat.Options()).combine(updates(one, two))
    assert made.factors.rank == 5
    assert torch.equal(made.factors.b, torch.cat([one.b, two.b], 1))
    close(product(made.factors), product(one) + product(two))


def test_svd_is_the_best_approximation() -> None:
    one, two = factors(3, 0), factors(3, 1)
    total = product(one) + product(two)
    u, sigma, v = torch.linalg.svd(total, full_matrices=False)
    close(combined(svd, one, two, rank=2), u[:, :2] * sigma[:2] @ v[:2])
    close(combined(svd, one, two), u[:, :3] * sigma[:3] @ v[:3])
    close(combined(svd, turned(one), two), combined(svd, one, two))
    kept = combined(svd, one, two, energy=0.9)
    assert float((kept - total).norm() ** 2) <= 0.1 * float(total.norm() ** 2)
    assert rank_for(sigma, float(total.norm() ** 2), 0.9) == int(torch.linalg.matrix_rank(kept))
    close(combined(svd, one, two, energy=1.0), total)


def test_cores_hold_the_updates_exactly() -> None:
    one, two, method = factors(2, 0), factors(3, 1), core.Method(core.Options())
    cores = method.project(updates(one, two, adapters=(0, 2), count=3))
    assert cores.u.shape == (ROWS, 5)
    assert cores.v.shape == (5, COLUMNS)
    close(cores.u @ cores.cores[0] @ cores.v, product(one))
    close(cores.u @ cores.cores[2] @ cores.v, product(two))
    assert not cores.cores[1].any()
    made = method.restore(cores, cores.cores[0] + cores.cores[2])
    close(product(made.factors), product(one) + product(two))
    again = method.project(updates(turned(one), turned(two), adapters=(0, 2), count=3))
    close(again.cores[0], cores.cores[0], 1e-9)  # the split of an update into factors means nothing
    same = method.project(updates(one, one))
    assert same.cores[0].shape == (2, 2)  # nothing new in the second: no directions of rounding noise
    close(product(method.restore(cores, torch.zeros(5, 5, dtype=torch.float64)).factors) + 1, torch.ones(ROWS, COLUMNS))


# LoRA-LEGO: the degenerate cases that tell it is the sum, the adapter itself, and one thing whatever the gauge.


def test_lego_of_as_many_units_as_there_are_is_the_sum() -> None:
    one, two = factors(2, 0), factors(3, 1)
    close(combined(lego, one, two, rank=5, output_reweight=False), product(one) + product(two))


@pytest.mark.parametrize("canonical", [False, True])
def test_lego_of_an_adapter_with_itself_is_itself(canonical: bool) -> None:
    one = factors(4, 0)
    order = torch.tensor([2, 0, 3, 1])
    signs = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
    other = Factors(
        (one.b * signs)[:, order] * 5, (one.a * signs[:, None])[order] / 5
    )  # the same units, otherwise told
    close(combined(lego, one, other, rank=4, canonical=canonical), product(one))
    close(combined(lego, one, one, one, canonical=canonical), product(one))


def test_lego_depends_on_updates_alone_where_canonical() -> None:
    one, two = factors(3, 0), factors(3, 1)
    plain = combined(lego, one, two, canonical=True)
    close(combined(lego, turned(one), turned(two), canonical=True), plain, 1e-9)
    assert not torch.allclose(combined(lego, turned(one), two), combined(lego, one, two))


def test_lego_reweights() -> None:
    one, two = factors(4, 0), factors(4, 1)
    made = lego.Method(lego.Options(rank=2, output_reweight=False)).combine(updates(one, two)).factors
    bare = combined(lego, one, two, rank=2, output_reweight=False, parameter_reweight=False)
    assert float(bare.norm()) < made.norm  # means are shorter than what they are means of
    close(combined(lego, one, two, rank=2), math.sqrt(2) * product(made))
    a, _ = lego.units(Factors.stacked([one, two]))
    assert made.a.norm(dim=1).max() <= a.norm(dim=1).max() + 1e-12
    assert combined(lego, one, two, rank=3, seed=1).shape == (ROWS, COLUMNS)
    assert torch.equal(combined(lego, one, two, rank=3), combined(lego, one, two, rank=3))


def test_lego_of_nothing() -> None:
    empty = Factors(torch.zeros(ROWS, 2, dtype=torch.float64), factors(2, 0).a)
    assert not combined(lego, empty, empty).any()
    one = factors(2, 1)
    close(combined(lego, one, empty, rank=4, output_reweight=False), product(one))


def test_clusters_are_found() -> None:
    draws = torch.Generator().manual_seed(0)
    middle = torch.randn(5, 40, generator=draws, dtype=torch.float64) * 10
    labels = torch.arange(5).repeat(6)
    points = middle[labels] + torch.randn(30, 40, generator=draws, dtype=torch.float64)
    found = lego.clusters(points, 5, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(found, labels, strict=True)}) == 5
    twins = torch.ones(6, 3, dtype=torch.float64)
    assert sorted(set(lego.clusters(twins, 4, seed=0).tolist())) == [
        0,
        1,
        2,
        3,
    ]  # none empty, though all points are one


# Extraction.


@pytest.mark.parametrize("shape", [(40, 30), (1400, 900), (700, 2000)])
def test_an_update_of_low_rank_is_recovered(shape: tuple[int, int]) -> None:
    delta = product(factors(6, 0, *shape)).float()
    made = extract.Method(extract.Options(rank=6)).extract("m", delta, 0)
    assert float((product(made.factors) - delta.double()).norm()) < 1e-6 * float(delta.norm())


def test_sketches_are_as_good_as_a_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a spectrum that falls slowly, as those of fine-tunes do."""
    draws = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 600, generator=draws)).Q for n in (800, 600))
    sigma = torch.arange(1, 601).float() ** -0.5
    delta = u * sigma @ v.T
    quick = leading(delta, 16, None, generator(0, "m"))
    again = leading(delta, 16, None, generator(0, "m"))
    assert all(torch.equal(a, b) for a, b in zip(quick, again, strict=True))
    captured, best = float(quick[1].square().sum()), float(sigma[:16].square().sum())
    assert abs(captured / best - 1) < 2e-4
    sigmas = [leading(delta, None, energy, generator(0, "m"))[1] for energy in (0.3, 0.6, 0.99)]
    monkeypatch.setattr(_factors, "EXACT", 10_000)
    exact = [leading(delta, None, energy, generator(0, "m"))[1] for energy in (0.3, 0.6, 0.99)]
    assert [abs(len(a) - len(b)) <= 1 for a, b in zip(sigmas, exact, strict=True)] == [True] * 3
    assert len(leading(delta, 20, 0.99, generator(0, "m"))[1]) == 20


def test_the_residual_is_the_tail() -> None:
    delta = product(factors(20, 0, 60, 50)).float()
    sigma = torch.linalg.svdvals(delta.double())
    made = extract.Method(extract.Options(rank=4)).extract("m", delta, 0)
    tail = float(sigma[4:].square().sum().sqrt())
    assert math.isclose(float((product(made.factors) - delta.double()).norm()), tail, rel_tol=1e-5)
    held = extract.Method(extract.Options(energy=0.9)).extract("m", delta, 0).factors.rank
    share = sigma.square().cumsum(0) / sigma.square().sum()
    assert share[held - 1] >= 0.9 > share[held - 2]
    assert extract.Method(extract.Options()).extract("m", delta, 0).factors.rank == extract.RANK
    with pytest.raises(UsageError, match="energy"):
        extract.Options.parse({"energy": 1.5}, where="adapter.extract")


# What others made of the same inputs.


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    place = shared / "golden" / "lora" / "extract_and_peft"
    return load_file(place.with_suffix(".safetensors")), json.loads(place.with_suffix(".json").read_text())


def test_extraction_as_mergekit(golden: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    tensors, facts = golden
    runs = {name: run for name, run in facts["runs"].items() if name.startswith("extract.")}
    assert len(runs) == 6
    for name, run in runs.items():
        matrix = name.split(".")[1]
        delta = tensors[f"extract.{matrix}.finetuned"] - tensors[f"extract.{matrix}.base"]
        sigma = torch.linalg.svdvals(delta.double())
        torch.testing.assert_close(sigma[:5], tensors[f"extract.{matrix}.singular_values"][:5], rtol=1e-5, atol=0)
        made = extract.Method(extract.Options(rank=run["rank"])).extract("m", delta, 0)
        close(product(made.factors), tensors[f"{name}.product"].double(), 1e-5)


def test_sums_as_peft(golden: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    tensors, facts = golden
    seen = 0
    for name, run in facts["runs"].items():
        kind, layer = run.get("combination_type"), name.split(".")[-1]
        if kind not in ("cat", "svd"):
            continue
        parts = []
        for adapter, weight in zip(run["adapters"], run["weights"], strict=True):
            a, b = (tensors[f"peft.{adapter}.{layer}.lora_{half}"].double() for half in "AB")
            parts.append(Factors(b, a * (weight * facts["adapters"][adapter]["scaling"])))
        options = {"rank": run["options"]["svd_rank"]} if "svd_rank" in run["options"] else {}
        method = {"cat": cat, "svd": svd}[kind]
        made = method.Method(method.Options(**options)).combine(updates(*parts)).factors
        assert made.rank == run["rank"]
        close(product(made), tensors[f"{name}.delta"].double(), 1e-5)
        if kind == "cat":
            torch.testing.assert_close(made.a.float(), tensors[f"{name}.lora_A"], rtol=0, atol=1e-6)
            assert torch.equal(made.b.float(), tensors[f"{name}.lora_B"])
        seen += 1
    assert seen == 6
