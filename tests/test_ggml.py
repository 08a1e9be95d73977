"""Blocks of ggml: our encoders against the decoder of the ``gguf`` package, their error, their corners."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from weightworks.store import floats
from weightworks.store.floats import FloatQuantized, FloatScheme
from weightworks.store.ggml import MXFP4, Q4_0, Q8_0, TYPES, exact
from weightworks.store.packing import IntScheme, Quantized

# Relative root of the mean squared error on N(0, 1): at most what the gguf package's encoders reach, of Q4_K less than Q4_1's.
ERRORS = {"F32": 0, "F16": 2.2e-4, "BF16": 1.8e-3, "Q8_0": 0.0054, "Q4_0": 0.0825, "Q4_K": 0.0715, "MXFP4": 0.1130}


def library(stored: torch.Tensor, name: str) -> torch.Tensor:
    decoded = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.array(decoded))


@pytest.mark.parametrize("name", sorted(TYPES))
def test_bytes_mean_to_the_library_what_they_mean_here(name: str) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    kind = TYPES[name]
    stored = kind.encode(weight)
    assert stored.shape == (64, kind.row_bytes(1024))
    assert stored.shape[1] == 1024 // kind.width * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    decoded = kind.decode(stored)
    assert torch.equal(decoded, library(stored, name))
    assert float((decoded - weight).norm() / weight.norm()) <= ERRORS[name]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "MXFP4"])
def test_no_worse_than_the_library(name: str) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 0.02
    theirs = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))
    own = TYPES[name].decode(TYPES[name].encode(weight))
    assert (own - weight).norm() <= (library(theirs, name) - weight).norm() * 1.0001


@pytest.mark.parametrize("name", sorted(TYPES))
def test_corners(name: str) -> None:
    """All zero, all alike, one that stands out, tiny and large ones: within the bound that exports are held to."""
    kind = TYPES[name]
    base = torch.randn(256, generator=torch.Generator().manual_seed(2))
    alone = torch.zeros(256)
    alone[37] = -3.0
    rows = [torch.zeros(256), torch.full((256,), 0.3), torch.full((256,), -0.3), alone, base * 1e-9, base.abs() + 5]
    rows += [base * min(kind.largest / 8, 1e30), -(base.abs())]
    weight = torch.stack(rows)
    decoded = kind.decode(kind.encode(weight))
    assert torch.equal(decoded[0], rows[0])
    top = weight.view(-1, kind.width).abs().amax(1, keepdim=True)
    assert bool(((decoded - weight).view(-1, kind.width).abs() <= kind.worst * top + kind.least).all())


def test_what_is_on_the_grid_stays() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (8, 8, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15  # the whole range of every sub-block is used
    steps = torch.randint(1, 64, (8, 8, 1), generator=generator)
    steps[:, 0], shift = 63, torch.randint(0, 64, (8, 8, 1), generator=generator)
    shift[:, 0] = 63
    weight = (codes * steps * 0.0078125 - shift * 0.03125).flatten(1)
    decoded = TYPES["Q4_K"].decode(TYPES["Q4_K"].encode(weight))
    assert float((decoded - weight).norm() / weight.norm()) < 0.03  # the search is no exhaustive one
    for kind in (MXFP4, Q8_0):
        once = kind.decode(kind.encode(weight))
        assert torch.equal(kind.decode(kind.encode(once)), once), kind.name


def quantized(bits: int, *, symmetric: bool, scale: torch.dtype, group: int = 64) -> Quantized:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (6, 128), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(6, 128 // group, generator=generator) + 0.1).to(scale)
    middle = torch.full((6, 128 // group), 1 << (bits - 1), dtype=torch.uint8)
    zero = middle if symmetric else torch.randint(0, 1 << bits, middle.shape, generator=generator, dtype=torch.uint8)
    return Quantized(IntScheme(bits, group, symmetric), codes, scales, zero)


def test_packed_integers_go_over_as_they_are() -> None:
    for bits in (2, 3, 4):
        weight = quantized(bits, symmetric=True, scale=torch.bfloat16)
        for kind in (Q4_0, Q8_0):
            stored = exact(weight, kind)
            assert stored is not None
            assert torch.equal(kind.decode(stored), weight.dequantize())
    uneven = quantized(4, symmetric=False, scale=torch.float16)
    assert exact(uneven, Q4_0) is None
    stored = exact(uneven, Q8_0)
    assert stored is not None
    assert torch.equal(Q8_0.decode(stored), uneven.dequantize())
    assert exact(quantized(4, symmetric=True, scale=torch.float32), Q4_0) is None  # scales of more digits than half has
    assert exact(quantized(4, symmetric=True, scale=torch.bfloat16, group=16), Q4_0) is None
    assert exact(quantized(8, symmetric=False, scale=torch.float16), Q8_0) is None


def test_packed_mxfp4_goes_over_as_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128) % 16
    scale = torch.tensor([[0, 1, 127, 251]] * 2, dtype=torch.uint8)
    weight = FloatQuantized(FloatScheme("E2M1", 32, "E8M0"), codes, scale)
    stored = exact(weight, MXFP4)
    assert stored is not None
    assert torch.equal(library(stored, "MXFP4"), weight.dequantize())
    assert torch.equal(floats.decoded_scale(scale)[0, 2:3], torch.ones(1))
    assert exact(FloatQuantized(FloatScheme("E2M1", 64, "E8M0"), codes, scale[:, :2]), MXFP4) is None
