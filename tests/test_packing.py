"""Packing codes into words: against Python integers, published golden words and the golden compressed-tensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointMaker
from safetensors.torch import load_file

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.formats import FORMATS
from weightworks.store.packing import (
    IntScheme,
    Quantized,
    pack_columns,
    pack_rows,
    packed_width,
    unpack_columns,
    unpack_rows,
)

BITS = range(2, 9)
SHAPES = [(1, 1), (3, 5), (5, 45), (2, 31), (2, 32), (2, 33), (7, 97), (1, 256), (3, 0), (0, 3)]
# Words of the codes 0, 1, 2, ... modulo 2**bits, 32 of them along the inputs: ../shared/methods/quantization.md, 1.1.
GOLDEN = {
    2: "e4e4e4e4 e4e4e4e4",
    3: "88fac688 c688fac6 fac688fa",
    4: "76543210 fedcba98 76543210 fedcba98",
    8: "03020100 07060504 0b0a0908 0f0e0d0c 13121110 17161514 1b1a1918 1f1e1d1c",
}


def random_codes(bits: int, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * bits + shape[0] + shape[1])
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def words_of(row: list[int], bits: int) -> list[int]:
    """The row's bit stream as one Python integer, cut into signed 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def signed(text: str) -> list[int]:
    return [int.from_bytes(bytes.fromhex(word), "big", signed=True) for word in text.split()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_one_little_endian_bit_stream(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(bits, shape)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert tuple(words.shape) == (shape[0], packed_width(shape[1], bits))
    assert words.tolist() == [words_of(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_unpacking_is_the_inverse(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(bits, shape)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, shape[1]), codes)
    assert torch.equal(unpack_columns(pack_columns(codes, bits), bits, shape[0]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_columns_are_rows_turned(bits: int) -> None:
    codes = random_codes(bits, (45, 6))
    words = pack_columns(codes, bits)
    assert tuple(words.shape) == (packed_width(45, bits), 6) and words.is_contiguous()
    assert words.T.tolist() == [words_of(column, bits) for column in codes.T.tolist()]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", ["lowest", "highest"])
def test_extreme_codes_do_not_touch_their_neighbours(bits: int, value: str) -> None:
    codes = torch.full((2, 67), 0 if value == "lowest" else (1 << bits) - 1, dtype=torch.uint8)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 67), codes)
    codes[:, ::2] = (1 << bits) - 1 - codes[:, ::2]
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 67), codes)


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits: int) -> None:
    codes = (torch.arange(32) % (1 << bits)).to(torch.uint8).unsqueeze(0)
    words = torch.tensor([signed(GOLDEN[bits])], dtype=torch.int32)
    assert torch.equal(pack_rows(codes, bits), words)
    assert torch.equal(unpack_rows(words, bits, 32), codes)
    assert torch.equal(pack_columns(codes.T, bits), words.T)


def test_golden_zero_points() -> None:
    zero = (torch.arange(-8, 0) + 8).to(torch.uint8).unsqueeze(1)  # signed -8 .. -1 over 8 output rows
    weight = Quantized(IntScheme(4, 32, False), torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), zero)
    assert FORMATS["compressed-tensors"].tensors("a", weight)["a.weight_zero_point"].tolist() == [signed("76543210")]


def test_dequantize_follows_the_formula_word_for_word() -> None:
    codes, order = random_codes(4, (3, 8)), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.int32)
    scale, zero = torch.tensor([[0.5, 2.0], [1.0, 3.0], [0.25, 8.0]]), random_codes(4, (3, 2))
    for index in (None, order):
        group = [i // 4 for i in range(8)] if index is None else index.tolist()
        expected = [
            [float(scale[o, group[i]]) * (int(codes[o, i]) - int(zero[o, group[i]])) for i in range(8)]
            for o in range(3)
        ]
        weight = Quantized(IntScheme(4, 4, False, index is not None), codes, scale, zero, index)
        assert weight.dequantize().tolist() == expected


def test_scheme() -> None:
    assert IntScheme(4, 32, True).groups(128) == 4
    assert IntScheme(4, -1, True).groups(128) == 1
    assert [IntScheme(bits, -1, True).midpoint for bits in (2, 3, 4, 8)] == [2, 4, 8, 128]


# Golden files of compressed-tensors 0.20.0


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = shared / "golden" / "compressed_tensors"
    return load_file(folder / "packing.safetensors"), json.loads((folder / "packing.json").read_text())["runs"]


@pytest.mark.parametrize("shape", ["16x64", "5x45"])
@pytest.mark.parametrize("bits", BITS)
def test_golden_packing(golden: tuple[dict[str, torch.Tensor], dict[str, Any]], bits: int, shape: str) -> None:
    case = {key.removeprefix(f"int{bits}_{shape}."): value for key, value in golden[0].items()}
    codes = (case["codes"].int() + (1 << (bits - 1))).to(torch.uint8)
    zero = (case["zero_point"].int() + (1 << (bits - 1))).to(torch.uint8)
    assert torch.equal(pack_rows(codes, bits), case["packed"])
    assert torch.equal(unpack_rows(case["packed"], bits, codes.shape[1]), codes)
    assert torch.equal(pack_columns(zero, bits), case["zero_point_packed_dim0"])
    assert torch.equal(unpack_columns(case["zero_point_packed_dim0"], bits, zero.shape[0]), zero)


@pytest.mark.parametrize("run", ["int4_sym_g32", "int4_asym_g32", "int8_sym_g32", "int3_asym_g32"])
def test_golden_weights(
    golden: tuple[dict[str, torch.Tensor], dict[str, Any]], make_checkpoint: CheckpointMaker, run: str
) -> None:
    cases, runs = golden
    facts, weight, format_ = runs[f"w.{run}"], cases["w.weight"], FORMATS["compressed-tensors"]
    scheme = IntScheme(facts["num_bits"], facts["group_size"], facts["symmetric"])
    stored = {f"layer.{key}": cases[f"w.{run}.{key}"] for key in facts["keys"]}
    config = {"quantization_config": format_.config(scheme, ["lm_head"], {})}
    folder = make_checkpoint(stored, config=config)
    loaded = format_.load(Checkpoint.open(folder), "layer", scheme)
    decoded = DenseView(Checkpoint.open(folder)).read("layer.weight")
    assert torch.equal(decoded, loaded.dequantize())
    # The file says how far the library's own decoding is from the weight; and the codes are the nearest on the grid.
    assert (decoded - weight).abs().max().item() == facts["max_abs_dequant_error"]
    scale, zero = loaded.scale.repeat_interleave(32, dim=1), loaded.zero.repeat_interleave(32, dim=1)
    codes = torch.round(weight / scale + zero).clamp(0, (1 << scheme.bits) - 1).to(torch.uint8)
    assert (codes == loaded.codes).float().mean() > 0.999
    assert {name: tensor.tolist() for name, tensor in format_.tensors("layer", loaded).items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }
