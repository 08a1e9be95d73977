"""Grids on normal numbers: relative squared errors known beforehand, each to 3 %."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from compress import gaussian
from compress.codebooks import LEVELS, BookGrid, BookScheme, levels
from compress.floatgrid import FloatGrid
from compress.grids import AnyGrid, Grid, grouped
from compress.quantize import gptq, higgs, rtn
from compress.schemes import HARDWARE
from weightworks.errors import UsageError
from weightworks.stage.protocols import Target
from weightworks.store.floats import FloatScheme, tensor_scale
from weightworks.store.packing import IntScheme

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (2048, 128, 64, 32)
ABSMAX = {  # by bits, for groups of SIZES
    2: (0.470, 0.303, 0.261, 0.223),
    3: (0.0910, 0.0564, 0.0485, 0.0412),
    4: (0.0198, 0.0123, 0.0106, 0.0090),
    8: (6.9e-5, 4.3e-5, 3.7e-5, 3.1e-5),
}
MINMAX = {
    2: (0.429, 0.253, 0.208, 0.165),
    3: (0.0815, 0.0464, 0.0380, 0.0299),
    4: (0.0177, 0.0101, 0.0083, 0.0065),
    8: (6.1e-5, 3.5e-5, 2.9e-5, 2.3e-5),
}
CLIPPED = {
    2: (0.149, 0.146, 0.143, 0.136),
    3: (0.0403, 0.0380, 0.0358, 0.0321),
    4: (0.0118, 0.0102, 0.0090, 0.0077),
}
LLOYD_MAX = {2: 0.1176, 3: 0.03456, 4: 0.00951}


@cache
def weights(rows: int = 256) -> torch.Tensor:
    return torch.randn(rows, 2048, generator=torch.Generator().manual_seed(0))


def error(grid: AnyGrid, rows: int = 256) -> float:
    """Relative, of rounding to nearest."""
    weight = weights(rows)
    groups = grouped(weight, grid.scheme.group_size)
    scale, zero = grid.fit(groups)
    made = grid.encoded(grid.codes(groups, scale, zero), scale, zero).dequantize()
    return float((made - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize(
    ("table", "symmetric", "clip", "rows"),
    [(ABSMAX, True, False, 256), (MINMAX, False, False, 256), (CLIPPED, True, True, 128)],
    ids=["absmax", "minmax", "clipped"],
)
def test_integers(table: dict[int, tuple[float, ...]], symmetric: bool, clip: bool, rows: int) -> None:
    for bits, wanted in table.items():
        seen = [error(Grid(IntScheme(bits, size, symmetric), torch.float32, clip=clip), rows) for size in SIZES]
        assert seen == pytest.approx(wanted, rel=0.03), bits


@pytest.mark.parametrize(
    ("book", "size", "wanted"), [("NF4", 64, 0.00846), ("NF4", 128, 0.00913), ("FP4", 64, 0.0112), ("FP4", 128, 0.0119)]
)
def test_books(book: str, size: int, wanted: float) -> None:
    assert error(BookGrid(BookScheme(book, size), torch.float32)) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("name", "wanted"), [("NVFP4A16", 0.00906), ("MXFP4A16", 0.0125)])
def test_hardware_formats(name: str, wanted: float) -> None:
    scheme = HARDWARE[name]
    assert isinstance(scheme, FloatScheme)
    whole = tensor_scale(weights().abs().max()) if scheme.scales == "E4M3" else None
    assert error(FloatGrid(scheme, torch.float32, whole)) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_and_higgs(bits: int) -> None:
    """The best scalar levels; rotated blocks of weights that are not normal reach them, and pairs do better."""
    x = weights()[:32].reshape(-1, 1)
    grid = gaussian.scalar(2**bits)
    made = grid[gaussian.closest(x, grid)]
    assert float((made - x).square().mean()) == pytest.approx(LLOYD_MAX[bits], rel=0.03)
    assert torch.allclose(grid, -grid.flip(0), atol=1e-5)
    skewed = torch.rand(64, 2048, generator=torch.Generator().manual_seed(1)).pow(4) - 0.2
    seen = [higgs.quantize(skewed, bits=bits, vector=vector, size=512) for vector in (1, 2)]
    errors = [float((one - skewed).square().sum() / skewed.square().sum()) for one in seen]
    assert errors[0] == pytest.approx(LLOYD_MAX[bits], rel=0.05) and errors[1] < 0.97 * errors[0]


def test_books_keep_zero_and_shift() -> None:
    for book in LEVELS:
        assert 0.0 in levels(book) and float(levels(book).abs().max()) == 1
    scale, _ = BookGrid(BookScheme("SHIFT4", 32), torch.float32).fit(grouped(weights(), 32))
    powers = torch.log2(scale)
    assert torch.equal(powers, powers.round())
    seen = error(BookGrid(BookScheme("SHIFT4", 64), torch.float32))
    assert seen == pytest.approx(0.0377, rel=0.03)  # measured: levels twice as large as the next are coarse far out


def test_clipping_never_costs() -> None:
    for book in LEVELS:
        plain, clipped = (error(BookGrid(BookScheme(book, 64), torch.float32, clip=clip), 32) for clip in (False, True))
        assert clipped <= plain


def test_schemes_without_container() -> None:
    """They are dense, of 4 bits, in groups of 64 unless told otherwise; error feedback works on them."""
    options = rtn.Options(scheme="NF4")
    assert (options.format, options.group_size, options.bits) == ("dense", 64, 4)
    for wrong in ({"format": "compressed-tensors"}, {"bits": 3}):
        with pytest.raises(UsageError, match="NF4"):
            rtn.Options.parse({"scheme": "NF4", **wrong}, where="quantize.rtn")
    weight = weights(32)[:, :128]
    inputs = torch.randn(512, 128, generator=torch.Generator().manual_seed(2)) @ (torch.eye(128) + 0.1)
    method = gptq.Method(gptq.Options(scheme="NF4"))
    statistics = method.watch(128, torch.device("cpu"))
    statistics.add(inputs)
    target = Target("layer.weight", torch.float32)
    fed = method.solve([weight.clone()], statistics, [target])[0].dense()
    plain = rtn.Method(options).apply(weight, target).dense()
    errors = [float((inputs @ (one - weight).T).square().sum()) for one in (fed, plain)]
    assert errors[0] < 0.8 * errors[1]
