"""Pruning against the authors' own code: SparseGPT (IST-DASLab/sparsegpt), Wanda and its magnitude (locuslab/wanda).

Their outputs lie in ``../shared/golden``. The references for unstructured masks prune one weight more than int(n S) in
each block of columns (SparseGPT) or layer (magnitude); ours prune what is asked for, so the tests ask for theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.columns import Columns
from compress.grids import Grid
from compress.hessian import Hessian, factor
from compress.masks import Pattern, pattern_mask, top_mask
from compress.prune import magnitude, wanda
from compress.prune.sparsegpt import Swept, remove
from compress.sweep import BLOCK
from weightworks.stage.protocols import Target
from weightworks.store.packing import IntScheme

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = ("a_96x128", "b_64x256")
SEQUENCES = 8  # the references count sequences, not tokens


class Golden:
    """The inputs of one problem, and what the references made of them."""

    def __init__(self, folder: Path, case: str) -> None:
        inputs = load_file(folder / "calib" / f"{case}.safetensors")
        self.weight, self.inputs = inputs["W"], inputs["X"].float()
        self.outputs, self.variants = {}, {}
        for kind in ("sparsegpt", "wanda"):
            self.outputs |= load_file(folder / kind / f"{case}.safetensors")
            self.variants |= json.loads((folder / kind / f"{case}.json").read_text())["variants"]

    def hessian(self) -> torch.Tensor:
        hessian = Hessian(self.weight.shape[1])
        hessian.add(self.inputs.flatten(0, 1))
        hessian.tokens = SEQUENCES
        return hessian.finish()

    def columns(self) -> Columns:
        columns = Columns(self.weight.shape[1])
        columns.add(self.inputs.flatten(0, 1))
        return columns

    def loss(self, weight: torch.Tensor) -> float:
        """tr(E H E') in float64, undamped."""
        error = weight.double() - self.weight.double()
        return float(((error @ self.hessian().double()) * error).sum())

    def swept(self, name: str) -> tuple[torch.Tensor, Swept]:
        """What our sweep makes of the weight, and the answer."""
        variant, weight, hessian = self.variants[name], self.weight.clone(), self.hessian()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0
        order = torch.arange(weight.shape[1])
        found = factor(hessian, order, damp_percent=variant["percdamp"])
        assert found.lower is not None
        asked: dict[str, Any] = {}
        if "m" in variant:
            asked["pattern"] = Pattern(variant["m"] - variant["n"], variant["m"])
        else:
            widths = [min(BLOCK, weight.shape[1] - start) for start in range(0, weight.shape[1], BLOCK)]
            asked["counts"] = [int(weight.shape[0] * width * variant["sparsity"]) + 1 for width in widths]
        if "bits" in variant:
            asked["grid"] = Grid(IntScheme(variant["bits"], -1, False), torch.float32)
        answer = remove(weight, found.lower, order, **asked)
        return weight if answer.quantized is None else answer.quantized.dequantize(), answer


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    if not (shared / "golden" / "sparsegpt").is_dir():
        pytest.skip("no ../shared/golden/sparsegpt")
    return Golden(shared / "golden", request.param)


@pytest.mark.parametrize("name", ["u50", "u70", "2of4", "4of8"])
def test_sparsegpt_is_the_references(golden: Golden, name: str) -> None:
    ours, answer = golden.swept(name)
    mask, expected = golden.outputs[f"{name}.mask"], torch.zeros_like(golden.weight)
    expected[mask] = golden.outputs[f"{name}.kept_values"]
    assert float((answer.mask == mask).float().mean()) >= 0.999
    same = answer.mask & mask
    assert float((ours - expected)[same].abs().max()) <= 1e-5 * float(expected.abs().max())
    assert golden.loss(ours) == pytest.approx(golden.variants[name]["proxy_loss"], rel=1e-4)


def test_sparsegpt_with_rounding_is_the_references(golden: Golden) -> None:
    names = [name for name, variant in golden.variants.items() if "bits" in variant]
    assert names
    for name in names:
        ours, answer = golden.swept(name)
        assert answer.quantized is not None
        assert float((answer.mask == golden.outputs[f"{name}.mask"]).float().mean()) >= 0.999
        assert float((answer.quantized.codes == golden.outputs[f"{name}.codes"]).float().mean()) >= 0.99
        assert torch.equal(answer.quantized.zero, golden.outputs[f"{name}.zero"].view_as(answer.quantized.zero))
        assert not ours[~answer.mask].any()
        assert golden.loss(ours) == pytest.approx(golden.variants[name]["proxy_loss"], rel=1e-3)


def test_norms_are_the_references(golden: Golden) -> None:
    ours = golden.columns().squares / SEQUENCES
    torch.testing.assert_close(ours.float(), golden.outputs["scaler_row"], rtol=1e-5, atol=0)


def test_wanda_is_the_references(golden: Golden) -> None:
    scores = wanda.Method(wanda.Options()).score(golden.weight, golden.columns())
    rows, columns = scores.shape
    for name in ("row50", "row70"):
        pruned = int(columns * golden.variants[f"wanda.{name}"]["S"])  # of each row
        ours = top_mask(scores, rows * (columns - pruned), "row")
        assert float((ours != golden.outputs[f"wanda.{name}.mask"]).float().mean()) <= 0.0005, name
    for name, pattern in (("2of4", Pattern(2, 4)), ("4of8", Pattern(4, 8))):
        differing = pattern_mask(scores, pattern) != golden.outputs[f"wanda.{name}.mask"]
        assert float(differing.float().mean()) <= 0.0005, name


def test_magnitude_is_the_references(golden: Golden) -> None:
    count = int(golden.weight.numel() * golden.variants["magnitude.layer50"]["S"]) + 1
    ours = top_mask(golden.weight.abs(), golden.weight.numel() - count)
    assert torch.equal(ours, golden.outputs["magnitude.layer50.mask"])
    solution = magnitude.Method(magnitude.Options(pattern="2:4")).apply(golden.weight, Target("w", torch.float32))
    assert solution.mask is not None
    assert torch.equal(solution.mask, golden.outputs["magnitude.2of4.mask"])
    assert torch.equal(solution.dense(), golden.weight.masked_fill(~solution.mask, 0))
